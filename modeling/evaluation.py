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
        variance, clip_x0: of the reverse process.
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
        first_image: number of the first image. Noise depends on this number, so images may be measured in parts.
        batch_size: images at a time; results depend on it by rounding only.
        precision: "fp32", or "bf16" or "fp16" for the network's matrix products.
        bar: wraps the K + 1 measurements of each batch, a list, for a progress bar.

    Returns:
        (N, 3 + 3 K) float64 on the CPU, a row for each image: L_T, log p(x_0 | x_1) with the predicted x_0 raw and
        clipped, then K times a timestep and the squared error of x_0 raw and clipped; in nats and per dimension.

    Raises:
        ValueError: for images that are not uint8 (N, C, H, W), or a timesteps_per_image outside 1..T - 1.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must be uint8 (N, C, H, W), N > 0, got {images.dtype} {tuple(images.shape)}")
    last = diffusion.num_timesteps
    columns = last - 1 if timesteps_per_image is None else timesteps_per_image
    if not (1 <= columns <= last - 1 or columns == last - 1 == 0):
        raise ValueError(f"timesteps_per_image must be in 1..{last - 1} (T - 1), got {timesteps_per_image}")
    bounds, device = _part_bounds(last, columns).tolist(), diffusion.betas.device
    rows = []
    with evaluating(diffusion), autocast(device, precision):
        for start in range(0, len(images), batch_size):
            x_0 = to_model_range(images[start : start + batch_size].to(device))
            index = torch.arange(len(x_0), device=device) + first_image + start
            decoder = torch.empty(0)  # (B, 2), of timestep 1
            means = [_mean(x_0.square())]  # on the device until the batch is done: no CPU-GPU sync
            for column in bar(list(range(-1, columns))):  # -1: the decoder
                noise = draw_normal(_SEED, Purpose.EVALUATION, column + 1, index, images.shape[1:])
                if column < 0:
                    decoder = _decoder(diffusion, x_0, noise)
                    continue
                low, high = bounds[column], bounds[column + 1]
                timesteps = low + draw_integers(_SEED, Purpose.TIMESTEP, column, index, high - low)
                means += [timesteps.to(x_0.dtype), *_errors(diffusion, x_0, timesteps, noise)]
            rows.append(_row(diffusion, torch.stack(means, dim=1).cpu().double(), decoder))
    return torch.cat(rows)


def _mean(values: Tensor) -> Tensor:
    """The mean over each image's dimensions, (B,)."""
    return values.flatten(1).mean(1)


def _decoder(diffusion: DiffusionModel, x_0: Tensor, noise: Tensor) -> Tensor:
    """log p(x_0 | x_1) with the predicted x_0 raw and clipped, (B, 2) float64 on the CPU."""
    timesteps = torch.ones(len(x_0), dtype=torch.int64, device=x_0.device)
    _, predicted = diffusion.predict(diffusion.q_sample(x_0, timesteps, noise), 1)
    # sigma_1^2: the posterior variance of t = 1 is 0, so that of t = 2 is used; with T = 1 only beta_1 is available.
    variance = diffusion.posterior_variance(2) if diffusion.num_timesteps > 1 else diffusion.p_variance(1)
    x_0, predicted = x_0.cpu(), predicted.cpu()  # CPU-GPU sync, once a batch
    means = predicted, predicted.clamp(-1, 1)
    return torch.stack([_mean(discretized_log_likelihood(x_0, mean, variance**0.5)) for mean in means], dim=1)


def _errors(diffusion: DiffusionModel, x_0: Tensor, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The squared errors of the predicted eps, and of the x_0 clipped, (B,) each."""
    eps, predicted = diffusion.predict(diffusion.q_sample(x_0, timesteps, noise), timesteps)
    return _mean((eps - noise).square()), _mean((predicted.clamp(-1, 1) - x_0).square())


def _row(diffusion: DiffusionModel, means: Tensor, decoder: Tensor) -> Tensor:
    """The rows of `measure_errors`, from the mean square of x_0 and K times a timestep and its two errors."""
    abar = diffusion.schedules_float64["alphas_cumprod"]
    prior = 0.5 * (abar[-1].item() * means[:, :1] - abar[-1].item() - math.log1p(-abar[-1].item()))  # L_T
    timesteps, eps, clipped = means[:, 1::3], means[:, 2::3], means[:, 3::3]
    abar = abar[timesteps.long()]
    raw = eps * (1 - abar) / abar  # the error of x_0 by eq. 15, without its cancellation
    return torch.cat([prior, decoder, torch.stack([timesteps, raw, clipped], dim=2).flatten(1)], dim=1)


def summarise(
    diffusion: DiffusionModel, errors: Tensor, variance: str = "large", *, clip_x0: bool = False
) -> BitsPerDim:
    """Computes the bound of one reverse process from the rows of `measure_errors`; arguments as for `bits_per_dim`."""
    tables, last, columns = diffusion.schedules_float64, diffusion.num_timesteps, errors.shape[1] // 3 - 1
    abar, beta = tables["alphas_cumprod"], tables["betas"]
    constants, factors = torch.zeros_like(abar), torch.zeros_like(abar)
    for t in range(2, last + 1):
        sigma2, posterior = diffusion.p_variance(t, variance), diffusion.posterior_variance(t)
        constants[t] = 0.5 * (math.log(sigma2 / posterior) - 1 + posterior / sigma2)
        factors[t] = abar[t - 1] * (beta[t] / (1 - abar[t])) ** 2 / (2 * sigma2)  # of x_0 in the mean: eq. 7
    prior, distortion = errors[:, 0], -errors[:, 1 + clip_x0]
    timesteps, squares = errors[:, 3::3].long(), errors[:, 4 + clip_x0 :: 3]  # (N, K)
    bounds = _part_bounds(last, columns)
    nats = (constants[timesteps] + factors[timesteps] * squares) * bounds.diff()  # each timestep represents its part
    rate = nats.sum(1) + prior
    totals = (distortion + rate) / math.log(2)
    return BitsPerDim(
        total=totals.mean().item(),
        standard_error=(totals.std() / len(totals) ** 0.5).item() if len(totals) > 1 else math.nan,
        distortion=distortion.mean().item() / math.log(2),
        rate=rate.mean().item() / math.log(2),
        prior=prior.mean().item() / math.log(2),
        terms=nats.mean(0) / math.log(2),
        bounds=bounds,
        num_images=len(errors),
        num_timesteps=last,
        timesteps_per_image=columns,
        variance=variance,
        clip_x0=clip_x0,
    )


def bits_per_dim(
    diffusion: DiffusionModel,
    images: Tensor,
    variance: str = "large",
    *,
    clip_x0: bool = False,
    timesteps_per_image: int | None = None,
    first_image: int = 0,
    batch_size: int = 250,
    precision: str = "fp32",
    bar: Bar = iter,
) -> BitsPerDim:
    """The variational bound (eq. 5) on the negative log-likelihood of images, in bits per dimension.

    L_{t-1} compares the posterior (eq. 7) with p(x_{t-1} | x_t), L_0 is the discretized decoder of section 3.3 with the
    posterior variance of t = 2, L_T the prior. To compute several variants at once, use `measure_errors`.

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
        diffusion, images, timesteps_per_image=timesteps_per_image, first_image=first_image, batch_size=batch_size,
        precision=precision, bar=bar,
    )  # fmt: skip
    return summarise(diffusion, errors, variance, clip_x0=clip_x0)
