"""Nearest neighbours: exact against brute force; and the ratio that tells copies from new images."""

import numpy as np
import pytest
import torch

from modeling.images import enlarge, make_grid
from modeling.measures import neighbours
from modeling.measures.neighbours import draw_neighbours, memorisation_ratio, nearest_neighbours
from tests.helpers import random_images

pytestmark = pytest.mark.numeric

SAMPLES, TRAIN, HELD_OUT = (random_images(count, 3, 4, 4, seed=seed) for seed, count in enumerate((20, 50, 30)))


@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize(("queries_at_once", "references_at_once"), [(1000, 1000), (7, 13), (1, 1)])
def test_pixels_neighbours_are_exactly_those_of_brute_force(monkeypatch, k, queries_at_once, references_at_once):
    monkeypatch.setattr(neighbours, "_QUERIES", queries_at_once)
    monkeypatch.setattr(neighbours, "_REFERENCES", references_at_once)
    distances, indices = nearest_neighbours(SAMPLES, TRAIN, k)
    first, second = (images.flatten(1).numpy().astype(np.int64) for images in (SAMPLES, TRAIN))
    squares = ((first[:, None] - second[None]) ** 2).sum(axis=2)  # (N, M), integers
    expected = np.sort(squares, axis=1)[:, :k]
    assert np.array_equal(np.take_along_axis(squares, indices.numpy(), axis=1), expected)
    assert np.array_equal((distances**2).round().long().numpy(), expected)
    assert all(len(set(row.tolist())) == k for row in indices)


def test_features_neighbours_are_those_of_brute_force(monkeypatch):
    monkeypatch.setattr(neighbours, "_REFERENCES", 16)
    queries, references = torch.randn(9, 5) + 100, torch.randn(40, 5) + 100  # far from 0: where sums of squares cancel
    distances, indices = nearest_neighbours(queries, references, 4)
    expected = (queries.double()[:, None] - references.double()[None]).norm(dim=2).sort(dim=1)
    torch.testing.assert_close(distances, expected.values[:, :4], rtol=1e-12, atol=0)
    assert torch.equal(indices, expected.indices[:, :4])


def test_a_copy_is_found_at_distance_zero():
    for references in (TRAIN, torch.randn(50, 7) * 1e3):
        distances, indices = nearest_neighbours(references[10:20], references)
        assert torch.equal(indices[:, 0], torch.arange(10, 20))
        assert not distances.any()


def test_copies_of_training_images_have_ratio_zero():
    assert memorisation_ratio(TRAIN[:20], TRAIN, HELD_OUT) == 0


def test_held_out_images_have_ratio_one():
    assert memorisation_ratio(HELD_OUT[:20], TRAIN, HELD_OUT) == 1


def test_the_memorisation_ratio_is_that_of_the_medians():
    samples, train, held_out = [1.0, 2.0, 103.0], [0.0, 100.0], [8.0, 96.0, -90.0]  # distances 1, 2, 3 and 8, 4, 90
    assert memorisation_ratio(*(torch.tensor(values)[:, None] for values in (samples, train, held_out))) == 0.25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nearest_neighbours(SAMPLES, TRAIN[:, :2]), "of one further shape"),
        (lambda: nearest_neighbours(torch.zeros(3), torch.zeros(3)), "of one further shape"),
        (lambda: nearest_neighbours(SAMPLES, TRAIN, 0), r"k must be in 1..50 .*got 0"),
        (lambda: nearest_neighbours(SAMPLES, TRAIN, 51), r"k must be in 1..50 .*got 51"),
        (lambda: nearest_neighbours(torch.full((1, 2), torch.nan), torch.zeros(1, 2)), "queries must be finite"),
        (lambda: nearest_neighbours(torch.zeros(1, 2), torch.full((1, 2), torch.inf)), "references must be finite"),
        (lambda: memorisation_ratio(SAMPLES, TRAIN, HELD_OUT[:19]), r"held_out must have .* \(20\), got 19"),
        (lambda: memorisation_ratio(SAMPLES, TRAIN, TRAIN), "must not be training images"),
    ],
)
def test_rows_without_neighbours_are_rejected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_picture_has_a_row_for_each_sample_with_its_neighbours_and_their_distances():
    distances, indices = nearest_neighbours(SAMPLES[:3], TRAIN, 4)
    picture = draw_neighbours(SAMPLES[:3], TRAIN[indices], distances)
    tiles = [enlarge(make_grid(torch.stack([SAMPLES[row], *TRAIN[indices[row]]]), 5)) for row in range(3)]
    height = tiles[0].shape[1]
    line = (picture.shape[1] - 3 * height) // 4
    for row in range(3):
        top = line + row * (height + line)
        assert torch.equal(picture[:, top : top + height], tiles[row])
        captions = picture[:, top + height : top + height + line].tensor_split(5, dim=2)
        assert all(caption.min() < 128 for caption in captions)
