"""evaluate.py as a user calls it: each number with its identity, nothing measured twice, nothing lost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import main
from modeling.data import load_images
from modeling.encoder import Encoder, save_encoder
from modeling.evaluation import bits_per_dim
from modeling.files import sha256_of
from modeling.heldout import denoising_loss
from modeling.trained import load_trained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(path, Encoder(8), {})
    return path


@pytest.fixture
def run(tiny) -> Path:
    """A finished run in the working folder."""
    main.main(tiny("runtime.output_dir=run"))
    return Path("run")


@pytest.fixture
def measure(run, encoder, compose_config):
    """evaluate.py on that run: the record."""

    def measure_with(*overrides: str) -> dict:
        options = ["checkpoint=run/checkpoints/last.pt", f"encoder={encoder}", "num_images=12", "num_steps=4"]
        options += ["bits_images=8", "bits_timesteps=null", "loss_images=20", "device=cpu", "precision=fp32"]
        values = compose_config(*options, *overrides, name="evaluate")
        evaluate.main(values)
        return json.loads((Path(values.out) / "evaluation.json").read_text())

    return measure_with


def test_every_measure_is_what_the_library_computes_and_says_of_what(run, measure, encoder, compose_config, capsys):
    record = measure()
    printed = capsys.readouterr().out
    options = compose_config("checkpoint=run/checkpoints/last.pt", "precision=fp32", "num_steps=4", name="evaluate")
    trained, config = load_trained(evaluate.parse(options, evaluate.EvaluateConfig))
    folder = Path(config.dataset.root) / "shapes"
    test = load_images(folder, "test", json.loads((folder / "manifest.json").read_text()))

    assert record["identity"]["checkpoint_sha256"] == sha256_of(run / "checkpoints" / "last.pt")
    assert record["identity"]["test_sha256"] == sha256_of(folder / "test.npy")
    for variance in ("large", "small"):
        for kind, clip_x0 in (("raw", False), ("clipped", True)):
            found = record["bits_per_dim"]["values"][f"{variance}, {kind}"]
            expected = bits_per_dim(trained.model, test[:8], variance, clip_x0=clip_x0)
            assert found["total"] == pytest.approx(expected.total, rel=1e-5)
            assert found["num_images"] == 8
            assert found["num_timesteps"] == 19
            assert sum(found["rate_by_timestep"]) + found["prior"] == pytest.approx(found["rate"])
    assert record["heldout_loss"]["values"]["total"] == pytest.approx(
        denoising_loss(trained.model, test[:20], "cpu")[0]
    )
    assert record["heldout_loss"]["identity"]["num_images"] == 20
    values, identity = record["encoder"]["values"], record["encoder"]["identity"]
    assert values["encoder/frechet_distance"] > 0
    assert identity["extractor_sha256"] == sha256_of(encoder)
    assert identity["num_images"] == 12
    assert identity["samples"] | {"num_steps": 4, "sampler": "ancestral", "variance": "small"} == identity["samples"]
    assert not [name for name in values if "fid" in name]
    for line in ("bits_per_dim  160 evaluations", "heldout_loss  20 evaluations", "samples       48 evaluations"):
        assert line in printed
    with Image.open("evaluation/neighbours.png") as picture:
        assert picture.size == (34 * 6 + 2, 34 * 10 + 2)


def test_the_same_command_again_measures_nothing_and_another_one_is_refused(measure, capsys):
    first = measure()
    record = Path("evaluation/evaluation.json")
    written = record.stat().st_mtime_ns
    capsys.readouterr()
    assert measure() == first
    assert record.stat().st_mtime_ns == written
    assert "bits_per_dim" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds another evaluation"):
        measure("loss_images=10")
    assert measure("loss_images=10", "overwrite=true")["heldout_loss"]["identity"]["num_images"] == 10


def test_a_stopped_evaluation_keeps_what_it_has(measure, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("modeling.measures.measure_distances", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        measure()
    record = json.loads(Path("evaluation/evaluation.json").read_text())
    assert "heldout_loss" in record
    assert "encoder" not in record
    with monkeypatch.context() as patch:
        for name in ("denoising_loss", "BoundErrors"):
            patch.setattr(f"modeling.measures.{name}", lambda *args, **options: pytest.fail("measured again"))
        patch.setattr("modeling.trained.draw_samples", lambda *args, **options: pytest.fail("sampled again"))
        assert measure()["heldout_loss"] == record["heldout_loss"]


def test_raw_and_averaged_weights_are_two_models(measure):
    measures = "measures=[heldout_loss]"
    ema, raw = measure(measures, "out=ema"), measure(measures, "weights=raw", "out=raw")
    assert ema["heldout_loss"]["values"] != raw["heldout_loss"]["values"]
    assert raw["identity"]["weights"] == "raw"


def test_samples_of_a_file_are_measured_in_the_place_of_new_ones(measure, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (15, 32, 32, 3), dtype=np.uint8)
    np.savez("theirs.npz", arr_0=images)
    record = measure("measures=[encoder]", "samples=theirs.npz")
    assert record["encoder"]["identity"]["num_images"] == 15
    assert not Path("evaluation/samples.npz").exists()


def test_the_linear_denoiser_needs_no_checkpoint(tiny_data, compose_config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    losses = {}
    for name in ("linear", "gaussian"):
        values = compose_config(
            f"checkpoint={name}", f"data={tiny_data}/shapes", "measures=[heldout_loss]", f"out={name}", name="evaluate"
        )
        evaluate.main(values)
        record = json.loads(Path(f"{name}/evaluation.json").read_text())
        losses[name] = record["heldout_loss"]["values"]["total"]
        assert record["identity"]["checkpoint"] == name
    assert losses["gaussian"] < 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint=nowhere.pt"], "nowhere.pt: there is no such file"),
        (["measures=[fid]", "inception_weights=nowhere.pth"], "inception_weights=nowhere.pth: there is no such file"),
        (["measures=[encoder]", "encoder=nowhere.safetensors"], "nowhere.safetensors"),
        (["data=nowhere"], "data=nowhere: no prepared data there"),
        (["measures=[encoder]", "samples=nowhere.npz"], r"nowhere\.npz"),
        (["measures=[]"], "measures"),
        (["num_steps=21"], "num_steps must be at most 20, got 21"),
    ],
)
def test_wrong_requests_are_refused_before_any_measure(measure, overrides, message):
    with pytest.raises(SystemExit, match=message):
        measure(*overrides)
    assert not Path("evaluation/evaluation.json").exists()
