"""sample.py: needs nothing but the file, writes every kind of output, resumes, and trusts no file."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

import sample
from modeling.checkpoint import load_weights
from modeling.config import parse
from modeling.measures import trained
from modeling.measures.sample_files import read_samples
from modeling.options import weights_file
from modeling.samplers import Ancestral
from modeling.system.errors import UserError
from tests.helpers import ended_after, ends_in_error, run_script

pytestmark = pytest.mark.numeric


@pytest.mark.slow
def test_sampling_needs_nothing_but_the_file(finished_run, tmp_path):
    """In a fresh process and folder; the images are those of the training's last grid, which has the same seed."""
    checkpoint = tmp_path / "given.safetensors"
    checkpoint.write_bytes((finished_run / "model.safetensors").read_bytes())
    options = ["num_images=4", "num_steps=5", "batch_size=4", "device=cpu"]
    result = run_script("sample.py", f"checkpoint={checkpoint}", *options, f"out={tmp_path}/a.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{tmp_path}/a.png"
    with Image.open(tmp_path / "a.png") as ours, Image.open(finished_run / "samples" / "ema" / "8.png") as theirs:
        np.testing.assert_array_equal(np.array(ours), np.array(theirs))


@pytest.mark.slow
def test_samples_depend_on_the_batch_size_by_rounding_only(finished_run, compose_config, tmp_path):
    grids = []
    for size in (4, 3):
        path = tmp_path / f"{size}.png"
        options = [f"checkpoint={finished_run}/checkpoints/last.pt", "num_images=4", "num_steps=null"]
        options += [f"batch_size={size}", "precision=fp32", "device=cpu", f"out={path}"]
        sample.main(compose_config(*options, name="sample"))
        with Image.open(path) as image:
            grids.append(np.array(image).astype(int))
    assert np.abs(grids[0] - grids[1]).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint=nowhere.pt"], "nowhere.pt: No such file or directory"),
        (["checkpoint={run}/samples"], "expected a file, or a run's folder that holds weights=ema"),
        (["checkpoint={run}/config.yaml"], "no checkpoint"),
        (["checkpoint={run}/model.safetensors", "num_steps=21"], "num_steps must be at most 20, got 21"),
        (["checkpoint={run}/model.safetensors", "sampler=ddim", "eta=-1"], "eta=-1"),
        (["checkpoint={run}/model.safetensors", "sampler=dpm_solver", "eta=1.0"], "eta must be null with sampler=dpm"),
        (
            ["checkpoint={run}/model.safetensors", "picture=path", "out=a.npz"],
            r"picture=path needs out=\*\.png or \*\.gif or .*got a",
        ),
        (["checkpoint={run}/model.safetensors", "weights=raw"], "holds averaged weights only"),
        (["checkpoint={run}/model.safetensors", "out={run}", "overwrite=true"], "does not hold samples"),
        (["checkpoint={run}/model.safetensors", "out={run}/samples/inputs.png"], "exists already"),
        (["checkpoint=nowhere.pt", "out={run}/config.yaml/a.png"], r"^\S+/config.yaml/a.png: Not a directory\n$"),
    ],
)
def test_wrong_requests_are_rejected(finished_run, compose_config, monkeypatch, tmp_path, capsys, overrides, message):
    monkeypatch.chdir(tmp_path)
    overrides = [override.format(run=finished_run) for override in overrides]
    with ends_in_error(capsys, message):
        sample.main(compose_config(*overrides, name="sample"))


@pytest.mark.slow
def test_a_stopped_script_resumes_and_writes_every_kind_of_output(finished_run, compose_config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = [
        f"checkpoint={finished_run}", "num_images=6", "batch_size=2", "num_steps=4", "sampler=ddim",
    ]  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trained, "sample_images", ended_after(trained.sample_images, 2, KeyboardInterrupt))
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
    for picture, out in (("path", "path.png"), ("path", "path.webp"), ("interpolation", "between.png")):
        sample.main(compose_config(*options, f"picture={picture}", f"out={out}", "scale=4", name="sample"))
    with Image.open("between.png") as image:
        assert image.size == (4 * (34 * 10 + 2), 4 * (34 * 6 + 2))
        about = json.loads(image.info["Comment"])
        assert about == identity | {"checkpoint": str(finished_run)}
    with Image.open("path.png") as image:
        assert image.size[1] == 12 * 4 * (34 + 2) + 20  # a line of text
    with Image.open("path.webp") as image:
        assert (image.n_frames, image.size) == (5, (4 * 2 * (34 * 2 + 2), 4 * (34 * 3 + 2) + 20))


def hostile(config: dict) -> dict:
    """Configurations that an attacker might put into a file with weights."""
    return {
        "names code": config | {"model": config["model"] | {"_target_": "os.system"}},
        "reads the environment": config | {"diffusion": config["diffusion"] | {"schedule": "${oc.env:HOME}"}},
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
        pytest.param("reads the environment", "diffusion.schedule=${oc.env:HOME}: input", marks=pytest.mark.long),
        pytest.param("takes forever", "num_blocks", marks=pytest.mark.long),
        pytest.param("is none", "is no trained model of this project", marks=pytest.mark.long),
    ],
)
def test_a_configuration_inside_a_file_can_do_no_harm(finished_run, tmp_path, kind, message):
    config, weights = load_weights(finished_run / "model.safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(weights, metadata={"config": json.dumps(hostile(config)[kind])}))
    done = run_script("sample.py", f"checkpoint={path}", "num_steps=5", f"out={tmp_path}/a.png")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    assert not (tmp_path / "a.png").exists()


@pytest.mark.fault("hostile config")
def test_a_key_that_names_code_is_unknown(compose_config):
    with pytest.raises(UserError, match="_target_: unknown key"):
        parse(compose_config("+model._target_=os.system"))


@pytest.mark.slow
def test_a_bug_inside_sampling_keeps_its_traceback(finished_run, compose_config, monkeypatch, tmp_path):
    def fail(*arguments):
        raise ValueError("a bug")

    monkeypatch.setattr(Ancestral, "__call__", fail)
    options = [f"checkpoint={finished_run}/model.safetensors", "num_images=2", "num_steps=3", f"out={tmp_path}/a.png"]
    with pytest.raises(ValueError, match="^a bug$"):  # no SystemExit
        sample.main(compose_config(*options, name="sample"))


KINDS = "out must end in .png or .npz, or name a folder, which has no suffix (.gif and .webp are for picture=path)"


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (".", "out must name a file or a folder, got ."),
        ("/", "out must name a file or a folder, got /"),
        ("x.jpg", f"{KINDS}, got x.jpg"),
        ("x.gif", f"{KINDS}, got x.gif"),
        ("x.PNG", f"{KINDS}, got x.PNG"),
        ("x.npz scale=2", "scale must be null with out=x.npz, whose images are not enlarged, got 2"),
        ("x scale=2", "scale must be null with out=x, whose images are not enlarged, got 2"),
        ("x.gif picture=interpolation", "picture=interpolation needs out=*.png, got x.gif"),
        ("x.gif picture=inpaint image=a.png mask=b.png", "picture=inpaint needs out=*.png, got x.gif"),
        ("x.gif picture=path num_images=17", "num_images must be at most 16 with picture=path, got 17"),
    ],
)
def test_an_output_of_no_known_kind_is_rejected(compose_config, capsys, out, message):
    with ends_in_error(capsys, f"^{re.escape(message)}$"):
        sample.main(compose_config("checkpoint=any.pt", *f"out={out}".split(), "overwrite=true", name="sample"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("image=a.png", "image must be null with picture=grid, got a.png"),
        ("picture=inpaint image=a.png", "mask must be the file of a picture with picture=inpaint, got null"),
        ("picture=variations", "image must be the file of a picture with picture=variations, got null"),
        ("picture=variations image=a.png jump_length=2", "jump_length must be null with picture=variations, got 2"),
        ("picture=inpaint image=a.png mask=b.png strength=0.5", "strength must be null with picture=inpaint, got 0.5"),
        ("picture=variations image=a.png strength=0", "strength=0: input should be greater than 0"),
    ],
)
def test_what_edits_a_picture_belongs_to_its_kind(compose_config, capsys, overrides, message):
    with ends_in_error(capsys, f"^{re.escape(message)}$"):
        sample.main(compose_config("checkpoint=any.pt", *overrides.split(), name="sample"))


@pytest.mark.slow
def test_a_given_picture_is_edited_beside_it(finished_run, compose_config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(given).save("given.png")
    is_drawn = np.zeros((32, 32), bool)
    is_drawn[8:20, 12:24] = True
    Image.fromarray(is_drawn.astype(np.uint8) * 255).save("mask.png")
    options = [f"checkpoint={finished_run}", "num_images=3", "num_steps=4", "scale=1", "image=given.png"]
    shown = {}
    for picture, key, value in (("inpaint", "mask", "mask.png"), ("variations", "strength", 0.3)):
        sample.main(
            compose_config(*options, f"picture={picture}", f"{key}={value}", f"out={picture}.png", name="sample")
        )
        with Image.open(f"{picture}.png") as image:
            about = json.loads(image.info["Comment"])
            assert about["image"] == "given.png"
            assert about[key] == value
            tiles = [np.array(image)[2:34, left : left + 32] for left in range(2, image.width, 34)]
        assert np.array_equal(tiles[0], given)
        shown[picture] = tiles[1:]
    hole, *results = shown["inpaint"]
    assert (hole[is_drawn] == 128).all()
    assert len(results) == len(shown["variations"]) == 3
    assert all(np.array_equal(tile[~is_drawn], given[~is_drawn]) for tile in [hole, *results])
    assert not any(np.array_equal(result, hole) for result in [*results, *shown["variations"]])


def test_a_run_folder_is_a_checkpoint(tmp_path):
    assert weights_file(tmp_path) == tmp_path  # of another kind
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").touch()
    assert weights_file(tmp_path) == tmp_path / "checkpoints" / "last.pt"  # of an unfinished run
    (tmp_path / "model.safetensors").touch()
    assert weights_file(tmp_path) == tmp_path / "model.safetensors"
    assert weights_file(tmp_path, "raw") == tmp_path / "checkpoints" / "last.pt"
    assert weights_file(tmp_path / "model.safetensors", "raw") == tmp_path / "model.safetensors"
