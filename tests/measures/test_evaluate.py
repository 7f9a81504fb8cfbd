"""evaluate.py as a user calls it: each number with its identity, nothing measured twice, nothing lost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

import evaluate
import main
from modeling.data import load_images
from modeling.evaluation import bits_per_dim, measure_errors
from modeling.heldout import denoising_loss
from modeling.measures.encoder import Encoder, save_encoder
from modeling.measures.trained import load_trained
from modeling.samplers import sample_images
from modeling.system.files import sha256_of
from tests.helpers import ROOT, TINY, ended_after

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(path, Encoder(8), {})
    return path


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        main.main(compose("config", [*TINY, f"dataset.root={tiny_data}", f"runtime.output_dir={folder}"]))
    return folder


@pytest.fixture
def measure(run, encoder, compose_config, monkeypatch, tmp_path):
    """evaluate.py on that run, in a fresh working folder: the record."""
    monkeypatch.chdir(tmp_path)

    def measure_with(*overrides: str) -> dict:
        options = [f"checkpoint={run}/checkpoints/last.pt", f"encoder={encoder}", "num_images=12", "num_steps=4"]
        options += ["bits_images=8", "bits_timesteps=null", "loss_images=20", "device=cpu", "precision=fp32"]
        values = compose_config(*options, *overrides, name="evaluate")
        evaluate.main(values)
        return json.loads((Path(values.out) / "evaluation.json").read_text())

    return measure_with


def test_every_measure_is_what_the_library_computes_and_says_of_what(run, measure, encoder, compose_config, capsys):
    record = measure()
    printed = capsys.readouterr().out
    options = compose_config(f"checkpoint={run}/checkpoints/last.pt", "precision=fp32", "num_steps=4", name="evaluate")
    trained, config = load_trained(evaluate.parse(options, evaluate.EvaluateConfig))
    folder = Path(config.dataset.root) / "shapes"
    test = load_images(folder, "test", json.loads((folder / "manifest.json").read_text()))

    for name in ("bits_per_dim", "heldout_loss"):
        assert record[name]["identity"]["checkpoint_sha256"] == sha256_of(run / "checkpoints" / "last.pt")
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
    assert identity["extractor_sha256"] == sha256_of(encoder)
    assert identity["num_images"] == 12
    assert identity["samples"] | {"num_steps": 4, "sampler": "ancestral", "variance": "small"} == identity["samples"]
    assert not [name for name in values if "fid" in name]
    assert identity["memorisation_num_images"] == 12
    for name in record:
        assert f"{name:14s}about 0." in printed
    with Image.open("evaluation/neighbours.png") as picture:
        assert picture.size == (34 * 6 + 2, 34 * 10 + 2)


def test_the_same_command_again_measures_nothing_and_another_one_is_refused(measure, capsys):
    first = measure()
    record = Path("evaluation/evaluation.json")
    written = record.stat().st_mtime_ns
    capsys.readouterr()
    assert measure("batch_size=5") == first  # on which nothing depends
    assert record.stat().st_mtime_ns == written
    printed = capsys.readouterr().out
    assert "bits_per_dim  large, raw" in printed
    assert "about" not in printed
    with pytest.raises(SystemExit, match="holds heldout_loss of another model or with other options"):
        measure("loss_images=10")
    with pytest.raises(SystemExit, match="holds bits_per_dim, heldout_loss, encoder of another model"):
        measure("weights=raw")
    second = measure("measures=[heldout_loss]", "loss_images=10", "overwrite=true")
    assert second.pop("heldout_loss")["identity"]["num_images"] == 10
    assert second == {name: first[name] for name in ("bits_per_dim", "encoder")}  # kept


def test_files_that_changed_under_their_names_are_noticed(measure, encoder):
    def samples(seed):
        images = np.random.default_rng(seed).integers(0, 256, (15, 32, 32, 3), dtype=np.uint8)
        np.savez("theirs.npz", arr_0=images)
        return measure("measures=[encoder]", "samples=theirs.npz")

    first = samples(0)
    assert samples(0) == first
    with pytest.raises(SystemExit, match="holds encoder of another model"):
        samples(1)


class Ended(Exception):
    """A process is killed here."""


def test_a_stopped_evaluation_goes_on_where_it_was(measure, monkeypatch):
    whole = measure("out=whole")
    counts = {"errors": 0, "images": 0}

    def counted(name, function):
        def call(*args, **options):
            counts[name] += 1
            return function(*args, **options)

        return call

    for name, place, function in (
        ("errors", "modeling.measures.plan.measure_errors", measure_errors),
        ("images", "modeling.measures.resumable.sample_images", sample_images),
    ):
        with monkeypatch.context() as patch, pytest.raises(Ended):
            patch.setattr(place, ended_after(function, 2, Ended))
            measure("batch_size=3")
        monkeypatch.setattr(place, counted(name, function))
    resumed = measure("batch_size=3")
    assert counts == {"errors": 1, "images": 2}  # of 3 and of 4 batches
    for name, record in whole.items():
        assert record["identity"] == resumed[name]["identity"]
    found, expected = (record["bits_per_dim"]["values"]["large, raw"]["total"] for record in (resumed, whole))
    assert found == pytest.approx(expected, rel=1e-6)
    assert not list(Path("evaluation").glob("*.partial"))


def test_parts_of_another_evaluation_are_given_up_with_overwrite_only(measure, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr("modeling.measures.plan.measure_errors", ended_after(measure_errors, 1, Ended))
        measure("batch_size=3")
    with pytest.raises(SystemExit, match=r"holds parts of something else \(num_images differ\)"):
        measure("batch_size=3", "bits_images=7")
    assert measure("batch_size=3", "bits_images=7", "overwrite=true")["bits_per_dim"]["identity"]["num_images"] == 7


def test_a_damaged_record_is_named(measure):
    Path("evaluation").mkdir()
    Path("evaluation/evaluation.json").write_text('{"bits')
    with pytest.raises(SystemExit, match=r"evaluation/evaluation\.json is damaged"):
        measure()


def test_raw_and_averaged_weights_are_two_models(measure):
    measures = "measures=[heldout_loss]"
    ema, raw = measure(measures, "out=ema"), measure(measures, "weights=raw", "out=raw")
    assert ema["heldout_loss"]["values"] != raw["heldout_loss"]["values"]
    assert raw["heldout_loss"]["identity"]["weights"] == "raw"


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
        assert record["heldout_loss"]["identity"]["checkpoint"] == name
    assert losses["linear"] != losses["gaussian"]
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
