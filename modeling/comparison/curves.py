"""What a run's folder says: its configuration, the curve of its training loss and its losses at the end."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from typing_extensions import TypedDict

from modeling.run.identity import run_length
from modeling.system.errors import UserError
from modeling.system.reading import check, parse_json, read_json, read_json_lines, read_yaml, reading

# Keys that do not change a curve, or only the steps at which it is looked at; True: the whole section.
LEFT_OUT: dict[str, Any] = {
    "dataset": {"root", "archive", "urls"},
    "train": {"log_every", "checkpoint_every", "max_skipped_in_row", "sample_every", "num_samples", "sample_steps"},
    "runtime": True,
    "wandb": True,
}


# ---- what is read of a run's files


class _Dataset(TypedDict):
    name: str
    root: str
    num_images: int | None


class _Train(TypedDict):
    batch_size: int
    num_epochs: float
    max_steps: int | None
    log_every: int


class _Config(TypedDict):
    dataset: _Dataset
    train: _Train


_Row = TypedDict(
    "_Row",
    {
        "step": int,
        "train/loss": float | None,
        "train/loss_smoothed": NotRequired[float | None],
        "train/skipped": int,
        "seconds": float,
    },
)


class _Metrics(TypedDict):
    steps: int


class _Details(TypedDict):
    bins: dict[str, dict[str, float]]


class _File(TypedDict):
    count: int


class _Manifest(TypedDict):
    files: dict[str, _File]


class TooEarlyError(UserError):
    """The run has no loss yet."""


_REMEDY = "restore it, or train this run again"


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
        step: the last one in metrics.jsonl; `loss_smoothed` and `seconds` are of its line.
        metrics: the content of metrics.json and details.json; None until the run is finished.
        last_step: the run's length; None where it cannot be known.
    """

    config: Mapping[str, Any]
    curve: Curve
    step: int
    seconds: float
    loss_smoothed: float | None
    metrics: Mapping[str, Any] | None
    last_step: int | None


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that shapes the curves, without the machine."""
    sections = {key: value for key, value in config.items() if LEFT_OUT.get(key) is not True}
    for key in LEFT_OUT.keys() & sections:
        sections[key] = {name: value for name, value in sections[key].items() if name not in LEFT_OUT[key]}
    return sections


def _length(config: _Config) -> int | None:
    dataset, train = config["dataset"], config["train"]
    num_images, manifest = dataset["num_images"], Path(dataset["root"]) / dataset["name"] / "manifest.json"
    with contextlib.suppress(OSError, UserError, KeyError):  # the run may be from another machine
        num_images = read_json(manifest, _Manifest)["files"]["train.npy"]["count"]
    if num_images is None:
        return None
    return run_length(num_images, train["batch_size"], train["num_epochs"], train["max_steps"])


def _read_metrics(folder: Path) -> dict[str, Any] | None:
    """The content of metrics.json and details.json; None where there is none."""
    path = folder / "metrics.json"
    if not path.exists():
        return None
    with reading(path, "metrics of a finished run", _REMEDY):
        metrics: dict[str, Any] = dict(parse_json(path.read_bytes(), _Metrics))
        check({key: loss for key, loss in metrics.items() if key.startswith("eval/")}, dict[str, float])
        if "bins" in metrics:  # an older run has all in one file
            check(metrics, _Details)
            return metrics
    return metrics | read_json(folder / "details.json", _Details, _REMEDY)


def read_run(folder: Path) -> RunRecord:
    """The run in a folder, finished or not.

    Raises:
        TooEarlyError: if they hold no loss yet.
        UserError: if its files are missing or damaged.
    """
    path = folder / "metrics.jsonl"
    try:
        config, metrics = read_yaml(folder / "config.yaml", _Config, _REMEDY), _read_metrics(folder)
        rows = read_json_lines(path, _Row) if metrics or path.exists() else []  # which a run writes a little later
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; expected the folder of a run that has begun") from error
    batch_size, log_every = config["train"]["batch_size"], config["train"]["log_every"]
    if not rows:
        raise TooEarlyError(f"too early: {path} is empty, its first line comes at step {log_every:,}")
    if None in rows:
        raise UserError(f"{path}: line {rows.index(None) + 1} is damaged: delete it, or resume the run, which does")
    table = [[row["step"], row["train/loss"], row["train/skipped"], row["seconds"]] for row in rows if row]
    steps, losses, skipped, seconds = np.array(table, dtype=float).T  # null becomes nan
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
    smoothed = rows[-1].get("train/loss_smoothed") if rows[-1] else None
    return RunRecord(config, curve, int(steps[-1]), float(seconds[-1]), smoothed, metrics, last_step)
