"""The optimal denoiser of the training images themselves, which brackets the least loss that is possible."""

import torch
from torch import Tensor, nn

from modeling.images import to_model_range

_PART_NUMBERS = 2**22  # of training images that are float32 at a time: 16 MiB


class EmpiricalDenoiser(nn.Module):
    """E[eps | x_t] where x_0 is one of N training images, each as likely as the others.

    The posterior of image i is softmax_i(-||x_t - sqrt(abar) x_i||^2 / (2 (1 - abar))), E[x_0 | x_t] its mean, and eps
    follows from it (eq. 4). No function has a smaller expected loss on the training images. So that loss is, on average
    over training sets, at most the least loss on new images, which is in turn at most this denoiser's on held-out
    images, as of any.

    Args:
        images: (N, C, H, W) uint8, on the module's device; a part of them is float at a time.
        alphas_cumprod: (T + 1,), index 0 is clean data.

    Called as an eps model: x (B, C, H, W), t = timestep / T (B,). A call costs 4 B N C H W operations.
    """

    images: Tensor
    signal: Tensor
    sigma: Tensor

    def __init__(self, images: Tensor, alphas_cumprod: Tensor):
        super().__init__()
        self.register_buffer("images", images.flatten(1))
        self.register_buffer("signal", alphas_cumprod.double().sqrt().float())
        self.register_buffer("sigma", (1 - alphas_cumprod.double()).sqrt().float())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        timesteps = (t * (len(self.signal) - 1)).round().long()
        signal, sigma = self.signal[timesteps][:, None], self.sigma[timesteps][:, None]  # (B, 1)
        with torch.autocast(x.device.type, enabled=False):
            x_t = x.flatten(1).float()
            highest = torch.full_like(signal, -torch.inf)  # of the logits so far
            total, weighted = torch.zeros_like(signal), torch.zeros_like(x_t)  # over exp(highest)
            for part in self.images.split(max(1, _PART_NUMBERS // x_t.shape[1])):
                x_0 = to_model_range(part)  # (P, D)
                # Less ||x_t||^2, which all have. At small sigma float32 is off by some units, of differences of 1e5.
                logits = signal * (x_t @ x_0.T - signal * x_0.square().sum(1) / 2) / sigma**2  # (B, P)
                before, highest = highest, torch.maximum(highest, logits.amax(1, keepdim=True))
                weights, kept = (logits - highest).exp(), (before - highest).exp()
                total = kept * total + weights.sum(1, keepdim=True)
                weighted = kept * weighted + weights @ x_0
            eps = (x_t - signal * weighted / total) / sigma
        return eps.reshape(x.shape)
