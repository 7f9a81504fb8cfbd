"""The small classifier: its shape, its training, its file and its script."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import train_encoder as script
from modeling.checkpoint import CheckpointError, load_weights
from modeling.datasets.cifar10 import load_labels
from modeling.measures.encoder import (
    Encoder,
    accuracy,
    augment,
    images_sha256,
    load_encoder,
    save_encoder,
    train_encoder,
)
from modeling.measures.encoder import _learning_rate as learning_rate
from modeling.seeding import Purpose, derive_seed
from modeling.system.files import sha256_of
from tests.helpers import ROOT, equal, random_images

IMAGES = random_images(40, 3, 32, 32)
BRIGHTNESS = torch.arange(40) % 2
BRIGHT_OR_DARK = IMAGES // 2 + 128 * BRIGHTNESS[:, None, None, None].to(torch.uint8)
RECIPE = {"width": 8, "num_epochs": 5, "batch_size": 16, "max_lr": 0.05}


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
def test_a_width_that_cannot_be_is_refused(width):
    with pytest.raises(ValueError, match=f"width must be a multiple of 8 in 8..256, got {width}"):
        Encoder(width)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (1, 3, 64, 64), (3, 32, 32)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"takes images \(N, 3, 32, 32\), got"):
        Encoder(8)(torch.zeros(shape))


# ---- training


def test_an_augmented_image_is_one_of_its_fifty_variants_and_all_occur():
    image = random_images(1, 3, 6, 6)
    augmented = augment(image.expand(2000, -1, -1, -1), seed=0, step=3)
    variants = {}
    for number, mirrored in enumerate((image, image.flip(-1))):
        padded = F.pad(mirrored, (2, 2, 2, 2), mode="reflect")
        for y in range(5):
            for x in range(5):
                variants[padded[0, :, y : y + 6, x : x + 6].numpy().tobytes()] = (number, y, x)
    counts = dict.fromkeys(variants, 0)
    for one in augmented:
        counts[one.contiguous().numpy().tobytes()] += 1  # a KeyError: no variant
    assert len(counts) == 50
    chi_squared = sum((count - 40) ** 2 / 40 for count in counts.values())
    assert chi_squared < 49 + 5 * math.sqrt(2 * 49)  # uniform: mean 49, five standard deviations


def test_an_augmented_image_depends_on_seed_step_and_index_alone():
    whole = augment(IMAGES, seed=1, step=2)
    assert torch.equal(augment(IMAGES[:7], seed=1, step=2), whole[:7])
    assert not torch.equal(augment(IMAGES, seed=1, step=3), whole)
    assert not torch.equal(augment(IMAGES, seed=2, step=2), whole)


def test_the_learning_rate_rises_to_its_maximum_and_falls_to_zero():
    rates = [learning_rate(step, 100, 0.5) for step in range(101)]
    assert rates[0] == 0.5 / 20
    assert rates[19] == rates[20] == 0.5
    assert rates == sorted(rates[:20]) + sorted(rates[20:], reverse=True)
    assert rates[100] == 0
    assert all(0 < learning_rate(step, steps, 1) <= 1 for steps in (1, 2, 3, 7) for step in range(steps))


def test_training_is_a_function_of_the_seed():
    first, again = (train_encoder(IMAGES, BRIGHTNESS, **RECIPE | {"num_epochs": 1}) for _ in range(2))
    other = train_encoder(IMAGES, BRIGHTNESS, **RECIPE | {"num_epochs": 1}, seed=1)
    assert equal(first.state_dict(), again.state_dict())
    assert not equal(first.state_dict(), other.state_dict())


def test_a_learning_rate_of_zero_leaves_the_weights_as_they_were_drawn():
    encoder = train_encoder(IMAGES, BRIGHTNESS, **RECIPE | {"max_lr": 0.0})
    torch.manual_seed(derive_seed(0, Purpose.WEIGHTS))
    assert equal(dict(encoder.named_parameters()), dict(Encoder(8, 2).named_parameters()))


def test_it_learns_to_tell_bright_from_dark():
    # The running statistics need more steps than the weights.
    encoder = train_encoder(BRIGHT_OR_DARK, BRIGHTNESS, **RECIPE | {"num_epochs": 30})
    assert not encoder.training
    assert accuracy(encoder, BRIGHT_OR_DARK, BRIGHTNESS) == 1


def test_accuracy_counts_every_image_once():
    encoder = Encoder(8, 4).eval()
    encoder.head.weight.data.zero_()
    encoder.head.bias.data = torch.tensor([0.0, 0.0, 1.0, 0.0])
    labels = torch.tensor([2, 0, 2, 3, 1] * 8)
    assert accuracy(encoder, IMAGES, labels, batch_size=7) == 0.4


@pytest.mark.parametrize(
    ("labels", "change", "message"),
    [
        (BRIGHTNESS[1:], {}, r"labels must have shape \(40,\).*got \(39,\)"),
        (BRIGHTNESS, {"batch_size": 41}, r"batch_size must be in 1..40 .*got 41"),
        (BRIGHTNESS, {"batch_size": 0}, r"batch_size must be in 1..40 .*got 0"),
        (BRIGHTNESS, {"width": 9}, "width must be"),
    ],
)
def test_training_on_what_does_not_fit_is_refused(labels, change, message):
    with pytest.raises(ValueError, match=message):
        train_encoder(IMAGES, labels, **RECIPE | change)


def test_a_loss_that_is_not_finite_ends_the_training():
    with pytest.raises(FloatingPointError, match=r"max_lr=1e\+30 is too high"):
        train_encoder(IMAGES, BRIGHTNESS, **RECIPE | {"max_lr": 1e30})


# ---- the file


def test_what_is_saved_is_loaded_to_the_bit(tmp_path):
    path = tmp_path / "new" / "encoder.safetensors"
    encoder = train_encoder(IMAGES, BRIGHTNESS, **RECIPE)
    about = {"test_accuracy": 0.5, "seed": 0}
    sha256 = save_encoder(path, encoder, about)
    loaded, found = load_encoder(path)
    assert found == about
    assert sha256 == sha256_of(path) == save_encoder(path, loaded, about)
    assert equal(loaded.state_dict(), encoder.state_dict())
    assert not loaded.training


def test_another_file_is_no_encoder(tmp_path):
    path = tmp_path / "encoder.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
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
    path.write_bytes(b"anything")
    with pytest.raises(CheckpointError, match="holds no exported model"):
        load_encoder(path)


def test_the_hash_of_images_is_of_their_bytes_and_shape():
    assert images_sha256(IMAGES) == images_sha256(IMAGES.clone())
    changed = IMAGES.clone()
    changed[-1, -1, -1, -1] ^= 1
    variants = (IMAGES, changed, IMAGES.flip(0), IMAGES[:39], IMAGES.reshape(20, 6, 32, 32), IMAGES.transpose(2, 3))
    assert len({images_sha256(images) for images in variants}) == 6


# ---- the script


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("width=12", "width=12: input should be a multiple of 8"),
        ("urls=abc", "urls=abc: input should be a valid list"),
        ("max_lr=0", "max_lr=0: input should be greater than 0"),
    ],
)
def test_a_wrong_value_is_named(compose_config, argument, message):
    with pytest.raises(SystemExit, match=message):
        script.main(compose_config(argument, name="encoder"))


def test_an_encoder_that_is_there_is_not_replaced(compose_config, tmp_path):
    path = tmp_path / "encoder.safetensors"
    path.write_text("precious")
    with pytest.raises(SystemExit, match="exists already; name another file or set overwrite=true"):
        script.main(compose_config(f"out={path}", name="encoder"))
    assert path.read_text() == "precious"


@pytest.mark.data
def test_the_labels_are_the_official_ones(cifar10_archive):
    train, test = load_labels(cifar10_archive)
    assert train[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert test[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert torch.from_numpy(train).bincount().tolist() == [5000] * 10
    assert torch.from_numpy(test).bincount().tolist() == [1000] * 10


@pytest.mark.data
@pytest.mark.long
def test_the_script_writes_an_encoder_whose_header_tells_its_accuracy(cifar10_archive, tmp_path):
    path = tmp_path / "encoder.safetensors"
    arguments = [f"out={path}", f"archive={cifar10_archive}", "num_epochs=1", "width=8"]
    done = subprocess.run([sys.executable, "train_encoder.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, about = load_encoder(path)
    assert f"{about['test_accuracy']:.2%} of the test images" in done.stdout
    assert f"SHA-256 {sha256_of(path)}" in done.stdout
    assert about["test_accuracy"] > 0.3  # one class in ten is chance
