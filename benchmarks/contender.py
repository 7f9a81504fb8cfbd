"""What all contenders share: the network as a tutorial has it, its FLOPs, waiting for the device."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modeling import build
from modeling.config import Config, parse
from modeling.layers import GroupNorm, ReLU

NUM_TIMESTEPS, BETAS = 1000, (1e-4, 0.02)
LOG_EVERY = 25


@dataclass
class Contender:
    """What can be timed.

    Args:
        run: does this many steps and returns when the device has finished them.
        images_per_step: images in a training batch, or images sampled at a time.
        flops_per_image: of one step, for one image.
        close: ends what it has started.
    """

    run: Callable[[int], None]
    images_per_step: int
    flops_per_image: float
    close: Callable[[], None] = lambda: None


def compose(overrides: list[str]) -> Config:
    """The validated configuration that `main.py` would have with these overrides."""
    import hydra

    with hydra.initialize_config_dir(str(Path("conf").absolute()), version_base="1.3"):
        return parse(hydra.compose("config", overrides))


def plain_network(config: Config, fast_layers: Sequence[str] = ()) -> nn.Module:
    """The configured network as a tutorial has it: with PyTorch's own layers instead of ours, except for these."""
    torch.manual_seed(0)
    network = build.build_eps_model(config.model)
    for module in network.modules():
        name = type(module).__name__
        if isinstance(module, (GroupNorm, ReLU)) and name not in fast_layers:
            module.__class__ = getattr(nn, name)  # ours have the name of the class that they derive from
            if isinstance(module, nn.ReLU):
                module.inplace = False
    return network


def network_flops(network: nn.Module, with_gradient: bool, time: float = 0.5) -> float:
    """FLOPs (2 for a multiply-add) of one image through the network, by torch's own counter."""
    network = copy.deepcopy(network).cpu()
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(with_gradient):
        output = network(torch.zeros(1, 3, 32, 32), torch.tensor([time]))
        if with_gradient:
            getattr(output, "sample", output).sum().backward()
    return counter.get_total_flops()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def count_launches(run: Callable[[int], None], num_steps: int = 10) -> float | None:
    """Kernels, copies and fills of memory that a step launches on the GPU, by torch's profiler; None without one."""
    if not torch.cuda.is_available():
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(num_steps)
    events = [event for event in profile.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.is_user_annotation for event in events) / num_steps
