"""Publishes the recorded run's weights: `python -m tests.published_weights` (`make weights`), after `make record`.

It copies outputs/model.safetensors to weights/cifar10.safetensors, measures its bits/dim, writes the record beside it,
and draws the picture of the docs: about two minutes.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from modeling.system.files import sha256_of, write_json
from tests.helpers import ROOT

WEIGHTS, RECORD = ROOT / "weights" / "cifar10.safetensors", ROOT / "weights" / "cifar10.json"
PICTURE = ROOT / "docs" / "pictures" / "weights.png"
SAMPLE = ["num_images=9", "num_steps=20", "scale=4", "precision=fp32", "num_threads=1", "device=cpu"]


def main(outputs: Path = ROOT / "outputs") -> None:
    metrics, details = (json.loads((outputs / name).read_text()) for name in ("metrics.json", "details.json"))
    WEIGHTS.parent.mkdir(exist_ok=True)
    shutil.copyfile(outputs / "model.safetensors", WEIGHTS)
    hashes = {name: details[name] for name in ("data_sha256", "code_sha256")}
    machine = {name: details[name] for name in ("torch", "device", "precision", "threads")}
    names = ("eval/heldout_ema", "eval/train_ema", "images", "steps", "seconds", "parameters")
    about = {"command": "make train", "sha256": sha256_of(WEIGHTS), "seed": details["seed"], **hashes, **machine}
    with tempfile.TemporaryDirectory() as folder:
        run("evaluate.py", "measures=[bits_per_dim]", f"out={folder}", "overwrite=true")
        bits = json.loads((Path(folder) / "evaluation.json").read_text())["bits_per_dim"]["values"]
    bounds = {
        f"bits_per_dim/{name}": {key: bits[f"{name}, clipped"][key] for key in ("total", "standard_error")}
        for name in ("large", "small")
    }
    write_json(RECORD, about | {name: metrics[name] for name in names} | bounds)
    run("sample.py", *SAMPLE, f"out={PICTURE.relative_to(ROOT)}", "overwrite=true")


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
