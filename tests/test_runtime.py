"""Device, precision and memory of the machine at hand."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from modeling import build, runtime
from modeling.build import build_runtime
from modeling.config import parse
from modeling.runtime import (
    autocast,
    available_cpus,
    check_finite,
    evaluation_batch_size,
    keep_freed_memory,
    limit_threads,
    peak_memory_bytes,
    place,
    resolve_device,
    resolve_micro_batch_size,
    resolve_precision,
    warn_if_busy,
)
from modeling.sections import Machine
from modeling.system.errors import UserError
from tests.helpers import ROOT


def test_auto_chooses_the_best_available_device():
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert resolve_device("auto").type == best
    assert resolve_device("cpu").type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is available")
def test_a_missing_device_is_rejected_and_the_available_ones_are_named():
    with pytest.raises(ValueError, match=r"device=cuda: not available; this machine has .*cpu"):
        resolve_device("cuda")


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_chooses_bf16_where_the_hardware_has_it(monkeypatch, has_bf16):
    monkeypatch.setattr(runtime, "_has_bf16", lambda device: has_bf16)
    assert resolve_precision("auto", torch.device("cpu")) == ("bf16" if has_bf16 else "fp32")
    assert resolve_precision("fp32", torch.device("cpu")) == "fp32"


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_matrix_products_run_in_the_precision(device, precision, dtype):
    a = torch.ones(2, 2, device=device)
    with autocast(device, precision):
        assert (a @ a).dtype == dtype


def test_fp16_on_a_cpu_is_warned_of(capsys):
    machine = Machine(device="cpu", precision="fp16", deterministic=False, num_threads=None, keep_freed_memory=False)
    assert build_runtime(machine) == (torch.device("cpu"), "fp16")
    assert "80 times slower than fp32" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named_with_its_precision(value):
    check_finite(torch.zeros(3), "a sample", "fp16")
    with pytest.raises(FloatingPointError, match="^a sample is not finite in bf16$"):
        check_finite(torch.tensor([0.0, value]), "a sample", "bf16")
    with pytest.raises(FloatingPointError, match="fp16: fp16 ends at 65,504, try precision=fp32"):
        check_finite(torch.tensor([0.0, value]), "a sample", "fp16")


@pytest.mark.parametrize(
    ("size", "device", "batch_size", "hidden_size", "expected"),
    [
        (None, "cpu", 128, 128, 64),
        (None, "cpu", 128, 32, 128),
        (None, "cpu", 512, 32, 256),
        (None, "cpu", 32, 128, 32),
        (None, "cpu", 128, 4096, 2),
        (None, "cuda", 128, 128, 128),
        (16, "cuda", 128, 128, 16),
        (500, "cpu", 128, 128, 128),
    ],
)
def test_micro_batches_need_the_same_memory_at_every_width_on_a_cpu(size, device, batch_size, hidden_size, expected):
    """On other devices they are whole batches."""
    assert resolve_micro_batch_size(size, torch.device(device), batch_size, hidden_size) == expected


@pytest.mark.parametrize(
    ("size", "pixels", "expected"), [(None, 64, 250), (None, 1024, 250), (None, 128 * 128, 15), (4, 1024, 4)]
)
def test_images_without_gradients_need_the_same_memory_at_every_size(size, pixels, expected):
    assert evaluation_batch_size(size, pixels) == expected
    assert evaluation_batch_size(None, 10**9) == 1


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts Linux page faults")
def test_freed_memory_is_kept_and_does_not_fault_again():
    """In a process of its own, because it cannot be undone."""
    code = (
        "import resource, torch; from modeling.runtime import keep_freed_memory; {call}\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): torch.ones(10_000_000)\n"
        "before = faults()\n"
        "for _ in range(20): torch.ones(10_000_000)\n"
        "print(faults() - before)"
    )
    counts = []
    for call in ("pass", "keep_freed_memory()"):
        done = subprocess.run([sys.executable, "-c", code.format(call=call)], cwd=ROOT, capture_output=True, text=True)
        counts.append(int(done.stdout))
    assert counts[1] < counts[0] / 10


def test_the_allocator_is_unchanged_where_the_configuration_says_so(monkeypatch, compose_config):
    calls = []
    monkeypatch.setattr(build, "keep_freed_memory", lambda: calls.append("kept"))
    for value, expected in (("false", []), ("true", ["kept"])):
        build_runtime(parse(compose_config("runtime.device=cpu", f"runtime.keep_freed_memory={value}")).runtime)
        assert calls == expected


def test_threads_respect_the_quota_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert available_cpus(tmp_path) == 64  # no control groups
    (tmp_path / "cpu").mkdir()
    for quota, expected in (("-1", 64), ("250000", 2), ("20000", 1)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
        assert available_cpus(tmp_path) == expected
    for quota, expected in (("max 100000", 64), ("400000 100000", 4), ("50000 100000", 1), ("12800000 100000", 64)):
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        assert available_cpus(tmp_path) == expected


def test_a_smaller_number_of_threads_is_kept(monkeypatch):
    asked = torch.get_num_threads()
    try:
        for available, expected in ((asked + 5, asked), (1, 1)):
            monkeypatch.setattr(runtime, "available_cpus", lambda available=available: available)
            limit_threads()
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(asked)


def test_the_threads_asked_for_are_used_and_are_at_most_the_cpus():
    before = torch.get_num_threads()
    try:
        limit_threads(1)
        assert torch.get_num_threads() == 1
        with pytest.raises(UserError, match=rf"num_threads=100000: this process may use {available_cpus()} CPUs"):
            limit_threads(100_000)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("num_threads", "is_warned_of"), [(1, False), (2, True)])
def test_several_threads_beside_busy_processes_are_warned_of(num_threads, is_warned_of, capsys):
    before = torch.get_num_threads()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        torch.set_num_threads(num_threads)
        warn_if_busy()
    finally:
        torch.set_num_threads(before)
        for process in busy:
            process.kill()
            process.wait()
    assert ("num_threads=1 may be several times faster than the 2 threads" in capsys.readouterr().err) == is_warned_of


def test_weights_are_placed_with_the_channels_last():
    layers = place(torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Linear(8, 8)), torch.device("cpu"))
    assert layers.get_parameter("0.weight").is_contiguous(memory_format=torch.channels_last)
    assert layers.get_parameter("1.weight").is_contiguous()


def test_other_c_libraries_are_not_called(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


def test_peak_memory_counts_bytes():
    before = peak_memory_bytes()
    block = torch.ones(100_000_000)  # 400 MB
    assert peak_memory_bytes() >= before
    assert peak_memory_bytes() > 400e6
    del block


def test_float32_is_no_tf32_and_the_deterministic_mode_sets_what_cuda_needs():
    """In a process of its own: the switch holds for the whole process."""
    code = (
        "import os, torch; from modeling.runtime import prepare_cuda\n"
        "for deterministic in False, True:\n"
        "    prepare_cuda(deterministic)\n"
        "    print(torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark)\n"
        "print(torch.are_deterministic_algorithms_enabled(), os.environ['CUBLAS_WORKSPACE_CONFIG'])\n"
        "print(torch.utils.deterministic.fill_uninitialized_memory)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False True", "False False", "True :4096:8", "False"]


def test_on_the_cpu_the_deterministic_mode_changes_nothing(compose_config):
    build_runtime(parse(compose_config("runtime.deterministic=true", "runtime.device=cpu")).runtime)
    assert not torch.are_deterministic_algorithms_enabled()
