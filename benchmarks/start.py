"""How long a command takes until its first output or step; nothing runs beside it, so it needs no turns."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from modeling.system.errors import UserError


def _forget_files(folder: Path) -> None:
    """Drops the files of a folder from the system's cache, as after a restart of the machine."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _seconds_to_first_step() -> float:
    """From the command to the line of the first training step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "main.py", "experiment=demo", "train.log_every=1", f"runtime.output_dir={run}"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not ((metrics := run / "metrics.jsonl").exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise UserError(f"{' '.join(command)}: ended with {process.returncode}")
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        process.terminate()
        process.wait()
    return seconds


def measure_start(rounds: int) -> list[dict]:
    """How long a user waits: rows with label, seconds, lowest and highest."""

    def seconds_of(*arguments: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "main.py", *arguments], capture_output=True, check=False)
        return time.perf_counter() - begin

    subprocess.run([sys.executable, "prepare_data.py", "experiment=demo"], check=True, stdout=subprocess.DEVNULL)
    waits = {
        "`python main.py --help`": lambda: seconds_of("--help"),
        "`python main.py train.lr=1`, an error": lambda: seconds_of("train.lr=1"),
        "`python main.py experiment=demo`, first step": _seconds_to_first_step,
    }
    rows = []
    for label, wait in waits.items():
        for is_cold in (True, False) if hasattr(os, "posix_fadvise") else (False,):
            found = []
            for _ in range(rounds):
                if is_cold:
                    _forget_files(Path(sys.prefix))
                found.append(wait())
            state = "cold" if is_cold else "warm"
            seconds = {"seconds": statistics.median(found), "lowest": min(found), "highest": max(found)}
            rows.append({"label": f"{label}, {state}"} | seconds)
    return rows
