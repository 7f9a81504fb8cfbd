"""The variational bound in bits per dimension: how well a model explains images, without another network."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.diffusion import VARIANCES, DiffusionModel, check_choice, evaluating
from modeling.images import to_model_range
from modeling.runtime import autocast
from modeling.seeding import Purpose, draw_integers, draw_normal
from modeling.system.progress import Bar

_SEED = 0  # fixed, not the run's: every model is measured with the same noise
_HALF_LEVEL = 1 / 255  # half the distance between two grey levels in [-1, 1]


@dataclass(frozen=True)
class BitsPerDim:
    """The bound of eq. 5 in bits per dimension, averaged over the images, and its parts.

    Attributes:
        total: rate + distortion.
        standard_error: of total, from the differences between images (and between the timesteps drawn for them); nan
            for one image.
        distortion: L_0, the bits to code x_0 given x_1.
        rate: the bits to code x_1: L_1 + ... + L_T.
        prior: L_T, the part of the rate that comes from x_T being not quite noise.
        terms: (K,) float64, the part of the rate that comes from each of the K equal parts of the timesteps 2..T.
        bounds: (K + 1,) integers: part k holds the timesteps bounds[k]..bounds[k + 1] - 1.
        num_images: N.
        num_timesteps: T of the process.
        timesteps_per_image: K, how many of 2..T were measured for each image.
        variance, clip_x0: of the reverse process; variance is "optimal" where it was given in numbers.
    """

    total: float
    standard_error: float
    distortion: float
    rate: float
    prior: float
    terms: Tensor
    bounds: Tensor
    num_images: int
    num_timesteps: int
    timesteps_per_image: int
    variance: str
    clip_x0: bool


def _mean(values: Tensor) -> Tensor:
    """The mean over each image's dimensions, (B,)."""
    return values.flatten(1).mean(1)


def discretized_log_likelihood(x_0: Tensor, mean: Tensor, std: float) -> Tensor:
    """log p(x_0 | x_1) of section 3.3: a Gaussian's mass at each of 256 grey levels, of which the outer two are open.

    Args:
        x_0: the levels, (...) in [-1, 1], multiples of 2/255 from -1.
        mean: (...).
        std: of the Gaussian.

    Returns:
        (...) float64, in nats; the 256 probabilities of any mean sum to 1, and none becomes 0. With levels
        rounded to float32 they sum to 1 within 4e-6.

    Note: the paper's code has tanh instead of the normal distribution function, and no probability below 1e-12.
    """
    x_0, mean = x_0.double(), mean.double()
    upper = torch.where(x_0 > 1 - _HALF_LEVEL, math.inf, (x_0 + _HALF_LEVEL - mean) / std)
    lower = torch.where(x_0 < -1 + _HALF_LEVEL, -math.inf, (x_0 - _HALF_LEVEL - mean) / std)
    # The difference of two tails, taken on the side where both are small: log(ndtr(high) - ndtr(low)).
    is_right = lower + upper > 0
    high, low = torch.where(is_right, -lower, upper), torch.where(is_right, -upper, lower)
    log_high = torch.special.log_ndtr(high)
    return log_high + torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high))


def _part_bounds(num_timesteps: int, timesteps_per_image: int) -> Tensor:
    """(K + 1,) bounds of K equal parts of the timesteps 2..T."""
    parts = [2 + k * (num_timesteps - 1) // max(timesteps_per_image, 1) for k in range(timesteps_per_image + 1)]
    return torch.tensor(parts)


def measure_errors(
    diffusion: DiffusionModel,
    images: Tensor,
    *,
    timesteps_per_image: int | None = None,
    decoder_variance: float | None = None,
    first_image: int = 0,
    batch_size: int = 250,
    precision: str = "fp32",
    bar: Bar = iter,
) -> Tensor:
    """Measures the network's errors at each timestep; every variant of the bound is a weighted sum of them.

    Args:
        diffusion: any eps model in a `DiffusionModel`; measured on its device, in eval mode.
        images: (N, C, H, W) uint8.
        timesteps_per_image: K, how many of the timesteps 2..T are measured for each image: one drawn from each of K
            equal parts, so that the estimate is unbiased; None for all T - 1.
        decoder_variance: sigma_1^2 of L_0; None for the posterior variance of timestep 2 (that of 1 is 0).
        first_image: number of the first image. Noise depends on this number, so images may be measured in parts.
        batch_size: images at a time; results depend on it by rounding only.
        precision: "fp32", or "bf16" or "fp16" for the network's matrix products.
        bar: wraps the K + 1 measurements of each batch, a list, for a progress bar.

    Returns:
        (N, 6 + 3 K) float64 on the CPU, a row for each image: L_T, log p(x_0 | x_1) with the predicted x_0 raw and
        clipped, then for timestep 1 and the K others: the timestep and the squared error of x_0 raw and clipped; in
        nats and per dimension.

    Raises:
        ValueError: for images that are not uint8 (N, C, H, W), or a timesteps_per_image outside 1..T - 1.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must be uint8 (N, C, H, W), N > 0, got {images.dtype} {tuple(images.shape)}")
    last = diffusion.num_timesteps
    columns = last - 1 if timesteps_per_image is None else timesteps_per_image
    if not (1 <= columns <= last - 1 or columns == last - 1 == 0):
        raise ValueError(f"timesteps_per_image must be in 1..{last - 1} (T - 1), got {timesteps_per_image}")
    if decoder_variance is None:
        decoder_variance = diffusion.posterior_variance(2) if last > 1 else diffusion.p_variance(1)
    bounds, device = [1, *_part_bounds(last, columns).tolist()], diffusion.betas.device
    rows = []
    with evaluating(diffusion), autocast(device, precision):
        for start in range(0, len(images), batch_size):
            x_0 = to_model_range(images[start : start + batch_size].to(device))
            index = torch.arange(len(x_0), device=device) + first_image + start
            decoder = torch.empty(0)  # (B, 2), of timestep 1
            means = [_mean(x_0.square())]  # on the device until the batch is done: no CPU-GPU sync
            for column in bar(list(range(columns + 1))):  # the first is timestep 1
                noise = draw_normal(_SEED, Purpose.EVALUATION, column, index, images.shape[1:])
                low, high = bounds[column], bounds[column + 1]
                timesteps = low + draw_integers(_SEED, Purpose.TIMESTEP, column - 1, index, high - low)
                eps, predicted = diffusion.predict(diffusion.q_sample(x_0, timesteps, noise), timesteps)
                errors = _mean((eps - noise).square()), _mean((predicted.clamp(-1, 1) - x_0).square())
                means += [timesteps.to(x_0.dtype), *errors]
                if column == 0:
                    decoder = _decoder(x_0, predicted, decoder_variance)
            rows.append(_row(diffusion, torch.stack(means, dim=1).cpu().double(), decoder))
    return torch.cat(rows)


def _decoder(x_0: Tensor, predicted: Tensor, variance: float) -> Tensor:
    """log p(x_0 | x_1) with the predicted x_0 raw and clipped, (B, 2) float64 on the CPU."""
    x_0, predicted = x_0.cpu(), predicted.cpu()  # CPU-GPU sync, once a batch
    means = predicted, predicted.clamp(-1, 1)
    return torch.stack([_mean(discretized_log_likelihood(x_0, mean, variance**0.5)) for mean in means], dim=1)


def _row(diffusion: DiffusionModel, means: Tensor, decoder: Tensor) -> Tensor:
    """The rows of `measure_errors`, from the mean square of x_0 and K + 1 times a timestep and its two errors."""
    abar = diffusion.schedules_float64["alphas_cumprod"]
    prior = 0.5 * (abar[-1].item() * means[:, :1] - abar[-1].item() - math.log1p(-abar[-1].item()))  # L_T
    timesteps, eps, clipped = means[:, 1::3], means[:, 2::3], means[:, 3::3]
    abar = abar[timesteps.long()]
    raw = eps * (1 - abar) / abar  # the error of x_0 by eq. 15, without its cancellation
    return torch.cat([prior, decoder, torch.stack([timesteps, raw, clipped], dim=2).flatten(1)], dim=1)


def _x_0_factors(diffusion: DiffusionModel) -> Tensor:
    """The square of x_0's factor in the mean of eq. 7 at timesteps 1..T, (T,) float64."""
    abar, beta = diffusion.schedules_float64["alphas_cumprod"], diffusion.schedules_float64["betas"]
    return abar[:-1] * (beta[1:] / (1 - abar[1:])) ** 2


def optimal_variances(diffusion: DiffusionModel, errors: Tensor, *, clip_x0: bool = False) -> Tensor:
    """sigma_t^2 at timesteps 1..T, (T,) float64, with which the bound of the images of `errors` is least.

    The posterior variance plus the mean squared error of the predicted mean: where the derivative of L_{t-1} by
    sigma_t^2 is 0 (for the best network: Bao et al. 2022, arXiv 2201.06503, theorem 1). In L_0 grey levels are taken
    for continuous. `errors` are of training images (`measure_errors` with all timesteps), so that test images stay new.
    """
    timesteps = range(1, diffusion.num_timesteps + 1)
    posterior = torch.tensor([diffusion.posterior_variance(t) for t in timesteps], dtype=torch.float64)
    return posterior + _x_0_factors(diffusion) * errors[:, 4 + clip_x0 :: 3].mean(0)


def summarise(
    diffusion: DiffusionModel, errors: Tensor, variance: str | Tensor = "large", *, clip_x0: bool = False
) -> BitsPerDim:
    """The bound of one reverse process from the rows of `measure_errors`; `variance` is a name, or all sigma_t^2."""
    last, columns = diffusion.num_timesteps, errors.shape[1] // 3 - 2
    constants, factors = torch.zeros(2, last + 1, dtype=torch.float64)
    for t in range(2, last + 1):
        sigma2 = variance[t - 1].item() if isinstance(variance, Tensor) else diffusion.p_variance(t, variance)
        posterior = diffusion.posterior_variance(t)
        constants[t] = 0.5 * (math.log(sigma2 / posterior) - 1 + posterior / sigma2)
        factors[t] = 1 / (2 * sigma2)
    factors[1:] *= _x_0_factors(diffusion)
    prior, distortion = errors[:, 0], -errors[:, 1 + clip_x0]
    timesteps, squares = errors[:, 6::3].long(), errors[:, 7 + clip_x0 :: 3]  # (N, K)
    bounds = _part_bounds(last, columns)
    nats = (constants[timesteps] + factors[timesteps] * squares) * bounds.diff()  # each timestep represents its part
    nats, prior, distortion = (found / math.log(2) for found in (nats, prior, distortion))  # in bits from here
    rate = nats.sum(1) + prior
    totals = distortion + rate
    return BitsPerDim(
        total=totals.mean().item(),
        standard_error=(totals.std() / len(totals) ** 0.5).item() if len(totals) > 1 else math.nan,
        distortion=distortion.mean().item(),
        rate=rate.mean().item(),
        prior=prior.mean().item(),
        terms=nats.mean(0),
        bounds=bounds,
        num_images=len(errors),
        num_timesteps=last,
        timesteps_per_image=columns,
        variance="optimal" if isinstance(variance, Tensor) else variance,
        clip_x0=clip_x0,
    )


def bits_per_dim(
    diffusion: DiffusionModel,
    images: Tensor,
    variance: str = "large",
    *,
    clip_x0: bool = False,
    timesteps_per_image: int | None = None,
    batch_size: int = 250,
    precision: str = "fp32",
) -> BitsPerDim:
    """The variational bound (eq. 5) on the negative log-likelihood of images, in bits per dimension.

    L_{t-1} compares the posterior (eq. 7) with p(x_{t-1} | x_t), L_0 is the discretized decoder of section 3.3 with the
    posterior variance of t = 2, L_T the prior. For several variants at once: `measure_errors`, `summarise`.

    Args:
        diffusion: any eps model in a `DiffusionModel`.
        images: (N, C, H, W) uint8.
        variance: "large" for sigma_t^2 = beta_t, "small" for the posterior variance.
        clip_x0: whether the predicted x_0 is clipped to [-1, 1], as the paper's code does.

    Other arguments are those of `measure_errors`.

    Raises:
        ValueError: for an unknown variance, and what `measure_errors` raises.
    """
    check_choice("variance", variance, VARIANCES)
    errors = measure_errors(
        diffusion, images, timesteps_per_image=timesteps_per_image, batch_size=batch_size, precision=precision
    )
    return summarise(diffusion, errors, variance, clip_x0=clip_x0)
