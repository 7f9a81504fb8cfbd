"""The records of a run: complete local files, with or without Weights & Biases beside them."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modeling.run.records import JsonLines, Tracker, write_csv


def test_lines_are_appended_and_read_back(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.log(1, {"a": 0.5})
    lines.log(2, {"a": 0.25})
    assert lines.rows == [{"step": 1, "a": 0.5}, {"step": 2, "a": 0.25}]


def test_a_second_record_of_a_step_joins_its_line(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.log(1, {"a": 0.5})
    lines.log(2, {"a": 0.25})
    lines.log(2, {"b": 3})
    assert lines.rows == [{"step": 1, "a": 0.5}, {"step": 2, "a": 0.25, "b": 3}]


def test_resuming_drops_a_cut_line_and_those_that_will_come_again(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "a"')
    lines = JsonLines(path, step=2)
    lines.log(3, {"a": 1})
    assert [row["step"] for row in lines.rows] == [1, 2, 3]


@pytest.mark.parametrize(
    ("harm", "steps", "num_lost"),
    [
        (lambda lines: [*lines[:4], b'\0\0{"step": 10}'], [2, 4, 6, 8], 0),
        (lambda lines: [*lines[:4], bytes(600)], [2, 4, 6, 8], 0),
        (lambda lines: [*lines, b"[]", b'{"step": 1}', b'{"status": 0}', b'{"step": "12"}'], [2, 4, 6, 8], 0),
        (lambda lines: [lines[0], b"[" * 10**5, *lines[2:]], [2, 6, 8], 1),
        (lambda lines: [b"\xe9", b'{"step": null}', *lines[2:]], [6, 8], 2),
        (lambda lines: [lines[0], lines[1][:-3] + lines[2], *lines[3:]], [2, 8], 1),
        (lambda lines: [*lines[:2], b"", b""], [2, 4], 2),
        (lambda lines: lines[:2], [2, 4], 2),
        (lambda lines: [b""] * 5, [], 4),
        (lambda lines: [], [], 0),  # a run that began from another folder's checkpoint has no earlier lines
    ],
)
@pytest.mark.fault("damaged file")
def test_resuming_drops_damaged_lines_and_says_how_many_are_lost(tmp_path, capsys, harm, steps, num_lost):
    path = tmp_path / "m.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.5}).encode() for step in range(2, 12, 2)]
    path.write_bytes(b"".join(line + b"\n" for line in harm(lines)))
    resumed = JsonLines(path, step=9, log_every=2)
    assert [row["step"] for row in resumed.rows] == steps
    assert path.read_text() == "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in steps)
    expected = f"warning: {path}: {num_lost} lines up to step 9 are damaged and lost\n" if num_lost else ""
    assert capsys.readouterr().err == expected


def test_csv_holds_the_rows_that_have_all_columns(tmp_path):
    path = tmp_path / "t.csv"
    write_csv(path, [{"step": 1, "loss": 0.5, "x": 1}, {"step": 2}, {"step": 3, "loss": 0.1}], ["step", "loss"])
    assert path.read_text() == "step,loss\n1,0.5\n3,0.1\n"


def test_a_tracker_hands_all_to_wandb_and_keeps_the_lines(tmp_path):
    calls = []

    def record(name):
        return lambda *arguments: calls.append((name, *arguments))

    names = "log", "image", "artifact", "finish"
    grid, path = torch.zeros(3, 4, 4, dtype=torch.uint8), tmp_path / "config.yaml"
    stand_in: Any = SimpleNamespace(**{name: record(name) for name in names})
    for wandb in (stand_in, None):
        tracker = Tracker(JsonLines(tmp_path / "m.jsonl"), wandb)
        tracker.log(1, {"loss": 0.5})
        tracker.image(1, "inputs", grid)
        tracker.artifact(path, "config", "config")
        tracker.sync()
        tracker.finish(is_complete=False)
        assert tracker.lines.rows == [{"step": 1, "loss": 0.5}]
    assert calls == [
        ("log", 1, {"loss": 0.5}),
        ("image", 1, "inputs", grid),
        ("artifact", path, "config", "config"),
        ("finish", False),
    ]
