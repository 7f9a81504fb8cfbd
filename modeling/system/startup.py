"""What a script needs of its process before its work: a POSIX system, streams that last, threads that share CPUs."""

import contextlib
import errno
import io
import os
import sys
from pathlib import Path

# How often a thread looks for the others before it sleeps: for about 0.2 ms instead of 3 ms. Beside other processes a
# waiting thread then leaves its CPU to them, and gets it back; alone nothing is lost (docs/speed.md).
SPIN_COUNT = "20000"
_NAMES = {1: "standard output", 2: "standard error"}


def prepare_process() -> None:
    """Prepares the process of a script; PyTorch must not be imported yet, whose OpenMP reads its variables once.

    On a system that is not POSIX it ends the process with one line.
    """
    try:
        import fcntl  # noqa: F401
    except ImportError:
        sys.exit("this project runs on Linux and macOS, and on Windows inside WSL (`wsl --install`)")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed (`2>&-`): a file that is opened later would become standard error
            os.open(os.devnull, os.O_RDWR)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is getattr(sys, f"__{name}__"):  # nobody has replaced it
            setattr(sys, name, _lasting(getattr(sys, name), descriptor))


def available_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Counts the CPUs that this process may use: its affinity mask, or its control group's quota if that is less.

    PyTorch only knows the mask: in a container with a quota of 2 on a machine with 64 it would start 64 threads.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [cgroup / "cpu.max", cgroup / "cpu" / "cpu.cfs_quota_us"]  # versions 2 and 1
    with contextlib.suppress(OSError):
        if quotas[0].exists():
            quota, period = quotas[0].read_text().split()
        else:
            quota, period = quotas[1].read_text().strip(), quotas[1].with_name("cpu.cfs_period_us").read_text()
        if quota not in ("max", "-1"):
            count = min(count, max(1, int(quota) // int(period)))
    return count


class _Lasting(io.FileIO):
    """A stream that may be written to when nobody reads it any more: `| head` has ended, or the terminal is closed."""

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self._without_reader = {errno.EPIPE, errno.EIO} if self.isatty() else {errno.EPIPE}

    def write(self, data, /):
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # also for what libraries, child processes and Python's exit write
            os.close(nowhere)
            if error.errno not in self._without_reader:
                raise OSError(error.errno, error.strerror, _NAMES[self.fileno()]) from error
            return memoryview(data).nbytes


def _lasting(stream: io.TextIOWrapper | None, descriptor: int) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(_Lasting(descriptor))
    if stream is None:
        return io.TextIOWrapper(buffer, encoding="utf-8")
    stream.flush()
    return io.TextIOWrapper(
        buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering
    )
