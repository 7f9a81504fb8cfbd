"""The processes that work together, through torch.distributed; most often it is one alone."""

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from modeling.distributed.agreement import NUM_WAITS, WAIT_SECONDS, Agreement
from modeling.distributed.shares import Share, share_of, sum_as_tree
from modeling.system.errors import UserError
from modeling.system.signals import uninterrupted

Item = TypeVar("Item")
Result = TypeVar("Result")


class Processes(Agreement):
    """One of `count` processes that do the same work, each its part: rows of each training batch, or whole batches.

    All of them have all results. Process 0 alone owns files, writes and prints.
    """

    _gpus: distributed.ProcessGroup | None = None  # NCCL, for gradients on GPUs

    def share(self, batch_size: int, micro_batch_size: int | None) -> Share:
        """This process's share of a batch whose parts have at most `micro_batch_size` images (None: no limit).

        Raises:
            UserError: for a batch with fewer images than there are processes.
        """
        if batch_size < self.count:
            raise UserError(
                f"train.batch_size={batch_size}: it is shared by {self.count} processes, expected an image for each"
            )
        return share_of(self.rank, self.count, batch_size, micro_batch_size)

    def use(self, device: torch.device) -> None:
        """Takes this process's GPU, if the device is one.

        Raises:
            UserError: for more processes than GPUs.
        """
        if self.count == 1 or device.type == "cpu":
            return
        number = int(os.environ.get("LOCAL_RANK", self.rank))
        num_gpus = torch.cuda.device_count() if device.type == "cuda" else 1
        if number >= num_gpus:
            raise UserError(
                f"process {self.rank} is number {number + 1} on its machine, which has {num_gpus} GPUs: start one for "
                f"each GPU (torchrun --nproc-per-node={num_gpus}, or main.py runtime.processes={num_gpus}), or set "
                "device=cpu (of main.py: runtime.device=cpu)"
            )
        with uninterrupted():  # whoever has agreed takes part
            self.agree()
            torch.cuda.set_device(number)
            # All have agreed before each sum, so its time limit is for a process that dies within one.
            group = distributed.new_group(backend="nccl", timeout=timedelta(seconds=2 * NUM_WAITS * WAIT_SECONDS))
        assert isinstance(group, distributed.ProcessGroup)
        self._gpus = group

    def add_up(self, loss: Tensor, gradients: list[Tensor]) -> Tensor:
        """Replaces the gradients by their sums over the processes; returns the sum of the losses.

        On CPUs the sum is a tree over the processes' numbers; NCCL adds in an order of its own. To be called inside
        `uninterrupted`: after it every process finishes its step.

        Raises:
            SystemExit: instead, when a process ends.
        """
        if self.count == 1:
            return loss
        self.agree()
        ours = torch.cat([*(gradient.reshape(-1) for gradient in gradients), loss.reshape(1)])
        if self._gpus is not None:
            distributed.all_reduce(ours, group=self._gpus)
        else:
            ours = sum_as_tree(self._gather(ours))
        *sums, total = ours.split([*(gradient.numel() for gradient in gradients), 1])
        torch._foreach_copy_(gradients, [part.view(of.shape) for part, of in zip(sums, gradients, strict=True)])
        return total[0]

    def map(self, compute: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """The result of each item, in order and in every process; item k is computed by process k mod `count`.

        In rounds of an item for each process: what process 0 writes of a round is safe before the next one begins.

        Args:
            compute: its results are made of plain values and tensors on the CPU.

        Raises:
            SystemExit: when another process ends; within a round, as soon as this process's item is done.
        """
        if self.count == 1:
            yield from map(compute, items)
            return
        for start in range(0, len(items), self.count):
            self.expect_pause()
            ours = [compute(item) for item in items[start : start + self.count][self.rank : self.rank + 1]]
            results: list[list[Result]] = [[]] * self.count
            self._exchange_objects(distributed.all_gather_object, results, ours)
            for theirs in results:
                yield from theirs
        self.expect_pause()

    def once(self, compute: Callable[[], Result]) -> Result:
        """What process 0 computes, in every process: plain values and tensors on the CPU."""
        if self.count == 1:
            return compute()
        self.expect_pause()
        result: list[Any] = [compute() if self.rank == 0 else None]
        self._exchange_objects(distributed.broadcast_object_list, result, 0)
        self.expect_pause()
        return result[0]

    def check_same(self, what: str, ours: Any) -> None:
        """Raises UserError in a process whose value is another one than that of process 0; plain values."""
        theirs = self.once(lambda: ours)
        if theirs != ours:
            raise UserError(
                f"{what} is {ours} for process {self.rank} and {theirs} for process 0: expected that all see the same "
                "files, and that no other run replaces them meanwhile"
            )
        self.agree()  # none goes on before all are equal

    def _exchange_objects(self, collective: Callable, *arguments: object) -> None:
        with uninterrupted():  # whoever has agreed takes part
            self.agree()
            try:
                collective(*arguments, weights_only=True)
            except RuntimeError as error:
                raise self._loss() from error


ALONE = Processes()
