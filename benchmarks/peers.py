"""Training steps of other packages from the package index."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contender import NUM_TIMESTEPS, Contender, network_flops
from modeling.runtime import autocast, resolve_device


def _peer_training(
    loss_of: Callable[[Tensor], Tensor], network: nn.Module, x_0: Tensor, precision: str, optimizer: type
) -> Contender:
    """The training step of both packages' examples; `loss_of(images)` is the package's own part."""
    device = resolve_device("auto")
    flops = network_flops(network, with_gradient=True, time=500.0)
    network.to(device)
    optimizer = optimizer(network.parameters(), lr=1e-4)
    x_0 = x_0.to(device)

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            with autocast(device, precision):
                loss = loss_of(x_0)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

    return Contender(run, len(x_0), flops)


def diffusers_training(batch_size: int, precision: str = "fp32") -> Contender:
    """The training step of diffusers' unconditional example, with the network of google/ddpm-cifar10-32."""
    from diffusers import DDPMScheduler, UNet2DModel

    network = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
        norm_eps=1e-6,
    )
    scheduler = DDPMScheduler(NUM_TIMESTEPS)

    def loss_of(x_0: Tensor) -> Tensor:
        noise = torch.randn_like(x_0)
        timesteps = torch.randint(0, NUM_TIMESTEPS, (len(x_0),), device=x_0.device)
        # Its annotation is narrower than the indices that it takes.
        x_t = scheduler.add_noise(x_0, noise, timesteps)  # pyright: ignore[reportArgumentType]
        eps = network(x_t, timesteps).sample
        return F.mse_loss(eps.float(), noise)

    return _peer_training(loss_of, network, torch.rand(batch_size, 3, 32, 32) * 2 - 1, precision, torch.optim.AdamW)


def lucidrains_training(batch_size: int, precision: str = "fp32") -> Contender:
    """The training step of denoising-diffusion-pytorch, with the network of its README."""
    # Not among the requirements: timed only where it is installed.
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet  # pyright: ignore[reportMissingImports]

    network = Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=False)
    diffusion = GaussianDiffusion(network, image_size=32, timesteps=NUM_TIMESTEPS).to(resolve_device("auto"))
    return _peer_training(diffusion, network, torch.rand(batch_size, 3, 32, 32), precision, torch.optim.Adam)
