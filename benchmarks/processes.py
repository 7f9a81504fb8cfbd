"""Training steps shared by several processes, as `runtime.processes` starts them, and what adding gradients costs."""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor, distributed

from benchmarks.contender import Contender
from benchmarks.training import our_run, our_training
from modeling.distributed.launcher import joined
from modeling.distributed.processes import Processes
from modeling.system.signals import uninterrupted


class _Apart(Processes):
    """Processes that share batches, and do not add up: what a step takes without the sum and without waiting."""

    def add_up(self, loss: Tensor, gradients: list[Tensor]) -> Tensor:
        return loss


def _sums(overrides: list[str], batch_size: int, folder: str, processes: Processes) -> Contender:
    """The sum of the gradients, and nothing else of the step."""
    run = our_run([*overrides, f"train.batch_size={batch_size}"], folder, processes)
    loss, gradients = torch.zeros(()), [torch.zeros_like(parameter) for parameter in run.model.parameters()]

    def sums(num_steps: int) -> None:
        for _ in range(num_steps):
            with uninterrupted():
                processes.add_up(loss, gradients)

    return Contender(sums, batch_size, 0)


def _part(what: str, processes: Processes, overrides: list[str], batch_size: int, folder: str) -> Contender:
    """A process's part of the contender."""
    if what == "sums":
        return _sums(overrides, batch_size, folder, processes)
    if what == "apart":
        processes = _Apart(processes.rank, processes.count)
    return our_training(overrides, batch_size, folder, processes)


def shared_training(what: str, count: int, overrides: list[str], batch_size: int, folder: str) -> Contender:
    """Our training in processes that share each batch and the CPUs.

    Args:
        what: "steps"; "apart", in which they do not wait for each other; or "sums", what they wait for alone.
        count: of the processes.
    """
    part = functools.partial(_part, what, overrides=overrides, batch_size=batch_size, folder=folder)
    stack = contextlib.ExitStack()
    contender = part(stack.enter_context(joined(count, None, functools.partial(_follow, part))))

    def run(num_steps: int) -> None:
        _heard(num_steps)
        contender.run(num_steps)

    def close() -> None:
        _heard(0)
        stack.close()

    return Contender(run, batch_size, contender.flops_per_image, close)


def _follow(part: Callable[[Processes], Contender]) -> None:
    with joined() as processes:
        contender = part(processes)
        while num_steps := _heard(0):
            contender.run(num_steps)


def _heard(num_steps: int) -> int:
    """What process 0 calls it with."""
    number = torch.tensor([num_steps])
    distributed.broadcast(number, 0)
    return int(number)
