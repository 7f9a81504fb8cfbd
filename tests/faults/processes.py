"""What the tests of real processes share: a run that takes seconds, and what it has printed and recorded so far."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from modeling.checkpoint import load_checkpoint
from tests.helpers import ROOT, TINY, clean_environment, start_script

NUM_STEPS = 100
LONG = [*TINY, "train.num_epochs=25", "train.sample_every=10", "train.log_every=1"]
PARTS = [*LONG, "runtime.micro_batch_size=4", "train.num_eval_images=20"]  # four parts a batch; five of the losses


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Reads the output until `text` has been in it, or it ends; returns what was read."""
    assert process.stdout is not None
    seen = ""
    while text not in seen and (character := process.stdout.read(1)):
        seen += character
    return seen


def run_to_end(script: str, *overrides: str, **popen_options) -> tuple[int, str]:
    """The exit code of a script and all that it printed."""
    with start_script(script, *overrides, **popen_options) as process:
        output = process.communicate()[0]
    return process.returncode, output


def steps_of(folder: Path) -> list[int]:
    """The steps in metrics.jsonl; a killed process's last line may be cut."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


@contextlib.contextmanager
def launched(
    count: int, *overrides: str, script: Path = ROOT / "main.py", **popen_options
) -> Iterator[subprocess.Popen]:
    """Starts `count` processes by torchrun, with all output in one pipe; none of them outlives the section."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(script)]
    options = {"cwd": ROOT, "env": clean_environment(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))} | popen_options
    with subprocess.Popen(
        [sys.executable, *launcher, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        **options,
    ) as process:
        try:
            yield process
        finally:
            kill_all(process)


def kill_all(launcher: subprocess.Popen) -> None:
    """Kills a launcher and its processes, if it runs."""
    if launcher.poll() is None:
        for child in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def run_launched(count: int, *overrides: str, **options) -> tuple[int, str]:
    """The exit code of a script in `count` processes, and all that they printed."""
    with launched(count, *overrides, **options) as process:
        output = process.communicate()[0]
    return process.returncode, output


def process_of(launcher: subprocess.Popen, rank: int) -> psutil.Process:
    """The launched process with this number."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    [found] = [child for child in children if child.environ().get("RANK") == str(rank)]
    return found


def wait_for_checkpoint(folder: Path, process: subprocess.Popen, step: int = 1) -> None:
    """Waits until the run in the folder has saved this step, or ended."""
    path = folder / "checkpoints" / "last.pt"
    while process.poll() is None and not (path.exists() and load_checkpoint(path)["state"]["step"] >= step):
        time.sleep(0.02)
