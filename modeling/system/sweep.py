"""A sweep's jobs (`-m`), one after the other or in several processes: none ends the others, a signal ends all."""

import contextlib
import io
import itertools
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

from modeling.system.credentials import masked
from modeling.system.errors import Failed, UserError
from modeling.system.signals import SECOND_CTRL_C_SECONDS, STOPPING, Stopped, stopping_on_signals
from modeling.system.startup import available_cpus, prepare_process

MOST_FAILED = 125  # as an exit code: shells use those above


def parallel(overrides: list[str], num_jobs: int) -> list[str]:
    """What to add to a sweep's command for `hydra/launcher=joblib`: no more processes than there are jobs.

    The CPUs are divided among them, and one without a job would have none to save when a signal comes.

    Raises:
        UserError: if joblib's launcher is not installed, or the number of processes is none.
    """
    if "hydra/launcher=joblib" not in overrides:
        return []
    if find_spec("hydra_plugins.hydra_joblib_launcher") is None:
        raise UserError("hydra/launcher=joblib: not installed, run `pip install -r requirements-sweeps.txt`")
    key = "hydra.launcher.n_jobs"
    text = next((word.partition("=")[2] for word in reversed(overrides) if word.startswith(f"{key}=")), "-1")
    if not re.fullmatch(r"-1|[1-9]\d*", text):
        raise UserError(f"{key}={text}: expected how many runs go on at a time, or -1 for one on each CPU")
    return [f"{key}={min(available_cpus() if text == '-1' else int(text), num_jobs)}"]


class _Named(io.TextIOBase):
    """A stream whose lines begin with the job that writes them; no terminal, so that progress comes in lines."""

    def __init__(self, stream: TextIO, name: str):
        self.stream, self.name, self.line = stream, name, ""

    def write(self, text: str, /) -> int:
        *lines, self.line = (self.line + text).split("\n")
        if lines:
            self.stream.write("".join(f"{self.name} {line}\n" for line in lines))
            self.stream.flush()
        return len(text)


class Sweep:
    """What the jobs of a sweep share, in whichever process each runs: a folder of small files.

    Args:
        folder: empty.
        jobs: the overrides of each; those in which the jobs differ are shown.
    """

    def __init__(self, folder: Path, jobs: list[list[str]]):
        self.folder, self.process = folder, os.getpid()
        is_shown = [len(set(words)) > 1 for words in zip(*jobs, strict=True)]
        self.names = [shlex.join(itertools.compress(job, is_shown)) for job in jobs]

    def run(self, number: int, job: Callable[[], None]) -> None:
        """Runs a job and notes why it failed; does nothing once the sweep is stopped.

        Args:
            number: of the job, from 0.
            job: ends with `Failed` for a mistake, with `Stopped` where it was asked to end.
        """
        if os.getpid() == self.process:
            self._run(number, job)
            return
        for name in STOPPING:  # outside of a job they would end this process, and with it the pool
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        prepare_process()
        name = f"[{number + 1}/{len(self.names)}]"
        with (
            contextlib.redirect_stdout(_Named(sys.stdout, name)),
            contextlib.redirect_stderr(_Named(sys.stderr, name)),
        ):
            self._run(number, job)

    def _run(self, number: int, job: Callable[[], None]) -> None:
        running = self.folder / f"{os.getpid()}.running"
        try:
            with stopping_on_signals():
                running.touch()
                if self.exit_code_of_signal is not None:
                    return
                print(f"\nrun {number + 1} of {len(self.names)}: {self.names[number]}", flush=True)
                job()
        except Stopped as stopped:
            if stopped.code:  # the time limit is each run's own
                self._stop(int(stopped.code))
        except Failed as failed:
            self._note(number, failed.message)
        except Exception as error:  # a bug, or PyTorch's own errors, such as too little memory: the others still run
            traceback.print_exc()
            self._note(number, f"{type(error).__name__}: {error}")
        finally:
            running.unlink(missing_ok=True)

    def _note(self, number: int, message: str) -> None:
        (self.folder / f"{number:09}.failed").write_text(masked(f"  {self.names[number]}: {message}\n"))

    def _stop(self, exit_code: int) -> None:
        """No job begins any more."""
        (self.folder / "stopped").write_text(str(exit_code))

    @property
    def exit_code_of_signal(self) -> int | None:
        """That of the signal which has stopped the sweep, None as long as there was none."""
        path = self.folder / "stopped"
        return int(path.read_text() or STOPPING["SIGTERM"]) if path.exists() else None

    @contextlib.contextmanager
    def stopping_jobs_on_signals(self) -> Iterator[None]:
        """Inside, a signal to this process stops the jobs in other processes; it waits until they are saved.

        A second Ctrl-C leaves at once.
        """
        requested_at = 0.0

        def handle(number: int, frame: object) -> None:
            nonlocal requested_at
            name = signal.Signals(number).name
            if self.exit_code_of_signal is not None:
                if name == "SIGINT" and time.monotonic() - requested_at > SECOND_CTRL_C_SECONDS:
                    os._exit(STOPPING[name])
                return
            requested_at = time.monotonic()
            self._stop(STOPPING[name])
            for path in self.folder.glob("*.running"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(path.stem), signal.SIGTERM)

        is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # under nohup
        names = STOPPING.keys() - {"SIGALRM"} - ({"SIGHUP"} if is_ignored else set())
        before = {name: signal.signal(getattr(signal, name), handle) for name in names}
        try:
            yield
        except BrokenProcessPool as error:
            if self.exit_code_of_signal is None:  # else the signal has ended a process that had no job yet
                raise UserError(
                    "a process of this sweep was killed, maybe for lack of memory: the same command resumes all runs; "
                    "a lower hydra.launcher.n_jobs needs less memory"
                ) from error
        finally:
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)

    def end(self) -> None:
        """Lists the failed jobs and ends the process, unless all went well.

        Raises:
            SystemExit: with the number of failed jobs, at most `MOST_FAILED`, or as the signal that stopped the sweep.
        """
        failures = [path.read_text() for path in sorted(self.folder.glob("*.failed"))]
        if failures:
            print(f"\n{len(failures)} of {len(self.names)} runs failed:\n{''.join(failures)}", end="", file=sys.stderr)
        stopped = self.exit_code_of_signal
        if stopped is not None:
            print("the sweep is stopped; the same command resumes it", file=sys.stderr)
        if code := min(len(failures), MOST_FAILED) if stopped is None else stopped:
            sys.exit(code)
