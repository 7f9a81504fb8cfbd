"""evaluate.py: each number is the library's, with its identity."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from modeling.data import load_images
from modeling.evaluation import bits_per_dim
from modeling.heldout import denoising_loss
from modeling.measures.subject import default_data, stored_data
from modeling.measures.trained import load_trained
from modeling.system.files import sha256_of
from tests.helpers import ROOT, ends_in_error

pytestmark = pytest.mark.slow


def test_every_number_is_the_librarys_with_its_identity(finished_run, measure, encoder_path, compose_config):
    record = measure()
    checkpoint = finished_run / "checkpoints" / "last.pt"
    options = compose_config(f"checkpoint={checkpoint}", "precision=fp32", "num_steps=4", name="evaluate")
    trained, stored = load_trained(evaluate.parse(options, evaluate.EvaluateConfig))
    folder = stored_data(str(checkpoint), stored)
    test = load_images(folder, "test", json.loads((folder / "manifest.json").read_text()))

    for name in ("bits_per_dim", "heldout_loss"):
        assert record[name]["identity"]["checkpoint_sha256"] == sha256_of(checkpoint)
        assert record[name]["identity"]["test_sha256"] == sha256_of(folder / "test.npy")
    for variance in ("large", "small"):
        for kind, clip_x0 in (("raw", False), ("clipped", True)):
            found = record["bits_per_dim"]["values"][f"{variance}, {kind}"]
            expected = bits_per_dim(trained.model, test[:8], variance, clip_x0=clip_x0)
            assert found["total"] == pytest.approx(expected.total, rel=1e-5)
            assert found["num_images"] == 8
            assert (found["num_timesteps"], found["timesteps_per_image"]) == (20, 19)
            assert sum(found["rate_by_timestep"].values()) + found["prior"] == pytest.approx(found["rate"])
            assert list(found["rate_by_timestep"])[-1] == "20-20"
    assert record["heldout_loss"]["values"]["total"] == pytest.approx(
        denoising_loss(trained.model, test[:20], "cpu")[0]
    )
    assert record["heldout_loss"]["identity"]["num_images"] == 20
    values, identity = record["encoder"]["values"], record["encoder"]["identity"]
    assert values["encoder/frechet_distance"] > 0
    assert identity["extractor_sha256"] == sha256_of(encoder_path)
    assert identity["num_images"] == 12
    assert identity["samples"] | {"num_steps": 4, "sampler": "ancestral", "variance": "small"} == identity["samples"]
    assert not [name for name in values if "fid" in name]
    assert identity["memorisation_num_images"] == 12
    with Image.open("evaluation/neighbours.png") as picture:
        assert picture.size == (3 * (34 * 6 + 2), 10 * 3 * (34 + 2) + 11 * 20)  # and a line of text more than rows


def test_raw_and_averaged_weights_are_two_models(measure):
    measures = "measures=[heldout_loss]"
    ema, raw = measure(measures, "out=ema"), measure(measures, "weights=raw", "out=raw")
    assert ema["heldout_loss"]["values"] != raw["heldout_loss"]["values"]
    assert raw["heldout_loss"]["identity"]["weights"] == "raw"


def test_samples_of_a_file_are_measured_instead_of_new_ones(measure):
    images = np.random.default_rng(0).integers(0, 256, (15, 32, 32, 3), dtype=np.uint8)
    np.savez("theirs.npz", arr_0=images)
    record = measure("measures=[encoder]", "samples=theirs.npz")
    assert record["encoder"]["identity"]["num_images"] == 15
    assert not Path("evaluation/samples.npz").exists()


def test_what_a_user_does_not_name_is_the_repositorys(monkeypatch, tmp_path):
    """From another folder; its own data comes first, where a run was trained there."""
    monkeypatch.chdir(tmp_path)
    assert default_data(Path("data/cifar10")) == ROOT / "data" / "cifar10"
    Path("data/cifar10").mkdir(parents=True)
    assert default_data(Path("data/cifar10")) == Path("data/cifar10")
    assert default_data(tmp_path) == tmp_path


def test_the_empirical_denoiser_has_both_losses_and_no_other_measure(
    tiny_data, compose_config, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    empirical = ["checkpoint=empirical", f"data={tiny_data}/shapes", "loss_images=40"]
    with ends_in_error(capsys, r"measures=\[heldout_loss,fid\]: checkpoint=empirical has losses only"):
        evaluate.main(compose_config(*empirical, "measures=[heldout_loss,fid]", name="evaluate"))
    evaluate.main(compose_config(*empirical, "measures=[heldout_loss,train_loss]", name="evaluate"))
    record = json.loads(Path("evaluation/evaluation.json").read_text())
    assert [record[name]["identity"]["split"] for name in ("heldout_loss", "train_loss")] == ["test", "train"]
    assert record["train_loss"]["values"]["total"] < record["heldout_loss"]["values"]["total"]


@pytest.mark.long
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
        assert record["heldout_loss"]["identity"]["checkpoint"] == name
    assert losses["linear"] != losses["gaussian"]
    assert losses["gaussian"] < 1
