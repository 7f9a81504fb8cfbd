"""The training step of another package."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.contender import NUM_TIMESTEPS, Contender, network_flops
from modeling.runtime import autocast, resolve_device


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

    device = resolve_device("auto")
    flops = network_flops(network, with_gradient=True, time=500.0)
    network.to(device)  # pyright: ignore[reportArgumentType]  # its decorator hides self
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    x_0 = (torch.rand(batch_size, 3, 32, 32) * 2 - 1).to(device)

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            noise = torch.randn_like(x_0)
            timesteps = torch.randint(0, NUM_TIMESTEPS, (len(x_0),), device=device)
            # Its annotation is narrower than the indices that it takes.
            x_t = scheduler.add_noise(x_0, noise, timesteps)  # pyright: ignore[reportArgumentType]
            with autocast(device, precision):
                eps = network(x_t, timesteps).sample
            loss = F.mse_loss(eps.float(), noise)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

    return Contender(run, batch_size, flops)
