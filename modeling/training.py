"""The plain training loop: Algorithm 1's gradient, one step, one epoch; and grids of samples.

A run (`modeling.run.step`, `modeling.run.loop`) calls the same `backward`, with random numbers by step number, a
learning rate, averaged weights, log lines and checkpoints.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from modeling.diffusion import DiffusionModel, evaluating
from modeling.distributed.shares import first_half
from modeling.images import save_grid
from modeling.layers import half_copies
from modeling.runtime import DTYPES, autocast
from modeling.system.progress import progress_bar


def backward(
    model: DiffusionModel,
    inputs: Tensor,
    *,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    precision: str = "fp32",
    micro_batch_size: int | None = None,
    loss_scale: Tensor | None = None,
    batch_size: int | None = None,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Adds the gradient of the batch's loss (Algorithm 1, line 5) to the parameters' `.grad`.

    Returns the loss, a detached scalar on the device.

    Args:
        inputs: x_0, (B, C, H, W), float in [-1, 1], on the model's device.
        timesteps, noise: as for the model, which draws what is not given.
        precision: "fp32", or "bf16" or "fp16" for the network's matrix products; loss and weights stay float32.
        micro_batch_size: at most this many images go through the network at once, which needs less memory; None for
            all. The gradient is the same up to rounding (with dropout, up to other masks).
        loss_scale: the gradient is that of the loss times this scalar, if one is given; see `modeling.run.loss_scale`.
        batch_size: images in the whole batch, where the inputs are some of its rows; their share of its loss is meant.
        seeds: instead of micro_batch_size: the batch is cut into as many parts, and each part's dropout is seeded.
    """
    num_parts = 1 if micro_batch_size is None else -(-len(inputs) // micro_batch_size)
    if seeds is not None:
        num_parts = len(seeds)
    rows = [repeat(None) if rows is None else rows.tensor_split(num_parts) for rows in (inputs, timesteps, noise)]
    parts = list(zip(*rows, seeds or repeat(None), strict=False))
    return _add_gradients(model, parts, batch_size or len(inputs), precision, loss_scale)


def _add_gradients(
    model: DiffusionModel, parts: list, batch_size: int, precision: str, loss_scale: Tensor | None
) -> Tensor:
    """Adds the gradients of a batch's parts, and returns their loss, as a binary tree over the parts' places.

    A process that has half of the parts then computes the same bits as one that has all of them. Two parts need no
    second copy of the gradient; each doubling after them needs one more.
    """
    if len(parts) > 2:
        half = first_half(len(parts))
        loss = _add_gradients(model, parts[:half], batch_size, precision, loss_scale)
        gradients = gradients_of(model.parameters())
        model.zero_grad()
        loss = loss + _add_gradients(model, parts[half:], batch_size, precision, loss_scale)
        torch._foreach_add_(gradients_of(model.parameters()), gradients)
        return loss
    losses = []
    for x_0, timesteps, noise, seed in parts:
        if seed is not None:
            torch.manual_seed(seed)
        with autocast(x_0.device, precision):
            loss = _call(model, x_0, precision, timesteps=timesteps, noise=noise)
        if len(x_0) < batch_size:
            loss = loss * (len(x_0) / batch_size)
        (loss if loss_scale is None else loss * loss_scale).backward()
        losses.append(loss.detach())
    return sum(losses[1:], losses[0])


def _call(model: DiffusionModel, x_0: Tensor, precision: str, **options: Tensor | None) -> Tensor:
    """The model's loss; on CUDA all weights are cast to half precision at once, unless the compiler fuses the casts."""
    dtype, is_compiled = DTYPES[precision], model._compiled_call_impl is not None
    if x_0.device.type != "cuda" or dtype is None or is_compiled:
        return model(x_0, **options)
    # No weight is tied to another one, and looking for such takes half a millisecond.
    return functional_call(model, half_copies(model, dtype), (x_0,), options, tie_weights=False)


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that there are, in the parameters' order."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def train_step(model: DiffusionModel, inputs: Tensor, optimizer: Optimizer, device: torch.device | str) -> Tensor:
    """Takes one step of Algorithm 1; inputs and result are those of `backward`, with inputs on any device."""
    optimizer.zero_grad()
    loss = backward(model, inputs.to(device, non_blocking=True))
    optimizer.step()
    return loss


def train_epoch(model: DiffusionModel, dataloader: Iterable, optimizer: Optimizer, device: torch.device | str) -> float:
    """Trains on every batch, x or (x, ...), with a progress bar; returns the mean loss over all images.

    Raises:
        ValueError: for a loader that yields nothing.
    """
    model.train()
    total, num_images = torch.zeros((), device=device), 0
    with progress_bar(dataloader, unit="step") as bar:
        for batch in bar:
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            total += train_step(model, inputs, optimizer, device) * len(inputs)  # on the device: no CPU-GPU sync
            num_images += len(inputs)
    if num_images == 0:
        raise ValueError("the dataloader yields no batch: it has fewer images than one batch takes")
    return (total / num_images).item()


def generate_samples(
    model: DiffusionModel,
    device: torch.device | str,
    path: str | Path,
    *,
    num_samples: int = 8,
    size: Sequence[int] = (3, 32, 32),
    sampler: Callable[[DiffusionModel, int, Sequence[int], torch.device | str], Tensor] = DiffusionModel.sample,
    about: dict[str, Any] | None = None,
) -> Tensor:
    """Samples images in eval mode, writes them as a PNG grid, creating its folder, and returns it, (3, H, W) uint8.

    Args:
        size: (C, H, W) of one image.
        sampler: called as sampler(model, num_samples, size, device); Algorithm 2 by default.
        about: what the file says of itself; see `modeling.images.encode_png`.
    """
    with evaluating(model):
        return save_grid(sampler(model, num_samples, size, device), path, about=about)
