"""The samplers, their timesteps, and images that are a function of their number.

Samplers differ only in the update from x_t to x at the next timestep. An update receives each timestep as its abar, the
cumulative product of alphas, and nothing else.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.diffusion import VARIANCES, DiffusionModel, check_choice, evaluating
from modeling.runtime import autocast
from modeling.schedules import SPACINGS, respaced_timesteps
from modeling.seeding import Noise, draw_noise, image_noise, starting_point
from modeling.system.progress import Bar

SAMPLERS = ("ancestral", "ddim", "dpm_solver")

# (x, eps, x_0, abar, abar of the next timestep, source of noise) -> x at the next timestep
Update = Callable[[Tensor, Tensor, Tensor, float, float, Callable[[], Tensor]], Tensor]


@dataclass(frozen=True)
class Sampler:
    """How images are drawn from a model; two equal samplers draw the same images.

    Args:
        name: "ancestral", "ddim" or "dpm_solver".
        num_steps: network evaluations, each at another timestep, at most T; None for all T.
        clip_x0: clips each predicted x_0 to [-1, 1] and computes eps from it again; an undertrained network needs it.
        variance: ancestral only: "small" (the default) for the posterior variance, "large" for the chain's own
            beta = 1 - abar_t / abar_s.
        eta: ddim only, in [0, 1]: 0 (the default) is deterministic, 1 is ancestral with the small variance. The noise
            that a larger eta adds lets later steps correct earlier errors, which an undertrained network needs.
        spacing: of the timesteps, see `respaced_timesteps`: by default "trailing" for ancestral and "quadratic" for the
            others, with which few steps brought the best images (docs/results.md).

    Raises:
        ValueError: for a value outside these, or one that the sampler does not have.
    """

    name: str = "ancestral"
    num_steps: int | None = None
    clip_x0: bool = True
    variance: str | None = None
    eta: float | None = None
    spacing: str | None = None

    def __post_init__(self) -> None:
        check_choice("sampler", self.name, SAMPLERS)
        spacing = self.spacing or ("trailing" if self.name == "ancestral" else "quadratic")
        check_choice("spacing", spacing, SPACINGS)
        object.__setattr__(self, "spacing", spacing)
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        for key, owner, default in (("variance", "ancestral", "small"), ("eta", "ddim", 0.0)):
            if self.name == owner and getattr(self, key) is None:
                object.__setattr__(self, key, default)
            elif self.name != owner and getattr(self, key) is not None:
                raise ValueError(f"{key} must be None with the sampler {self.name}, got {getattr(self, key)}")
        if self.variance is not None:
            check_choice("variance", self.variance, VARIANCES)
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")

    def make_update(self) -> Update:
        """Returns a new update, for the steps of one batch in order."""
        match self.name:
            case "ancestral":
                return Ancestral(self.variance or "small")
            case "ddim":
                return Ddim(self.eta or 0.0)
        return DpmSolver()


@dataclass(frozen=True)
class Ancestral:
    """Draws from p(x_s | x_t) of the chain that has only these timesteps (Ho et al. 2020, Algorithm 2, eq. 7).

    The last step adds no noise.
    """

    variance: str

    def __call__(
        self, x: Tensor, eps: Tensor, x_0: Tensor, abar: float, abar_next: float, noise: Callable[[], Tensor]
    ) -> Tensor:
        alpha = abar / abar_next
        mean = (abar_next**0.5 * (1 - alpha) * x_0 + alpha**0.5 * (1 - abar_next) * x) / (1 - abar)
        if abar_next == 1:
            return mean
        factor = 1.0 if self.variance == "large" else (1 - abar_next) / (1 - abar)
        return mean + (factor * (1 - alpha)) ** 0.5 * noise()


@dataclass(frozen=True)
class Ddim:
    """Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16; with eta = 0 the probability-flow ODE to first order."""

    eta: float

    def __call__(
        self, x: Tensor, eps: Tensor, x_0: Tensor, abar: float, abar_next: float, noise: Callable[[], Tensor]
    ) -> Tensor:
        sigma = self.eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) ** 0.5
        x = abar_next**0.5 * x_0 + max(1 - abar_next - sigma**2, 0.0) ** 0.5 * eps
        return x + sigma * noise() if sigma > 0 else x


class DpmSolver:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2): the same ODE by a two-step method.

    Its time is lambda = log(sqrt(abar) / sqrt(1 - abar)), and in equal steps of lambda it is of second order. The
    first step has no predecessor and the last one is infinitely long in lambda, so both are of first order: over all
    timesteps, down to clean data, the error falls less regularly, and mostly more slowly.
    """

    def __init__(self) -> None:
        self.previous: tuple[Tensor, float] | None = None  # x_0 and lambda of the step before

    def __call__(
        self, x: Tensor, eps: Tensor, x_0: Tensor, abar: float, abar_next: float, noise: Callable[[], Tensor]
    ) -> Tensor:
        before, time = self.previous, _log_snr(abar) / 2
        self.previous = x_0, time
        if abar_next == 1:
            return x_0
        step = _log_snr(abar_next) / 2 - time
        if before is not None:
            ratio = step / (2 * (time - before[1]))
            x_0 = (1 + ratio) * x_0 - ratio * before[0]  # extrapolated to the middle of the step
        return ((1 - abar_next) / (1 - abar)) ** 0.5 * x - abar_next**0.5 * math.expm1(-step) * x_0


def _log_snr(abar: float) -> float:
    return math.log(abar / (1 - abar))


def timesteps_of(sampler: Sampler, model: DiffusionModel) -> list[int]:
    """The timesteps at which a sampler asks the model, descending from T; raises ValueError for more than it has."""
    abars = model.schedules_float64["alphas_cumprod"]
    return respaced_timesteps(abars, sampler.num_steps or model.num_timesteps, sampler.spacing or "trailing")


def follow(
    model: DiffusionModel,
    x: Tensor,
    steps: Sequence[tuple[int, int]],
    sampler: Sampler,
    *,
    noise: Noise,
    bar: Bar = iter,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
    constrain: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """Takes steps, each from x_t to the next timestep, in eval mode and without gradients.

    Args:
        x: x_t of the first step, (B, ...), on the model's device.
        steps: (timestep, next timestep), the one after beginning where it ends. A step upward draws from q(x_t | x_s),
            and the sampler begins again there.
        noise: timestep of a step -> (B, ...).
        observe: as for `sample`, called before each step downward.
        constrain: (x, its timestep) -> x, called after each step downward.
    """
    update, device = sampler.make_update(), x.device
    abars = model.schedules_float64["alphas_cumprod"].tolist()
    with evaluating(model):
        for timestep, following in bar(steps):
            abar = abars[timestep]
            if following > timestep:
                alpha = abars[following] / abar
                x = alpha**0.5 * x + (1 - alpha) ** 0.5 * noise(timestep).to(device)
                update = sampler.make_update()
                continue
            eps, x_0 = model.predict(x, timestep)
            if sampler.clip_x0:
                x_0 = x_0.clamp(-1, 1)
                eps = (x - abar**0.5 * x_0) / (1 - abar) ** 0.5
            if observe is not None:
                observe(timestep, x, x_0)
            x = update(x, eps, x_0, abar, abars[following], lambda timestep=timestep: noise(timestep).to(device))
            if constrain is not None:
                x = constrain(x, following)
    return x


def sample(
    model: DiffusionModel,
    num_samples: int,
    size: Sequence[int],
    device: torch.device | str,
    sampler: Sampler = Sampler(),
    *,
    noise: Noise | None = None,
    bar: Bar = iter,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Samples with any sampler, in eval mode and without gradients.

    Args:
        noise: timestep -> (B, *size), at 0 the starting noise; drawn from torch's default generator if not given.
        observe: called before each step with (timestep, x_t, the predicted x_0).

    Other arguments and the result are those of `DiffusionModel.sample`.

    Raises:
        ValueError: for more steps than the model has timesteps, or for noise of another shape.
    """
    noise = noise or draw_noise(num_samples, size, device)
    x = starting_point(noise, num_samples, size, device)
    steps = list(itertools.pairwise([*timesteps_of(sampler, model), 0]))
    return follow(model, x, steps, sampler, noise=noise, bar=bar, observe=observe)


def sample_images(
    model: DiffusionModel,
    num_samples: int,
    size: Sequence[int],
    device: torch.device | str,
    sampler: Sampler = Sampler(),
    *,
    seed: int,
    first_image: int = 0,
    precision: str = "fp32",
    bar: Bar = iter,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """`sample` for numbered images: each is a function of the model, the sampler, the seed and its number.

    The other images of the batch change an image by rounding only.

    Args:
        first_image: number of the first image.
        precision: "fp32", or "bf16" or "fp16" for the network's matrix products; the steps between them are float32.

    Returns:
        (B, *size), about [-1, 1].
    """
    noise = image_noise(seed, torch.arange(first_image, first_image + num_samples, device=device), size)
    with autocast(device, precision):
        return sample(model, num_samples, size, device, sampler, noise=noise, bar=bar, observe=observe)
