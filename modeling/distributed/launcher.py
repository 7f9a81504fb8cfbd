"""How a run's processes come together: torchrun has started all, or the first one starts the others."""

import contextlib
import functools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import TCPStore
from torch.distributed.rendezvous import rendezvous

from modeling.distributed.processes import ALONE, Processes
from modeling.system.errors import UserError, errors_in_one_line
from modeling.system.signals import STOPPING, stopping_on_signals, uninterrupted
from modeling.system.startup import available_cpus

JOIN_SECONDS = 300  # for all processes to start
END_SECONDS = 10  # for the others to end, once process 0 has
_LOOK_SECONDS = 0.05
_SIGNALS = [getattr(signal, name) for name in STOPPING]
_FOLLOW = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); pickle.load(sys.stdin.buffer)()"


@contextlib.contextmanager
def joined(
    wanted: int | None = None, num_threads: int | None = None, work: Callable[[], object] | None = None
) -> Iterator[Processes]:
    """Joins the processes that a launcher such as torchrun has started; without one it starts `wanted` - 1 others.

    Inside, what ends one process ends all, and all but process 0 print nothing.

    Args:
        wanted: `runtime.processes`.
        num_threads: of each process that is started here.
        work: what those do; it comes to the same place.

    Raises:
        UserError: when they do not find each other, or a launcher has started another number.
    """
    is_launched = "RANK" in os.environ
    count = int(os.environ.get("WORLD_SIZE", "1")) if is_launched else wanted or 1
    mistake = None
    if wanted not in (None, count):
        mistake = UserError(
            f"runtime.processes={wanted}: a launcher such as torchrun has started {count}, expected null or {count}"
        )
    if count == 1:
        if mistake is not None:
            raise mistake
        yield ALONE
        return
    with contextlib.ExitStack() as stack:
        try:
            if is_launched:
                store, rank, _ = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))
            else:
                assert work is not None
                store, rank = stack.enter_context(_others(count, num_threads, work)), 0
            store = distributed.PrefixStore(str(store.add(_presence(rank), 1)), store)  # each run of a sweep its own
            # Its own time limit is for the whole run: how long a process waits is decided at each agreement.
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(days=1))
        except RuntimeError as error:
            where = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT', '')}"
            reason = str(error).splitlines()[0]
            raise UserError(f"{count} processes have not found each other at {where}: {reason}") from error
        stack.callback(distributed.destroy_process_group)
        if rank:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        processes = Processes(rank, count, store)
        with processes.showing_life(), processes.ending_together():
            if mistake is not None:
                raise mistake
            yield processes


def _presence(rank: int) -> str:
    """The key under which a process says in the store that it is here."""
    return f"joined by {rank}"


@contextlib.contextmanager
def _others(count: int, num_threads: int | None, work: Callable[[], object]) -> Iterator[TCPStore]:
    """Inside, processes 1 to `count` - 1 do `work`, with the environment that torchrun would give them.

    The threads that this process would have are divided among all. Those that do not end by themselves are killed.

    Args:
        num_threads: `runtime.num_threads`, of each process; None for its share.
        work: can be pickled.

    Raises:
        UserError: for more threads than CPUs, and when a process ends before it is here.
    """
    threads, available = torch.get_num_threads(), available_cpus()
    most = max(1, available // count)
    if num_threads is not None and num_threads > most:
        raise UserError(
            f"num_threads={num_threads}: each of runtime.processes={count} may use {most} of {available} CPUs"
        )
    share = max(1, min(most, threads // count))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=JOIN_SECONDS))
    place = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "OMP_NUM_THREADS": share}
    processes: list[subprocess.Popen] = []
    try:
        with uninterrupted():  # each that is started is in the list
            processes += (_start(place | {"RANK": rank, "LOCAL_RANK": rank}, work) for rank in range(1, count))
        start = time.monotonic()
        while missing := [rank for rank in range(1, count) if not store.check([_presence(rank)])]:
            if time.monotonic() - start > JOIN_SECONDS:
                raise UserError(f"process {', '.join(map(str, missing))} of {count} has not begun in {JOIN_SECONDS} s")
            for rank, process in enumerate(processes, 1):
                if process.poll() is not None:
                    raise UserError(
                        f"process {rank} of {count} has ended with {process.returncode} before the run began"
                    )
            time.sleep(_LOOK_SECONDS)
        torch.set_num_threads(share)
        try:
            yield store
        finally:
            end = time.monotonic() + END_SECONDS
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0, end - time.monotonic()))
    finally:
        torch.set_num_threads(threads)
        for process in processes:
            process.kill()
            process.wait()


def _start(environment: dict[str, str | int], work: Callable[[], object]) -> subprocess.Popen:
    """A process that does the work; it gets no signal before it can end well.

    It is a plain one: torchrun's agent makes every exit code a 1 and kills what takes 30 s to save, and with
    multiprocessing the workers of a loader would be new interpreters, too.
    """
    variables = {name: str(value) for name, value in environment.items()}
    variables = {"TORCH_CPP_LOG_LEVEL": "ERROR"} | os.environ | variables  # else warnings with stack traces
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        process = subprocess.Popen([sys.executable, "-c", _FOLLOW], stdin=subprocess.PIPE, env=variables)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert process.stdin is not None  # a pipe
    with contextlib.suppress(BrokenPipeError), process.stdin:  # it has ended: the caller sees that
        process.stdin.write(pickle.dumps(sys.path) + pickle.dumps(functools.partial(_follow, work)))
    return process


def _follow(work: Callable[[], object]) -> None:
    with errors_in_one_line(), stopping_on_signals(is_told=False):  # process 0 says it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        work()
