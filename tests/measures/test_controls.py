"""The images that validate features: each kind is what it is called, and their distances rise."""

import math

import pytest
import torch

from modeling.datasets.cifar10 import load_cifar10
from modeling.measures.controls import check_rising, control_distances, control_images
from modeling.measures.distances import frechet_distance
from modeling.measures.extractors import load_own_encoder
from modeling.measures.features import extract_features
from modeling.system.errors import UserError
from tests.helpers import ROOT, equal, random_images

TRAINED = ROOT / "encoders" / "cifar10.safetensors"


def test_each_control_is_what_it_is_called():
    train, test = random_images(80, 3, 8, 8, seed=1), random_images(30, 3, 8, 8, seed=2)
    reference, controls = control_images(train, test)
    assert list(controls) == ["train halves", "train / test", "noise", "blur", "Gaussian", "uniform"]
    assert all(images.shape == (30, 3, 8, 8) and images.dtype == torch.uint8 for images in controls.values())
    assert torch.equal(reference, train[:30])
    assert torch.equal(controls["train halves"], train[30:60])
    assert torch.equal(controls["train / test"], test)
    assert controls["uniform"].flatten().bincount(minlength=256).min() > 0
    again = control_images(train, test)[1]
    assert equal(controls, again)
    assert torch.equal(control_images(train, test[:7])[1]["uniform"], controls["uniform"][:7])


def test_noise_on_grey_images_has_its_standard_deviation_and_blur_none():
    grey = torch.full((1000, 3, 8, 8), 128, dtype=torch.uint8)
    controls = control_images(grey, grey)[1]
    assert torch.equal(controls["blur"], grey[:500])
    assert torch.equal(controls["Gaussian"], grey[:500])  # no pixel varies
    difference = controls["noise"].double() - 128
    assert difference.std().item() == pytest.approx(math.sqrt(15**2 + 1 / 12), rel=0.01)  # 1/12 by rounding
    assert difference.mean().item() == pytest.approx(0, abs=0.1)


def test_the_gaussian_control_has_the_mean_and_covariance_of_the_images():
    common = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    own = torch.randn(4000, 48, generator=torch.Generator().manual_seed(1))
    train = (120 + 20 * common + 10 * own).round().to(torch.uint8).reshape(4000, 3, 4, 4)
    drawn = control_images(train, train)[1]["Gaussian"].flatten(1).double()
    images = train[:2000].flatten(1).double()
    assert (drawn.mean(0) - images.mean(0)).abs().max() < 5 * 22.4 / 2000**0.5
    covariances = torch.cov(drawn.T), torch.cov(images.T)
    torch.testing.assert_close(*covariances, atol=5 * 500 * (2 / 2000) ** 0.5, rtol=0)


@pytest.mark.long
def test_each_control_is_measured_against_the_same_training_images(encoder_path):
    extractor = load_own_encoder(encoder_path)
    train, test = random_images(40, 3, 32, 32, seed=1), random_images(20, 3, 32, 32, seed=2) // 2
    table = control_distances(extractor, train, test)
    reference, controls = control_images(train, test)
    values = {name: extract_features(extractor, images).values for name, images in controls.items()}
    reference = extract_features(extractor, reference).values
    assert table == {name: frechet_distance(value, reference) for name, value in values.items()}
    assert table["uniform"] != table["Gaussian"]


@pytest.mark.parametrize("distances", [[1.0, 3.0, 2.0], [1.0, 1.0, 2.0], [-1.0, 0.0, float("nan")]])
def test_distances_that_do_not_rise_are_an_error(distances):
    check_rising({"first": 0.0, "second": 0.1})
    with pytest.raises(UserError, match="do not rise"):
        check_rising(dict(zip("abc", distances, strict=True)))


@pytest.mark.data
@pytest.mark.long
@pytest.mark.skipif(not TRAINED.is_file(), reason="encoders/cifar10.safetensors is missing: make encoder")
def test_in_the_encoders_features_the_controls_distances_rise(cifar10_archive):
    images, _ = load_cifar10(cifar10_archive, ())
    table = control_distances(load_own_encoder(TRAINED), *map(torch.from_numpy, images))
    assert list(table) == ["train halves", "train / test", "noise", "blur", "Gaussian", "uniform"]
    check_rising(table)
