"""The processes that train one run together, through torch.distributed; most often it is one alone."""

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from modeling.system.errors import Failed, UserError
from modeling.system.shares import Share, share_of, sum_as_tree
from modeling.system.signals import STOPPING, Stopped, uninterrupted

JOIN_SECONDS = 300  # for all processes to start
WAIT_SECONDS, NUM_WAITS = 1, 45  # for a step of the others; many short waits: one is over at once after a suspension
SAY_SECONDS = 2  # in which those that are alive have said so, once one has failed
GOING_ON = 0  # a process's word at an agreement; another one is 1 + the exit code that it ends with


class Processes:
    """One of `count` processes that take the same steps, each on its rows of the batch.

    Process 0 alone owns the run's folder, and writes, prints and samples, while the others wait. What ends one of them
    (a signal, an error) ends all, at the same step: each gives its word before gradients are added up.

    Args:
        rank: this process's number.
        store: where each process notes how many agreements it has come to.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: distributed.Store | None = None):
        self.rank, self.count, self.store = rank, count, store
        self._gpus: distributed.ProcessGroup | None = None  # NCCL, for gradients on GPUs
        self._num_agreed = 0
        self._may_pause = True  # whether process 0 may keep the others waiting before the next agreement
        self._is_over = False  # one has said that it ends
        self._is_lost = False  # one has not answered

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
        if self.count == 1 or device.type != "cuda":
            return
        number, num_gpus = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        if number >= num_gpus:
            raise UserError(
                f"process {self.rank} is number {number + 1} on its machine, which has {num_gpus} GPUs: start one for "
                f"each GPU (torchrun --nproc-per-node={num_gpus}), or set runtime.device=cpu"
            )
        self.agree()
        torch.cuda.set_device(number)
        group = distributed.new_group(backend="nccl")
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

    def expect_pause(self) -> None:
        """Before the next agreement process 0 may write or sample, which may take longer than a step."""
        self._may_pause = True

    def agree(self) -> None:
        """Waits until all processes have come here or end.

        Raises Failed or Stopped when one ends, and UserError when one is dead or does not answer.
        """
        if self.count == 1:
            return
        with uninterrupted():
            codes = [word - 1 for word in self._exchange(GOING_ON) if word != GOING_ON]
            if not codes:
                return
        if codes[0] not in STOPPING.values():
            raise Failed("", codes[0])
        reason = next(name for name, code in STOPPING.items() if code == codes[0])
        raise Stopped("the time limit" if reason == "SIGALRM" else reason, codes[0])

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Process 0 does this section before the others begin it."""
        if self.rank:
            self.agree()
        yield
        if self.rank == 0:
            self.expect_pause()
            self.agree()

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Ends the section in all processes once it ends in one, with one message, when process 0 is done with it."""
        try:
            yield
            self.expect_pause()
            self.agree()
        except BaseException as error:
            if self._is_lost:
                raise
            code, is_heard = error.code if isinstance(error, SystemExit) else 1, self._is_over
            if not self._is_over:
                words = self._exchange(1 + int(code or 0))
                is_heard = next(rank for rank, word in enumerate(words) if word != GOING_ON) != self.rank
            with contextlib.suppress(UserError, Failed):  # a launcher ends the others as soon as one has ended
                self.expect_pause()
                self._exchange(GOING_ON)
            if is_heard and self.rank:
                raise Failed("", int(code or 0)) from None
            raise

    def _exchange(self, word: int) -> list[int]:
        """Every process's word."""
        assert self.store is not None
        self._num_agreed = self.store.add(str(self.rank), 1)
        words = [int(theirs) for theirs in self._gather(torch.tensor([word]))]
        self._may_pause, self._is_over = False, self._is_over or any(words)
        return words

    def _gather(self, ours: Tensor) -> list[Tensor]:
        """Every process's tensor.

        Raises UserError or Failed when one is dead, or does not answer.
        """
        theirs, num_waits = [torch.empty_like(ours) for _ in range(self.count)], 0
        try:
            work = distributed.all_gather(theirs, ours, async_op=True)
            while True:
                try:
                    work.wait(timedelta(seconds=WAIT_SECONDS))
                    return theirs
                except RuntimeError as error:  # it was too long, or the connection is closed
                    num_waits += 1
                    if "timed out" not in str(error) or (num_waits >= NUM_WAITS and not self._may_pause):
                        raise
        except RuntimeError as error:
            raise self._loss() from error

    def _loss(self) -> UserError | Failed:
        """What ends this process when another one is dead or hangs; the first of the living says which."""
        assert self.store is not None
        self._is_lost = True
        try:
            self.store.add(str(self.rank), 1)  # it lives
            time.sleep(SAY_SECONDS)
            counts = [self.store.add(str(rank), 0) - self._num_agreed for rank in range(self.count)]
        except RuntimeError:  # without a launcher process 0 keeps the counts
            counts = [-1] + [1] * (self.count - 1)
        # Those that have not come to this agreement; else those that came, but do not say that they live.
        missing = [rank for rank in range(self.count) if counts[rank] == min(counts) < 1]
        if self.rank != min(set(range(self.count)) - set(missing)):
            return Failed("", 1)
        who = f"process {', '.join(map(str, missing))}" if missing else "one"
        remedy = "the same command resumes the run from its last checkpoint"
        return UserError(f"{who} of {self.count} is dead or does not answer: {remedy}")


ALONE = Processes()


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """Joins the processes that a launcher such as torchrun has started; without one there is this process alone.

    Inside, what ends one process ends all, and all but process 0 print nothing.

    Raises:
        UserError: when they do not find each other.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    try:
        store, rank, count = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))
        store = distributed.PrefixStore(str(store.add(f"joined by {rank}", 1)), store)  # each run of a sweep its own
        # Its own time limit is for the whole run: how long a process waits is decided at each agreement.
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(days=1))
    except RuntimeError as error:
        what = "{WORLD_SIZE} processes have not found each other at {MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ)
        raise UserError(f"{what}: {str(error).splitlines()[0]}") from error
    processes = Processes(rank, count, store)
    try:
        with contextlib.ExitStack() as silenced:
            if rank:
                nowhere = silenced.enter_context(open(os.devnull, "w"))
                silenced.enter_context(contextlib.redirect_stdout(nowhere))
                silenced.enter_context(contextlib.redirect_stderr(nowhere))
            with processes.ending_together():
                yield processes
    finally:
        distributed.destroy_process_group()
