"""What the tests of real processes share: a run that takes seconds, and what it has printed and recorded so far."""

import json
import subprocess
from pathlib import Path

from tests.helpers import TINY, start_script

NUM_STEPS = 100
LONG = [*TINY, "train.num_epochs=25", "train.sample_every=10", "train.log_every=1"]


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
