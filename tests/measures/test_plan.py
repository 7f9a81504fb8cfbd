"""evaluate.py measures nothing twice, loses nothing, and rejects a wrong request before it measures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from modeling.checkpoint import load_weights
from modeling.evaluation import measure_errors
from modeling.measures import network_measures, trained
from modeling.measures.sample_files import read_samples
from modeling.samplers import sample_images
from tests.helpers import ended_after, ends_in_error

pytestmark = [pytest.mark.slow, pytest.mark.numeric]


def test_the_same_command_measures_nothing_and_another_one_is_rejected(measure, capsys):
    first = measure()
    record = Path("evaluation/evaluation.json")
    written = record.stat().st_mtime_ns
    capsys.readouterr()
    assert measure("batch_size=5") == first  # the size is no part of an identity
    assert record.stat().st_mtime_ns == written
    printed = capsys.readouterr().out
    assert "bits_per_dim  large, raw" in printed
    with ends_in_error(capsys, "holds heldout_loss of another model or with other options"):
        measure("loss_images=10")
    with ends_in_error(capsys, "holds bits_per_dim, heldout_loss, encoder of another model"):
        measure("weights=raw")
    second = measure("measures=[heldout_loss]", "loss_images=10", "overwrite=true")
    assert second.pop("heldout_loss")["identity"]["num_images"] == 10
    assert second == {name: first[name] for name in ("bits_per_dim", "encoder")}  # kept


def test_files_that_changed_under_their_names_are_noticed(measure, capsys):
    def samples(seed):
        images = np.random.default_rng(seed).integers(0, 256, (15, 32, 32, 3), dtype=np.uint8)
        np.savez("theirs.npz", arr_0=images)
        return measure("measures=[encoder]", "samples=theirs.npz")

    first = samples(0)
    assert samples(0) == first
    with ends_in_error(capsys, "holds encoder of another model"):
        samples(1)


def test_samples_of_another_sampler_are_not_replaced_unasked(measure, capsys):
    measure("measures=[encoder]")
    written = Path("evaluation/samples.npz").read_bytes()
    Path("evaluation/evaluation.json").unlink()
    with ends_in_error(capsys, "samples.npz: holds samples of another model or with other options"):
        measure("measures=[heldout_loss,encoder]", "num_steps=3")
    assert Path("evaluation/samples.npz").read_bytes() == written
    assert not Path("evaluation/evaluation.json").exists()  # nothing was measured before
    measure("measures=[encoder]", "num_steps=3", "overwrite=true")


class Ended(Exception):
    """A process is killed."""


def test_a_stopped_evaluation_resumes(measure, monkeypatch):
    whole = measure("batch_size=3", "out=whole")
    counts = {"errors": 0, "images": 0}

    def counted(name, function):
        def call(*args, **options):
            counts[name] += 1
            return function(*args, **options)

        return call

    for name, module, function in (
        ("errors", network_measures, measure_errors),
        ("images", trained, sample_images),
    ):
        with monkeypatch.context() as patch, pytest.raises(Ended):
            patch.setattr(module, function.__name__, ended_after(function, 2, Ended))
            measure("batch_size=3")
        monkeypatch.setattr(module, function.__name__, counted(name, function))
    resumed = measure("batch_size=3")
    assert counts == {"errors": 1, "images": 2}  # of 3 and of 4 batches
    assert resumed == whole  # of the same batches: to the bit
    assert not list(Path("evaluation").glob("*.partial"))


def test_the_bound_of_optimal_variances_is_lower_and_resumes_in_either_part(measure, monkeypatch):
    options = "measures=[bits_optimal,bits_per_dim]", "batch_size=3"
    whole = measure(*options, "out=whole")
    optimal, others = whole["bits_optimal"], whole["bits_per_dim"]["values"]
    assert optimal["values"].keys() == {"optimal, clipped"}
    best = optimal["values"]["optimal, clipped"]
    assert best["rate"] < min(others[f"{variance}, clipped"]["rate"] for variance in ("large", "small"))
    assert best["num_images"] == 8
    training_images = optimal["identity"]["variance_images"]
    in_test_part = -(-training_images // 3) + 1
    for count in (1, in_test_part):
        with monkeypatch.context() as patch, pytest.raises(Ended):
            patch.setattr(network_measures, "measure_errors", ended_after(measure_errors, count, Ended))
            measure(*options, f"out=stopped{count}")
        assert measure(*options, f"out=stopped{count}") == whole
    assert not list(Path().glob("*/*.partial"))


def test_the_batch_size_changes_numbers_by_rounding_only(measure):
    """On some CPUs a kernel depends on the number of images that it is given."""
    records, samples = [], []
    for size in (3, 12):
        records.append(measure(f"batch_size={size}", f"out=size{size}"))
        samples.append(read_samples(Path(f"size{size}/samples.npz"))[0].int())
        records[-1]["encoder"]["identity"].pop("images_sha256")  # of the samples, to the bit
    for name, record in records[0].items():
        assert record["identity"] == records[1][name]["identity"]
    assert (samples[0] - samples[1]).abs().max() <= 1
    totals = [record["bits_per_dim"]["values"]["large, raw"]["total"] for record in records]
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    losses = [record["heldout_loss"]["values"]["total"] for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_parts_of_another_evaluation_are_deleted_with_overwrite_only(measure, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr(network_measures, "measure_errors", ended_after(measure_errors, 1, Ended))
        measure("batch_size=3")
    with ends_in_error(capsys, r"holds parts of something else \(num_images differ\)"):
        measure("batch_size=3", "bits_images=7")
    assert measure("batch_size=3", "bits_images=7", "overwrite=true")["bits_per_dim"]["identity"]["num_images"] == 7


@pytest.mark.parametrize("name", ["bits_per_dim", "bits_optimal", "heldout_loss", "encoder"])
def test_weights_that_are_not_finite_end_a_measure_in_one_line(finished_run, measure, capsys, name):
    config, weights = load_weights(finished_run / "model.safetensors")
    weights = {key: torch.full_like(weight, torch.nan) for key, weight in weights.items()}
    Path("broken.safetensors").write_bytes(save(weights, metadata={"config": json.dumps(config)}))
    with ends_in_error(capsys, "is not finite in fp32"):
        measure("checkpoint=broken.safetensors", f"measures=[{name}]")
    assert not Path("evaluation/evaluation.json").exists()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((12, 64, 64, 3), r"samples=theirs.npz: images of shape \(3, 64, 64\), expected"),
        ((9, 32, 32, 3), "distances need at least 10 samples, got 9"),
    ],
)
def test_samples_that_cannot_be_measured_are_rejected(measure, capsys, shape, message):
    np.savez("theirs.npz", arr_0=np.zeros(shape, dtype=np.uint8))
    with ends_in_error(capsys, message):
        measure("measures=[encoder]", "samples=theirs.npz")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["checkpoint=nowhere.pt"], "nowhere.pt: No such file or directory"),
        (["measures=[fid]", "inception_weights=nowhere.pth"], "inception_weights=nowhere.pth: there is no such file"),
        (["measures=[encoder]", "encoder=nowhere.safetensors"], "nowhere.safetensors"),
        (["data=nowhere"], "nowhere holds no prepared data: run prepare_data.py"),
        (["measures=[encoder]", "samples=nowhere.npz"], r"nowhere\.npz"),
        (["measures=[]"], "measures"),
        (["num_steps=21"], "num_steps must be at most 20, got 21"),
    ],
)
def test_wrong_requests_are_rejected_before_any_measure(measure, capsys, overrides, message):
    with ends_in_error(capsys, message):
        measure(*overrides)
    assert not Path("evaluation/evaluation.json").exists()
