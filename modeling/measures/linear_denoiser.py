"""The best linear prediction of the noise: no training, exact for Gaussian data, a yardstick for trained networks."""

import torch
from torch import Tensor, nn


class LinearDenoiser(nn.Module):
    """E[eps | x_t] for data N(mean, covariance).

    It is sqrt(1 - abar) (abar covariance + (1 - abar) I)^-1 (x_t - sqrt(abar) mean).

    Args:
        mean: (D,) or a scalar tensor, of the flattened images in [-1, 1].
        covariance: (D, D); or a scalar tensor, the variance of every dimension, all uncorrelated.
        alphas_cumprod: (T + 1,), index 0 is clean data.

    Called as an eps model: x (B, ...) with D numbers an image, t = timestep / T (B,).
    """

    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor | None
    abar: Tensor
    one_minus_abar: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor, alphas_cumprod: Tensor):
        super().__init__()
        if covariance.ndim == 0:
            eigenvalues, eigenvectors = covariance, None
        else:
            eigenvalues, eigenvectors = torch.linalg.eigh(covariance.double())
            eigenvectors = eigenvectors.to(mean)
        for name, value in {
            "mean": mean,
            "eigenvalues": eigenvalues.clamp(min=0).to(mean),
            "eigenvectors": eigenvectors,
            "abar": alphas_cumprod.to(mean),
            # 1e-4 at t = 1: too small to be computed from abar in float32
            "one_minus_abar": (1 - alphas_cumprod.double()).to(mean),
        }.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        timesteps = (t * (len(self.abar) - 1)).round().long()
        abar, one_minus_abar = self.abar[timesteps][:, None], self.one_minus_abar[timesteps][:, None]
        with torch.autocast(x.device.type, enabled=False):
            eps = x.flatten(1).to(self.mean) - abar.sqrt() * self.mean
            if self.eigenvectors is not None:
                eps = eps @ self.eigenvectors
            eps = eps * one_minus_abar.sqrt() / (abar * self.eigenvalues + one_minus_abar)
            if self.eigenvectors is not None:
                eps = eps @ self.eigenvectors.T
        return eps.reshape(x.shape)


def fit_linear_denoiser(images: Tensor, alphas_cumprod: Tensor, *, is_isotropic: bool = False) -> LinearDenoiser:
    """The best linear denoiser for images (N, C, H, W), float in [-1, 1].

    Args:
        alphas_cumprod: (T + 1,) of the process.
        is_isotropic: fits one mean and one variance for all pixels, N(mean, variance I).
    """
    x = images.flatten(1)
    if is_isotropic:
        return LinearDenoiser(x.mean(), x.double().var().float(), alphas_cumprod)
    return LinearDenoiser(x.mean(0), torch.cov(x.T), alphas_cumprod)
