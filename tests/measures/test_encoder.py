"""The small classifier: its shape and its file."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from modeling.checkpoint import CheckpointError, load_weights
from modeling.measures.encoder import Encoder, images_sha256, load_encoder, save_encoder
from modeling.system.errors import UserError
from modeling.system.files import sha256_of
from tests.helpers import equal, random_images

pytestmark = pytest.mark.numeric

IMAGES = random_images(40, 3, 32, 32)


# ---- the network


def test_features_are_a_function_of_the_single_image():
    encoder = Encoder(8)
    encoder(torch.randn(16, 3, 32, 32) * 3 + 1)  # statistics other than the initial ones
    encoder.eval()
    x = torch.randn(4, 3, 32, 32)
    features = encoder.features(x)
    assert features.shape == (4, encoder.num_features) == (4, 32)
    torch.testing.assert_close(encoder.features(x[2:3]), features[2:3])
    torch.testing.assert_close(encoder(x), F.linear(features, encoder.head.weight, encoder.head.bias))


def test_the_default_has_128_features_and_fits_in_two_megabytes(tmp_path):
    encoder = Encoder()
    assert encoder.num_features == 128
    save_encoder(tmp_path / "encoder.safetensors", encoder, {})
    assert (tmp_path / "encoder.safetensors").stat().st_size < 2_000_000


@pytest.mark.parametrize("width", [0, 12, 264, -8, 8.0])
def test_a_width_that_cannot_be_is_rejected(width):
    with pytest.raises(ValueError, match=f"width must be a multiple of 8 in 8..256, got {width}"):
        Encoder(width)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (1, 3, 64, 64), (3, 32, 32)])
def test_images_of_another_shape_are_rejected(shape):
    with pytest.raises(UserError, match=r"takes images \(N, 3, 32, 32\), got"):
        Encoder(8)(torch.zeros(shape))


# ---- the file


def test_a_saved_encoder_is_loaded_to_the_bit(tmp_path):
    path = tmp_path / "new" / "encoder.safetensors"
    encoder = Encoder(8)
    encoder(torch.randn(16, 3, 32, 32))  # statistics other than the initial ones
    about = {"test_accuracy": 0.5, "seed": 0}
    sha256 = save_encoder(path, encoder, about)
    loaded, found = load_encoder(path)
    assert found == about
    assert sha256 == sha256_of(path) == save_encoder(path, loaded, about)
    assert equal(loaded.state_dict(), encoder.state_dict())
    assert not loaded.training


def test_another_file_is_no_encoder(tmp_path):
    path = tmp_path / "encoder.safetensors"
    with pytest.raises(FileNotFoundError, match="No such file"):
        load_encoder(path)
    save_encoder(path, Encoder(8), {})
    weights = load_weights(path)[1]
    head = {"head.weight": torch.zeros(10, 36)}  # of a width that cannot be
    for tensors, key in ((weights, "model"), ({}, "encoder"), (weights | head, "encoder"), (head, "encoder")):
        save_file(tensors, path, metadata={"config": f'{{"{key}": {{}}}}'})
        with pytest.raises(CheckpointError, match="holds no encoder"):
            load_encoder(path)
    save_file(weights | {"body.9.weight": torch.zeros(1)}, path, metadata={"config": '{"encoder": {}}'})
    with pytest.raises(CheckpointError, match="does not fit"):
        load_encoder(path)


def test_images_sha256_is_of_bytes_and_shape():
    assert images_sha256(IMAGES) == images_sha256(IMAGES.clone())
    changed = IMAGES.clone()
    changed[-1, -1, -1, -1] ^= 1
    variants = (IMAGES, changed, IMAGES.flip(0), IMAGES[:39], IMAGES.reshape(20, 6, 32, 32), IMAGES.transpose(2, 3))
    assert len({images_sha256(images) for images in variants}) == 6
