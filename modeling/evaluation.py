"""The variational bound in bits per dimension: how well a model explains images, with no other network involved."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.diffusion import Bar, DiffusionModel, evaluating
from modeling.images import to_model_range
from modeling.runtime import autocast
from modeling.seeding import Purpose, draw_integers, draw_normal

_SEED = 0  # fixed, not the run's: every model is measured with the same noise
_HALF_LEVEL = 1 / 255  # half the distance of two grey levels in [-1, 1]


@dataclass(frozen=True)
class BitsPerDim:
    """The bound of eq. 5 in bits per dimension, averaged over the images, and its parts.

    Attributes:
        total: rate + distortion.
        standard_error: of total, from the differences between images (and between the timesteps drawn for them).
        distortion: L_0, the bits to code x_0 given x_1.
        rate: the bits to code x_1: L_1 + ... + L_{T-1}, and L_T, which is `prior`.
        prior: L_T, that x_T is not quite noise.
        terms: (K,) float64 on the CPU, the share of each of the K equal parts of the timesteps 2..T in the rate.
        num_images, num_timesteps: N; K, that were measured of 2..T for each image.
        variance, clip_x0: of the reverse process that was measured.
    """

    total: float
    standard_error: float
    distortion: float
    rate: float
    prior: float
    terms: Tensor
    num_images: int
    num_timesteps: int
    variance: str
    clip_x0: bool


def discretized_log_likelihood(x_0: Tensor, mean: Tensor, std: float) -> Tensor:
    """log p(x_0 | x_1) of section 3.3: a Gaussian's share in each of 256 grey levels, the outer two open to infinity.

    Args:
        x_0: the levels, (...) in [-1, 1], multiples of 2/255 from -1.
        mean: (...).
        std: of the Gaussian.

    Returns:
        (...) float64, in nats; the 256 probabilities of any mean sum to 1, and none becomes 0.
    """
    x_0, mean = x_0.double(), mean.double()
    upper = torch.where(x_0 > 1 - _HALF_LEVEL, math.inf, (x_0 + _HALF_LEVEL - mean) / std)
    lower = torch.where(x_0 < -1 + _HALF_LEVEL, -math.inf, (x_0 - _HALF_LEVEL - mean) / std)
    # The difference of two tails, taken on the side where both are small: log(ndtr(high) - ndtr(low)).
    is_right = lower + upper > 0
    high, low = torch.where(is_right, -lower, upper), torch.where(is_right, -upper, lower)
    log_high = torch.special.log_ndtr(high)
    return log_high + torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high))


class BoundErrors:
    """What the network gets wrong at each timestep, of which every variant of the bound is a weighted sum.

    Args:
        diffusion: any eps model in a `DiffusionModel`; measured on its device, in eval mode.
        images: (N, C, H, W) uint8.
        num_timesteps: K, how many of the timesteps 2..T are measured for each image: one drawn from each of K equal
            parts, by which the estimate stays unbiased; None for all T - 1.
        batch_size: images at a time; results depend on it by rounding only.
        precision: "fp32", or "bf16" for the network's matrix products.
        bar: wraps the K + 1 measurements of each batch, a list, for a progress bar.

    Raises:
        ValueError: for images that are not uint8 (N, C, H, W), or a num_timesteps outside 1..T - 1.
    """

    def __init__(
        self,
        diffusion: DiffusionModel,
        images: Tensor,
        *,
        num_timesteps: int | None = None,
        batch_size: int = 250,
        precision: str = "fp32",
        bar: Bar = iter,
    ):
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
            raise ValueError(f"images must be uint8 (N, C, H, W), N > 0, got {images.dtype} {tuple(images.shape)}")
        last = diffusion.num_timesteps
        columns = last - 1 if num_timesteps is None else num_timesteps
        if not (1 <= columns <= last - 1 or columns == last - 1 == 0):
            raise ValueError(f"num_timesteps must lie in 1..{last - 1} (T - 1), got {num_timesteps}")
        self.diffusion, self.num_images, self.num_timesteps = diffusion, len(images), columns
        # The K parts of 2..T: part k holds bounds[k]..bounds[k + 1] - 1.
        self.bounds = torch.tensor([2 + k * (last - 1) // columns for k in range(columns + 1)] if columns else [2])
        device = diffusion.betas.device
        starts = range(0, len(images), batch_size)
        prior, first, timesteps, errors = [], [], [], []
        with evaluating(diffusion), autocast(device, precision):
            for start in starts:
                index = torch.arange(start, min(start + batch_size, len(images)), device=device)
                x_0 = to_model_range(images[start : start + batch_size].to(device))
                prior.append(self._prior(x_0))
                drawn, measured = [], []
                for column in bar(list(range(-1, columns))):  # -1: timestep 1
                    noise = draw_normal(_SEED, Purpose.EVALUATION, column + 1, index, images.shape[1:])
                    if column < 0:
                        first.append(self._first(x_0, noise))
                        continue
                    low, high = self.bounds[column : column + 2].tolist()
                    at = low + draw_integers(_SEED, Purpose.TIMESTEP, column, index, high - low)
                    drawn.append(at.cpu())
                    measured.append(self._errors(x_0, at, noise))
                timesteps += [torch.stack(drawn, dim=1)] if columns else []
                errors += [torch.stack(measured, dim=1)] if columns else []
        self.prior = torch.cat(prior)  # (N,) nats
        self.log_likelihood = torch.cat(first)  # (N, 2) nats: raw, clipped
        self.timesteps = torch.cat(timesteps) if columns else torch.zeros(len(images), 0, dtype=torch.int64)  # (N, K)
        self.errors = torch.cat(errors) if columns else torch.zeros(len(images), 0, 2)  # (N, K, 2)

    def _prior(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) per dimension, (B,)."""
        abar = self.diffusion.schedules_float64["alphas_cumprod"][-1].item()
        return 0.5 * (abar * x_0.double().square().flatten(1).mean(1).cpu() - abar - math.log1p(-abar))

    def _first(self, x_0: Tensor, noise: Tensor) -> Tensor:
        """log p(x_0 | x_1) per dimension, (B, 2)."""
        timestep = torch.ones(len(x_0), dtype=torch.int64, device=x_0.device)
        _, predicted = self.diffusion.predict(self.diffusion.q_sample(x_0, timestep, noise), 1)
        std = self._variance("small", min(2, self.diffusion.num_timesteps)) ** 0.5
        found = [
            discretized_log_likelihood(x_0.cpu(), mean.cpu(), std).flatten(1).mean(1)
            for mean in (predicted, predicted.clamp(-1, 1))
        ]
        return torch.stack(found, dim=1)

    def _errors(self, x_0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Squared error of x_0 per dimension, (B, 2)."""
        eps, predicted = self.diffusion.predict(self.diffusion.q_sample(x_0, timesteps, noise), timesteps)
        abar = self.diffusion.schedules_float64["alphas_cumprod"][timesteps.cpu()]
        raw = (eps - noise).square().flatten(1).mean(1).cpu().double() * (1 - abar) / abar  # eq. 15, without cancelling
        clipped = (predicted.clamp(-1, 1) - x_0).square().flatten(1).mean(1).cpu().double()
        return torch.stack([raw, clipped], dim=1)

    def _variance(self, variance: str, timestep: int) -> float:
        """sigma_t^2; at t = 1, where the posterior's is 0, that of t = 2 (T = 1: beta_1)."""
        if self.diffusion.num_timesteps == 1:
            return self.diffusion.p_variance(1, "large")
        return self.diffusion.p_variance(timestep, variance)

    def bits_per_dim(self, variance: str = "large", *, clip_x0: bool = False) -> BitsPerDim:
        """The bound for one reverse process; see `bits_per_dim`."""
        which, tables = int(clip_x0), self.diffusion.schedules_float64
        abar, beta = tables["alphas_cumprod"], tables["betas"]
        constants, factors = torch.zeros_like(abar), torch.zeros_like(abar)
        for t in range(2, self.diffusion.num_timesteps + 1):
            sigma2, posterior = self._variance(variance, t), self.diffusion.posterior_variance(t)
            constants[t] = 0.5 * (math.log(sigma2 / posterior) - 1 + posterior / sigma2)
            mean_factor2 = abar[t - 1] * (beta[t] / (1 - abar[t])) ** 2  # of x_0 in the posterior mean, eq. 7
            factors[t] = mean_factor2 / (2 * sigma2)
        nats = constants[self.timesteps] + factors[self.timesteps] * self.errors[:, :, which]  # L_{t-1}, (N, K)
        nats = nats * (self.bounds[1:] - self.bounds[:-1])  # one timestep stands for its part
        distortion = -self.log_likelihood[:, which]
        totals = (distortion + nats.sum(1) + self.prior) / math.log(2)
        return BitsPerDim(
            total=totals.mean().item(),
            standard_error=(totals.std() / len(totals) ** 0.5).item() if len(totals) > 1 else math.nan,
            distortion=distortion.mean().item() / math.log(2),
            rate=(nats.sum(1) + self.prior).mean().item() / math.log(2),
            prior=self.prior.mean().item() / math.log(2),
            terms=nats.mean(0) / math.log(2),
            num_images=self.num_images,
            num_timesteps=self.num_timesteps,
            variance=variance,
            clip_x0=clip_x0,
        )


def bits_per_dim(
    diffusion: DiffusionModel, images: Tensor, variance: str = "large", *, clip_x0: bool = False, **options
) -> BitsPerDim:
    """The variational bound (eq. 5) on the negative log-likelihood of images, in bits per dimension.

    L_{t-1} compares the posterior (eq. 7) with p(x_{t-1} | x_t), L_0 is the discretized decoder of section 3.3 with the
    posterior variance of t = 2, L_T the prior. To compute several variants at once, use `BoundErrors`.

    Args:
        diffusion: any eps model in a `DiffusionModel`.
        images: (N, C, H, W) uint8.
        variance: "large" for sigma_t^2 = beta_t, "small" for the posterior variance.
        clip_x0: whether the predicted x_0 is clipped to [-1, 1], as the paper's code does.
        options: of `BoundErrors`; by default every t in 1..T is measured for every image.

    Raises:
        ValueError: for an unknown variance, and as `BoundErrors`.
    """
    diffusion.p_variance(1, variance)  # an unknown name fails before any compute
    return BoundErrors(diffusion, images, **options).bits_per_dim(variance, clip_x0=clip_x0)
