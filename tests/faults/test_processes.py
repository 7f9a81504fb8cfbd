"""Runs that several processes train: the result of one process, and one message when any of them fails."""

import errno
import functools
import os
import resource
import signal
import time
from pathlib import Path

import pytest

from modeling.checkpoint import load_checkpoint
from tests.faults.processes import PARTS, launched, process_of, run_launched, wait_for, wait_for_checkpoint
from tests.helpers import TINY, equal, result, start_script

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.fault("several processes")]

PRECISIONS = ("fp32", "bf16", "fp16")
QUICK = ["train.sample_every=9", "train.num_samples=2", "train.num_eval_images=4"]  # fp16 is slow on a CPU
# The last process has a NaN in the gradient of the second step.
SPOILED = """
import math, runpy
from modeling.run.step import Step

def backward(self, images, original=Step.backward):
    loss = original(self, images)
    if self.state.step == 1 and self.processes.rank == self.processes.count - 1:
        next(self.model.parameters()).grad[0] = math.nan
    return loss

Step.backward = backward
runpy.run_path("main.py", run_name="__main__")
"""
IMPATIENT = """
import runpy
from modeling.distributed import agreement
agreement.NUM_WAITS = agreement.NUM_SILENT_WAITS = 3
runpy.run_path("main.py", run_name="__main__")
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("counts", "options"),
    [
        ((1, 2, 4), ["train.batch_size=64", "train.num_epochs=4", "runtime.micro_batch_size=16"]),
        ((1, 2), ["train.batch_size=15", "train.num_epochs=2", "runtime.micro_batch_size=8"]),
    ],
    ids=["64 images", "15 images"],
)
def test_any_number_of_processes_has_the_result_of_one(tmp_path, tiny_data, record_property, counts, options):
    """Weights, average, optimizer, metrics and samples to the bit: with dropout, and with a NaN in one gradient."""
    script = written(tmp_path, SPOILED)
    results = {}
    for count in counts:
        folder = f"runtime.output_dir={tmp_path}/{count}-${{runtime.precision}}"
        sweep = ["-m", *TINY, *QUICK, "model.dropout=0.2", f"dataset.root={tiny_data}", *options, folder]
        code, output = run_launched(count, *sweep, f"runtime.precision={','.join(PRECISIONS)}", script=script)
        assert code == 0, output
        results[count] = {name: result(tmp_path / f"{count}-{name}") for name in PRECISIONS}
    for precision in PRECISIONS:
        first = results[1][precision]
        assert first["state"]["state"]["num_skipped"] == 1
        for count in counts[1:]:
            assert equal(results[count][precision], first), (count, precision)
    record_property("outcome", f"{' '.join(options)}: {counts} processes, {PRECISIONS}: equal to the bit")


def test_a_signal_to_one_process_stops_all_and_any_number_resumes(tmp_path, tiny_data, whole, record_property):
    options = [*PARTS, f"dataset.root={tiny_data}", f"runtime.output_dir={tmp_path / 'run'}"]
    with launched(2, *options) as process:
        wait_for_checkpoint(tmp_path / "run", process)
        process_of(process, 1).terminate()
        output = process.communicate()[0]
    steps = [load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["state"]["step"]]
    assert output.count(f"stopped by SIGTERM: saved at step {steps[0]} of 100") == 1
    assert output.count("stopped by") == 1
    with start_script("main.py", *options) as process:
        wait_for_checkpoint(tmp_path / "run", process, steps[0] + 1)
        process.send_signal(signal.SIGTERM)
        output = process.communicate()[0]
    steps.append(load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["state"]["step"])
    assert "processes: checkpoint 2, this run 1" in output
    assert steps[0] < steps[1] < 100
    code, output = run_launched(4, *options)
    assert code == 0, output
    assert equal(result(tmp_path / "run"), whole)
    record_property("outcome", f"2 processes to step {steps[0]}, 1 to {steps[1]}, 4 to 100: equal to one process")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_and_the_same_command_resumes(tmp_path, tiny_data, whole, record_property, rank):
    options = [*PARTS, f"dataset.root={tiny_data}", f"runtime.output_dir={tmp_path / 'run'}"]
    with launched(2, *options) as process:
        wait_for_checkpoint(tmp_path / "run", process)
        process_of(process, rank).kill()
        started = time.monotonic()
        output = process.communicate()[0]
        seconds = time.monotonic() - started
    assert (process.returncode, seconds < 60) == (1, True)
    assert output.count(f"process {rank} of 2 is dead or does not answer") == 1, output
    code, output = run_launched(2, *options)
    assert code == 0, output
    assert equal(result(tmp_path / "run"), whole)
    record_property("outcome", f"process {rank} killed: all ended within {seconds:.1f} s, equal when resumed")


def test_a_process_that_hangs_is_named(tmp_path, tiny_data, record_property):
    options = [*PARTS, f"dataset.root={tiny_data}", f"runtime.output_dir={tmp_path / 'run'}"]
    with launched(2, *options, script=written(tmp_path, IMPATIENT)) as process:
        wait_for_checkpoint(tmp_path / "run", process)
        hanging = process_of(process, 1)
        hanging.suspend()
        started = time.monotonic()
        wait_for(process, "process 1 of 2 is dead or does not answer")
        seconds = time.monotonic() - started
        hanging.kill()
        process.communicate()
    assert seconds < 15
    assert process.returncode == 1
    record_property("outcome", f"process 1 stopped (SIGSTOP): named after {seconds:.1f} s with limits of 3 s")


def test_a_full_disk_under_process_0_ends_all_with_one_message(tmp_path, tiny_data, record_property):
    folder = tmp_path / "run"
    options = [*PARTS, f"dataset.root={tiny_data}", f"runtime.output_dir={folder}"]
    with launched(2, *options) as process:
        wait_for_checkpoint(folder, process)
        process_of(process, 0).terminate()
        process.communicate()
    half = (folder / "checkpoints" / "last.pt").stat().st_size // 2
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (half, half))
    code, output = run_launched(2, *options, preexec_fn=limit)
    message = f"{folder}/checkpoints/last.pt: {os.strerror(errno.EFBIG)}"
    assert (code, output.count(message)) == (1, 1), output
    assert "dead" not in output
    code, output = run_launched(2, *options)
    assert code == 0, output
    record_property("outcome", f"{os.strerror(errno.EFBIG)}: code 1, one message, resumed")


def test_a_folder_that_is_rejected_is_reported_once(tmp_path, tiny_data):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    options = [*PARTS, f"dataset.root={tiny_data}", f"runtime.output_dir={tmp_path / 'run'}"]
    code, output = run_launched(2, *options)
    assert (code, output.count("run holds other files")) == (1, 1), output
    code, output = run_launched(2, *options[:-1], f"runtime.output_dir={tmp_path / 'other'}", "train.batch_size=1")
    assert (code, output.count("train.batch_size=1: it is shared by 2 processes")) == (1, 1), output
    assert not (tmp_path / "other").exists()
