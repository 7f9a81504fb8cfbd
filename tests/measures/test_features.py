"""Features of images: the network's own, computed once, and of valid images only."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from modeling.images import to_model_range
from modeling.measures.encoder import load_encoder
from modeling.measures.extractors import load_own_encoder
from modeling.measures.features import extract_features
from modeling.system.errors import UserError
from tests.helpers import random_images

pytestmark = pytest.mark.numeric

IMAGES = random_images(24, 3, 32, 32)


def test_features_are_the_encoders_whatever_the_batch_size(encoder_path):
    found = extract_features(load_own_encoder(encoder_path), IMAGES, batch_size=7)
    encoder, _ = load_encoder(encoder_path)
    torch.testing.assert_close(found.values, encoder.features(to_model_range(IMAGES)))
    assert found.logits is None


def test_features_are_computed_once_and_kept(encoder_path, tmp_path):
    extractor = load_own_encoder(encoder_path)
    first = extract_features(extractor, IMAGES, cache=tmp_path)
    assert torch.equal(first.values, extract_features(extractor, IMAGES).values)

    def fail(images):
        raise AssertionError("computed again")

    unable = replace(extractor, function=fail)
    again = extract_features(unable, IMAGES, cache=tmp_path)
    assert torch.equal(again.values, first.values)
    assert again.identity == first.identity
    for changed, images in ((unable, IMAGES.flip(0)), (replace(unable, sha256="other"), IMAGES), (unable, IMAGES[:12])):
        with pytest.raises(AssertionError, match="computed again"):
            extract_features(changed, images, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_keep_features_is_warned_of(encoder_path, tmp_path, capsys):
    (tmp_path / "file").touch()
    found = extract_features(load_own_encoder(encoder_path), IMAGES, cache=tmp_path / "file" / "cache")
    assert len(found.values) == len(IMAGES)
    assert "the features are not kept for the next time" in capsys.readouterr().err


@pytest.mark.parametrize("values", [np.zeros((24, 32)), np.zeros((24, 32), np.float32), np.array([{}] * 24)])
def test_kept_features_of_another_kind_are_rejected(encoder_path, tmp_path, values):
    extractor = load_own_encoder(encoder_path)
    extract_features(extractor, IMAGES, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    np.savez(path, values=values)
    if values.dtype == np.float32:
        assert not extract_features(extractor, IMAGES, cache=tmp_path).values.any()  # of the right kind: taken
        np.savez(path, values=values[:23])
    with pytest.raises(UserError, match="is no file of features, or damaged: .*; delete it"):
        extract_features(extractor, IMAGES, cache=tmp_path)


@pytest.mark.parametrize(
    "images", [IMAGES.float(), IMAGES[:9], IMAGES[:, :1], IMAGES[0]], ids=["float", "too few", "grey", "one"]
)
def test_other_images_are_rejected_before_anything_is_computed(encoder_path, images):
    with pytest.raises(UserError, match=r"images must be uint8 of shape \(N, 3, H, W\) with N at least 10, got"):
        extract_features(load_own_encoder(encoder_path), images)


def test_features_that_are_not_finite_are_rejected_and_not_kept(encoder_path, tmp_path):
    good, bad = IMAGES.flatten(1).float(), IMAGES.flatten(1) / 0.0
    for outputs, cache in (((bad, None), tmp_path), ((bad, good), None), ((good, bad), None)):
        broken = replace(load_own_encoder(encoder_path), function=lambda images, outputs=outputs: outputs)
        with pytest.raises(UserError, match="the features of encoder are not finite: its weights .* are broken"):
            extract_features(broken, IMAGES, cache=cache)
    assert not list(tmp_path.iterdir())
