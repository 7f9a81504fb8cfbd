"""Two runs beside each other."""

import json
import re

from tests.comparison.runs import noisy


def lines_of(text):
    """The first word of each line -> the rest."""
    return {line.partition(" ")[0]: line.split()[1:] for line in text.splitlines() if line}


def test_two_runs_are_shown_with_what_differs_and_by_how_much(write_run, command):
    a, b = write_run(noisy(0), "a"), write_run(2 * noisy(0), "b", heldout=0.07, optimizer__lr=0.5)
    (b / "details.json").write_text((b / "details.json").read_text().replace('"threads": 2', '"threads": 1'))
    code, text = command(a, b)
    assert code == 0
    lines = lines_of(text)
    assert (lines["A"], lines["B"]) == ([str(a)], [str(b)])
    assert lines["optimizer.lr"] == ["0.004", "0.5"]
    assert lines["threads"] == ["2", "1"]
    assert "torch" not in lines
    assert lines["eval/heldout_ema"] == ["0.03500", "0.07000", "+100.0%"]
    assert lines["train/loss,"][1] == "144,000-160,000"
    assert lines["train/loss,"][-1] == "+100.0%"
    assert max(map(len, text.splitlines()[2:])) <= 100


def test_equal_runs_differ_in_nothing(write_run, command):
    code, text = command(write_run(noisy(0), "a"), write_run(noisy(0), "b"))
    assert code == 0
    assert "what differs\nnothing\n" in text


def test_a_run_in_progress_is_compared_over_the_images_that_both_have_seen(write_run, command):
    whole, part = write_run(noisy(0), "whole"), write_run(noisy(0)[:40], "part", is_finished=False)
    code, text = command(part, whole)
    lines = lines_of(text)
    assert code == 0
    assert lines["state"] == ["stopped", "finished"]
    assert lines["train/loss,"][1] == "57,600-64,000"
    assert lines["train/loss,"][-1] == "+0.0%"
    assert lines["eval/heldout_ema"] == ["0.03500"]
    assert "threads" not in lines  # only a finished run has said


def test_two_runs_on_other_images_are_said_to_be(write_run, command):
    a, b = write_run(noisy(0), "a"), write_run(noisy(0), "b", dataset__seed=5)
    assert re.search(r"the losses at the end may be of other images \(dataset.seed\)", command(a, b)[1])
    details = json.loads((a / "details.json").read_text()) | {"data_sha256": "1"}
    (a / "details.json").write_text(json.dumps(details))
    assert "(data_sha256, dataset.seed)" in command(a, b)[1]
