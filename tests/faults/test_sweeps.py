"""Sweeps killed or stopped at any moment: the same command resumes them, with the results of single runs."""

import random
import signal
import time
from pathlib import Path

import pytest

from modeling.checkpoint import load_checkpoint
from tests.faults.processes import run_to_end, wait_for
from tests.helpers import TINY, equal, result, start_script

RATES, SEEDS = ("0.001", "0.002"), ("0", "1", "2")
JOBS = [(rate, seed) for rate in RATES for seed in SEEDS]


def options(folder: Path, data: Path) -> list[str]:
    folders = f"runtime.output_dir={folder}/${{optimizer.lr}}-${{seed}}"
    return [*TINY, f"dataset.root={data}", "train.checkpoint_every=1", "train.num_epochs=10", folders]


def sweep(folder: Path, data: Path) -> list[str]:
    return ["-m", *options(folder, data), f"optimizer.lr={','.join(RATES)}", f"seed={','.join(SEEDS)}"]


@pytest.fixture(scope="module")
def single_runs(tiny_data, tmp_path_factory) -> dict[tuple[str, str], dict]:
    folder = tmp_path_factory.mktemp("single")
    for rate, seed in JOBS:
        code, output = run_to_end("main.py", *options(folder, tiny_data), f"optimizer.lr={rate}", f"seed={seed}")
        assert code == 0, output
    return {(rate, seed): result(folder / f"{rate}-{seed}") for rate, seed in JOBS}


def assert_equal_to_single_runs(folder: Path, single_runs: dict) -> None:
    for rate, seed in JOBS:
        assert equal(result(folder / f"{rate}-{seed}"), single_runs[rate, seed]), (rate, seed)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("SIGKILL")
def test_a_sweep_killed_in_its_third_run_resumes_to_the_results_of_single_runs(tmp_path, tiny_data, single_runs):
    third = tmp_path / "-".join(JOBS[2])
    with start_script("main.py", *sweep(tmp_path, tiny_data)) as process:
        wait_for(process, "run 3 of 6")
        while not (third / "checkpoints" / "last.pt").exists():
            time.sleep(0.01)
        time.sleep(random.Random(0).uniform(0, 0.2))
        process.kill()
        process.communicate()
    step = load_checkpoint(third / "checkpoints" / "last.pt")["state"]["step"]
    assert 0 < step < 40
    assert not (third / "metrics.json").exists()
    assert not (tmp_path / "-".join(JOBS[3])).exists()
    finished = [(tmp_path / "-".join(job) / "metrics.json") for job in JOBS[:2]]
    before = [path.stat().st_mtime_ns for path in finished]

    code, output = run_to_end("main.py", *sweep(tmp_path, tiny_data))
    assert code == 0, output
    assert output.count("this run is finished, nothing to do") == 2
    assert f"from step {step}" in output
    assert [path.stat().st_mtime_ns for path in finished] == before
    assert_equal_to_single_runs(tmp_path, single_runs)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("signal")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_sweep_is_saved_and_resumes(tmp_path, tiny_data, single_runs, name, code):
    with start_script("main.py", *sweep(tmp_path, tiny_data)) as process:
        wait_for(process, "run 2 of 6")
        while not (tmp_path / "-".join(JOBS[1]) / "checkpoints" / "last.pt").exists():
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))
        output = process.communicate()[0]
    assert process.returncode == code, output
    assert "saved at step" in output
    assert "run 3 of 6" not in output
    code, output = run_to_end("main.py", *sweep(tmp_path, tiny_data))
    assert code == 0, output
    assert_equal_to_single_runs(tmp_path, single_runs)
