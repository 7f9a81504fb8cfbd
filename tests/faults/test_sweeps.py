"""Sweeps killed or stopped at any moment: the same command resumes them, with the results of single runs."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modeling.checkpoint import load_checkpoint
from tests.faults.processes import run_to_end, wait_for
from tests.helpers import ROOT, TINY, clean_environment, equal, result, run_script, start_script

RUNNING = ROOT / "docs" / "running.md"
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
        while process.poll() is None and not (third / "checkpoints" / "last.pt").exists():
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
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
@pytest.mark.parametrize(("name", "to_all", "code"), [("SIGINT", True, 130), ("SIGTERM", False, 143)])
def test_a_stopped_sweep_is_saved_and_resumes(tmp_path, tiny_data, single_runs, launcher, name, to_all, code):
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    command = [*sweep(tmp_path, tiny_data), f"hydra/launcher={launcher}"]
    command += ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    running = JOBS[:2] if launcher == "joblib" else JOBS[:1]
    with start_script("main.py", *command, start_new_session=True) as process:
        while process.poll() is None and not all(
            (tmp_path / "-".join(job) / "checkpoints" / "last.pt").exists() for job in running
        ):
            time.sleep(0.01)
        (os.killpg if to_all else os.kill)(process.pid, getattr(signal, name))
        output = process.communicate()[0]
    assert process.returncode == code, output
    assert output.count("stopped by") == len(running)
    assert len([job for job in JOBS if (tmp_path / "-".join(job)).exists()]) == len(running)
    code, output = run_to_end("main.py", *command)
    assert code == 0, output
    assert_equal_to_single_runs(tmp_path, single_runs)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("signal")
def test_the_job_array_of_the_page_is_requeued_after_a_signal_and_finishes(tmp_path, tiny_data, single_runs):
    """srun and scontrol are stand-ins; the script is the page's own."""
    (tmp_path / "main.py").symlink_to(ROOT / "main.py")
    done = run_script("main.py", *sweep(tmp_path, tiny_data), "--print-jobs")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == len(JOBS)
    (tmp_path / "jobs.txt").write_text(done.stdout)
    (tmp_path / "sweep.sh").write_text(re.findall(r"```text\n(#!.*?)```", RUNNING.read_text(), re.DOTALL)[0])
    programs = {"srun": 'echo $$ > pid; exec "$@"', "python": f'exec {sys.executable} "$@"', "scontrol": "echo $@"}
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    environment = clean_environment(OMP_NUM_THREADS="1", **variables)

    def start() -> subprocess.Popen[str]:
        command = ["bash", "sweep.sh"]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)

    with start() as process:
        while process.poll() is None and not (tmp_path / "-".join(JOBS[1]) / "checkpoints" / "last.pt").exists():
            time.sleep(0.01)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
        output = process.communicate()[0]
    assert process.returncode == 0, output
    assert output.endswith("requeue 7_2\n")
    with start() as process:
        output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "requeue" not in output
    assert equal(result(tmp_path / "-".join(JOBS[1])), single_runs[JOBS[1]])
