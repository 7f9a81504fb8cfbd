"""Publishes a run's weights: `python -m tests.published_weights` (`make weights`), after `make record`.

It writes the model of outputs/ to weights/cifar10.safetensors, measures its bits/dim and held-out loss, writes the
record beside it, and draws the picture of the docs: about two minutes. `python -m tests.published_weights
evening FOLDER` does it with the run of experiment=evening that is in that folder: about ten minutes.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from modeling.checkpoint import load_weights
from modeling.system.files import sha256_of, write_json
from tests.helpers import ROOT

SAMPLE = ["num_images=9", "num_steps=20", "scale=4", "precision=fp32", "num_threads=1", "device=cpu"]


@dataclass(frozen=True)
class Publication:
    """A file of weights in Git, with its record, and a picture of its samples in the docs.

    Args:
        name: of the file and of its record.
        command: that trained it.
        dtype: of the weights in the file; half precision takes half the space in every clone.
    """

    name: str
    command: str
    dtype: torch.dtype = torch.float32

    @property
    def weights(self) -> Path:
        return ROOT / "weights" / f"{self.name}.safetensors"

    @property
    def record(self) -> Path:
        return self.weights.with_suffix(".json")

    @property
    def picture(self) -> Path:
        return ROOT / "docs" / "pictures" / f"{self.name}-weights.png"

    @property
    def sample(self) -> list[str]:
        """What draws the picture, less `out`."""
        return [f"checkpoint={self.weights.relative_to(ROOT)}", *SAMPLE]


PUBLICATIONS = {
    "default": Publication("cifar10", "make train"),
    "evening": Publication("cifar10-evening", "python main.py experiment=evening", torch.float16),
}


def main(name: str = "default", outputs: str = "outputs") -> None:
    publication, run_folder = PUBLICATIONS[name], ROOT / outputs
    metrics, details = (json.loads((run_folder / file).read_text()) for file in ("metrics.json", "details.json"))
    config, weights = load_weights(run_folder / "model.safetensors")
    weights = {key: weight.to(publication.dtype) for key, weight in weights.items()}
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder) / publication.weights.name
        new.write_bytes(save(weights, metadata={"config": json.dumps(config, sort_keys=True)}))
        run(
            "evaluate.py", f"checkpoint={new}", "measures=[bits_per_dim,heldout_loss]", "loss_images=5000",
            f"out={folder}/evaluation",
        )  # fmt: skip
        measured = json.loads((Path(folder) / "evaluation" / "evaluation.json").read_text())
        bits, loss = measured["bits_per_dim"]["values"], measured["heldout_loss"]
        numbers = {"heldout_loss": loss["values"]["total"]}
        for variance in ("large", "small"):
            bound = bits[f"{variance}, clipped"]
            numbers[f"bits_per_dim/{variance}"] = {key: bound[key] for key in ("total", "standard_error")}
        machine = ("torch", "device", "precision", "threads")
        about = ("seed", "data_sha256", "code_sha256", *machine)
        trained = ("eval/heldout_ema", "eval/train_ema", "images", "steps", "seconds", "parameters")
        record = {
            "command": publication.command,
            "sha256": sha256_of(new),
            "run": {key: details[key] for key in about} | {key: metrics[key] for key in trained},
            "measured": {key: loss["identity"][key] for key in machine} | numbers,
        }
        shutil.move(new, publication.weights)
        write_json(publication.record, record)
    run("sample.py", *publication.sample, f"out={publication.picture.relative_to(ROOT)}", "overwrite=true")


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
