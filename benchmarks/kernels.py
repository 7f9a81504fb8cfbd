"""Single operations: our layers, PyTorch's, and the machine's own limits."""

from itertools import repeat

import torch
from torch import nn

from benchmarks.contender import Contender, synchronise
from modeling.layers import GroupNorm, ReLU
from modeling.runtime import DTYPES, keep_freed_memory, resolve_device


def group_norm(channels: int, num_groups: int, pixels: int, is_channels_last: bool, is_ours: bool) -> Contender:
    """GroupNorm of 64 images in bf16, forward and backward."""
    keep_freed_memory()
    layer = (GroupNorm if is_ours else nn.GroupNorm)(num_groups, channels)
    x = torch.randn(64, channels, pixels, pixels, dtype=torch.bfloat16)
    if is_channels_last:
        x = x.to(memory_format=torch.channels_last)
    grad = torch.randn_like(x)
    x.requires_grad_()

    def run(num_steps: int) -> None:
        for _ in repeat(None, num_steps):
            torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad)

    return Contender(run, len(x), 0)


def relu(channels: int, pixels: int, is_ours: bool) -> Contender:
    """ReLU of 64 images in bf16 and channels last, in place, forward."""
    layer = ReLU() if is_ours else nn.ReLU(inplace=True)
    x = torch.randn(64, channels, pixels, pixels, dtype=torch.bfloat16).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def run(num_steps: int) -> None:
        for _ in repeat(None, num_steps):
            layer(x)

    return Contender(run, len(x), 0)


def peak_matmul(precision: str = "bf16", size: int = 4096) -> Contender:
    """A product of two large square matrices; an "image" is one product."""
    device = resolve_device("auto")
    dtype = DTYPES[precision] or torch.float32
    a = torch.randn(size, size, dtype=dtype, device=device)
    out = torch.empty_like(a)

    def run(num_steps: int) -> None:
        for _ in repeat(None, num_steps):
            torch.mm(a, a, out=out)
        synchronise(device)

    return Contender(run, 1, 2 * size**3)


def peak_convolution(precision: str = "bf16") -> Contender:
    """A 3x3 convolution of 256 to 256 channels at 16x16, channels last; an "image" is one of the batch."""
    device = resolve_device("auto")
    batch_size = 1024 if device.type == "cuda" else 32  # enough that a launch takes no part of the time
    dtype = DTYPES[precision] or torch.float32
    layer = nn.Conv2d(256, 256, 3, padding=1, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    x = torch.randn(batch_size, 256, 16, 16, device=device, dtype=dtype).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def run(num_steps: int) -> None:
        for _ in repeat(None, num_steps):
            layer(x)
        synchronise(device)

    return Contender(run, batch_size, 2 * 9 * 256 * 256 * 16 * 16)
