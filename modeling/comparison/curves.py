"""What a run's folder says: its configuration, the curve of its training loss and its losses at the end."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from modeling.run.identity import run_length
from modeling.system.errors import UserError

# Keys that do not change a curve, or only the steps at which it is looked at; True: the whole section.
LEFT_OUT: dict[str, Any] = {
    "dataset": {"root", "archive", "urls"},
    "train": {"log_every", "checkpoint_every", "max_skipped_in_row", "sample_every", "num_samples", "sample_steps"},
    "runtime": True,
    "wandb": True,
}


@dataclass(frozen=True)
class Curve:
    """Mean losses of consecutive spans.

    Args:
        edges: (N + 1,) images seen at the start and after each span.
        losses: (N,), 0 where no step counted.
        counts: (N,) images whose losses were averaged.
    """

    edges: np.ndarray
    losses: np.ndarray
    counts: np.ndarray

    def average(self, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The means between other edges, nan where no step counted, and their counts; spans are split evenly."""
        totals = (np.concatenate([[0], np.cumsum(values)]) for values in (self.losses * self.counts, self.counts))
        sums, counts = (np.diff(np.interp(edges, self.edges, total)) for total in totals)
        return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0), counts


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says.

    Args:
        step: the last one in metrics.jsonl.
        metrics: the content of metrics.json; None until the run is finished.
        last_step: the run's length; None where it cannot be known.
    """

    config: dict[str, Any]
    curve: Curve
    step: int
    seconds: float
    metrics: dict[str, Any] | None
    last_step: int | None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's values.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected the folder of a run that has begun") from error
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: expected keys and values")
    return {str(key): value for key, value in values.items()}


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that shapes the curves, without the machine."""
    sections = {key: value for key, value in config.items() if LEFT_OUT.get(key) is not True}
    for key in LEFT_OUT.keys() & sections:
        sections[key] = {name: value for name, value in sections[key].items() if name not in LEFT_OUT[key]}
    return sections


def _length(config: dict[str, Any]) -> int | None:
    dataset, train = config["dataset"], config["train"]
    num_images, manifest = dataset["num_images"], Path(dataset["root"]) / dataset["name"] / "manifest.json"
    with contextlib.suppress(OSError, ValueError, KeyError):  # the run may be from another machine
        num_images = json.loads(manifest.read_text())["files"]["train.npy"]["count"]
    if num_images is None:
        return None
    return run_length(num_images, train["batch_size"], train["num_epochs"], train["max_steps"])


def read_run(folder: Path) -> RunRecord:
    """The run in a folder, finished or not.

    Raises:
        UserError: if its files are missing or damaged, or hold no loss yet.
    """
    config, path = read_yaml(folder / "config.yaml"), folder / "metrics.jsonl"
    try:
        batch_size, log_every = (config["train"][key] for key in ("batch_size", "log_every"))
        # Whole lines only: a run in progress may be writing the last one.
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if not rows:
            raise UserError(f"too early: {path} is empty, its first line comes at step {log_every:,}")
        table = [[row[key] for key in ("step", "train/loss", "train/skipped")] for row in rows]
        steps, losses, skipped = np.array(table, dtype=float).T  # null becomes nan
        metrics = path.with_name("metrics.json")
        metrics = json.loads(metrics.read_text()) if metrics.exists() else None
        if metrics and metrics["steps"] != steps[-1]:
            metrics = None  # those of a shorter run, which this one resumes
        start = max(0, steps[0] - log_every)  # above 0 if the run began from another one's checkpoint
        edges = np.concatenate([[start], steps])
        counts = np.diff(edges) - np.diff(skipped, prepend=skipped[0] if start else 0)
        if (np.diff(edges) <= 0).any() or (counts < 0).any():
            raise UserError(f"{path} is damaged: its steps do not rise")
        counts = np.where(np.isfinite(losses), counts, 0) * batch_size
        curve = Curve(edges * batch_size, np.where(counts > 0, losses, 0), counts)
        last_step = _length(config) if metrics is None else metrics["steps"]
        return RunRecord(config, curve, int(steps[-1]), rows[-1]["seconds"], metrics, last_step)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; expected a run that has begun") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: config.yaml, metrics.jsonl or metrics.json is damaged: {error!r}") from error
