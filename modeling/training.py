"""Training: fit -> train_epoch -> train_step, one loop; and grids of samples.

What a run needs beside the loss (learning rate, random numbers, averaged weights, log lines, checkpoints) hangs on the
step number and is handed in, so that the plain loop and the full run are the same code.
"""

import math
from collections.abc import Callable, Iterable, Sized
from itertools import islice, repeat
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from modeling.data import Batches
from modeling.diffusion import DiffusionModel, evaluating
from modeling.images import save_grid
from modeling.progress import progress_bar
from modeling.run_step import RunStep
from modeling.runtime import autocast

Step = Callable[[DiffusionModel, Tensor, Optimizer, torch.device | str], Tensor]


def train_step(
    model: DiffusionModel,
    inputs: Tensor,
    optimizer: Optimizer,
    device: torch.device | str,
    *,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    precision: str = "fp32",
    micro_batch_size: int | None = None,
    loss_scale: Tensor | float = 1.0,
    update: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """One step of Algorithm 1.

    Args:
        inputs: x_0, (B, C, H, W), float in [-1, 1].
        timesteps: (B,) integers in 1..T, drawn by the model if not given.
        noise: (B, C, H, W), drawn by the model if not given.
        precision: "fp32", or "bf16" or "fp16" for the network's matrix products (loss and weights stay float32).
        micro_batch_size: at most so many images go through the network at a time, and their gradients add up to that of
            the batch: the same step up to rounding (with dropout, up to other masks), in less memory. None for all.
        loss_scale: the gradients are those of the loss times this; see `modeling.loss_scale`.
        update: called with the loss, once the gradients are there, in the place of `optimizer.step()`.

    Returns:
        The loss, a detached scalar on the device.
    """
    inputs = inputs.to(device, non_blocking=True)
    num_parts = 1 if micro_batch_size is None else math.ceil(len(inputs) / micro_batch_size)
    parts = [repeat(None) if rows is None else rows.tensor_split(num_parts) for rows in (inputs, timesteps, noise)]
    optimizer.zero_grad()
    loss = 0.0
    for x_0, part_timesteps, part_noise in zip(*parts, strict=False):
        with autocast(device, precision):
            part_loss = model(x_0, timesteps=part_timesteps, noise=part_noise) * (len(x_0) / len(inputs))
        (part_loss * loss_scale).backward()
        loss = loss + part_loss.detach()
    if update is None:
        optimizer.step()
    else:
        update(loss)
    return loss


def train_epoch(
    model: DiffusionModel,
    dataloader: Iterable,
    optimizer: Optimizer,
    device: torch.device | str,
    *,
    step: Step = train_step,
    bar: tqdm | None = None,
) -> float:
    """Trains on every batch of the loader.

    Args:
        dataloader: yields x or (x, ...), x as `step` takes it.
        step: called as `train_step` is.
        bar: a progress bar to advance; a new one over this epoch if not given.

    Returns:
        The mean loss, each image counted once.

    Raises:
        ValueError: for a loader that yields nothing.
    """
    model.train()
    total, num_images = torch.zeros((), device=device), 0
    own_bar = None
    if bar is None:
        bar = own_bar = progress_bar(total=len(dataloader) if isinstance(dataloader, Sized) else None, unit="step")
    for batch in dataloader:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        loss = step(model, inputs, optimizer, device)
        total += loss * len(inputs)  # stays on the device: no CPU-GPU sync
        num_images += len(inputs)
        bar.update()
    if own_bar is not None:
        own_bar.close()
    if num_images == 0:
        raise ValueError("the dataloader yields no batch: there are fewer images than one batch takes")
    return (total / num_images).item()


def fit(
    model: DiffusionModel,
    batches: Batches,
    optimizer: Optimizer,
    device: torch.device | str,
    *,
    step: RunStep,
    sample: Callable[[int], None],
    sample_every: int,
    num_workers: int = 0,
    bar: tqdm | None = None,
) -> None:
    """Trains from `step.state` to `step.last_step`.

    Args:
        step: the step of this run, with its state.
        sample: called with the steps done every `sample_every` epochs and after the last step.
        num_workers: processes that make batches; the result does not depend on it.
        bar: a progress bar over the run's steps.

    Raises:
        FloatingPointError: for too many steps in a row whose loss or gradient is not finite.
        Stopped: when the process is asked to end; `step.state` then is that of the last whole step.
    """
    state, per_epoch = step.state, batches.steps_per_epoch
    # One loader for the whole run: its workers wait at no epoch's edge, and none has to be started anew.
    loader = iter(batches.loader(range(state.step, step.last_step), num_workers, device))
    while True:
        epoch, steps_into_epoch = divmod(state.step, per_epoch)
        is_last = state.step == step.last_step
        # At the start, too: a run may have been stopped between a step and the samples that are due after it.
        if is_last or (state.step and steps_into_epoch == 0 and epoch % sample_every == 0):
            with step.clock.paused():
                sample(state.step)
        if is_last:
            return
        num_steps = min((epoch + 1) * per_epoch, step.last_step) - state.step
        train_epoch(model, islice(loader, num_steps), optimizer, device, step=step, bar=bar)


def generate_samples(
    model: DiffusionModel,
    device: torch.device | str,
    path: str | Path,
    *,
    num_samples: int = 8,
    size: tuple[int, int, int] = (3, 32, 32),
    sampler: Callable[..., Tensor] = DiffusionModel.sample,
    **options,
) -> Tensor:
    """Samples and writes them as a PNG grid, creating parent folders; train/eval mode is as before afterwards.

    Args:
        path: the PNG.
        size: (C, H, W) of one image.
        sampler: called as sampler(model, num_samples, size, device, **options); Algorithm 2 by default.

    Returns:
        The grid, (3, height, width) uint8.
    """
    with evaluating(model):
        return save_grid(sampler(model, num_samples, size, device, **options), path)
