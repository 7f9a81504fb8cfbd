"""How processes that work together end together: each gives its word, and one that is dead or hangs is named."""

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor, distributed

from modeling.system.errors import Failed, UserError
from modeling.system.signals import STOPPING, Stopped, uninterrupted

WAIT_SECONDS, NUM_WAITS = 1, 45  # for a step of the others; many short waits: one is over at once after a suspension
NUM_SILENT_WAITS = 450  # without a sign of life of one; long, since a library may keep Python's threads from running
SAY_SECONDS = 2  # in which those that are alive have said so, once one has failed
# A process's word at an agreement; another one is 1 + the exit code that it ends with.
GOING_ON, PAUSING = 0, -1
_HOLDING = "holding"  # the key in the store


class Agreement:
    """What one of `count` processes knows of the others.

    What ends one of them (a signal, an error) ends all, where they next agree.

    Args:
        rank: this process's number.
        store: where each process notes how many agreements it has come to.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: distributed.Store | None = None):
        self.rank, self.count, self.store = rank, count, store
        self._num_agreed = 0
        self._may_pause = True  # whether one may keep the others waiting before the next agreement
        self._will_pause = False  # this process's word at the next one
        self._is_over = False  # one has said that it ends
        self._is_lost = False  # one has not answered
        self._silent: list[int] = []  # which gave no sign of life for long

    def expect_pause(self) -> None:
        """Before the next agreement one process may take longer than a step: it writes, or computes a batch.

        Each process has to know it by itself; what one alone knows it announces.
        """
        self._may_pause = True

    def announce_pause(self) -> None:
        """Says at the next agreement that this process may take longer than a step before the one after."""
        self._will_pause = True

    def hold(self) -> None:
        """Lets the others wait for this process's next word for as long as it lives: it saves before it ends."""
        if self.store is not None:
            with contextlib.suppress(RuntimeError):  # the store has ended: nobody waits
                self.store.add(_HOLDING, 1)

    @contextlib.contextmanager
    def showing_life(self) -> Iterator[None]:
        """Inside, a thread gives signs of life, without which the others would wait for ever in a pause."""
        over = threading.Event()

        def show() -> None:
            with contextlib.suppress(RuntimeError):  # the store has ended
                while self.store is not None and not over.wait(WAIT_SECONDS):
                    self.store.add(_life(self.rank), 1)

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(SAY_SECONDS)

    def agree(self) -> None:
        """Waits until all processes have come here or end.

        Raises Failed or Stopped when one ends, and UserError when one is dead or does not answer.
        """
        if self.count == 1:
            return
        with uninterrupted():
            words = self._exchange(PAUSING if self._will_pause else GOING_ON)
            codes = [word - 1 for word in words if word > GOING_ON]
            if not codes:
                return
        if codes[0] not in STOPPING.values():
            raise Failed("", codes[0])
        reason = next(name for name, code in STOPPING.items() if code == codes[0])
        raise Stopped("the time limit" if reason == "SIGALRM" else reason, codes[0])

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Process 0 does this section before the others begin it."""
        self.expect_pause()
        if self.rank:
            self.agree()
        yield
        if self.rank == 0:
            self.agree()
        self.expect_pause()

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
                is_heard = next(rank for rank, word in enumerate(words) if word > GOING_ON) != self.rank
            with contextlib.suppress(UserError, Failed):  # a launcher ends the others as soon as one has ended
                self.expect_pause()
                self._exchange(GOING_ON)
            if is_heard and self.rank:
                raise Failed("", int(code or 0)) from None
            raise

    def _exchange(self, word: int) -> list[int]:
        """Every process's word."""
        assert self.store is not None
        try:
            self._num_agreed = self.store.add(str(self.rank), 1)
        except RuntimeError as error:  # without a launcher the store ends with process 0
            raise self._loss() from error
        words = [int(theirs) for theirs in self._gather(torch.tensor([word]))]
        self._will_pause, self._may_pause = False, PAUSING in words
        self._is_over = self._is_over or max(words) > GOING_ON
        return words

    def _gather(self, ours: Tensor) -> list[Tensor]:
        """Every process's tensor.

        Raises UserError or Failed when one is dead, or does not answer.
        """
        assert self.store is not None
        theirs, num_waits = [torch.empty_like(ours) for _ in range(self.count)], 0
        signs, silences = [-1] * self.count, [0] * self.count
        try:
            work = distributed.all_gather(theirs, ours, async_op=True)
            while True:
                try:
                    work.wait(timedelta(seconds=WAIT_SECONDS))
                    return theirs
                except RuntimeError as error:  # it was too long, or the connection is closed
                    num_waits += 1
                    if "timed out" not in str(error):
                        raise
                    if num_waits >= NUM_WAITS and not self._may_pause and not self.store.add(_HOLDING, 0):
                        raise
                    before, signs = signs, self._signs_of_life()
                    silences = [0 if old != new else n + 1 for old, new, n in zip(before, signs, silences, strict=True)]
                    self._silent = [rank for rank, number in enumerate(silences) if number >= NUM_SILENT_WAITS]
                    if self._silent:
                        raise
        except RuntimeError as error:
            raise self._loss() from error

    def _signs_of_life(self) -> list[int]:
        """How many each process has given."""
        assert self.store is not None
        return [self.store.add(_life(rank), 0) for rank in range(self.count)]

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
        missing = self._silent or [rank for rank in range(self.count) if counts[rank] == min(counts) < 1]
        if self.rank != min(set(range(self.count)) - set(missing)):
            return Failed("", 1)
        who = f"process {', '.join(map(str, missing))}" if missing else "one"
        return UserError(f"{who} of {self.count} is dead or does not answer: the same command resumes what is saved")


def _life(rank: int) -> str:
    """The key under which a process gives signs of life."""
    return f"signs of life of {rank}"
