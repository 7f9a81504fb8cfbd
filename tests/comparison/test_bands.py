"""Known curves are judged as they must be."""

import re

import numpy as np
import pytest

from modeling.comparison.bands import compare_curves, compare_ends, first_exit
from modeling.comparison.curves import read_run
from modeling.comparison.references import choose_reference
from modeling.system.errors import UserError
from tests.comparison.runs import BATCH_SIZE, NUM_LINES, OTHER_SEED, are_equal, noisy, reference_of, windows_of


@pytest.mark.parametrize("changed", [{}, OTHER_SEED])
def test_a_run_equal_to_the_reference_is_in_the_middle_of_the_band(write_run, changed):
    folder = write_run(noisy(0))
    windows = windows_of(folder, reference_of(folder), changed)
    assert len(windows) == 25
    assert are_equal(windows)
    assert {window.side for window in windows} == {"in"}
    assert all(window.low < window.reference < window.high for window in windows)


@pytest.mark.long
def test_another_seeds_noise_stays_on_track(write_run):
    on_track, inside = 0, []
    for draw in range(100):
        reference = reference_of(write_run(noisy(2 * draw), f"a{draw}"))
        windows = windows_of(write_run(noisy(2 * draw + 1), f"b{draw}"), reference, OTHER_SEED)
        on_track += first_exit(windows) is None
        inside += [window.side == "in" for window in windows]
    assert on_track == 100
    assert np.mean(inside) > 0.99


@pytest.mark.parametrize(("factor", "side"), [(1.2, "above"), (0.8, "below")])
def test_a_curve_off_by_a_fifth_from_the_middle_on_is_found_there(write_run, factor, side):
    reference = reference_of(write_run(noisy(0)))
    found = []
    for draw in range(1, 21):
        losses = noisy(draw)
        losses[NUM_LINES // 2 :] *= factor
        first = first_exit(windows_of(write_run(losses, f"run{draw}"), reference, OTHER_SEED))
        assert first is not None
        assert first.side == side
        found.append((first.start - 80_000) / 6_400)  # windows after the middle, which is the middle of one
    assert min(found) >= -0.5
    assert np.median(found) <= 1.5
    assert max(found) <= 4.5


def test_a_small_departure_is_found_with_the_same_draws_only(write_run):
    losses = noisy(0)
    reference, run = reference_of(write_run(losses)), read_run(write_run(1.07 * losses, "off"))
    assert first_exit(compare_curves(run, reference, {})) is not None
    assert first_exit(compare_curves(run, reference, {"optimizer.lr": (1e-3, 2e-3)})) is not None
    for key in ("seed", "train.batch_size", "dataset.num_images", "diffusion.num_timesteps"):
        assert first_exit(compare_curves(run, reference, {key: (0, 1)})) is None


def test_two_windows_outside_are_no_alarm_and_three_are(write_run):
    losses = noisy(0)
    reference = reference_of(write_run(losses))
    for num_windows in (1, 2, 3):
        high = losses.copy()
        high[40 : 40 + 4 * num_windows] *= 2
        windows = windows_of(write_run(high, f"high{num_windows}"), reference, {})
        outside = [number for number, window in enumerate(windows) if window.side != "in"]
        assert outside == list(range(10, 10 + num_windows))
        first = first_exit(windows)
        assert (first is None) == (num_windows < 3)
    assert (first.start, first.end, first.side) == (64_000, 70_400, "above")
    mixed = losses.copy()
    mixed[40:44] *= 2
    mixed[44:48] /= 2
    mixed[48:52] *= 2
    assert first_exit(windows_of(write_run(mixed, "mixed"), reference, {})) is None


def test_runs_may_differ_in_when_the_loss_falls_steeply(write_run):
    losses = noisy(0)
    reference = reference_of(write_run(losses))
    late = losses.copy()
    late[:3] = losses[:3] * [1.1, 1.3, 1.3]
    windows = windows_of(write_run(late, "late"), reference, {})
    assert windows[0].value > 1.1 * windows[0].reference
    assert windows[0].side == "in"


def test_curves_are_compared_at_equal_numbers_of_images(write_run):
    losses = noisy(0)
    folder = write_run(losses)
    reference = reference_of(folder)
    pairs = write_run(losses.reshape(-1, 2).mean(1), "pairs", train__batch_size=2 * BATCH_SIZE)
    windows = windows_of(pairs, reference, {"train.batch_size": (64, 128)})
    assert are_equal(windows)
    rest = windows_of(folder, reference_of(write_run(losses[:97], "short")), {})
    assert [rest[-1].start, rest[-1].end] == [92 * 1600, 97 * 1600]  # a rest of one line is no window of its own
    coarse = write_run(losses.reshape(-1, 10).mean(1), "coarse", train__batch_size=10 * BATCH_SIZE)
    windows = windows_of(coarse, reference, {"train.batch_size": (64, 640)})
    assert [window.end for window in windows] == list(range(16_000, 160_001, 16_000))  # no shorter than its lines
    assert are_equal(windows)


def test_a_run_from_another_ones_checkpoint_is_compared_from_there_on(write_run):
    losses = noisy(0)
    reference = reference_of(write_run(losses))
    folder = write_run(losses, "later")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[40:]))
    windows = windows_of(folder, reference, {})
    assert windows[0].start == 64_000
    assert are_equal(windows)
    with pytest.raises(UserError, match="from image 64,000 on"):
        reference_of(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train__num_eval_images": 17}, r"other images \(train.num_eval_images\)"),
        ({"train__num_epochs": 4}, "the run is 320,000 images long, the reference 160,000"),
    ],
)
def test_losses_of_other_images_or_another_length_are_not_compared(write_run, changes, reason):
    losses = noisy(0)
    reference, run = reference_of(write_run(losses)), read_run(write_run(losses, "other", is_finished=False, **changes))
    _, changed = choose_reference({"default": reference}, run.config)
    bands, why_none = compare_ends(run, reference, changed)
    assert bands == []
    assert re.search(reason, why_none)
