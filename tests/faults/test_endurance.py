"""What a run costs in the long term: memory, open files, threads, and the time of its checkpoints."""

import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from modeling.config import parse
from modeling.images import to_model_range
from modeling.run.folder import RunFolder
from modeling.run.identity import identify
from modeling.run.objects import Run
from modeling.runtime import resolve_precision
from modeling.stage import read_manifest
from modeling.training import backward
from tests.faults.processes import steps_of
from tests.helpers import TINY, start_script


def anonymous_bytes(pid: int) -> int:
    """A process's own memory, without pages of files, which the system drops and reloads as it likes."""
    status = Path(f"/proc/{pid}/status").read_text()
    if "RssAnon:" not in status:
        raise psutil.ZombieProcess(pid)
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.fault("5,000 steps")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_five_thousand_steps_take_no_more_memory_files_or_threads(tmp_path, tiny_data, record_property, num_workers):
    folder = tmp_path / "run"
    options = [
        *TINY, f"dataset.root={tiny_data}", f"runtime.output_dir={folder}", "model.multipliers=[1]",
        "train.batch_size=2", "train.num_epochs=200", "train.max_steps=5000", "train.sample_every=20",
        "train.log_every=50", "train.checkpoint_every=100", "wandb.mode=offline",
        f"runtime.num_workers={num_workers}",
    ]  # fmt: skip
    rows = []
    with start_script("main.py", *options) as process:
        assert process.stdout is not None
        threading.Thread(target=process.stdout.read, daemon=True).start()
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            steps = steps_of(folder)
            try:
                with watched.oneshot():
                    if steps:
                        rows.append([steps[-1], anonymous_bytes(process.pid), watched.num_fds(), watched.num_threads()])
            except (psutil.Error, FileNotFoundError):
                break
            time.sleep(0.2)
    assert process.returncode == 0
    assert len(list((folder / "checkpoints").iterdir())) == 2
    steps, memory, files, threads = np.array([row for row in rows if 1000 <= row[0] < 5000]).T
    assert len(steps) > 50
    assert steps.max() > 4500
    slope = np.polyfit(steps / 1000, memory / 1e6, 1)[0]
    per_epoch = 6 * num_workers  # the pipes and queues of a loader
    outcome = (
        f"{slope:+.2f} MB per 1,000 steps, {files.min()}-{files.max()} open files, {threads.min()}-{threads.max()} "
        f"threads ({num_workers} workers)"
    )
    print(outcome)
    record_property("outcome", outcome)
    assert slope < 1
    early, late = steps < 2500, steps >= 3500
    assert np.median(files[late]) <= np.median(files[early]) + per_epoch
    assert np.median(threads[late]) <= np.median(threads[early]) + num_workers


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("cost")
@pytest.mark.parametrize("experiment", ["default", "demo"])
def test_checkpoints_cost_less_than_one_percent(tiny_data, compose_config, tmp_path, record_property, experiment):
    """A save and its verification, against the training steps of an interval; side by side, medians of five."""
    names = [] if experiment == "default" else [f"experiment={experiment}"]
    options = ["dataset=shapes", "dataset.num_images=64", f"dataset.root={tiny_data}"]
    config = parse(compose_config(*names, *options))
    manifest = read_manifest(config.dataset)
    folder = RunFolder(tmp_path / "run", identify(config, 100, "data", "code"))
    run = Run(config, manifest, 100, folder, torch.device("cpu"), resolve_precision("auto", torch.device("cpu")))
    batch = run.batches[0]
    times = {"step": [], "save": []}
    for number in range(15):
        started = time.perf_counter()
        run.optimizer.zero_grad()
        backward(run.model, to_model_range(batch), precision=run.precision)
        run.optimizer.step()
        times["step"].append(time.perf_counter() - started)
        if number % 3 == 2:
            run.state.step = number
            started = time.perf_counter()
            run.save()
            times["save"].append(time.perf_counter() - started)
    step, save = (float(np.median(times[name])) for name in ("step", "save"))
    share = save / (config.train.checkpoint_every * step)
    size = (tmp_path / "run" / "checkpoints" / "last.pt").stat().st_size / 1e6
    outcome = (
        f"{experiment}: a save of {size:.0f} MB takes {save:.2f} s ({min(times['save']):.2f}-"
        f"{max(times['save']):.2f}), a step {step:.3f} s: {share:.2%} of the time at a save every "
        f"{config.train.checkpoint_every} steps"
    )
    print(outcome)
    record_property("outcome", outcome)
    assert share < 0.01
