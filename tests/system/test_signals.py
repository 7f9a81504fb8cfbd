"""Requests to end: one exception, at once or after the section that must not be cut; conventional exit codes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from modeling.system.signals import STOPPING, Stopped, stopping_on_signals, uninterrupted
from tests.helpers import ROOT

CODES = [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138), ("SIGUSR2", 140)]


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize(("name", "code"), CODES)
@pytest.mark.fault("signal")
def test_a_signal_becomes_an_exit_with_its_conventional_code(name, code, capfd):
    with stopping_on_signals(), pytest.raises(SystemExit) as caught:
        send(name)
        time.sleep(5)
    assert (caught.value.code, caught.value.reason) == (code, name)
    assert f"{name}: stopping" in capfd.readouterr().err


@pytest.mark.fault("signal")
def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_on_signals():
            send("SIGHUP")
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.fault("signal")
def test_a_signal_stops_a_process_whose_terminal_is_closed():
    kept = os.dup(2)
    master, slave = os.openpty()
    os.dup2(slave, 2)
    os.close(master)
    try:
        with stopping_on_signals(), pytest.raises(Stopped):
            send("SIGHUP")
            time.sleep(5)
        with pytest.raises(OSError, match="Input/output"):  # it cannot be written to
            os.write(2, b"x")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(slave)


@pytest.mark.fault("time limit")
def test_the_time_limit_ends_with_zero_whatever_the_process_is_doing():
    is_over = False
    with stopping_on_signals(0.2), pytest.raises(Stopped) as caught:
        time.sleep(5)
        is_over = True
    assert not is_over
    assert (caught.value.code, caught.value.reason) == (0, "the time limit of 0.2 s")


def test_everything_is_as_before_afterwards():
    names = [*STOPPING, "SIGCHLD"]
    before = [signal.getsignal(getattr(signal, name)) for name in names]
    with stopping_on_signals(100), pytest.raises(Stopped):
        send("SIGTERM")
    assert [signal.getsignal(getattr(signal, name)) for name in names] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with uninterrupted():  # and the request is forgotten
        pass


def test_a_section_is_finished_before_the_stop():
    done = []
    with stopping_on_signals(), pytest.raises(Stopped):
        with uninterrupted():
            send("SIGTERM")
            with uninterrupted():
                done.append("inner")
            done.append("outer")
        done.append("after")
    assert done == ["inner", "outer"]


@pytest.mark.fault("signal")
def test_a_stop_that_python_swallowed_is_raised_again_at_the_next_section(monkeypatch):
    class Dying:
        def __del__(self):
            send("SIGTERM")

    done, swallowed = [], []
    monkeypatch.setattr("sys.unraisablehook", swallowed.append)
    with stopping_on_signals(), pytest.raises(Stopped):
        Dying()
        done.append("continued")
        with uninterrupted():
            done.append("section")
    assert done == ["continued"]
    assert [entry.exc_type for entry in swallowed] == [Stopped]


def test_an_error_in_a_section_is_not_hidden():
    with stopping_on_signals(), pytest.raises(KeyError), uninterrupted():
        send("SIGTERM")
        raise KeyError


def test_further_requests_change_nothing_while_the_first_is_carried_out():
    """Also a second Ctrl-C in the same instant, which comes from a shell or `timeout`, not from a hand."""
    saved = False
    with stopping_on_signals(), pytest.raises(Stopped) as caught:
        try:
            send("SIGINT")
        finally:
            for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
                send(name)
            saved = True
    assert saved
    assert caught.value.code == 130


PROCESS = """
import os, signal, sys, time
from modeling.system.signals import stopping_on_signals
with stopping_on_signals():
    if sys.argv[1] == "worker" and os.fork() == 0:
        for _ in range(100):
            time.sleep(0.05)
        print("worker continued", flush=True)
        os._exit(0)
    try:
        print("ready", flush=True)
        time.sleep(10)
    finally:
        print("saving", flush=True)
        for _ in range(100):
            time.sleep(0.05)
        print("saved", flush=True)
"""


def start(kind: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, kind], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.fault("signal")
def test_a_second_ctrl_c_leaves_at_once():
    with start("alone") as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "saving\n"
        time.sleep(0.4)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert process.stdout.read() == ""  # it would have printed "saved"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("signal")
def test_a_ctrl_c_for_the_group_leaves_forked_workers_to_their_parent():
    with start("worker") as process:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(10) == 130
        assert set(process.stdout.read().split("\n")) == {"saving", "saved", "worker continued", ""}
