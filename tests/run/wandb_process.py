"""Runs that log to Weights & Biases: in this process, or in one of their own that is watched to its end.

`python -m tests.run.wandb_process FOLDER MODE START_SECONDS FINISH_SECONDS FAULT` is that process.
"""

import contextlib
import importlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from modeling.run import wandb_tracker
from modeling.run.records import JsonLines, Tracker
from modeling.run.wandb_tracker import WandbTracker
from modeling.sections import Wandb
from tests.helpers import ROOT, clean_environment
from tests.run.wandb_server import CREDENTIALS, KEY

GAVE_UP = "the local files are complete without it"


def start_wandb(folder: Path, mode: str = "offline") -> WandbTracker:
    section = Wandb.model_validate({"mode": mode, "project": "p", "name": None})
    return WandbTracker(section, name="n", folder=folder, config={"a": 1}, run_id="same")


def track(folder: Path, mode: str = "offline") -> None:
    """A run's worth of calls; the local file must be complete whatever becomes of W&B."""
    tracker = Tracker(JsonLines(folder / "m.jsonl"), start_wandb(folder, mode))
    tracker.image(0, "inputs", torch.zeros(3, 4, 4, dtype=torch.uint8))
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0})
    (folder / "config.yaml").write_text("a: 1\n")
    tracker.artifact(folder / "config.yaml", "config", "config")
    tracker.finish(is_complete=True)
    assert [row["step"] for row in tracker.lines.rows] == [1, 2]


def wandb_cores(process_id: int | None = None) -> set[psutil.Process]:
    """W&B's own processes under a process, under this one by default."""
    return {child for child in psutil.Process(process_id).children() if child.name() == "wandb-core"}


@dataclass
class Ended:
    """A process that ended well, and the folder it has left."""

    folder: Path
    errors: str

    def assert_gave_up(self, *reasons: str) -> None:
        """W&B was given up once, for one of these reasons, and nothing else was printed."""
        assert any(reason in self.errors for reason in reasons), self.errors
        assert self.errors.count(GAVE_UP) == self.errors.count("\n") == 1


def run_tracked(
    tmp_path: Path,
    url: str,
    start_seconds: int = 15,
    finish_seconds: int = 10,
    *,
    mode: str = "online",
    fault: str = "",
) -> Ended:
    """Three steps in a process of its own, to the end of it and of W&B's own process.

    Whatever becomes of W&B, the limits hold, the lines are complete, W&B's process is gone and the key is in no file.
    """
    folder, home = tmp_path / "run", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    arguments = [str(folder), mode, str(start_seconds), str(finish_seconds), fault]
    environment = clean_environment(WANDB_API_KEY=KEY, WANDB_BASE_URL=url, HOME=str(home))
    with subprocess.Popen(
        [sys.executable, "-m", __name__, *arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        cores, limit = set(), time.time() + 60
        while process.poll() is None:
            if time.time() > limit:  # W&B's process, first: it holds our pipes, too
                for victim in [*cores, process]:
                    victim.kill()
            with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
                cores |= wandb_cores(process.pid)
            time.sleep(0.02)
        ended = time.time()
        assert process.stdout is not None
        assert process.stderr is not None
        output, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 0, errors
    seconds_to_start, finishing_at = map(float, output.split())
    assert seconds_to_start < start_seconds
    assert ended - finishing_at < finish_seconds + 2  # 2 s for Python's own end
    assert [json.loads(line)["step"] for line in (folder / "m.jsonl").read_text().splitlines()] == [1, 2, 3]
    (core,) = cores
    assert not core.is_running() or core.status() == psutil.STATUS_ZOMBIE
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for secret in (KEY.encode(), CREDENTIALS):
        assert [path for path in files if secret in path.read_bytes()] == []
    assert list(home.rglob("*")) == []
    return Ended(folder, errors)


def main() -> None:
    folder, (mode, start_seconds, finish_seconds, fault) = Path(sys.argv[1]), sys.argv[2:]
    wandb_tracker.START_SECONDS, wandb_tracker.FINISH_SECONDS = int(start_seconds), int(finish_seconds)
    importlib.import_module("wandb")  # which is not what is measured
    started = time.time()
    tracker = Tracker(JsonLines(folder / "m.jsonl"), start_wandb(folder, mode))
    print(time.time() - started)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0})
    if fault == "hangs":
        (core,) = wandb_cores()
        core.suspend()
    print(time.time())
    tracker.finish(is_complete=True)


if __name__ == "__main__":
    main()
