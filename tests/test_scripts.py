"""The three scripts as a user calls them."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save

import main
import sample
from modeling.checkpoint import load_weights
from modeling.config import ConfigError, parse
from modeling.measures.resumable import read_samples
from modeling.samplers import sample_images
from tests.helpers import ROOT, TINY, ended_after


def run_script(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, tiny_data) -> Path:
    """The folder of a small finished run, made by the scripts themselves in fresh processes."""
    folder = tmp_path_factory.mktemp("run") / "run"
    result = run_script("main.py", *TINY, f"dataset.root={tiny_data}", f"runtime.output_dir={folder}")
    assert result.returncode == 0, result.stderr
    folder.with_name("out").write_text(result.stdout)
    folder.with_name("err").write_text(result.stderr)
    return folder


@pytest.mark.slow
def test_a_run_leaves_everything_a_user_needs(finished_run):
    names = {str(path.relative_to(finished_run)) for path in finished_run.rglob("*") if path.is_file()}
    assert names == {
        "checkpoints/5.pt", "checkpoints/last.pt", "config.yaml", "heldout.csv", "lock", "loss.csv",
        "metrics.json", "metrics.jsonl",
        "model.safetensors", "run.json", "samples/ema/4.png", "samples/ema/8.png", "samples/inputs.png",
        "samples/raw/4.png", "samples/raw/8.png",
    }  # fmt: skip


@pytest.mark.slow
def test_the_terminal_shows_what_will_run_and_how_it_goes(finished_run):
    out, err = (finished_run.with_name(name).read_text() for name in ("out", "err"))
    resolved, _, rest = out.partition("\n\n")
    assert yaml.safe_load(resolved) == yaml.safe_load((finished_run / "config.yaml").read_text())
    for pattern in (
        r"model +ddpm, [\d,]+ parameters", r"device +(cpu, \d+ threads|cuda), (fp32|bf16)",
        r"training +8 steps of 16 images, 4 steps an epoch", rf"run folder +{finished_run}", r"samples +\S+/8\.png",
    ):  # fmt: skip
        assert re.search(pattern, rest)
    last = [line for line in err.splitlines() if line.startswith("training")][-1]  # a line, no carriage returns
    assert re.search(r"8/8 \[.*<.*, epoch 2, loss [\d.]+, lr [\d.e-]+, \d+ images/s\]", last)


@pytest.mark.slow
def test_metrics_tell_losses_and_identity(finished_run, tiny_data):
    metrics = json.loads((finished_run / "metrics.json").read_text())
    for name in ("eval/train_raw", "eval/train_ema", "eval/heldout_raw", "eval/heldout_ema"):
        assert 0.5 < metrics[name] < 1.5
        assert sum(metrics["bins"][name].values()) / 10 == pytest.approx(metrics[name])
    manifest = json.loads((tiny_data / "shapes" / "manifest.json").read_text())
    assert metrics["data_sha256"] == manifest["files"]["train.npy"]["sha256"]
    assert (metrics["steps"], metrics["images"], metrics["seed"]) == (8, 128, 0)
    assert metrics["torch"] == torch.__version__
    assert re.fullmatch("[0-9a-f]{64}", metrics["code_sha256"])
    assert metrics["images_per_second"] == pytest.approx(128 / metrics["seconds"])
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 8]
    assert lines[-1]["eval/heldout_ema"] == metrics["eval/heldout_ema"]
    rows = (finished_run / "loss.csv").read_text().splitlines()
    assert rows[0] == "step,train/loss,train/loss_smoothed,train/lr"
    assert len(rows) == 4
    assert len((finished_run / "heldout.csv").read_text().splitlines()) == 11


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(finished_run, tiny_data):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*.safetensors")}
    result = run_script("main.py", *TINY, f"dataset.root={tiny_data}", f"runtime.output_dir={finished_run}")
    assert result.returncode == 0
    assert "this run is finished, nothing to do" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_a_folder_with_another_run_or_other_files_is_refused(finished_run, tiny, tmp_path):
    with pytest.raises(SystemExit, match=r"holds the run shapes-ddpm8-adam-\w+, not shapes-ddpm8-sgd"):
        main.main(tiny("optimizer=sgd", f"runtime.output_dir={finished_run}"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(SystemExit, match="holds other files, not shapes-ddpm8-adam"):
        main.main(tiny("runtime.output_dir=mine"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_sampling_needs_nothing_but_the_file(finished_run, tmp_path):
    """In a fresh process and folder; the images are those of the training's last grid, which has the same seed."""
    checkpoint = tmp_path / "given.safetensors"
    checkpoint.write_bytes((finished_run / "model.safetensors").read_bytes())
    options = ["num_images=4", "num_steps=5", "batch_size=4", "device=cpu"]
    result = run_script(
        str(ROOT / "sample.py"), f"checkpoint={checkpoint}", *options, f"out={tmp_path}/a.png", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{tmp_path}/a.png"
    with Image.open(tmp_path / "a.png") as ours, Image.open(finished_run / "samples" / "ema" / "8.png") as theirs:
        np.testing.assert_array_equal(np.array(ours), np.array(theirs))


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch_size(finished_run, compose_config, tmp_path):
    grids = []
    for size in (4, 3):
        path = tmp_path / f"{size}.png"
        options = [
            "num_images=4",
            f"batch_size={size}",
            "num_steps=null",
            "precision=fp32",
            "device=cpu",
            f"out={path}",
        ]
        checkpoint = finished_run / "checkpoints" / "last.pt"
        sample.main(compose_config(f"checkpoint={checkpoint}", *options, name="sample"))
        with Image.open(path) as image:
            grids.append(np.array(image).astype(int))
    assert np.abs(grids[0] - grids[1]).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint=nowhere.pt"], "nowhere.pt: there is no such file"),
        (["checkpoint={run}/config.yaml"], "no checkpoint"),
        (["checkpoint={run}/model.safetensors", "num_steps=21"], "num_steps must be at most 20, got 21"),
        (["checkpoint={run}/model.safetensors", "sampler=ddim", "eta=-1"], "eta=-1"),
        (["checkpoint={run}/model.safetensors", "sampler=dpm_solver", "eta=1.0"], "eta must be null with sampler=dpm"),
        (["checkpoint={run}/model.safetensors", "picture=path", "out=a.npz"], r"picture=path needs out=\*\.png, got a"),
        (["checkpoint={run}/model.safetensors", "weights=raw"], "holds averaged weights only"),
        (["checkpoint={run}/model.safetensors", "out={run}", "overwrite=true"], "does not hold samples"),
        (["checkpoint={run}/model.safetensors", "out={run}/config.yaml"], "exists already"),
    ],
)
def test_wrong_sampling_requests_are_refused(finished_run, compose_config, monkeypatch, tmp_path, overrides, message):
    monkeypatch.chdir(tmp_path)
    overrides = [override.format(run=finished_run) for override in overrides]
    with pytest.raises(SystemExit, match=message):
        sample.main(compose_config(*overrides, name="sample"))


@pytest.mark.slow
def test_a_stopped_sample_script_goes_on_and_writes_every_kind(finished_run, compose_config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = [
        f"checkpoint={finished_run}/checkpoints/last.pt", "num_images=6", "batch_size=2", "num_steps=4", "sampler=ddim",
    ]  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("modeling.measures.resumable.sample_images", ended_after(sample_images, 2, KeyboardInterrupt))
        sample.main(compose_config(*options, "out=a.npz", name="sample"))
    sample.main(compose_config(*options, "out=a.npz", name="sample"))
    sample.main(compose_config(*options, "out=b", name="sample"))
    images, identity = read_samples(tmp_path / "a.npz")
    assert len(images) == len(list(Path("b").glob("*.png"))) == 6
    assert identity["sampler"] == "ddim"
    assert identity["eta"] == 0
    assert json.loads(Path("b/identity.json").read_text()) == identity
    assert not list(tmp_path.glob("*.partial"))
    with Image.open("b/5.png") as image:
        assert np.array_equal(np.array(image), images[5].permute(1, 2, 0).numpy())
    sample.main(compose_config(*options, "out=raw.npz", "weights=raw", name="sample"))
    assert not torch.equal(read_samples(tmp_path / "raw.npz")[0], images)
    for picture in ("path", "interpolation"):
        sample.main(compose_config(*options, f"picture={picture}", f"out={picture}.png", name="sample"))
        with Image.open(f"{picture}.png") as image:
            assert image.size == (34 * 10 + 2, 34 * (12 if picture == "path" else 6) + 2)


def hostile(config: dict) -> dict:
    """Configurations that someone who means harm might put into a file with weights."""
    return {
        "names code": config | {"model": config["model"] | {"_target_": "os.system"}},
        "reads the environment": config | {"wandb": config["wandb"] | {"name": 3, "project": "${oc.env:HOME}"}},
        "takes all memory": config | {"model": config["model"] | {"hidden_size": 4096, "multipliers": [64] * 6}},
        "takes forever": config | {"model": config["model"] | {"num_blocks": 10**9}},
        "is none": {"a": 1},
    }


@pytest.mark.slow
@pytest.mark.fault("hostile config")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        pytest.param("names code", "_target_", marks=pytest.mark.long),
        ("takes all memory", "the weights do not fit"),
        pytest.param("reads the environment", "wandb.name=3", marks=pytest.mark.long),
        pytest.param("takes forever", "num_blocks", marks=pytest.mark.long),
        pytest.param("is none", "unknown key", marks=pytest.mark.long),
    ],
)
def test_a_configuration_inside_a_file_can_do_no_harm(finished_run, tmp_path, kind, message):
    config, weights = load_weights(finished_run / "model.safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(weights, metadata={"config": json.dumps(hostile(config)[kind])}))
    started = time.perf_counter()
    done = run_script("sample.py", f"checkpoint={path}", "num_steps=5", f"out={tmp_path}/a.png")
    assert time.perf_counter() - started < 30
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    assert not (tmp_path / "a.png").exists()


@pytest.mark.fault("hostile config")
def test_a_key_that_names_code_is_unknown(compose_config):
    with pytest.raises(ConfigError, match="_target_: unknown key"):
        parse(compose_config("+model._target_=os.system"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["main.py", "optimizer.momentum=0.9"], "momentum must be null with optimizer.name=adam, got 0.9"),
        (["main.py", "train.lrr=1"], "lrr"),
        (["main.py", "model=huge"], "huge"),
        (["main.py", "dataset=shapes", "dataset.root=nowhere"], "run `python prepare_data.py dataset=shapes"),
        (["prepare_data.py", "seed=x"], "seed=x: input should be a valid integer"),
        (["sample.py"], "checkpoint"),
    ],
)
@pytest.mark.fault("wrong input")
def test_errors_come_at_once_with_one_line_and_a_code(arguments, message):
    started = time.perf_counter()
    result = run_script(*arguments)
    assert time.perf_counter() - started < 3  # nothing heavy was imported
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_preparing_by_script_and_once_more(tmp_path):
    arguments = ["prepare_data.py", "dataset=shapes", "dataset.num_images=64", f"dataset.root={tmp_path}"]
    assert "train.npy 64 images, test.npy 2000 images (written)" in run_script(*arguments).stdout
    assert "(already there, verified)" in run_script(*arguments).stdout


def test_preparing_without_data_names_the_remedy(tmp_path):
    archive = tmp_path / "archive.tar.gz"
    result = run_script(
        "prepare_data.py", "dataset=cifar10", f"dataset.root={tmp_path}", f"dataset.archive={archive}",
        "dataset.urls=[http://127.0.0.1:9/closed]",
    )  # fmt: skip
    assert result.returncode == 1
    assert (
        f"put the archive cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html at {archive}"
        in result.stderr
    )
    assert "Traceback" not in result.stderr
