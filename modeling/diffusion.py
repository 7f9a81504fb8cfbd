"""The diffusion process of Ho et al. 2020: q(x_t | x_0), what the network predicts, the loss, Algorithm 2.

`timestep` is an integer 1..T as in the paper; index 0 of every table is clean data. The network sees t = timestep / T.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.schedules import get_schedules as get_schedules  # others' code imports it from here
from modeling.schedules import linear_betas, schedule_tables
from modeling.seeding import Noise, draw_noise, starting_point
from modeling.system.progress import Bar

PREDICTIONS = ("eps", "x_0", "v")
WEIGHTINGS = ("uniform", "min_snr_5")
VARIANCES = ("large", "small")
SNR_CAP = 5.0


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards each submodule is in its own mode again."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


class DiffusionModel(nn.Module):
    """A DDPM around an eps model.

    Args:
        eps_model: called as eps_model(x_t, t) with x_t (B, ...) and t = timestep / T of shape (B,); returns the
            predicted noise, or what `prediction` names, in the shape of x_t.
        betas: (beta1, beta2), the ends of the linear schedule; or every beta in a tensor (T,).
        num_timesteps: T.
        prediction: what the network predicts: "eps" (eq. 14), "x_0", or "v" = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0
            (Salimans & Ho 2022, arXiv 2202.00512).
        weighting: weights of that prediction's squared error over the timesteps: "uniform", or "min_snr_5", with which
            the loss is the squared error of x_0 times min(SNR_t, 5), SNR_t = abar_t / (1 - abar_t) (Hang et al. 2023,
            arXiv 2303.09556, section 3.4).

    Raises:
        ValueError: for an unknown name, and what `linear_betas` and `schedule_tables` raise.
    """

    eps_model: nn.Module
    betas: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alpha_prod: Tensor
    loss_weights: Tensor

    def __init__(
        self,
        eps_model: nn.Module,
        betas: tuple[float, float] | Tensor,
        num_timesteps: int,
        *,
        prediction: str = "eps",
        weighting: str = "uniform",
    ):
        super().__init__()
        check_choice("prediction", prediction, PREDICTIONS)
        check_choice("weighting", weighting, WEIGHTINGS)
        if not isinstance(betas, Tensor):
            betas = linear_betas(*betas, num_timesteps)
        elif betas.shape != (num_timesteps,):
            raise ValueError(f"betas must have shape ({num_timesteps},), got {tuple(betas.shape)}")
        self.eps_model = eps_model
        self.num_timesteps = num_timesteps
        self.prediction, self.weighting = prediction, weighting
        # In float64 and on the CPU, whatever the module's device and dtype: the samplers read their coefficients here.
        self.schedules_float64 = schedule_tables(betas)
        for name, table in self.schedules_float64.items():
            self.register_buffer(name, table.float(), persistent=False)
        self.register_buffer("loss_weights", self._loss_weights(weighting).float(), persistent=False)

    def _loss_weights(self, weighting: str) -> Tensor:
        """The factor of the squared error at each timestep, (T + 1,) float64; not used at index 0."""
        abar = self.schedules_float64["alphas_cumprod"]
        if weighting == "uniform":
            return torch.ones_like(abar)
        snr = abar / (1 - abar)  # an error of x_0 is an error of eps over sqrt(SNR), and one of v over sqrt(SNR + 1)
        return snr.clamp(max=SNR_CAP) / {"eps": snr, "x_0": 1, "v": snr + 1}[self.prediction]

    def _check_timesteps(self, timesteps: Tensor, batch_size: int) -> None:
        if timesteps.shape != (batch_size,) or timesteps.is_floating_point():
            found = f"{timesteps.dtype} of shape {tuple(timesteps.shape)}"
            raise ValueError(f"timesteps must be integers of shape ({batch_size},), got {found}")
        if timesteps.device.type != "cpu" or torch.compiler.is_compiling():
            return  # on CUDA a synchronisation
        if not ((timesteps >= 1) & (timesteps <= self.num_timesteps)).all():
            raise ValueError(f"timesteps must be in 1..{self.num_timesteps}, got {timesteps.tolist()}")

    def _signal_and_sigma(self, timesteps: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t) of each image, (B, 1, ...) with ndim dimensions."""
        shape = (-1,) + (1,) * (ndim - 1)
        return self.sqrt_alphas_cumprod[timesteps].view(shape), self.sqrt_one_minus_alpha_prod[timesteps].view(shape)

    def q_sample(self, x_0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, eq. 4; x_0, noise and x_t are (B, ...)."""
        signal, sigma = self._signal_and_sigma(timesteps, x_0.ndim)
        return signal * x_0 + sigma * noise

    def _network(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The network's output for x_t (B, ...) at integer timesteps (B,), in float32 or better."""
        output = self.eps_model(x_t, timesteps.to(torch.float32) / self.num_timesteps)
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def predict(self, x_t: Tensor, timesteps: Tensor | int) -> tuple[Tensor, Tensor]:
        """The eps and the x_0 that the network predicts for x_t, from whichever output it has; eq. 4 and 15.

        Args:
            x_t: (B, ...).
            timesteps: (B,) integers in 1..T; or one for all images, whose coefficients are then rounded from float64.

        Returns:
            eps and x_0, each (B, ...), float32 or better; x_0 is not clipped.
        """
        if isinstance(timesteps, int):
            signal = self.schedules_float64["sqrt_alphas_cumprod"][timesteps].item()
            sigma = self.schedules_float64["sqrt_one_minus_alpha_prod"][timesteps].item()
            timesteps = torch.full((len(x_t),), timesteps, device=x_t.device)
        else:
            signal, sigma = self._signal_and_sigma(timesteps, x_t.ndim)
        output = self._network(x_t, timesteps)
        if self.prediction == "eps":
            return output, (x_t - sigma * output) / signal
        if self.prediction == "x_0":
            return (x_t - signal * output) / sigma, output
        return signal * output + sigma * x_t, signal * x_t - sigma * output  # (eps, x_0) is (v, x_t), rotated

    def losses(self, x_0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """The weighted squared error of each image's prediction, averaged over its dimensions: (B,), float32."""
        output = self._network(self.q_sample(x_0, timesteps, noise), timesteps)
        if self.prediction == "eps":
            target = noise
        elif self.prediction == "x_0":
            target = x_0
        else:  # v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0
            target = self.q_sample(noise, timesteps, -x_0)
        errors = F.mse_loss(output, target, reduction="none").flatten(1).mean(1)
        return errors if self.weighting == "uniform" else self.loss_weights[timesteps] * errors

    def eps_losses(self, x_0: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """The squared error of eps (eq. 14) for each image, whatever the network predicts: (B,), float32."""
        eps, _ = self.predict(self.q_sample(x_0, timesteps, noise), timesteps)
        return F.mse_loss(eps, noise, reduction="none").flatten(1).mean(1)

    def forward(self, x: Tensor, *, timesteps: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """The training loss, a scalar (Algorithm 1, lines 2 to 5); L_simple (eq. 14) by default.

        Args:
            x: x_0, (B, ...), float in [-1, 1]; moved to the model's device if it is elsewhere.
            timesteps: (B,) integers in 1..T, one for each image; drawn from torch's default generator if not given.
            noise: eps, of x's shape; drawn from torch's default generator if not given.

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
        eps, x_0 = self.predict(x_t, timestep)
        if clip_x0:
            return self.posterior_mean(x_t, x_0.clamp(-1, 1), timestep)
        eps_factor = self.schedules_float64["one_minus_alpha_over_prod"][timestep].item()
        return (x_t - eps_factor * eps) * self.schedules_float64["inv_sqrt_alphas"][timestep].item()

    def p_variance(self, timestep: int, variance: str = "large") -> float:
        """sigma_t^2: beta_t ("large") or beta tilde_t ("small"), section 3.2."""
        check_choice("variance", variance, VARIANCES)
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
        noise: Noise | None = None,
        bar: Bar = iter,
    ) -> Tensor:
        """Algorithm 2: ancestral sampling through all T timesteps, in eval mode and without gradients.

        Args:
            num_samples: B.
            size: shape of one image, for example (3, 32, 32).
            device: the model's.
            variance: "large" for sigma_t^2 = beta_t, "small" for the posterior variance.
            clip_x0: clips each predicted x_0 to [-1, 1], as the paper's code does.
            noise: called with 0 for x_T, then with the timesteps T..2; drawn from torch's default generator if
                not given.

        Returns:
            (B, *size), about [-1, 1].

        Raises:
            ValueError: for an unknown variance, or noise of another shape.
        """
        check_choice("variance", variance, VARIANCES)
        noise = noise or draw_noise(num_samples, size, device)
        x = starting_point(noise, num_samples, size, device)
        with evaluating(self):
            for timestep in bar(range(self.num_timesteps, 0, -1)):
                x = self.p_mean(x, timestep, clip_x0=clip_x0)
                if timestep > 1:
                    x = x + self.p_variance(timestep, variance) ** 0.5 * noise(timestep).to(device)
        return x
