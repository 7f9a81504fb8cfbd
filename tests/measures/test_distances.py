"""Distances: right where the answer is known, called FID only where they are."""

from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
import torch_fidelity

from modeling.measures.distances import frechet_distance, measure_distances, name_values
from modeling.measures.encoder import images_sha256
from modeling.measures.extractors import load_own_encoder
from modeling.measures.features import Features, extract_features
from modeling.system.files import sha256_of
from tests.helpers import random_images

pytestmark = pytest.mark.numeric


def whitened(count: int, dimensions: int) -> torch.Tensor:
    """Points whose mean is 0 and whose covariance is the identity, both exactly."""
    points = torch.randn(count, dimensions, dtype=torch.float64)
    points -= points.mean(dim=0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(points.T.cov()), points.T, upper=False).T


def as_features(values: torch.Tensor, extractor: str = "encoder", logits: torch.Tensor | None = None) -> Features:
    identity = {
        "num_images": len(values),
        "images_sha256": f"of {len(values)} images",
        "extractor": extractor,
        "extractor_sha256": "of the weights",
        "torch_fidelity": version("torch-fidelity"),
    }
    return Features(values, logits, identity)


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    mean, first, second = torch.randn(6).double(), torch.rand(6).double() + 0.1, torch.rand(6).double() + 0.1
    rotation = torch.linalg.qr(torch.randn(6, 6).double()).Q
    left, right = whitened(50, 6) * first @ rotation, (mean + whitened(80, 6) * second) @ rotation
    expected = mean.square().sum() + (first - second).square().sum()
    assert frechet_distance(left, right) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(left, left) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_in_general_position_is_the_closed_form():
    first, second = torch.randn(5, 5).double(), torch.randn(5, 5).double()
    covariances = first.T @ first, second.T @ second
    # tr (S_1 S_2)^(1/2) is the sum of the singular values of S_1^(1/2) S_2^(1/2), whatever the roots
    root = torch.linalg.svdvals(first @ second.T).sum()
    expected = covariances[0].trace() + covariances[1].trace() - 2 * root
    assert frechet_distance(whitened(40, 5) @ first, whitened(40, 5) @ second) == pytest.approx(
        expected.item(), rel=1e-9
    )


def test_a_set_has_no_distance_from_itself():
    values = measure_distances(as_features(whitened(40, 4).float()), as_features(whitened(40, 4).float()))["values"]
    assert values["encoder/frechet_distance"] == pytest.approx(0, abs=1e-5)  # of two with equal mean and covariance
    same = as_features(torch.randn(40, 4))
    values = measure_distances(same, same)["values"]
    assert values["encoder/precision"] == values["encoder/recall"] == 1


def test_samples_of_half_the_reference_have_precision_1_and_recall_1_2():
    near, far = torch.randn(20, 3) * 0.01, torch.randn(20, 3) * 0.01 + 100
    values = measure_distances(as_features(near), as_features(torch.cat([near, far])))["values"]
    assert (values["encoder/precision"], values["encoder/recall"]) == (1.0, 0.5)


def test_the_kernel_distance_of_points_is_the_closed_form():
    """All points of a set equal: every subset has the same kernel values, (x.y / D + 1)^3."""
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])
    values = measure_distances(as_features(one.expand(12, 2)), as_features(two.expand(15, 2)))["values"]
    expected = 1.5**3 + 3.5**3 - 2 * 1.5**3
    assert values["encoder/kernel_distance"] == pytest.approx(expected, rel=1e-6)
    assert values["encoder/kernel_distance_std"] == pytest.approx(0, abs=1e-5)


def test_the_inception_score_of_equal_images_is_one():
    alike = as_features(torch.randn(20, 3), "inception-2015", logits=torch.randn(7).expand(20, 7))
    values = measure_distances(alike, as_features(torch.randn(20, 3), "inception-2015"))["values"]
    assert values["inception-2015/inception_score"] == pytest.approx(1)


NAMES = ["frechet_distance", "kernel_distance", "kernel_distance_std", "precision", "recall", "inception_score"]


@pytest.mark.parametrize(
    ("extractor", "counts", "names"),
    [
        ("inception-2015", (50_000, 50_000), ["fid", "kid", "kid_std", "precision", "recall", "inception_score"]),
        ("inception-2015", (5_000, 50_000), [f"inception-2015/{name}" for name in NAMES]),
        ("inception-2015", (50_000, 10_000), [f"inception-2015/{name}" for name in NAMES]),
        ("inception", (50_000, 50_000), [f"inception/{name}" for name in NAMES]),
        ("encoder", (50_000, 50_000), [f"encoder/{name}" for name in NAMES]),
    ],
)
def test_only_50000_images_with_the_official_weights_have_a_fid(extractor, counts, names):
    assert list(name_values(dict.fromkeys(NAMES, 1.0), extractor, *counts)) == names


def test_without_logits_there_is_no_inception_score():
    features, logits = as_features(torch.randn(20, 3), "inception"), torch.randn(20, 7)
    assert "inception/inception_score" not in measure_distances(features, features)["values"]
    generated = as_features(torch.randn(20, 3), "inception", logits=logits)
    assert "inception/inception_score" in measure_distances(generated, features)["values"]


def test_features_of_two_extractors_are_rejected():
    first = as_features(torch.randn(20, 3))
    other = replace(first, identity=first.identity | {"extractor_sha256": "another"})
    with pytest.raises(ValueError, match="extractor_sha256 must be one for both, got of the weights and another"):
        measure_distances(first, other)


def test_every_number_has_its_identity(encoder_path):
    extractor = load_own_encoder(encoder_path)
    images, others = random_images(24, 3, 32, 32), random_images(30, 3, 32, 32, seed=1) // 2
    result = measure_distances(extract_features(extractor, images), extract_features(extractor, others))
    assert result["identity"] == {
        "num_images": 24,
        "images_sha256": images_sha256(images),
        "reference_num_images": 30,
        "reference_sha256": images_sha256(others),
        "extractor": "encoder",
        "extractor_sha256": sha256_of(encoder_path),
        "torch_fidelity": torch_fidelity.__version__,
        "kid_subsets": 100,
        "kid_subset_size": 24,
        "prc_neighborhood": 3,
    }
    assert set(result["values"]) == {
        f"encoder/{name}"
        for name in ("frechet_distance", "kernel_distance", "kernel_distance_std", "precision", "recall")
    }
