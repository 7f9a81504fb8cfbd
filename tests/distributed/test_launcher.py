"""How many processes a run is given, and what each may use; what they do together is in tests/faults."""

import functools
import os
import time

import pytest
import torch

from modeling.distributed import launcher
from modeling.distributed.launcher import joined
from modeling.distributed.processes import ALONE, Processes
from modeling.system.errors import UserError
from modeling.system.startup import available_cpus


def launched(monkeypatch, count: int) -> None:
    """As if torchrun had started this process and `count` - 1 others."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(count))


@pytest.mark.parametrize("wanted", [None, 1])
@pytest.mark.parametrize("is_launched", [False, True])
def test_one_process_needs_no_other(monkeypatch, wanted, is_launched):
    if is_launched:
        launched(monkeypatch, 1)
    with joined(wanted) as processes:
        assert processes is ALONE


def test_another_number_than_a_launcher_has_started_is_rejected(monkeypatch):
    launched(monkeypatch, 1)
    with pytest.raises(UserError, match="processes=2: a launcher such as torchrun has started 1, expected null or 1"):
        joined(2).__enter__()


def test_more_threads_than_there_are_cpus_for_each_process_are_rejected_before_one_is_started():
    available = available_cpus()
    message = (
        f"num_threads={available + 1}: each of runtime.processes=2 may use {max(1, available // 2)} of {available}"
    )
    with pytest.raises(UserError, match=message):
        joined(2, available + 1, os.abort).__enter__()


@pytest.mark.parametrize(("device", "num_gpus"), [("cuda", 2), ("mps", 1)])
def test_more_processes_than_gpus_are_rejected(monkeypatch, device, num_gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    message = rf"process {num_gpus} is number {num_gpus + 1} on its .* or main.py runtime.processes={num_gpus}\)"
    with pytest.raises(UserError, match=message):
        Processes(num_gpus, 8).use(torch.device(device))


def test_a_process_that_does_not_begin_is_named(monkeypatch):
    monkeypatch.setattr(launcher, "JOIN_SECONDS", 1)
    start = time.monotonic()
    with pytest.raises(UserError, match="process 1 of 2 has not begun in 1 s"):
        joined(2, None, functools.partial(time.sleep, 60)).__enter__()
    assert time.monotonic() - start < 30
