"""Ending a process from outside: signals and the time limit become one exception, held back where a state changes.

An exception, because a flag would be noticed only between steps, while a run may be sampling, compiling or preparing
data for minutes.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

# Exit codes. SIGHUP comes when ssh or the terminal ends, SIGUSR1 and SIGUSR2 from batch systems; the alarm is our time
# limit.
STOPPING = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 138, "SIGUSR2": 140, "SIGALRM": 0}
SECOND_CTRL_C_SECONDS = 0.2  # sooner than a hand: shells and `timeout` send the same signal twice


class Stopped(SystemExit):
    """The process was asked to end. Uncaught, it ends it with the conventional exit code.

    Args:
        reason: what asked: the signal's name, or the time limit.
        code: 128 + the signal's number, or 0 for the time limit.
    """

    def __init__(self, reason: str, code: int):
        super().__init__(code)
        self.reason = reason


_request: Stopped | None = None
_depth = 0  # of nested `uninterrupted` sections


@contextlib.contextmanager
def stopping_on_signals(max_seconds: float | None = None, *, is_told: bool = True) -> Iterator[None]:
    """Inside, the signals in `STOPPING` and the end of the time limit raise `Stopped`, once.

    SIGHUP stays ignored where it is, as under nohup. A second Ctrl-C leaves at once; files are written atomically, so
    they stay valid.

    Args:
        max_seconds: the time limit, from here; None for no limit.
        is_told: whether standard error says so at once.
    """
    global _request
    process, requested_at = os.getpid(), 0.0

    def handle(number: int, frame: object) -> None:
        global _request
        nonlocal requested_at
        name = signal.Signals(number).name
        if os.getpid() != process:  # a forked loader worker: ends when its parent says so, by SIGTERM at the latest
            if name == "SIGTERM":
                os._exit(STOPPING[name])
            return
        if _request is not None:
            if name == "SIGINT" and time.monotonic() - requested_at > SECOND_CTRL_C_SECONDS:
                os._exit(STOPPING[name])
            return
        requested_at = time.monotonic()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises for loader workers that the same signal ended
        reason = name if name != "SIGALRM" else f"the time limit of {max_seconds:g} s"
        _request = Stopped(reason, STOPPING[name])
        if is_told:
            with contextlib.suppress(OSError):  # the terminal may be closed
                os.write(2, f"\n{reason}: stopping\n".encode())
        if _depth == 0:
            raise _request

    is_left = {"SIGALRM": max_seconds is None, "SIGHUP": signal.getsignal(signal.SIGHUP) == signal.SIG_IGN}
    numbers = [getattr(signal, name) for name in STOPPING if not is_left.get(name)]
    before = {number: signal.signal(number, handle) for number in numbers}
    before[signal.SIGCHLD] = signal.getsignal(signal.SIGCHLD)
    if max_seconds is not None:
        signal.setitimer(signal.ITIMER_REAL, max_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        _request = None


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A section that is done wholly or not at all: `Stopped` comes before it or after it.

    Raises:
        Stopped: also where it was raised before and lost (Python ignores exceptions inside a `__del__`).
    """
    global _depth
    if _depth == 0 and _request is not None:
        raise _request
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    if _depth == 0 and _request is not None:
        raise _request
