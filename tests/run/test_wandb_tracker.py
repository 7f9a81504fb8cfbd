"""What Weights & Biases receives of a run, read back from its own files, and what becomes of the run without it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb

import main
from modeling.config import parse
from modeling.run import wandb_tracker
from tests.helpers import ROOT
from tests.run.wandb_file import read_wandb
from tests.run.wandb_process import GAVE_UP, start_wandb, track, wandb_cores


@pytest.mark.slow
def test_a_run_logs_everything_to_wandb_and_never_its_code(tiny, capsys):
    place = "wandb.project=here", "wandb.entity=us", "wandb.group=lr", "wandb.tags=[a,b c]", "wandb.notes=why"
    config = tiny("wandb.mode=offline", "runtime.name=big-lr", *place)
    main.main(config)
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch("big-lr-[0-9a-f]{10}", folder.name)
    found = read_wandb(folder)
    assert found.run.display_name == "big-lr"
    assert (found.run.project, found.run.entity, found.run.run_group) == ("here", "us", "lr")
    assert (list(found.run.tags), found.run.notes) == (["a", "b c"], "why")
    assert {key: found.config[key] for key in config} == parse(config).model_dump()  # all hyperparameters, nested
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 8]
    for line in lines:  # loss, smoothed loss, learning rate, images/s, at the same steps as in the local file
        row = found.rows[line["step"]]
        assert {key: row[key] for key in line if key != "step"} == {key: line[key] for key in line if key != "step"}
    assert {"train/loss", "train/loss_smoothed", "train/lr", "images_per_second"} <= set(lines[0])
    assert found.rows[0]["inputs._type"] == "image-file"
    for step in (4, 8):
        for kind in ("raw", "ema"):
            assert found.rows[step][f"samples/{kind}._type"] == "image-file"
    assert list(found.artifacts.values()) == [("config", ["config.yaml"])]
    media = [file.name for file in (folder / "wandb").rglob("*.png")]
    assert len(media) == 5  # inputs, and two grids at two steps
    assert not [file for file in (folder / "wandb").rglob("*") if file.suffix in (".py", ".patch", ".ipynb")]
    assert not any(name.startswith("code/") or name.endswith(".py") for name in found.files)
    assert "Weights & Biases" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_run_is_no_success_for_wandb(tmp_path):
    tracker = start_wandb(tmp_path)
    tracker.log(1, {"loss": 1.0})
    tracker.finish(is_complete=False)
    assert read_wandb(tmp_path).exit_code == 1


def test_nothing_of_wandb_is_left_after_the_end(tmp_path):
    """Its file is complete, and no process, thread or hook could hold up or change the end of ours."""
    numbers = signal.SIGINT, signal.SIGTERM
    before, threads = (sys.exit, sys.excepthook, *map(signal.getsignal, numbers)), set(threading.enumerate())
    tracker = start_wandb(tmp_path)
    assert len(wandb_cores()) == 1
    assert tuple(map(signal.getsignal, numbers)) == before[2:]
    tracker.log(1, {"loss": 1.0})
    tracker.finish(is_complete=True)
    assert wandb_cores() == set()
    found = read_wandb(tmp_path)
    assert found.rows[1]["loss"] == 1.0
    assert found.exit_code == 0  # the last record
    assert (sys.exit, sys.excepthook, *map(signal.getsignal, numbers)) == before
    assert set(threading.enumerate()) <= threads


# ---- without it


@pytest.mark.fault("Weights & Biases")
def test_a_run_without_wandb_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    track(tmp_path)
    assert capsys.readouterr().err.count(GAVE_UP) == 1


@pytest.mark.fault("Weights & Biases")
def test_a_run_whose_wandb_fails_to_start_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    def fail(**options):
        raise ConnectionResetError("the service is gone")

    monkeypatch.setattr(wandb, "init", fail)
    track(tmp_path)
    assert capsys.readouterr().err.count(f"the service is gone; {GAVE_UP}") == 1


@pytest.mark.slow
@pytest.mark.fault("Weights & Biases")
def test_a_run_whose_wandb_process_dies_goes_on_and_says_so_once(tmp_path):
    """In a process of its own, which must end well, too."""
    code = """
import sys, wandb
from pathlib import Path
from tests.run.wandb_process import track, wandb_cores

log = wandb.Run.log

def kill_the_service_first(run, *args, **options):
    for core in wandb_cores():
        core.kill()
        core.wait(5)
        print("killed")
    return log(run, *args, **options)

wandb.Run.log = kill_the_service_first
track(Path(sys.argv[1]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "killed" in done.stdout
    assert done.stderr.count(GAVE_UP) == 1
    assert "Traceback" not in done.stderr


def wandb_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "wandb"]


@pytest.fixture
def release():
    """An event for which a stand-in for W&B waits; the test ends when its thread has ended."""
    event = threading.Event()
    yield event
    event.set()
    for thread in wandb_threads():
        thread.join()


def busy_run(release: threading.Event) -> SimpleNamespace:
    """What wandb.init returns, with a log() that comes back only when it is released."""

    def ignore(*args, **options) -> None:
        pass

    def log(*args, **options) -> None:
        release.wait()

    return SimpleNamespace(dir="run/files", log_artifact=ignore, finish=ignore, define_metric=ignore, log=log)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["start", "finish"])
@pytest.mark.fault("Weights & Biases")
def test_a_slow_wandb_delays_a_run_by_a_bounded_time(tmp_path, monkeypatch, capsys, release, phase):
    init: dict[str, Callable] = {"start": lambda **_: release.wait(), "finish": lambda **_: busy_run(release)}
    monkeypatch.setattr(wandb_tracker, f"{phase.upper()}_SECONDS", 0.2)
    monkeypatch.setattr(wandb, "init", init[phase])
    started = time.perf_counter()
    track(tmp_path)
    assert time.perf_counter() - started < 1.2
    assert len(wandb_threads()) == 1  # it would have waited for more
    assert capsys.readouterr().err.count(f"did not {phase} within 0.2 s; the local files are complete") == 1


def test_calls_for_a_wandb_that_was_given_up_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = start_wandb(tmp_path)
    grid = torch.zeros(3, 4, 4, dtype=torch.uint8)
    kept = weakref.ref(grid)
    tracker.image(1, "grid", grid)
    del grid
    assert kept() is None


@pytest.mark.fault("Weights & Biases")
def test_calls_that_wandb_does_not_take_do_not_pile_up(tmp_path, monkeypatch, capsys, release):
    monkeypatch.setattr(wandb_tracker, "MAX_CALLS", 3)
    monkeypatch.setattr(wandb_tracker, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(wandb, "init", lambda **options: busy_run(release))
    tracker = start_wandb(tmp_path)
    for step in range(20):
        tracker.log(step, {"loss": 1.0})
    tracker.finish(is_complete=True)
    assert len(wandb_threads()) == 1  # still in its first call: nothing has waited for it
    assert capsys.readouterr().err.count(f"3 calls wait for it; {GAVE_UP}") == 1


@pytest.mark.slow
@pytest.mark.fault("Weights & Biases")
def test_online_without_a_key_is_logged_offline_and_asks_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    track(tmp_path, mode="online")
    assert "no API key" in capsys.readouterr().err
    assert read_wandb(tmp_path).rows[2]["loss"] == 1.0


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("Weights & Biases")
def test_signals_to_the_whole_group_do_not_reach_wandbs_process(tmp_path):
    """Ctrl-C does so; what the run logs while it ends must arrive, too."""
    code = """
import signal, sys, time
from pathlib import Path
from tests.run.wandb_process import start_wandb

seen = set()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: seen.add(number))
tracker = start_wandb(Path(sys.argv[1]))
tracker.log(1, {"loss": 1.0})
print("ready", flush=True)
while len(seen) < 2:
    time.sleep(0.05)
tracker.log(2, {"loss": 2.0})
tracker.finish(is_complete=True)
"""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, **options) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    found = read_wandb(tmp_path)
    assert [found.rows[step]["loss"] for step in (1, 2)] == [1.0, 2.0]
    assert found.exit_code == 0
