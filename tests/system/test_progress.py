"""Progress: one line that fits the terminal, and few lines in a log file."""

import fcntl
import io
import os
import pty
import struct
import sys
import termios
import time
from types import SimpleNamespace

from modeling.system import progress
from modeling.system.progress import progress_bar


def test_the_longest_line_of_a_training_fits_80_columns_with_speed_and_time_left(monkeypatch):
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(total=800_000, initial=799_999, unit="step", desc="training") as bar:
            bar.set_postfix_str("11500 images/s, loss 0.0279")
        written = ""
        while not written.endswith("\n"):  # one read gives what the terminal has passed on so far
            written += os.read(reading, 65536).decode()
    os.close(reading)
    line = written.rstrip().split("\r")[-1]
    assert len(line) <= 80
    assert "799999/800000 [00:00<" in line
    assert line.endswith(", 11500 images/s, loss 0.0279]")


def test_lines_of_a_log_have_the_clock_and_become_rare(monkeypatch):
    log, now = io.StringIO(), SimpleNamespace(seconds=0.0)
    clock = SimpleNamespace(monotonic=lambda: now.seconds, strftime=time.strftime)
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress, "time", clock)
    intervals = []
    with progress_bar(total=4, desc="training") as bar:
        for now.seconds in (1.0, 200.0, 1000.0, 50_000.0):
            bar.refresh()
            intervals.append(bar.mininterval)
    assert intervals == [10, 10, 50, 600]
    for line in log.getvalue().splitlines():
        time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")
        assert line[19:].startswith(" training:   0%| 0/4 [")


def test_the_thread_of_tqdm_adds_no_lines_to_a_log(monkeypatch):
    """It redraws bars that look at the clock only every so many steps, and are silent for longer than 10 s."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "LOG_INTERVAL_SECONDS", 0.01)
    with progress_bar(total=2000, desc="training") as bar:
        time.sleep(0.02)
        bar.update(1000)  # writes a line, after which tqdm would adapt `miniters` to the speed
        assert bar.last_print_n == 1000
        assert bar.miniters <= 1


def test_a_short_bar_that_does_not_stay_is_silent_in_a_log(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    assert list(progress_bar(range(3), desc="sampling", leave=False)) == [0, 1, 2]
    assert log.getvalue() == ""
    assert list(progress_bar(range(3), desc="reading")) == [0, 1, 2]
    assert "reading: 100%| 3/3 [00:00<00:00]" in log.getvalue()
