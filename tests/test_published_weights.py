"""The weights in Git: the file that its record names, and the samples that the docs show."""

import json

import numpy as np
import pytest
from PIL import Image

import sample
from modeling.options import PUBLISHED, weights_file
from modeling.system.files import sha256_of
from tests.published_weights import PICTURE, RECORD, SAMPLE, WEIGHTS


def test_the_published_weights_are_those_of_their_record():
    record = json.loads(RECORD.read_text())
    assert sha256_of(WEIGHTS) == record["sha256"]
    assert WEIGHTS.stat().st_size <= 5e6
    assert record["eval/heldout_ema"] < 0.0345
    assert 4.0 < record["bits_per_dim/large"]["total"] < 4.2
    with Image.open(PICTURE) as image:
        assert json.loads(image.info["Comment"])["checkpoint_sha256"] == record["sha256"]


def test_the_published_weights_are_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert weights_file(PUBLISHED) == WEIGHTS
    (tmp_path / PUBLISHED).parent.mkdir()
    (tmp_path / PUBLISHED).touch()
    assert weights_file(PUBLISHED) == PUBLISHED


@pytest.mark.slow
@pytest.mark.numeric
def test_a_clone_samples_the_picture_of_the_docs_without_a_checkpoint(compose_config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    sample.main(compose_config(*SAMPLE, "out=a.png", name="sample"))
    with Image.open("a.png") as found, Image.open(PICTURE) as expected:
        difference = np.abs(np.array(found).astype(int) - np.array(expected))
    assert difference.mean() < 0.5  # of 255: CPUs round differently
