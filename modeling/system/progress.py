"""Progress bars that are readable in a terminal and in a log file."""

import sys
import time
from collections.abc import Iterable
from typing import Protocol, TextIO, TypeVar

from tqdm import tqdm

# In a log file: seconds between lines. The interval grows with the run, to a twentieth of its time so far.
LOG_INTERVAL_SECONDS, LOG_SHARE, MAX_LOG_INTERVAL_SECONDS = 10, 1 / 20, 600
# tqdm's own, less the rate: what is behind the times is the postfix, whose end a narrow terminal cuts off.
TIMES = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
Item = TypeVar("Item")


class Bar(Protocol):
    """Wraps the items of a loop to show its progress, as `tqdm` does; `iter` shows nothing."""

    def __call__(self, items: Iterable[Item], /) -> Iterable[Item]: ...


class _Lines:
    """Turns a bar's carriage returns into lines with the clock, for a stream that is no terminal."""

    def __init__(self, stream: TextIO):
        self.stream, self.started = stream, time.monotonic()
        self.bar: tqdm | None = None

    def write(self, text: str) -> None:
        if text := text.strip("\r\n").rstrip():
            self.stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if self.bar is not None:
            interval = max(LOG_INTERVAL_SECONDS, LOG_SHARE * (time.monotonic() - self.started))
            self.bar.mininterval = min(interval, MAX_LOG_INTERVAL_SECONDS)

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(iterable=None, **options) -> tqdm:
    """tqdm on stderr: redrawn in place on a terminal; elsewhere a line every 10 s, in long runs every 10 minutes.

    With `leave=False` it is gone at its end on a terminal, and elsewhere silent unless it takes longer than 10 s.
    Without a stderr, or with one that is no whole stream, it shows nothing.
    """
    if not hasattr(sys.stderr, "isatty"):
        return tqdm(iterable, disable=True, **options)
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, bar_format="{l_bar}{bar}| " + TIMES, **options)
    delay = 0 if options.get("leave", True) else LOG_INTERVAL_SECONDS
    options |= {"leave": True, "position": 0}  # lines: nothing to erase, no cursor to move
    lines = _Lines(sys.stderr)
    options |= {"mininterval": LOG_INTERVAL_SECONDS, "delay": delay, "bar_format": "{l_bar} " + TIMES}
    options["miniters"] = 1  # the interval alone decides; else tqdm's monitor thread adds lines of its own after 10 s
    lines.bar = tqdm(iterable, file=lines, **options)
    return lines.bar
