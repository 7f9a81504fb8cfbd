"""The diffusion process of Ho et al. 2020: schedule, q(x_t | x_0), the simple loss, the posterior, Algorithm 2.

`timestep` is an integer 1..T as in the paper; index 0 of every table is clean data. The network sees t = timestep / T.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VARIANCES = ("large", "small")

Bar = Callable[[Iterable[int]], Iterable[int]]


def _schedules_float64(beta1: float, beta2: float, num_timesteps: int) -> dict[str, Tensor]:
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    if not 0 < beta1 < beta2 < 1:
        raise ValueError(f"betas must satisfy 0 < beta1 < beta2 < 1, got beta1={beta1}, beta2={beta2}")
    betas = torch.linspace(beta1, beta2, num_timesteps, dtype=torch.float64)
    betas = torch.cat([torch.zeros(1, dtype=torch.float64), betas])  # index 0: clean data
    alphas = 1 - betas
    alphas_cumprod = alphas.cumprod(0)
    sqrt_one_minus = (1 - alphas_cumprod).sqrt()
    ratio = betas / sqrt_one_minus
    ratio[0] = 0  # 0 / 0
    return {
        "betas": betas,
        "alphas": alphas,
        "alphas_cumprod": alphas_cumprod,
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alpha_prod": sqrt_one_minus,
        "inv_sqrt_alphas": alphas.rsqrt(),
        "sqrt_betas": betas.sqrt(),
        "one_minus_alpha_over_prod": ratio,
    }


def get_schedules(beta1: float, beta2: float, num_timesteps: int) -> dict[str, Tensor]:
    """The linear schedule of the paper (section 4) and what is derived from it.

    Args:
        beta1: beta at timestep 1.
        beta2: beta at timestep T; with T = 1 it is not used.
        num_timesteps: T, at least 1.

    Returns:
        float32 tensors of shape (T + 1,), computed in float64 and indexed by timestep; index 0 is clean data:
        betas, alphas = 1 - betas, alphas_cumprod (abar), sqrt_alphas_cumprod = sqrt(abar),
        sqrt_one_minus_alpha_prod = sqrt(1 - abar), inv_sqrt_alphas = 1 / sqrt(alpha), sqrt_betas,
        one_minus_alpha_over_prod = (1 - alpha) / sqrt(1 - abar), the factor of eps in eq. 11.

    Raises:
        ValueError: unless 0 < beta1 < beta2 < 1 and T >= 1.
    """
    return {name: table.float() for name, table in _schedules_float64(beta1, beta2, num_timesteps).items()}


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; each submodule's own mode is restored afterwards."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode


class DiffusionModel(nn.Module):
    """A DDPM around an eps model.

    Args:
        eps_model: called as eps_model(x_t, t) with x_t (B, ...) and t = timestep / T of shape (B,); returns the
            predicted noise in the shape of x_t.
        betas: (beta1, beta2), the ends of the linear schedule.
        num_timesteps: T.

    Raises:
        ValueError: as `get_schedules`.
    """

    def __init__(self, eps_model: nn.Module, betas: tuple[float, float], num_timesteps: int):
        super().__init__()
        self.eps_model = eps_model
        self.num_timesteps = num_timesteps
        # float64 on the CPU whatever the module's device and dtype: the samplers take their coefficients from here.
        self.schedules_float64 = _schedules_float64(*betas, num_timesteps)
        for name, table in self.schedules_float64.items():
            self.register_buffer(name, table.float(), persistent=False)

    def _check_timesteps(self, timesteps: Tensor, batch_size: int) -> None:
        if timesteps.shape != (batch_size,) or timesteps.is_floating_point():
            raise ValueError(
                f"timesteps must be integers of shape ({batch_size},), "
                f"got {timesteps.dtype} of shape {tuple(timesteps.shape)}"
            )
        in_range = (timesteps >= 1) & (timesteps <= self.num_timesteps)
        if timesteps.device.type == "cpu" and not torch.compiler.is_compiling() and not in_range.all():
            raise ValueError(f"timesteps must lie in 1..{self.num_timesteps}, got {timesteps.tolist()}")

    def predict_eps(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The network's noise for x_t (B, ...) at integer timesteps (B,), in float32 or better."""
        eps = self.eps_model(x_t, timesteps.to(torch.float32) / self.num_timesteps)
        return eps.to(torch.promote_types(eps.dtype, torch.float32))

    def q_sample(self, x_0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, eq. 4; all of x_0, noise and x_t are (B, ...)."""
        shape = (-1,) + (1,) * (x_0.ndim - 1)
        mean_factor = self.sqrt_alphas_cumprod[timesteps].reshape(shape)
        return mean_factor * x_0 + self.sqrt_one_minus_alpha_prod[timesteps].reshape(shape) * noise

    def losses(self, x_0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """The squared error of eq. 14 for each image, averaged over its dimensions: (B,), float32."""
        eps = self.predict_eps(self.q_sample(x_0, timesteps, noise), timesteps)
        return F.mse_loss(eps, noise, reduction="none").flatten(1).mean(1)

    def forward(self, x: Tensor, *, timesteps: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """L_simple (eq. 14), one timestep an image: the inner lines of Algorithm 1.

        Args:
            x: x_0, (B, ...), float in [-1, 1]; moved to the model's device if it lies elsewhere.
            timesteps: (B,) integers in 1..T; drawn uniformly from torch's default generator if not given.
            noise: eps, of x's shape; likewise.

        Returns:
            A scalar: mean over batch and dimensions.

        Raises:
            ValueError: for timesteps or noise that do not fit x.
        """
        device = self.betas.device
        x = x.to(device)
        if timesteps is None:
            timesteps = torch.randint(1, self.num_timesteps + 1, (len(x),), device=device)
        if noise is None:
            noise = torch.randn_like(x)
        if noise.shape != x.shape:
            raise ValueError(f"noise must have the shape of x, {tuple(x.shape)}, got {tuple(noise.shape)}")
        self._check_timesteps(timesteps, len(x))
        return self.losses(x, timesteps.to(device), noise.to(device)).mean()

    def predict_x_0(self, x_t: Tensor, eps: Tensor, timestep: int) -> Tensor:
        """x_0 from x_t and the noise in it, eq. 15; every image at the same timestep."""
        abar = self.schedules_float64["alphas_cumprod"][timestep].item()
        return (x_t - (1 - abar) ** 0.5 * eps) / abar**0.5

    def posterior_variance(self, timestep: int) -> float:
        """beta tilde of eq. 7: the variance of q(x_{t-1} | x_t, x_0)."""
        abar = self.schedules_float64["alphas_cumprod"]
        beta = self.schedules_float64["betas"][timestep]
        return ((1 - abar[timestep - 1]) / (1 - abar[timestep]) * beta).item()

    def posterior_mean(self, x_t: Tensor, x_0: Tensor, timestep: int) -> Tensor:
        """mu tilde of eq. 7: the mean of q(x_{t-1} | x_t, x_0)."""
        abar, beta = self.schedules_float64["alphas_cumprod"], self.schedules_float64["betas"][timestep]
        x_0_factor = abar[timestep - 1].sqrt() * beta / (1 - abar[timestep])
        x_t_factor = (1 - beta).sqrt() * (1 - abar[timestep - 1]) / (1 - abar[timestep])
        return x_0_factor.item() * x_0 + x_t_factor.item() * x_t

    def p_mean(self, x_t: Tensor, timestep: int, *, clip_x0: bool = False) -> Tensor:
        """The mean of p(x_{t-1} | x_t): eq. 11, or the posterior mean with x_0 clipped to [-1, 1]."""
        eps = self.predict_eps(x_t, torch.full((len(x_t),), timestep, device=x_t.device))
        if clip_x0:
            return self.posterior_mean(x_t, self.predict_x_0(x_t, eps, timestep).clamp(-1, 1), timestep)
        eps_factor = self.schedules_float64["one_minus_alpha_over_prod"][timestep].item()
        return (x_t - eps_factor * eps) * self.schedules_float64["inv_sqrt_alphas"][timestep].item()

    def p_variance(self, timestep: int, variance: str = "large") -> float:
        """sigma_t^2: beta_t ("large") or beta tilde_t ("small"), section 3.2."""
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {VARIANCES}, got {variance!r}")
        if variance == "small":
            return self.posterior_variance(timestep)
        return self.schedules_float64["betas"][timestep].item()

    def sample(
        self,
        num_samples: int,
        size: Sequence[int],
        device: torch.device | str,
        *,
        variance: str = "large",
        clip_x0: bool = False,
        noise: Tensor | None = None,
        step_noise: Callable[[int], Tensor] | None = None,
        generator: torch.Generator | None = None,
        bar: Bar = iter,
    ) -> Tensor:
        """Algorithm 2: ancestral sampling through all T timesteps, in eval mode and without gradients.

        Args:
            num_samples: B.
            size: shape of one image, for example (3, 32, 32).
            device: where to sample; the model must be there.
            variance: "large" for sigma_t^2 = beta_t, "small" for the posterior variance.
            clip_x0: clips each predicted x_0 to [-1, 1], as the paper's code does.
            noise: x_T, (B, *size); drawn if not given.
            step_noise: called with the timestep (T..2), returns z of Algorithm 2 as (B, *size); drawn if not given.
            generator: source of what is drawn; torch's default generator if not given.
            bar: wraps the timesteps, for example `tqdm`.

        Returns:
            (B, *size), about [-1, 1].

        Raises:
            ValueError: for an unknown variance or noise of another shape.
        """
        self.p_variance(1, variance)  # an unknown name fails before any compute
        x, step_noise = starting_noise(num_samples, size, device, noise, step_noise, generator)
        with evaluating(self):
            for timestep in bar(range(self.num_timesteps, 0, -1)):
                x = self.p_mean(x, timestep, clip_x0=clip_x0)
                if timestep > 1:
                    x = x + self.p_variance(timestep, variance) ** 0.5 * step_noise(timestep)
        return x


def starting_noise(
    num_samples: int,
    size: Sequence[int],
    device: torch.device | str,
    noise: Tensor | None,
    step_noise: Callable[[int], Tensor] | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Callable[[int], Tensor]]:
    """x_T and the source of the later noise, both on the device: as handed in, or drawn from the generator."""
    shape = (num_samples, *size)
    draw_device = device if generator is None else generator.device

    def draw(timestep: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=draw_device).to(device)

    if noise is None:
        noise = draw(0)
    elif tuple(noise.shape) != shape:
        raise ValueError(f"noise must have shape {shape}, got {tuple(noise.shape)}")
    if step_noise is None:
        return noise.to(device), draw
    return noise.to(device), lambda timestep: step_noise(timestep).to(device)
