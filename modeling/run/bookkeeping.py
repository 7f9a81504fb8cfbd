"""What a run counts beside its weights: steps, losses, time; its log lines; when what is due."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.run.loss_scale import INITIAL_SCALE
from modeling.runtime import peak_memory_bytes

SMOOTHING = 0.99  # of the displayed loss: about the last hundred steps


@dataclass
class TrainState:
    """What changes during a run beside weights, averaged weights and optimizer; all of it is in a checkpoint."""

    step: int = 0  # steps done, the skipped ones included
    loss_sum: float = 0.0  # over the steps since the last log line, the skipped ones left out
    num_losses: int = 0
    loss_smoothed: float = 0.0  # exponential average over the steps
    num_skipped: int = 0  # steps whose loss or gradient was not finite
    num_skipped_in_row: int = 0
    loss_scale: float = INITIAL_SCALE  # fp16, as the next one
    num_finite_at_scale: int = 0  # steps in a row
    seconds: float = 0.0  # spent in training steps, data loading included


Line = dict[str, float | None]


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
        try:
            yield
        finally:  # also when the run is stopped inside
            self.started += time.perf_counter() - before


@dataclass
class Bookkeeping:
    """Counts the steps of a run and keeps their losses on the device until they are asked for."""

    state: TrainState  # the present one of the run; it is updated
    steps_per_epoch: int
    last_step: int  # the length of the run
    log_every: int  # steps between log lines, and always after the last step
    checkpoint_every: int  # steps between checkpoints, and always after the last step
    sample_every: int  # epochs between grids of samples, and always after the last step
    checkpoint_seconds: float = math.inf  # a checkpoint is also due after this time
    max_skipped_in_row: int = 10  # this many skipped steps, one after the other, end the run
    precision: str = "fp32"  # this and the next one: for the remedy in that error
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        self.clock = Stopwatch()
        self._saved_at = time.monotonic()
        self._losses: list[Tensor] = []
        self._num_images, self._seconds = 0, 0.0  # since the last log line

    def count_step(self, loss: Tensor, num_images: int) -> None:
        """After each step; the loss is a scalar on the device, NaN for a skipped step (no CPU-GPU sync)."""
        self.state.step += 1
        self._losses.append(loss)
        self._num_images += num_images

    def count_time(self) -> None:
        """Moves the time since the last call into the state."""
        seconds = self.clock.lap()
        self.state.seconds += seconds
        self._seconds += seconds

    @property
    def is_line_due(self) -> bool:
        return self.state.step % self.log_every == 0 or self.state.step == self.last_step

    @property
    def is_checkpoint_due(self) -> bool:
        return self.state.step % self.checkpoint_every == 0 or self.state.step == self.last_step

    @property
    def is_checkpoint_late(self) -> bool:
        """Whether one is due after the next step because of the time since the last one."""
        return time.monotonic() - self._saved_at >= self.checkpoint_seconds

    @property
    def are_samples_due(self) -> bool:
        """Every `sample_every` epochs and after the last step."""
        epoch, steps_into_epoch = divmod(self.state.step, self.steps_per_epoch)
        is_edge = epoch > 0 and steps_into_epoch == 0 and epoch % self.sample_every == 0
        return is_edge or self.state.step == self.last_step

    def note_checkpoint(self) -> None:
        """After a checkpoint was written: the time to the next one begins."""
        self._saved_at = time.monotonic()

    def collect_losses(self) -> None:
        """Moves the losses since the last time from the device into the state (CPU-GPU sync).

        Raises:
            FloatingPointError: for too many skipped steps in a row.
        """
        state, losses = self.state, torch.stack(self._losses).tolist() if self._losses else []
        self._losses.clear()
        for step, loss in enumerate(losses, start=state.step - len(losses) + 1):
            if math.isnan(loss):
                state.num_skipped += 1
                state.num_skipped_in_row += 1
                if state.num_skipped_in_row >= self.max_skipped_in_row:
                    raise FloatingPointError(
                        f"the loss or its gradient was not finite in {self.max_skipped_in_row} steps in a row "
                        f"({step - self.max_skipped_in_row + 1} to {step}): "
                        "try a lower optimizer.lr"
                        + (" or optimizer.max_grad_norm=1" if self.max_grad_norm is None else "")
                        + (" or runtime.precision=fp32" if self.precision == "fp16" else "")
                    )
                continue
            state.num_skipped_in_row = 0
            decay = min(SMOOTHING, (step - 1) / (step + 8))  # step from 1: the first loss counts in full
            state.loss_smoothed = decay * state.loss_smoothed + (1 - decay) * loss
            state.loss_sum += loss
            state.num_losses += 1

    def make_line(self, learning_rate: float) -> Line:
        """The metrics of a log line: means since the line before, which begin again here.

        Args:
            learning_rate: of the last step.
        """
        self.collect_losses()
        state = self.state
        loss = state.loss_sum / state.num_losses if state.num_losses else None
        state.loss_sum, state.num_losses = 0.0, 0
        self.count_time()
        num_images, seconds = self._num_images, self._seconds
        self._num_images, self._seconds = 0, 0.0
        return {
            "epoch": (state.step - 1) // self.steps_per_epoch + 1,
            "train/loss": loss,
            "train/loss_smoothed": state.loss_smoothed,
            "train/lr": learning_rate,
            "train/skipped": state.num_skipped,
            "seconds": state.seconds,
            "images_per_second": num_images / seconds,
            "memory_bytes": peak_memory_bytes(),
        }


def describe_line(line: Line) -> str:
    """The part of a log line that is shown beside the progress bar."""
    skipped = f", {line['train/skipped']} skipped" if line["train/skipped"] else ""
    return f"{line['images_per_second']:.0f} images/s, loss {line['train/loss_smoothed']:.4f}{skipped}"
