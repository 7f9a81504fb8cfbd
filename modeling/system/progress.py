"""Progress bars that are readable in a terminal and in a log file."""

import sys
from collections.abc import Iterable
from typing import Protocol, TextIO, TypeVar

from tqdm import tqdm

LOG_INTERVAL_SECONDS = 10
Item = TypeVar("Item")


class Bar(Protocol):
    """Wraps the items of a loop to show its progress, as `tqdm` does; `iter` shows nothing."""

    def __call__(self, items: Iterable[Item], /) -> Iterable[Item]: ...


class _Lines:
    """Turns a bar's carriage returns into lines, for a stream that is no terminal."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> None:
        if text := text.strip("\r\n").rstrip():
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress_bar(iterable=None, **options) -> tqdm:
    """tqdm on stderr: redrawn in place on a terminal, one line every 10 s (and a last one) elsewhere.

    Without a stderr, or with one that is no whole stream, it shows nothing.
    """
    if not hasattr(sys.stderr, "isatty"):
        return tqdm(iterable, disable=True, **options)
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **options)
    options |= {"leave": True, "position": 0}  # lines: nothing to erase, no cursor to move
    return tqdm(iterable, file=_Lines(sys.stderr), mininterval=LOG_INTERVAL_SECONDS, ncols=110, **options)
