"""main.py and prepare_data.py as a user calls them: what a run leaves and shows, and how a script fails."""

import json
import re

import pytest
import torch
import yaml

from modeling.run.identity import data_sha256
from tests.helpers import ROOT, leaves, run_script

PARAMS = ROOT / "params.yaml"


@pytest.mark.slow
def test_a_run_leaves_everything_a_user_needs(finished_run):
    names = {str(path.relative_to(finished_run)) for path in finished_run.rglob("*") if path.is_file()}
    assert names == {
        "checkpoints/5.pt", "checkpoints/last.pt", "config.yaml", "details.json", "heldout.csv", "lock", "loss.csv",
        "metrics.json", "metrics.jsonl",
        "model.safetensors", "run.json", "samples/ema/4.png", "samples/ema/8.png", "samples/inputs.png",
        "samples/raw/4.png", "samples/raw/8.png",
    }  # fmt: skip


@pytest.mark.slow
def test_the_terminal_shows_what_will_run_and_how_it_goes(finished_run):
    out, err = (finished_run.with_name(name).read_text() for name in ("out", "err"))
    heading, *changed = out.partition("\n\n")[0].splitlines()
    rest = out.partition("\n\n")[2]
    assert heading == "params.yaml, with (all values: config.yaml)"
    values, defaults = (leaves(yaml.safe_load(path.read_text())) for path in (finished_run / "config.yaml", PARAMS))
    assert {line.split()[0] for line in changed} == {key for key in values if values[key] != defaults[key]}
    assert '  dataset.name                    "cifar10" -> "shapes"' in changed
    for pattern in (
        r"model +ddpm, [\d,]+ parameters", r"device +(cpu, \d+ threads|cuda), (fp32|bf16)",
        r"training +8 steps of 16 images, 4 steps an epoch", rf"run folder +{finished_run}", r"samples +\S+/8\.png",
    ):  # fmt: skip
        assert re.search(pattern, rest)
    first, last = [line for line in err.splitlines() if "training: " in line]  # lines, no carriage returns
    assert re.fullmatch(r"20\S+ \d\d:\d\d:\d\d training: +0%\| 0/8 \[00:00<\?\]", first)
    assert re.search(r"training: 100%\| 8/8 \[00:\d\d<00:00, \d+ images/s, loss [\d.]+\]", last)


@pytest.mark.slow
def test_the_metrics_are_a_dozen_numbers_beside_details_of_bins_identity_and_machine(finished_run, tiny_data):
    metrics, details = (json.loads((finished_run / f"{name}.json").read_text()) for name in ("metrics", "details"))
    assert len(metrics) == 12
    assert all(isinstance(value, int | float) for value in metrics.values())
    for name in ("eval/train_raw", "eval/train_ema", "eval/heldout_raw", "eval/heldout_ema"):
        assert 0.5 < metrics[name] < 1.5
        assert sum(details["bins"][name].values()) / 10 == pytest.approx(metrics[name])
    manifest = json.loads((tiny_data / "shapes" / "manifest.json").read_text())
    assert details["data_sha256"] == data_sha256(manifest)
    assert (metrics["steps"], metrics["images"], details["seed"]) == (8, 128, 0)
    assert details["torch"] == torch.__version__
    assert re.fullmatch("[0-9a-f]{64}", details["code_sha256"])
    assert metrics["images_per_second"] == pytest.approx(128 / metrics["seconds"])
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert lines[-1]["eval/heldout_ema"] == metrics["eval/heldout_ema"]
    rows = (finished_run / "loss.csv").read_text().splitlines()
    assert rows[0] == "step,train/loss,train/loss_smoothed,train/lr"
    assert len(rows) == 4
    assert len((finished_run / "heldout.csv").read_text().splitlines()) == 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["main.py", "train.lrr=1"], "train.lrr: unknown key"),
        (["main.py", "dataset=shapes", "dataset.root=nowhere"], "run `python prepare_data.py dataset=shapes"),
        (["prepare_data.py", "seed=x"], "seed=x: input should be a valid integer"),
        (["convert.py"], "checkpoint: missing, expected a value, as in `python convert.py checkpoint="),
        (["main.py", "runtime.max_seconds=1e10"], "runtime.max_seconds=10000000000.0: input should be less than"),
        (["sample.py", "checkpoint=x.pt", "out=/dev/null/x.png"], "/dev/null/x.png: Not a directory"),
        (["evaluate.py", "checkpoint=linear", "out=/dev/null/x"], "/dev/null/x/evaluation.json: Not a directory"),
        (["convert.py", "checkpoint=x.pt", "out=/dev/null/x"], "/dev/null/x: Not a directory"),
        (["train_encoder.py", "out=/dev/null/x.safetensors"], "/dev/null/x.safetensors: Not a directory"),
    ],
)
@pytest.mark.fault("wrong input")
def test_a_users_mistake_is_one_line_before_anything_heavy_is_imported(arguments, message):
    done = run_script(*arguments, env={"PYTHONPROFILEIMPORTTIME": "1"})
    lines = [line.split("|") for line in done.stderr.splitlines()]
    imported = {columns[-1].strip() for columns in lines if len(columns) == 3}
    assert "hydra" in imported
    assert not imported & {"torch", "numpy", "wandb"}
    assert done.returncode == 1
    errors = "".join(columns[0] for columns in lines if len(columns) == 1)
    assert message in errors
    assert "Traceback" not in errors


BUG = """
import runpy
from modeling import stage

stage.parse_stage = lambda values, schema: {}["no such key"]
runpy.run_path("prepare_data.py", run_name="__main__")
"""


def test_a_bug_keeps_its_traceback(tmp_path):
    (tmp_path / "buggy.py").write_text(BUG)
    done = run_script(tmp_path / "buggy.py", env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert 'prepare_data.py", line' in done.stderr
    assert "KeyError: 'no such key'" in done.stderr
