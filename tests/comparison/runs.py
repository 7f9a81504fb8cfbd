"""Runs with known curves, written as a run writes its folder."""

import numpy as np
import pytest

from modeling.comparison.bands import compare_curves
from modeling.comparison.curves import read_run
from modeling.comparison.references import make_reference

NUM_LINES, LOG_EVERY, BATCH_SIZE = 100, 25, 64  # 100 points, so windows of 4 lines: 6,400 images
SCATTER = 2.2  # standard deviation of an image's loss over its mean: that of a small network on CIFAR-10
OTHER_SEED = {"seed": (0, 1)}


def noisy(seed, num_lines=NUM_LINES):
    """A loss that falls steeply at first and slowly later, as the means that a run's lines would have."""
    line = LOG_EVERY * BATCH_SIZE
    images = (np.arange(num_lines) + 0.5) * line
    losses = 0.035 + 0.01 * np.exp(-images / 40_000) + np.exp(-images / 2_000)
    return losses * (1 + SCATTER / np.sqrt(line) * np.random.default_rng(seed).standard_normal(num_lines))


def reference_of(folder, name="default"):
    return make_reference(read_run(folder), name, "python main.py", "2026-01-01")


def windows_of(folder, reference, changed):
    return compare_curves(read_run(folder), reference, changed)


def are_equal(windows) -> bool:
    """Whether the run has the reference's losses, up to rounding."""
    return [window.value for window in windows] == pytest.approx([window.reference for window in windows], rel=1e-12)
