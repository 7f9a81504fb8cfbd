"""Runs whose processes main.py starts itself: it ends with the exit code of a single process, and they with it."""

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from modeling.checkpoint import load_checkpoint
from tests.faults.processes import PARTS, process_of, run_launched, run_to_end, wait_for_checkpoint
from tests.helpers import TINY, clean_environment, equal, result, start_script

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.fault("several processes")]

TWO = [*PARTS, "runtime.processes=2"]


def saved_step(folder: Path) -> int:
    return load_checkpoint(folder / "checkpoints" / "last.pt")["state"]["step"]


@pytest.mark.parametrize(
    ("name", "code"), [("the time limit", 0), ("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138), ("SIGKILL", 1)]
)
def test_each_way_to_end_has_its_exit_code_and_the_same_command_resumes(
    tmp_path, tiny_data, whole, record_property, name, code
):
    folder, limit = tmp_path / "run", ["runtime.max_seconds=8"] if code == 0 else []
    options = [*TWO, f"dataset.root={tiny_data}", f"runtime.output_dir={folder}"]
    with start_script("main.py", *options, *limit, start_new_session=True) as process:
        wait_for_checkpoint(folder, process)
        others, may_be_over = [], [psutil.NoSuchProcess] if limit else []  # its first checkpoint may be its last
        with contextlib.suppress(*may_be_over):
            others = psutil.Process(process.pid).children(recursive=True)
        match name:
            case "SIGINT":
                os.killpg(process.pid, signal.SIGINT)  # Ctrl-C, for every process of the terminal
            case "SIGKILL":
                process_of(process, 1).kill()
            case "SIGTERM" | "SIGUSR1":
                process.send_signal(getattr(signal, name))
        output = process.communicate()[0]
    assert (process.returncode, "Traceback" in output) == (code, False), output
    assert not psutil.wait_procs(others, timeout=5)[1]
    step = saved_step(folder)
    if name == "SIGKILL":
        assert output.count("process 1 of 2 is dead or does not answer") == 1, output
    else:
        assert output.count(f"stopped by {name}") == output.count("stopped by") == 1, output
        assert output.count(": stopping\n") == 1, output
        assert f"saved at step {step} of 100" in output
    code_again, output = run_to_end("main.py", *options)
    assert code_again == 0, output
    assert output.count("params.yaml, with") == output.count("/samples/ema/100.png") == 1, output
    assert equal(result(folder), whole)
    record_property("outcome", f"{name}: two processes ended at step {step} with {code}, resumed: equal to one")


def test_ctrl_c_while_the_others_start_ends_all_without_a_traceback(tmp_path, tiny_data):
    options = [*PARTS, "runtime.processes=4", f"dataset.root={tiny_data}", f"runtime.output_dir={tmp_path / 'run'}"]
    with start_script("main.py", *options, start_new_session=True) as process:
        while len(others := psutil.Process(process.pid).children(recursive=True)) < 3:
            time.sleep(0.01)
        time.sleep(0.2)  # they import torch
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate()[0]
    assert (process.returncode, output) == (130, "\nSIGINT: stopping\n")
    assert not psutil.wait_procs(others, timeout=5)[1]


def test_the_others_end_when_the_first_is_killed(tmp_path, tiny_data):
    options = [*TWO, f"dataset.root={tiny_data}", f"runtime.output_dir={tmp_path / 'run'}"]
    with start_script("main.py", *options) as process:
        wait_for_checkpoint(tmp_path / "run", process)
        other = process_of(process, 1)
        process.kill()
        output = process.communicate()[0]
    assert other.wait(60) is None  # no child of this process: how it ended is not known
    assert output.count("process 0 of 2 is dead or does not answer") == 1, output


@pytest.mark.parametrize("launcher", ["main.py", "torchrun"])
def test_a_stage_publishes_once(tmp_path, tiny_data, compose_config, launcher):
    options = [*TINY, "runtime.micro_batch_size=8", "runtime.processes=2", f"dataset.root={tiny_data}"]
    (tmp_path / "params.yaml").write_text(OmegaConf.to_yaml(compose_config(*options)))
    surroundings = {"cwd": tmp_path, "env": clean_environment(OMP_NUM_THREADS="1", DVC_STAGE="train")}
    run = run_to_end if launcher == "main.py" else run_launched
    code, output = run("main.py" if launcher == "main.py" else 2, *options, **surroundings)
    assert code == 0, output
    assert output.count("artefacts   outputs/, from runs/") == 1
    [folder] = (tmp_path / "runs").glob("*-*")
    assert (tmp_path / "outputs/metrics.json").read_bytes() == (folder / "metrics.json").read_bytes()


def test_a_parallel_sweep_of_such_runs_has_the_results_of_single_ones(tmp_path, tiny_data):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    options = [*TINY, "runtime.micro_batch_size=8", f"dataset.root={tiny_data}"]
    folder = f"runtime.output_dir={tmp_path}/${{runtime.processes}}-${{seed}}"
    for count, launcher in ((2, ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]), (1, [])):
        sweep = ["-m", *options, *launcher, folder, "seed=0,1", f"runtime.processes={count}"]
        code, output = run_to_end("main.py", *sweep)
        assert code == 0, output
    for seed in (0, 1):
        assert equal(result(tmp_path / f"2-{seed}"), result(tmp_path / f"1-{seed}"))


def test_another_number_than_torchrun_has_started_is_reported_once(tmp_path, tiny_data):
    options = [*PARTS, f"dataset.root={tiny_data}", f"runtime.output_dir={tmp_path / 'run'}", "runtime.processes=3"]
    code, output = run_launched(2, *options)
    message = "runtime.processes=3: a launcher such as torchrun has started 2, expected null or 2"
    assert (code, output.count(message)) == (1, 1), output
