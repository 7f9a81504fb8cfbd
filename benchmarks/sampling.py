"""Sampling; a step is one evaluation of the network for all images."""

import torch

from benchmarks.contender import BETAS, NUM_TIMESTEPS, Contender, compose, network_flops, plain_network, synchronise
from modeling import build
from modeling.runtime import place, resolve_device
from modeling.samplers import Sampler, sample_images
from modeling.schedules import get_schedules


def reference_sampling(overrides: list[str], batch_size: int) -> Contender:
    """Algorithm 2 as every tutorial writes it: fp32, a tensor operation for each term."""
    config = compose(overrides)
    device = resolve_device(config.runtime.device)
    network = plain_network(config).to(device).eval()
    flops = network_flops(network, with_gradient=False)
    tables = {name: table.to(device) for name, table in get_schedules(*BETAS, NUM_TIMESTEPS).items()}

    @torch.no_grad()
    def run(num_steps: int) -> None:
        x = torch.randn(batch_size, 3, 32, 32, device=device)
        for timestep in range(NUM_TIMESTEPS, NUM_TIMESTEPS - num_steps, -1):
            eps = network(x, torch.full((batch_size,), timestep / NUM_TIMESTEPS, device=device))
            mean = tables["inv_sqrt_alphas"][timestep] * (x - tables["one_minus_alpha_over_prod"][timestep] * eps)
            x = mean + tables["sqrt_betas"][timestep] * torch.randn_like(x)
        synchronise(device)

    return Contender(run, batch_size, flops)


def our_sampling(overrides: list[str], batch_size: int, *, has_fast_layers: bool = True) -> Contender:
    """What `sample.py` does for each batch.

    Args:
        has_fast_layers: False: PyTorch's own layers instead of those of `modeling.layers`.
    """
    config = compose(overrides)
    device, precision = build.build_runtime(config.runtime)
    eps_model = build.build_eps_model(config.model) if has_fast_layers else plain_network(config)
    flops = network_flops(eps_model, with_gradient=False)
    model = place(build.build_diffusion(config.diffusion, eps_model), device)

    def run(num_steps: int) -> None:
        sampler = Sampler(num_steps=num_steps)
        sample_images(model, batch_size, (3, 32, 32), device, sampler, seed=0, precision=precision)
        synchronise(device)

    return Contender(run, batch_size, flops)
