"""The weights in Git: the files that their records name, and the samples that the docs show."""

import json
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig
from PIL import Image

import sample
from modeling.options import PUBLISHED, weights_file
from modeling.system.files import sha256_of
from tests.helpers import ROOT
from tests.published_weights import PUBLICATIONS, SAMPLE


@pytest.mark.parametrize(
    ("name", "most_bytes", "most_loss", "most_bits"),
    [("default", 5e6, 0.0345, 4.2), ("evening", 10e6, 0.0322, 4.0)],
)
def test_the_published_weights_are_those_of_their_record(name, most_bytes, most_loss, most_bits):
    publication = PUBLICATIONS[name]
    record = json.loads(publication.record.read_text())
    assert sha256_of(publication.weights) == record["sha256"]
    assert publication.weights.stat().st_size <= most_bytes
    assert record["measured"]["heldout_loss"] <= most_loss
    assert record["measured"]["heldout_loss"] == pytest.approx(record["run"]["eval/heldout_ema"], rel=1e-3)
    assert record["measured"]["bits_per_dim/large"]["total"] <= most_bits
    with Image.open(publication.picture) as image:
        assert json.loads(image.info["Comment"])["checkpoint_sha256"] == record["sha256"]


def test_the_published_weights_are_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert weights_file(PUBLISHED) == ROOT / PUBLISHED
    (tmp_path / PUBLISHED).parent.mkdir()
    (tmp_path / PUBLISHED).touch()
    assert weights_file(PUBLISHED) == PUBLISHED


@pytest.mark.slow
@pytest.mark.numeric
def test_a_clone_samples_the_picture_of_the_docs_without_a_checkpoint(compose_config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    compare_samples(compose_config(*SAMPLE, "out=a.png", name="sample"), PUBLICATIONS["default"].picture)


@pytest.mark.slow
@pytest.mark.numeric
def test_a_clone_samples_the_picture_of_the_evening(compose_config, monkeypatch, tmp_path):
    publication = PUBLICATIONS["evening"]
    options = [f"checkpoint={publication.weights}", *SAMPLE, f"out={tmp_path}/a.png"]
    compare_samples(compose_config(*options, name="sample"), publication.picture)


def compare_samples(options: DictConfig, picture: Path) -> None:
    sample.main(options)
    with Image.open(options.out) as found, Image.open(picture) as expected:
        difference = np.abs(np.array(found).astype(int) - np.array(expected))
    assert difference.mean() < 0.5  # of 255: CPUs round differently
