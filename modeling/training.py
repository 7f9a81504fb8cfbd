"""Training: fit -> train_epoch -> train_step, one loop; and grids of samples.

What a run needs beside the loss (learning rate, random numbers, averaged weights, log lines, checkpoints) hangs on the
step number and is handed in, so that the plain loop and the full run are the same code.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from modeling.data import Batches
from modeling.diffusion import DiffusionModel, evaluating
from modeling.ema import Ema
from modeling.images import save_grid, to_model_range
from modeling.progress import progress_bar
from modeling.runtime import autocast, peak_memory_bytes
from modeling.seeding import Purpose, derive_seed, draw_integers, draw_normal

SMOOTHING = 0.99  # of the displayed loss: about the last hundred steps

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
    max_grad_norm: float | None = None,
) -> Tensor:
    """One step of Algorithm 1.

    Args:
        inputs: x_0, (B, C, H, W), float in [-1, 1].
        timesteps: (B,) integers in 1..T, drawn by the model if not given.
        noise: (B, C, H, W), drawn by the model if not given.
        precision: "fp32", or "bf16" for the network's matrix products (loss and weights stay float32).
        max_grad_norm: scales the gradient down to this norm; None leaves it.

    Returns:
        The loss, a detached scalar on the device.
    """
    inputs = inputs.to(device, non_blocking=True)
    with autocast(device, precision):
        loss = model(inputs, timesteps=timesteps, noise=noise)
    optimizer.zero_grad()
    loss.backward()
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return loss.detach()


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
    own_bar = progress_bar(total=len(dataloader), unit="step") if bar is None else None
    bar = own_bar if bar is None else bar
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


@dataclass
class TrainState:
    """What changes during a run beside weights, averaged weights and optimizer; all of it is in a checkpoint."""

    step: int = 0  # steps done
    loss_sum: float = 0.0  # over the steps since the last log line
    num_losses: int = 0
    loss_smoothed: float = 0.0  # exponential average over the steps
    seconds: float = 0.0  # spent in training steps, data loading included


class Stopwatch:
    """Seconds since the last `lap`, less those spent inside `paused`."""

    def __init__(self):
        self.started = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before


@dataclass
class RunStep:
    """`train_step` as step k of a run: everything beside the loss is a function of k.

    Args:
        state: where the run stands; step k is `state.step`, from 0.
        ema: average of the model's eps_model.
        learning_rate: step (from 0) -> learning rate.
        seed: the run's seed.
        steps_per_epoch: for the log lines.
        log: called with (steps done, metrics) every `log_every` steps and after the last one.
        save: called with the state every `checkpoint_every` steps and after the last one.
        last_step: the length of the run in steps.
        precision, max_grad_norm: as for `train_step`.

    Calling it raises FloatingPointError for a loss that is not finite, naming the step. The losses stay on the device
    until the next log line, so that may come up to `log_every` steps later, but never after a checkpoint was saved.
    """

    state: TrainState
    ema: Ema
    learning_rate: Callable[[int], float]
    seed: int
    steps_per_epoch: int
    log: Callable[[int, dict[str, float]], None]
    log_every: int
    save: Callable[[TrainState], None]
    checkpoint_every: int
    last_step: int
    precision: str = "fp32"
    max_grad_norm: float | None = None
    clock: Stopwatch = field(default_factory=Stopwatch)
    _losses: list[Tensor] = field(default_factory=list)
    _num_images: int = 0

    def __call__(
        self, model: DiffusionModel, inputs: Tensor, optimizer: Optimizer, device: torch.device | str
    ) -> Tensor:
        """Takes (B, C, H, W) uint8; otherwise as `train_step`."""
        step = self.state.step
        index = torch.arange(len(inputs), device=device)  # position in the global batch
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        torch.manual_seed(derive_seed(self.seed, Purpose.DROPOUT, step))
        loss = train_step(
            model,
            to_model_range(inputs.to(device, non_blocking=True)),
            optimizer,
            device,
            timesteps=draw_integers(self.seed, Purpose.TIMESTEP, step, index, model.num_timesteps) + 1,
            noise=draw_normal(self.seed, Purpose.NOISE, step, index, inputs.shape[1:]),
            precision=self.precision,
            max_grad_norm=self.max_grad_norm,
        )
        self.ema.update(model.eps_model, step)
        self.state.step += 1
        self._losses.append(loss)
        self._num_images += len(inputs)
        is_last = self.state.step == self.last_step
        if self.state.step % self.log_every == 0 or is_last:
            self._log_line()
        if self.state.step % self.checkpoint_every == 0 or is_last:
            self._collect_losses()
            with self.clock.paused():
                self.save(self.state)
        return loss

    def _collect_losses(self) -> None:
        """Moves the losses since the last time from the device into the state (CPU-GPU sync)."""
        losses = torch.stack(self._losses).tolist() if self._losses else []
        self._losses.clear()
        for step, loss in enumerate(losses, start=self.state.step - len(losses) + 1):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {step}: try a lower optimizer.lr, or optimizer.max_grad_norm=1"
                )
            decay = min(SMOOTHING, (step - 1) / (step + 8))  # step from 1: the first loss counts in full
            self.state.loss_smoothed = decay * self.state.loss_smoothed + (1 - decay) * loss
            self.state.loss_sum += loss
            self.state.num_losses += 1

    def _log_line(self) -> None:
        self._collect_losses()
        state = self.state
        loss = state.loss_sum / state.num_losses
        state.loss_sum, state.num_losses = 0.0, 0
        seconds, num_images = self.clock.lap(), self._num_images
        state.seconds += seconds
        self._num_images = 0
        metrics = {
            "epoch": (state.step - 1) // self.steps_per_epoch + 1,
            "train/loss": loss,
            "train/loss_smoothed": state.loss_smoothed,
            "train/lr": self.learning_rate(state.step - 1),
            "seconds": state.seconds,
            "images_per_second": num_images / seconds,
            "memory_bytes": peak_memory_bytes(),
        }
        with self.clock.paused():
            self.log(state.step, metrics)


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
        FloatingPointError: for a loss that is not finite, naming the step.
    """
    state, per_epoch = step.state, batches.steps_per_epoch
    pin_memory = torch.device(device).type == "cuda"
    while state.step < step.last_step:
        epoch = state.step // per_epoch + 1
        steps = range(state.step, min(epoch * per_epoch, step.last_step))
        train_epoch(model, batches.loader(steps, num_workers, pin_memory), optimizer, device, step=step, bar=bar)
        if epoch % sample_every == 0 or state.step == step.last_step:
            with step.clock.paused():
                sample(state.step)


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
