"""A run without files, for the tests of its loop: it records what it should log, save and sample."""

import inspect
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim import SGD, Optimizer

from modeling.data import Batches
from modeling.diffusion import DiffusionModel
from modeling.ema import Ema
from modeling.run.bookkeeping import Bookkeeping, TrainState
from modeling.run.loop import Training
from modeling.run.step import Step
from tests.helpers import random_images

IMAGES = random_images(20, 3, 32, 32)


class Recorder:
    """Stands for a `Run` and its tracker.

    Args:
        make: the class of the steps.
        options: of `Step` and `Bookkeeping`.
    """

    def __init__(
        self,
        model: DiffusionModel,
        last_step: int = 8,
        batches: Batches | None = None,
        optimizer: Optimizer | None = None,
        *,
        ema: Ema | None = None,
        state: TrainState | None = None,
        make: type[Step] = Step,
        **options: Any,
    ):
        self.lines, self.saved, self.sampled = [], [], []
        self.model, self.last_step, self.device = model, last_step, torch.device("cpu")
        self.batches = batches or Batches(IMAGES, 4, seed=0)
        self.optimizer = optimizer or SGD(model.parameters(), lr=0.01)
        self.ema, self.state = ema or Ema(model.eps_model, 0.9), state or TrainState()
        self.config = SimpleNamespace(runtime=SimpleNamespace(num_workers=0))
        self._make, self._options = make, {"log_every": 2, "checkpoint_every": 3, "sample_every": 1} | options
        stand_in: Any = self
        self.training = Training(stand_in, stand_in)

    def _given(self, made: type) -> dict[str, Any]:
        names = inspect.signature(made).parameters
        return {name: value for name, value in self._options.items() if name in names}

    def make_step(self) -> Step:
        given: dict[str, Any] = {"learning_rate": lambda step: 0.01} | self._given(Step)
        return self._make(self.model, self.ema, self.optimizer, self.state, self.batches.seed, **given)

    def make_books(self) -> Bookkeeping:
        return Bookkeeping(self.state, self.batches.steps_per_epoch, self.last_step, **self._given(Bookkeeping))

    def log(self, step: int, metrics: dict) -> None:
        self.lines.append({"step": step} | metrics)

    def sync(self) -> None:
        pass

    def save(self) -> None:
        self.saved.append(self.state.step)

    def sample(self, tracker) -> None:
        self.sampled.append(self.state.step)

    def fit(self) -> "Recorder":
        self.training.fit()
        return self


def run(model: DiffusionModel, last_step: int = 8, **options: Any) -> Recorder:
    """Trains the model as a run does."""
    return Recorder(model, last_step, **options).fit()


def with_losses(losses: list[float]) -> type[Step]:
    """Steps that have these losses and change nothing."""
    values = iter(losses)

    class Given(Step):
        def backward(self, images):
            return torch.tensor(next(values))

        def update(self, loss):
            return loss

    return Given


def spoiled(kind: str, bad_steps: set[int]) -> type[Step]:
    """Steps of which some (calls, from 0) have a bad loss, a bad batch or one bad number in the gradient."""
    calls = iter(range(10_000))

    class Spoiled(Step):
        def backward(self, images):
            if next(calls) not in bad_steps:
                return super().backward(images)
            if kind == "batch":
                self.model.eps_model.register_forward_pre_hook(spoil_once)
                return super().backward(images)
            loss = super().backward(images)
            what, value = kind.split()
            if what == "gradient":
                gradient = next(self.model.parameters()).grad
                assert gradient is not None
                gradient.flatten()[3] = float(value)
            return loss * float(value) if what == "loss" else loss

    def spoil_once(module, arguments):
        module._forward_pre_hooks.clear()
        x_t = arguments[0].clone()
        x_t[1, 0, 5, 5] = math.nan
        return x_t, *arguments[1:]

    return Spoiled
