"""Which runs become references, and which reference a run is compared with."""

import json
import shlex

import numpy as np
import pytest
from omegaconf import OmegaConf

from modeling.comparison.curves import Curve, comparable, read_run
from modeling.comparison.references import choose_reference, command_of, image_scatter, load_references
from modeling.system.errors import UserError
from modeling.system.reading import read_yaml
from tests.comparison.runs import BATCH_SIZE, LOG_EVERY, SCATTER, noisy, reference_of
from tests.helpers import ROOT


def test_the_scatter_is_found_whatever_the_trend_and_the_lines_lengths():
    generator = np.random.default_rng(0)
    counts = generator.integers(800, 3200, 2000)
    edges = np.concatenate([[0], np.cumsum(counts)])
    trend = 5 - edges[1:] / edges[-1]
    straight = Curve(edges, 5 - (edges[1:] + edges[:-1]) / 2 / edges[-1], counts)
    assert image_scatter(straight) == pytest.approx(0, abs=1e-10)
    lines = Curve(edges, trend + 0.3 / np.sqrt(counts) * generator.standard_normal(2000), counts)
    assert np.mean(image_scatter(lines)) == pytest.approx(0.3, rel=0.05)


def test_a_long_curve_is_thinned_without_a_change_of_its_means(write_run):
    losses = noisy(0, 1_007)
    folder = write_run(losses, dataset__num_images=10**7)
    curve = reference_of(folder)["curve"]
    assert len(curve) <= 100
    assert curve[-1]["step"] == 1_007 * LOG_EVERY
    assert curve[-1]["images"] == sum(point["count"] for point in curve) == 1_007 * LOG_EVERY * BATCH_SIZE
    total = sum(point["count"] * point["loss"] for point in curve)
    assert total == pytest.approx(losses.sum() * LOG_EVERY * BATCH_SIZE)
    late = [point["standard_error"] / point["loss"] * point["count"] ** 0.5 for point in curve[10:]]
    assert np.mean(late) == pytest.approx(SCATTER, rel=0.1)


def test_a_saved_reference_is_read_as_it_was_made(write_run, command, tmp_path):
    folder = write_run(noisy(0), seed=7)
    path = tmp_path / "refs" / "mine.json"
    code, text = command(folder, "--save", "mine")
    assert (code, text) == (0, f"{path}: {json.loads(path.read_text())['command']}\n")
    reference = load_references(path.parent)["mine"]
    assert reference == reference_of(folder) | {key: reference[key] for key in ("name", "command", "date")}
    assert reference["hardware"] == {"device": "x86_64", "threads": 2, "precision": "fp32", "torch": "2.15.0"}
    assert reference["config"]["seed"] == 7
    assert not {"runtime", "wandb"} & reference["config"].keys()
    assert str(tmp_path) not in path.read_text()
    assert max(map(len, path.read_text().splitlines())) < 1500


def test_the_command_of_a_reference_trains_with_its_configuration(compose_config):
    def composed(*overrides):
        return OmegaConf.to_container(compose_config(*overrides))

    default = read_yaml(ROOT / "params.yaml", dict)
    wanted = composed("model=unet", "optimizer=sgd", "optimizer.lr=1e-05", "dataset=shapes", "train.max_steps=7")
    words = shlex.split(command_of(wanted, default))
    assert words[:2] == ["python", "main.py"]
    assert comparable(composed(*words[2:])) == comparable(wanted)
    assert command_of(composed(), default) == "python main.py"


def test_a_run_that_cannot_be_a_reference_is_rejected(write_run, command, tmp_path):
    losses = noisy(0)
    finished = write_run(losses)
    command(finished, "--save", "taken")
    before = (tmp_path / "refs" / "taken.json").read_bytes()
    holes = [*losses[:9], None, *losses[10:]]
    for folder, name, message in (
        (finished, "taken", "exists already; choose another name or delete it"),
        (finished, "../up", "expected a name of letters, digits and . _ -"),
        (write_run(losses[:80], "b", is_finished=False), "new", "needs a finished run; this run is at step 2,000"),
        (write_run(losses[:29], "c"), "new", "at least 30 lines in metrics.jsonl, from step 1 on, each with a loss"),
        (write_run(holes, "d"), "new", "this run has 99 of 100"),
    ):
        code, text = command(folder, "--save", name)
        assert (code, message in text) == (2, True)
    assert [path.name for path in (tmp_path / "refs").iterdir()] == ["taken.json"]
    assert (tmp_path / "refs" / "taken.json").read_bytes() == before


def test_the_nearest_reference_is_taken_and_its_differences_are_listed(write_run, command):
    losses = noisy(0)
    command(write_run(losses, "a"), "--save", "default")
    command(write_run(losses, "b", optimizer__lr=0.5, train__ema_decay=0.5), "--save", "far")
    run = write_run(losses, "run", optimizer__lr=0.5)
    # Another machine and other samples are no difference.
    config = OmegaConf.load(run / "config.yaml")
    config.merge_with({"runtime": {"device": "cuda"}, "train": {"sample_every": 9}})
    OmegaConf.save(config, run / "config.yaml")
    with pytest.raises(UserError, match="default, far differ in 1 keys each: choose one with --reference"):
        choose_reference(load_references(run.parent / "refs"), read_run(run).config)
    code, text = command(run, "--reference", "far")
    assert code == 0
    assert "reference    far (" in text
    near = write_run(losses, "near", optimizer__lr=0.25)
    code, text = command(near)
    assert code == 0
    lr = OmegaConf.load(ROOT / "params.yaml").optimizer.lr
    assert "reference    default (" in text
    assert f"differences  optimizer.lr: default {lr}, this run 0.25\n" in text


def test_losses_of_another_data_set_or_diffusion_are_not_compared(write_run, command):
    losses = noisy(0)
    run = write_run(losses)
    assert command(run) == (2, "no comparable reference: none is saved\n")
    command(run, "--save", "default")
    for name, changes, text in (
        ("shapes", {"dataset__name": "shapes"}, 'default (dataset.name: default "cifar10", this run "shapes")'),
        ("short", {"diffusion__num_timesteps": 20}, "default (diffusion.num_timesteps: default 1000, this run 20)"),
    ):
        assert command(write_run(losses, name, **changes)) == (2, f"no comparable reference: {text}\n")
    assert command(run, "--reference", "other") == (2, "--reference other: unknown, available: default\n")
