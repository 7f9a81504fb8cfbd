"""A run's losses beside those of a reference: the band in which they should be, and where they leave it.

Two runs of one configuration differ for two reasons. They draw other images, timesteps and noise: the standard error of
a mean loss follows from the scatter of the reference's own lines. And their weights take another path: a share of the
loss allows for that. Losses are averaged over windows of equal numbers of images seen.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from modeling.comparison.curves import Curve, RunRecord
from modeling.comparison.references import BINS, Differences, Reference
from modeling.system.errors import UserError

NUM_WINDOWS = 25  # in which curves are compared, at most
# Half a band's width is the root of the sum of two squares: of a share of the reference's loss (`Tolerance`) and of
# NUM_ERRORS standard errors of the difference.
NUM_ERRORS = 2.5
# A run is off track when it leaves the band on the same side in NUM_ALARM consecutive windows; by chance that happens
# once in 2 million windows (2 x 0.0062^3).
NUM_ALARM = 3

DRAW_KEYS = ("seed", "dataset.", "train.batch_size", "train.random_flip", "diffusion.num_timesteps")


@dataclass(frozen=True)
class Tolerance:
    """How far two runs may be apart, as shares of the reference's loss.

    Args:
        curve: in a window of the training loss.
        end: in a loss at the end, which every run measures on the same images, timesteps and noise.
        bin_of_mean: in a range of timesteps at the end, as a share of the mean over all and beside `end`: the small
            ones vary by more.
        errors: the share of the standard error that remains in the difference; common draws have common errors.
    """

    curve: float
    end: float
    bin_of_mean: float
    errors: float


# If DRAW_KEYS are equal, every step draws the same. Measured between two versions of the code (CIFAR-10, 1,562 steps of
# Adam): 0.01, 0.005, 0.002 and 0.05.
SAME_DRAWS = Tolerance(curve=0.02, end=0.05, bin_of_mean=0.01, errors=0.25)
# Measured between three seeds of an unsteady run (600 steps on shapes): 0.11 at the end and 0.03 of the mean in a bin.
OTHER_DRAWS = Tolerance(curve=0.05, end=0.15, bin_of_mean=0.015, errors=1.0)


@dataclass(frozen=True)
class Band:
    """A loss beside the reference's.

    Args:
        value: None before it is measured, nan if no step counted.
        start, end: images seen; 0 for a loss at the end of the run.
    """

    name: str
    value: float | None
    reference: float
    half_width: float
    start: int = 0
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


@dataclass(frozen=True)
class Comparison:
    """A run beside a reference.

    Args:
        windows: the training loss; see `compare_curves`.
        ends: the losses at the end; see `compare_ends`.
        why_no_ends: why these cannot be compared, else empty.
    """

    run: RunRecord
    reference: Reference
    changed: Differences
    windows: list[Band]
    ends: list[Band]
    why_no_ends: str


def tolerance(changed: Differences) -> Tolerance:
    """The one of two runs whose configurations differ in these keys."""
    return OTHER_DRAWS if any(key.startswith(DRAW_KEYS) for key in changed) else SAME_DRAWS


def _last_points(ends: np.ndarray, curve: Curve) -> np.ndarray:
    """The index of the last point in each window; no window is shorter than a line of the run's curve.

    Args:
        ends: images seen at each point of the reference's curve.
    """
    longest = np.diff(curve.edges).max() / np.median(np.diff(ends, prepend=0))  # line, in points
    stride = min(len(ends), max(math.ceil(len(ends) / NUM_WINDOWS), math.ceil(longest)))
    last = np.arange(stride - 1, len(ends) + stride // 2, stride).clip(max=len(ends) - 1)
    last[-1] = len(ends) - 1  # a short rest joins the last window
    return last


def compare_curves(run: RunRecord, reference: Reference, changed: Differences) -> list[Band]:
    """The training loss in the windows of which the run has covered nine tenths or more.

    Raises:
        UserError: if there are none.
    """
    allowed, curve = tolerance(changed), reference["curve"]
    table = [[point["images"], point["count"], point["loss"], point["standard_error"]] for point in curve]
    ends, counts, losses, errors = np.array(table, dtype=float).T
    last = _last_points(ends, run.curve)
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
        # Where the loss falls steeply, runs differ in when it does, whatever they draw.
        error = scatter if scatter > 2 * error else allowed.errors * error
        error *= np.sqrt(1 + count / max(run_counts[number], 1))  # the run's own, from as many images as it has, too
        half_width = float(np.hypot(allowed.curve * mean, NUM_ERRORS * error))
        windows.append(Band("train/loss", float(values[number]), float(mean), half_width, int(start), int(end)))
    if not windows:
        seen = f"{run.curve.edges[0]:,.0f} to {run.curve.edges[-1]:,.0f}"
        raise UserError(f"too early: losses of images {seen}, and the first window is {edges[1]:,.0f} images long")
    return windows


def first_exit(windows: list[Band]) -> Band | None:
    """The first of NUM_ALARM consecutive windows that are all above, or all below, the band."""
    for number in range(len(windows) - NUM_ALARM + 1):
        if {window.side for window in windows[number : number + NUM_ALARM]} in ({"above"}, {"below"}):
            return windows[number]
    return None


def compare_ends(run: RunRecord, reference: Reference, changed: Differences) -> tuple[list[Band], str]:
    """The losses at the end, and the averaged weights' loss on held-out images by timestep.

    Returns:
        These, without values before the run's end; or none of them and why they cannot be compared.
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


def compare(run: RunRecord, reference: Reference, changed: Differences) -> Comparison:
    """A run beside a reference; `changed` is where their configurations differ.

    Raises:
        UserError: as `compare_curves`.
    """
    windows = compare_curves(run, reference, changed)
    return Comparison(run, reference, changed, windows, *compare_ends(run, reference, changed))
