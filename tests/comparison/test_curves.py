"""A run's folder is read as what it says."""

import json

import numpy as np
import pytest

from modeling.comparison.bands import first_exit
from modeling.comparison.curves import read_run
from modeling.system.errors import UserError
from tests.comparison.runs import NUM_LINES, noisy, reference_of, windows_of


def test_a_step_that_was_skipped_does_not_count(write_run):
    losses = noisy(0)
    some = [None if number % 4 == 1 else loss for number, loss in enumerate(losses)]
    windows = windows_of(write_run(some, "some"), reference_of(write_run(losses)), {})
    kept = [np.delete(losses[start : start + 4], 1).mean() for start in range(0, NUM_LINES, 4)]
    assert [window.value for window in windows] == pytest.approx(kept)

    partly = write_run(losses, "partly")
    rows = [json.loads(line) for line in (partly / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"train/skipped": 10 * (row["step"] >= 50)} for row in rows]
    (partly / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(partly).curve.counts[:4].tolist() == [25 * 64, 15 * 64, 25 * 64, 25 * 64]


def test_a_loss_that_is_no_number_does_not_count(write_run):
    losses = noisy(0)
    folder = write_run(losses)
    text = (folder / "metrics.jsonl").read_text().splitlines()
    text[60] = text[60].replace(f"{losses[60]}", "NaN")
    (folder / "metrics.jsonl").write_text("\n".join(text))
    assert read_run(folder).curve.counts[60] == 0


def test_a_loss_that_stays_away_is_above_the_band(write_run):
    losses = noisy(0)
    windows = windows_of(write_run([*losses[:60], *[None] * 40], "gone"), reference_of(write_run(losses)), {})
    first = first_exit(windows)
    assert first is not None
    assert (first.start, first.side) == (96_000, "above")


def test_the_metrics_of_a_shorter_run_are_not_the_resumed_ones_end(write_run):
    folder = write_run(noisy(0))
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("".join(lines.splitlines(keepends=True)[:-1]))
    run = read_run(folder)
    assert (run.metrics, run.step, run.last_step) == (None, 2_475, 2_500)


def test_an_older_run_with_everything_in_metrics_json_is_read_the_same(write_run):
    folder = write_run(noisy(0))
    new = read_run(folder).metrics
    (folder / "metrics.json").write_text(json.dumps(new))
    (folder / "details.json").unlink()
    assert read_run(folder).metrics == new
    assert new["bins"].keys() == {"eval/heldout_ema"}


def test_a_finished_run_without_its_details_is_an_error_that_names_them(write_run):
    folder = write_run(noisy(0))
    (folder / "details.json").unlink()
    with pytest.raises(UserError, match=r"details\.json: No such file"):
        read_run(folder)
