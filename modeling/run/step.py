"""A training step as step k of a run: what it draws, what it computes and what it changes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from modeling.diffusion import DiffusionModel
from modeling.distributed.processes import ALONE, Processes
from modeling.ema import Ema
from modeling.images import to_model_range
from modeling.run.bookkeeping import TrainState
from modeling.run.loss_scale import LossScale
from modeling.seeding import Purpose, derive_seed, draw_normal, draw_stratified
from modeling.training import backward, gradients_of


@dataclass
class Step:
    """Algorithm 1 in a run: all that is drawn is a function of the seed and the step number.

    Dropout alone draws from torch's generator, seeded for each part: its masks depend on the size of the micro-batches.
    """

    model: DiffusionModel
    ema: Ema  # averages model.eps_model
    optimizer: Optimizer
    state: TrainState  # step k is `state.step`, from 0
    seed: int  # the run's
    learning_rate: Callable[[int], float]  # step (from 0) -> learning rate
    precision: str = "fp32"  # for `modeling.training.backward`
    micro_batch_size: int | None = None  # likewise
    max_grad_norm: float | None = None  # scales the gradient down to this norm; None leaves it
    processes: Processes = ALONE  # that share the batch
    batch_size: int | None = None  # of the whole batch; None: the rows that `backward` gets are all of it

    def __post_init__(self) -> None:
        self.device = self.model.betas.device
        self.loss_scale: LossScale | None = None
        if self.precision == "fp16":
            self.loss_scale = LossScale(self.state.loss_scale, self.state.num_finite_at_scale, self.device)

    def backward(self, images: Tensor) -> Tensor:
        """The gradient of this step's loss on this process's rows of the batch, (B, C, H, W) uint8.

        Returns their part of the loss, a scalar on the device.
        """
        step, batch_size = self.state.step, self.batch_size or len(images)
        share = self.processes.share(batch_size, self.micro_batch_size)
        index = torch.arange(share.rows.start, share.rows.stop)  # position in the global batch
        timesteps = draw_stratified(self.seed, Purpose.TIMESTEP, step, index, batch_size, self.model.num_timesteps) + 1
        index, timesteps = (rows.to(self.device, non_blocking=True) for rows in (index, timesteps))
        self.optimizer.zero_grad()
        return backward(
            self.model,
            to_model_range(images.to(self.device, non_blocking=True)),
            timesteps=timesteps,
            noise=draw_normal(self.seed, Purpose.NOISE, step, index, images.shape[1:]),
            precision=self.precision,
            loss_scale=None if self.loss_scale is None else self.loss_scale.scale,
            batch_size=batch_size,
            seeds=[derive_seed(self.seed, Purpose.DROPOUT, step, place) for place in share.parts],
        )

    def update(self, loss: Tensor) -> Tensor:
        """Adds up and clips the gradient, then moves weights and average, unless loss or gradient is not finite.

        A skipped step changes neither weights nor average nor optimizer. All processes do the same update.

        Args:
            loss: of this process's rows.

        Returns:
            The loss of the batch, NaN for a skipped step.

        Raises:
            SystemExit: when another process ends.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.state.step)
        gradients = gradients_of(self.model.parameters())
        loss = self.processes.add_up(loss, gradients)
        if self.loss_scale is not None:
            self.loss_scale.unscale(gradients)
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.max_grad_norm, grad_norm)
        is_skipped = ~torch.isfinite(loss + grad_norm)
        if loss.device.type == "cuda":
            self._update_on_device(is_skipped)
        elif not is_skipped:
            self.optimizer.step()
            self.ema.update(self.model.eps_model, self.state.step)
        if self.loss_scale is not None:
            self.loss_scale.update(is_skipped)
        return torch.where(is_skipped, math.nan, loss)

    def _update_on_device(self, is_skipped: Tensor) -> None:
        """The update where the device decides on its own whether the step counts: no CPU-GPU sync."""
        # Where this is 1 the fused optimizers leave everything as it is; torch's stubs do not know it.
        self.optimizer.found_inf = is_skipped.float()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.ema.update(self.model.eps_model, self.state.step, unless=is_skipped)

    def store_loss_scale(self) -> None:
        """Moves the scale of the loss from the device into the state (CPU-GPU sync)."""
        if self.loss_scale is not None:
            self.state.loss_scale = self.loss_scale.scale.item()
            self.state.num_finite_at_scale = int(self.loss_scale.num_finite.item())
