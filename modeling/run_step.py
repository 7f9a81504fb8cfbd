"""A training step as step k of a run: what it draws, whether it counts, what it records, when it is saved."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from modeling.diffusion import DiffusionModel
from modeling.ema import Ema
from modeling.images import to_model_range
from modeling.loss_scale import INITIAL_SCALE, LossScale
from modeling.runtime import peak_memory_bytes
from modeling.seeding import Purpose, derive_seed, draw_integers, draw_normal
from modeling.signals import uninterrupted

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

    A step whose loss or gradient is not finite changes neither weights nor average nor optimizer; it is counted, and
    the run goes on with the next batch.

    Dropout alone draws from torch's generator, seeded for each step: its masks depend on the size of the micro-batches.

    Args:
        train_step: `modeling.training.train_step`.
        state: where the run stands; step k is `state.step`, from 0.
        ema: average of the model's eps_model.
        learning_rate: step (from 0) -> learning rate.
        seed: the run's seed.
        steps_per_epoch: for the log lines.
        log: called with (steps done, metrics) every `log_every` steps and after the last one.
        save: called with the state every `checkpoint_every` steps, or after `checkpoint_seconds` if that is sooner,
            and after the last step.
        last_step: the length of the run in steps.
        max_skipped_in_row: so many skipped steps, one after the other, end the run.
        precision: as for `train_step`.
        micro_batch_size: as for `train_step`.
        max_grad_norm: scales the gradient down to this norm; None leaves it.

    Calling it raises FloatingPointError for too many skipped steps in a row. Losses stay on the device until the next
    log line, so that may come up to `log_every` steps later.
    """

    train_step: Callable[..., Tensor]
    state: TrainState
    ema: Ema
    learning_rate: Callable[[int], float]
    seed: int
    steps_per_epoch: int
    log: Callable[[int, dict[str, float | None]], None]
    log_every: int
    save: Callable[[TrainState], None]
    checkpoint_every: int
    last_step: int
    checkpoint_seconds: float = math.inf
    max_skipped_in_row: int = 10
    precision: str = "fp32"
    micro_batch_size: int | None = None
    max_grad_norm: float | None = None
    clock: Stopwatch = field(default_factory=Stopwatch)
    _saved_at: float = field(default_factory=lambda: time.monotonic())
    _losses: list[Tensor] = field(default_factory=list)
    _num_images: int = 0
    _loss_scale: LossScale | None = None

    def __call__(
        self, model: DiffusionModel, inputs: Tensor, optimizer: Optimizer, device: torch.device | str
    ) -> Tensor:
        """Takes (B, C, H, W) uint8; otherwise as `train_step`."""
        step = self.state.step
        index = torch.arange(len(inputs), device=device)  # position in the global batch
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        torch.manual_seed(derive_seed(self.seed, Purpose.DROPOUT, step))
        if self.precision == "fp16" and self._loss_scale is None:
            self._loss_scale = LossScale(self.state.loss_scale, self.state.num_finite_at_scale, device)
        return self.train_step(
            model,
            to_model_range(inputs.to(device, non_blocking=True)),
            optimizer,
            device,
            timesteps=draw_integers(self.seed, Purpose.TIMESTEP, step, index, model.num_timesteps) + 1,
            noise=draw_normal(self.seed, Purpose.NOISE, step, index, inputs.shape[1:]),
            precision=self.precision,
            micro_batch_size=self.micro_batch_size,
            loss_scale=1.0 if self._loss_scale is None else self._loss_scale.scale,
            update=partial(self._finish, model, optimizer, len(inputs)),
        )

    def _finish(self, model: DiffusionModel, optimizer: Optimizer, num_images: int, loss: Tensor) -> None:
        """All that the step changes. Nothing interrupts it, so a stopped run is always between two steps."""
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        if self._loss_scale is not None:
            self._loss_scale.unscale([parameter.grad for parameter in parameters])
        grad_norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, grad_norm)
        with uninterrupted():
            is_skipped = ~torch.isfinite(loss + grad_norm)
            if loss.device.type == "cuda":
                self._update_on_device(model, optimizer, is_skipped)
            elif not is_skipped:
                optimizer.step()
                self.ema.update(model.eps_model, self.state.step)
            if self._loss_scale is not None:
                self._loss_scale.update(is_skipped)
            self.state.step += 1
            self._losses.append(torch.where(is_skipped, math.nan, loss))
            self._num_images += num_images
            is_last = self.state.step == self.last_step
            if self.state.step % self.log_every == 0 or is_last:
                self._log_line()
            is_time = time.monotonic() - self._saved_at >= self.checkpoint_seconds
            if self.state.step % self.checkpoint_every == 0 or is_last or is_time:
                with self.clock.paused():
                    self.checkpoint()

    def _update_on_device(self, model: DiffusionModel, optimizer: Optimizer, is_skipped: Tensor) -> None:
        """The update where the device decides on its own whether the step counts: no CPU-GPU sync."""
        optimizer.found_inf = is_skipped.float()  # the fused optimizers then leave everything as it is
        optimizer.step()
        self.ema.update(model.eps_model, self.state.step, unless=is_skipped)

    def checkpoint(self) -> None:
        """Saves the state now."""
        self._collect_losses()
        if self._loss_scale is not None:
            self.state.loss_scale = self._loss_scale.scale.item()
            self.state.num_finite_at_scale = self._loss_scale.num_finite.item()
        self.save(self.state)
        self._saved_at = time.monotonic()

    def _collect_losses(self) -> None:
        """Moves the losses since the last time from the device into the state (CPU-GPU sync)."""
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
                        "try a lower optimizer.lr, optimizer.max_grad_norm=1"
                        + (" or runtime.precision=fp32" if self.precision == "fp16" else "")
                    )
                continue
            state.num_skipped_in_row = 0
            decay = min(SMOOTHING, (step - 1) / (step + 8))  # step from 1: the first loss counts in full
            state.loss_smoothed = decay * state.loss_smoothed + (1 - decay) * loss
            state.loss_sum += loss
            state.num_losses += 1

    def _log_line(self) -> None:
        self._collect_losses()
        state = self.state
        loss = state.loss_sum / state.num_losses if state.num_losses else None
        state.loss_sum, state.num_losses = 0.0, 0
        seconds, num_images = self.clock.lap(), self._num_images
        state.seconds += seconds
        self._num_images = 0
        metrics = {
            "epoch": (state.step - 1) // self.steps_per_epoch + 1,
            "train/loss": loss,
            "train/loss_smoothed": state.loss_smoothed,
            "train/lr": self.learning_rate(state.step - 1),
            "train/skipped": state.num_skipped,
            "seconds": state.seconds,
            "images_per_second": num_images / seconds,
            "memory_bytes": peak_memory_bytes(),
        }
        with self.clock.paused():
            self.log(state.step, metrics)
