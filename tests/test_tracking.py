"""The records of a run: complete local files, and what Weights & Biases is told, read back from its own log."""

import json
import struct
import subprocess
import sys
import time
import types
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from modeling.tracking import JsonLines, Tracker, WandbTracker, write_csv
from tests.conftest import ROOT

# ---- local files


def test_lines_are_appended_and_read_back(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.log(1, {"a": 0.5})
    lines.log(2, {"a": 0.25})
    assert lines.rows() == [{"step": 1, "a": 0.5}, {"step": 2, "a": 0.25}]


def test_a_second_record_of_a_step_joins_its_line(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.log(1, {"a": 0.5})
    lines.log(2, {"a": 0.25})
    lines.log(2, {"b": 3})
    assert lines.rows() == [{"step": 1, "a": 0.5}, {"step": 2, "a": 0.25, "b": 3}]


def test_going_on_drops_the_lines_that_will_come_again_and_a_cut_one(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "a"')
    lines = JsonLines(path, step=2)
    lines.log(3, {"a": 1})
    assert [row["step"] for row in lines.rows()] == [1, 2, 3]


def test_csv_holds_the_rows_that_have_all_columns(tmp_path):
    write_csv(
        tmp_path / "t.csv", [{"step": 1, "loss": 0.5, "x": 1}, {"step": 2}, {"step": 3, "loss": 0.1}], ["step", "loss"]
    )
    assert (tmp_path / "t.csv").read_text() == "step,loss\n1,0.5\n3,0.1\n"


# ---- Weights & Biases


def wandb_records(path: Path) -> Iterator:
    """The records of an offline run: LevelDB's log framing around protobuf messages (wandb ships no reader)."""
    from wandb.proto import wandb_internal_pb2

    block_bytes, head_bytes, kinds_that_end = 32768, 7, (1, 4)
    data, position, parts = path.read_bytes(), 7, []
    assert struct.unpack("<4sHB", data[:7]) == (b":W&B", 0xBEE1, 0)
    while position + head_bytes <= len(data):
        left = block_bytes - position % block_bytes
        if left < head_bytes:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + head_bytes])
        body = data[position + head_bytes : position + head_bytes + length]
        assert zlib.crc32(body, zlib.crc32(bytes([kind]))) == checksum
        position += head_bytes + length
        parts.append(body)
        if kind in kinds_that_end:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def read_wandb(folder: Path) -> dict:
    """What a run's folder tells: config, rows by step, artifacts with their files, logged files."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found = {"config": {}, "rows": {}, "artifacts": {}, "files": []}

    def values(items):
        return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}

    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= values(record.run.config.update)
        elif kind == "config":
            found["config"] |= values(record.config.update)
        elif kind == "history":
            row = values(record.history.item)
            found["rows"].setdefault(row["_step"], {}).update(row)
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            artifact = record.request.log_artifact.artifact
            found["artifacts"][artifact.name] = (artifact.type, [entry.path for entry in artifact.manifest.contents])
        elif kind == "artifact":
            found["artifacts"][record.artifact.name] = (
                record.artifact.type,
                [entry.path for entry in record.artifact.manifest.contents],
            )
        elif kind == "files":
            found["files"] += [file.path for file in record.files.files]
    return found


@pytest.mark.slow
def test_a_run_tells_wandb_everything_and_never_the_code(tiny, capsys):
    import main
    from modeling.config import parse

    config = tiny("wandb.mode=offline", "runtime.output_dir=run", "wandb.project=here")
    main.main(config)
    found = read_wandb(Path("run"))
    assert found["run"].project == "here"
    assert found["run"].display_name == "run"
    assert {key: found["config"][key] for key in config} == parse(config).model_dump()  # all hyperparameters, nested
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 8]
    for line in lines:  # loss, smoothed loss, learning rate, images/s, at the same steps as in the local file
        row = found["rows"][line["step"]]
        assert {key: row[key] for key in line if key != "step"} == {key: line[key] for key in line if key != "step"}
    assert {"train/loss", "train/loss_smoothed", "train/lr", "images_per_second"} <= set(lines[0])
    assert found["rows"][0]["inputs._type"] == "image-file"
    for step in (4, 8):
        for kind in ("raw", "ema"):
            assert found["rows"][step][f"samples/{kind}._type"] == "image-file"
    assert list(found["artifacts"].values()) == [("config", ["config.yaml"])]
    media = [file.name for file in Path("run/wandb").rglob("*.png")]
    assert len(media) == 5  # inputs, and two grids at two steps
    assert not [file for file in Path("run/wandb").rglob("*") if file.suffix in (".py", ".patch", ".ipynb")]
    assert not any(name.startswith("code/") or name.endswith(".py") for name in found["files"])
    assert "Weights & Biases" not in capsys.readouterr().err


def track(tmp_path: Path, mode: str = "offline") -> None:
    """A run's worth of calls; the local file must be complete whatever becomes of W&B."""
    wandb = WandbTracker(mode=mode, project="p", name="n", folder=tmp_path, config={"a": 1})
    tracker = Tracker(JsonLines(tmp_path / "m.jsonl"), wandb)
    tracker.image(0, "inputs", torch.zeros(3, 4, 4, dtype=torch.uint8))
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0})
    (tmp_path / "config.yaml").write_text("a: 1\n")
    tracker.artifact(tmp_path / "config.yaml", "config", "config")
    tracker.finish()
    assert [row["step"] for row in tracker.lines.rows()] == [1, 2]


def test_without_wandb_the_run_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    track(tmp_path)
    assert capsys.readouterr().err.count("the local files are complete without it") == 1


def test_when_wandb_fails_to_start_the_run_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    def fail(**options):
        raise ConnectionResetError("the service is gone")

    monkeypatch.setattr("wandb.init", fail)
    track(tmp_path)
    assert capsys.readouterr().err.count("the service is gone; the local files are complete without it") == 1


@pytest.mark.slow
def test_when_wandbs_process_dies_the_run_goes_on_and_says_so_once(tmp_path):
    """In a process of its own, which must end well, too."""
    code = """
import psutil, sys, wandb
from pathlib import Path
from tests.test_tracking import track

log = wandb.Run.log

def kill_the_service_first(run, *args, **options):
    for child in psutil.Process().children(recursive=True):
        if "wandb" in child.name():
            child.kill()
            child.wait(5)
            print("killed")
    return log(run, *args, **options)

wandb.Run.log = kill_the_service_first
track(Path(sys.argv[1]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "killed" in done.stdout
    assert done.stderr.count("the local files are complete without it") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["start", "finish"])
def test_a_slow_wandb_delays_a_run_by_a_bounded_time(tmp_path, monkeypatch, capsys, phase):
    monkeypatch.setattr(f"modeling.tracking.{phase.upper()}_SECONDS", 0.2)
    if phase == "start":
        monkeypatch.setattr("wandb.init", lambda **options: time.sleep(1.5))
    else:
        run = types.SimpleNamespace(log=lambda *a, **k: time.sleep(1.5), log_artifact=print, finish=print)
        monkeypatch.setattr("wandb.init", lambda **options: run)
    started = time.perf_counter()
    track(tmp_path)
    assert time.perf_counter() - started < 1.2
    assert capsys.readouterr().err.count(f"did not {phase} within 0.2 s; the local files are complete") == 1
    time.sleep(2.5)  # lets the thread end inside this test


@pytest.mark.slow
def test_online_without_a_key_is_logged_offline_and_asks_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    track(tmp_path, mode="online")
    assert "no API key" in capsys.readouterr().err
    assert read_wandb(tmp_path)["rows"][2]["loss"] == 1.0
