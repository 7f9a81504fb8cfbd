"""Training of the small classifier, and its script."""

import math

import pytest
import torch
import torch.nn.functional as F

import train_encoder as script
from modeling.datasets.cifar10 import load_cifar10
from modeling.measures.encoder import Encoder, load_encoder
from modeling.measures.encoder_training import _learning_rate as learning_rate
from modeling.measures.encoder_training import accuracy, augment, train_encoder
from modeling.seeding import Purpose, derive_seed
from modeling.system.errors import UserError
from modeling.system.files import sha256_of
from tests.helpers import ROOT, ends_in_error, equal, random_images, start_script

IMAGES = random_images(40, 3, 32, 32)
BRIGHTNESS = torch.arange(40) % 2
BRIGHT_OR_DARK = IMAGES // 2 + 128 * BRIGHTNESS[:, None, None, None].to(torch.uint8)


def train(
    labels: torch.Tensor = BRIGHTNESS, *, images: torch.Tensor = IMAGES, width: int = 8, num_epochs: int = 5,
    batch_size: int = 16, max_lr: float = 0.05, seed: int = 0,
) -> Encoder:  # fmt: skip
    return train_encoder(
        images, labels, width=width, num_epochs=num_epochs, batch_size=batch_size, max_lr=max_lr, seed=seed
    )


# ---- training


def test_all_fifty_variants_of_an_augmented_image_occur_and_no_other():
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
    first, again, other = (train(num_epochs=1, seed=seed) for seed in (0, 0, 1))
    assert equal(first.state_dict(), again.state_dict())
    assert not equal(first.state_dict(), other.state_dict())


def test_a_learning_rate_of_zero_leaves_the_weights_as_they_were_drawn():
    encoder = train(max_lr=0.0)
    torch.manual_seed(derive_seed(0, Purpose.WEIGHTS))
    assert equal(dict(encoder.named_parameters()), dict(Encoder(8, 2).named_parameters()))


def test_training_learns_to_tell_bright_from_dark():
    # The running statistics need more steps than the weights.
    encoder = train(images=BRIGHT_OR_DARK, num_epochs=30)
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
def test_arguments_that_do_not_fit_are_rejected(labels, change, message):
    with pytest.raises(UserError if "batch_size" in change else ValueError, match=message):
        train(labels, **change)


def test_a_loss_that_is_not_finite_ends_the_training():
    with pytest.raises(FloatingPointError, match=r"max_lr=1e\+30 is too high"):
        train(max_lr=1e30)


# ---- the script


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("width=12", "width=12: input should be a multiple of 8"),
        ("width=264", "width=264: input should be less than or equal to 256"),
        ("urls=abc", "urls=abc: input should be a valid list"),
        ("max_lr=0", "max_lr=0: input should be greater than 0"),
    ],
)
def test_a_wrong_value_is_named(compose_config, capsys, argument, message):
    with ends_in_error(capsys, message):
        script.main(compose_config(argument, name="encoder"))


def test_an_existing_encoder_is_not_replaced(compose_config, capsys, tmp_path):
    path = tmp_path / "encoder.safetensors"
    path.write_text("precious")
    with ends_in_error(capsys, "exists already; name another one or set overwrite=true"):
        script.main(compose_config(f"out={path}", name="encoder"))
    assert path.read_text() == "precious"


@pytest.mark.data
def test_the_labels_are_the_official_ones(cifar10_archive):
    _, (train, test) = load_cifar10(cifar10_archive, ())
    assert train[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert test[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert torch.from_numpy(train).bincount().tolist() == [5000] * 10
    assert torch.from_numpy(test).bincount().tolist() == [1000] * 10


@pytest.mark.data
@pytest.mark.long
def test_the_script_writes_an_encoder_with_its_accuracy_in_the_header(cifar10_archive, tmp_path):
    path = tmp_path / "encoder.safetensors"
    arguments = [f"out={path}", f"archive={cifar10_archive}", "num_epochs=1", "width=8"]
    process = start_script("train_encoder.py", *arguments, cwd=ROOT)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    _, about = load_encoder(path)
    assert f"{about['test_accuracy']:.2%} of the test images" in output
    assert f"SHA-256 {sha256_of(path)}" in output
    assert about["test_accuracy"] > 0.3  # one class in ten is chance
