"""A run's curves beside those of a reference: the band in which they should lie, and where they leave it.

Two runs of one configuration differ in two ways. Other images, timesteps and noise are drawn: the standard error of a
mean loss follows from the scatter of the reference's own lines. And training takes another path: that is allowed for
as a share of the loss. Losses are averaged over windows of equal numbers of images seen.
"""

import contextlib
import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from modeling.run.identity import run_length
from modeling.system.errors import UserError

# The band: the reference's loss +- a share of it and NUM_ERRORS standard errors of the difference, the root of the sum
# of their squares since they are independent. Off track is who leaves it in NUM_ALARM windows in a row on one side; the
# draws alone do that once in 2e6 windows (2 x 0.0062^3).
NUM_ERRORS, NUM_ALARM = 2.5, 3
# With SAME_DRAWS equal, every step draws the same and the errors are common: a share of them is left to the difference
# (0.05 was measured between two versions of the code), and where the loss falls steeply all of it.
SAME_DRAWS = ("seed", "dataset.", "train.batch_size", "train.random_flip", "diffusion.num_timesteps")
COMMON_SHARE = 0.25


@dataclass(frozen=True)
class Tolerance:
    """How far another path of training may lead, as shares of the loss.

    Losses at the end are of the same images, timesteps and noise in every run, so that nothing else is in their bands;
    the small bins of timesteps vary by more, hence also by a share of the mean over all.
    """

    curve: float
    end: float
    bin_of_mean: float


# Measured: 0.01, 0.005 and 0.002 between two versions of the code (CIFAR-10, 1,562 steps); 0.11 at the end, and 0.03 of
# the mean in a bin, between three seeds of a run of 600 steps on shapes, which is as unsteady as they come.
SAME, OTHER = Tolerance(0.02, 0.05, 0.01), Tolerance(0.05, 0.15, 0.015)

NUM_WINDOWS = 25  # in which curves are compared, at most

# What changes no curve, or only at which steps one looks; True: the whole section.
LEFT_OUT = {
    "dataset": {"root", "archive", "urls"},
    "train": {"log_every", "checkpoint_every", "max_skipped_in_row", "sample_every", "num_samples", "sample_steps"},
    "runtime": True,
    "wandb": True,
}
POINT = ("step", "images", "count", "loss", "standard_error")  # of a reference's curve
BINS = "eval/heldout_ema"


class ComparisonError(UserError):
    """What cannot be compared or saved, and why."""


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
    """What a run's folder says: `metrics` is None until it is finished, `last_step` None where it cannot be known."""

    config: dict
    curve: Curve
    step: int
    seconds: float
    metrics: dict | None
    last_step: int | None


@dataclass(frozen=True)
class Band:
    """A loss beside the reference's: `value` is None before it is measured, nan where no step counted."""

    name: str
    value: float | None
    reference: float
    half_width: float
    start: int = 0  # images seen
    end: int = 0

    @property
    def low(self) -> float:
        return max(0.0, self.reference - self.half_width)

    @property
    def high(self) -> float:
        return self.reference + self.half_width

    @property
    def side(self) -> str:
        """in, above (also for nan) or below; empty without a value."""
        if self.value is None:
            return ""
        return "below" if self.value < self.low else "in" if self.value <= self.high else "above"


def comparable(config: dict) -> dict:
    """The part of a resolved configuration that shapes the curves: nothing of the machine."""
    sections = {key: value for key, value in config.items() if LEFT_OUT.get(key) is not True}
    for key in LEFT_OUT.keys() & sections:
        sections[key] = {name: value for name, value in sections[key].items() if name not in LEFT_OUT[key]}
    return sections


def _length(config: dict) -> int | None:
    dataset, train = config["dataset"], config["train"]
    num_images, manifest = dataset["num_images"], Path(dataset["root"]) / dataset["name"] / "manifest.json"
    with contextlib.suppress(OSError, ValueError, KeyError):  # the run may be of another machine
        num_images = json.loads(manifest.read_text())["files"]["train.npy"]["count"]
    if num_images is None:
        return None
    return run_length(num_images, train["batch_size"], train["num_epochs"], train["max_steps"])


def read_run(folder: str | Path, config: dict) -> RunRecord:
    """The run in a folder, finished or not.

    Args:
        config: what the folder's config.yaml says.

    Raises:
        ComparisonError: for records that are missing or damaged.
    """
    path = Path(folder) / "metrics.jsonl"
    try:
        batch_size, log_every = (config["train"][key] for key in ("batch_size", "log_every"))
        # Whole lines only: the last may be in the making.
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if not rows:
            raise ComparisonError(f"too early: {path} is empty, its first line comes at step {log_every:,}")
        table = [[row[key] for key in ("step", "train/loss", "train/skipped")] for row in rows]
        steps, losses, skipped = np.array(table, dtype=float).T  # null becomes nan
        metrics = path.with_name("metrics.json")
        metrics = json.loads(metrics.read_text()) if metrics.exists() else None
        if metrics and metrics["steps"] != steps[-1]:
            metrics = None  # of a shorter run, which this one goes on from
        start = max(0, steps[0] - log_every)  # above 0 where the run began from another one's checkpoint
        edges = np.concatenate([[start], steps])
        counts = np.diff(edges) - np.diff(skipped, prepend=skipped[0] if start else 0)
        if (np.diff(edges) <= 0).any() or (counts < 0).any():
            raise ComparisonError(f"{path} is damaged: its steps do not rise")
        counts = np.where(np.isfinite(losses), counts, 0) * batch_size
        curve = Curve(edges * batch_size, np.where(counts > 0, losses, 0), counts)
        last_step = _length(config) if metrics is None else metrics["steps"]
        return RunRecord(config, curve, int(steps[-1]), rows[-1]["seconds"], metrics, last_step)
    except OSError as error:
        raise ComparisonError(f"{error.filename}: {error.strerror}; expected a run that has begun") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ComparisonError(f"{folder}: config.yaml, metrics.jsonl or .json is damaged: {error!r}") from error


# ---- the comparison


def tolerance(changed: dict[str, tuple]) -> Tolerance:
    """SAME if every step sees the same images, timesteps and noise; `changed` are the configurations' differences."""
    return OTHER if any(key.startswith(SAME_DRAWS) for key in changed) else SAME


def compare_curves(run: RunRecord, reference: dict, changed: dict[str, tuple]) -> list[Band]:
    """The training loss in the windows that the run has covered, each to nine tenths at least.

    A window is some of the reference's points, and no shorter than a line of the run; `changed` as in `tolerance`.

    Raises:
        ComparisonError: when the run has covered none.
    """
    allowed, table = tolerance(changed), [[point[key] for key in POINT] for point in reference["curve"]]
    _, ends, counts, losses, errors = np.array(table, dtype=float).T
    longest = np.diff(run.curve.edges).max() / np.median(np.diff(ends, prepend=0))  # line, in points
    stride = min(len(ends), max(math.ceil(len(ends) / NUM_WINDOWS), math.ceil(longest)))
    last = np.arange(stride - 1, len(ends) + stride // 2, stride).clip(max=len(ends) - 1)  # point of each window
    last[-1] = len(ends) - 1  # a short rest joins the last window
    edges = np.concatenate([[0], ends[last]])
    values, run_counts = run.curve.average(edges)
    windows = []
    for number, (start, end) in enumerate(pairwise(edges)):
        if min(end, run.curve.edges[-1]) - max(start, run.curve.edges[0]) < 0.9 * (end - start):
            continue
        inside = slice(last[number - 1] + 1 if number else 0, last[number] + 1)
        count, share = counts[inside].sum(), counts[inside] / counts[inside].sum()
        mean = share @ losses[inside]
        error = np.sqrt(share**2 @ errors[inside] ** 2)
        scatter = np.sqrt(share @ (losses[inside] - mean) ** 2 / max(len(share) - 1, 1))
        if scatter > 2 * error:  # the loss falls steeply here, and runs differ in when it does
            error = scatter
        elif allowed is SAME:
            error *= COMMON_SHARE
        error *= np.sqrt(1 + count / max(run_counts[number], 1))  # with the run's own, from as many images as it has
        half_width = float(np.hypot(allowed.curve * mean, NUM_ERRORS * error))
        windows.append(Band("train/loss", float(values[number]), float(mean), half_width, int(start), int(end)))
    if not windows:
        seen = f"{run.curve.edges[0]:,.0f} to {run.curve.edges[-1]:,.0f}"
        raise ComparisonError(
            f"too early: losses of images {seen}, and the first window is {edges[1]:,.0f} images long"
        )
    return windows


def first_exit(windows: list[Band]) -> Band | None:
    """The first of NUM_ALARM windows in a row that lie above, or below, the band."""
    for number in range(len(windows) - NUM_ALARM + 1):
        if {window.side for window in windows[number : number + NUM_ALARM]} in ({"above"}, {"below"}):
            return windows[number]
    return None


def compare_ends(run: RunRecord, reference: dict, changed: dict[str, tuple]) -> tuple[list[Band], str]:
    """The losses at the end, and the averaged weights' on held-out images by timestep, without values before it.

    Returns:
        These, or none and why they cannot be compared; `changed` as in `tolerance`.
    """
    if images := [key for key in changed if key.startswith(("dataset.", "train.num_eval_images"))]:
        return [], f"they are of other images ({', '.join(images)})"
    length = (run.last_step or 0) * run.config["train"]["batch_size"]
    if length and abs(length - reference["images"]) > 0.01 * reference["images"]:
        return [], f"the run is {length:,} images long, the reference {reference['images']:,}"
    allowed, found, losses = tolerance(changed), run.metrics or {}, reference["losses"]
    measured = found.get("bins", {}).get(BINS, {})
    bands = [Band(key, found.get(key), loss, allowed.end * loss) for key, loss in losses.items()]
    for key, loss in reference["bins"][BINS].items():
        half_width = allowed.end * loss + allowed.bin_of_mean * losses[BINS]
        bands.append(Band(f"{BINS} {key}", measured.get(key), loss, half_width))
    return bands, ""
