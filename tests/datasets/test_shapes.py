"""The shapes: a function of seed and number, each one thing on a plain ground."""

import numpy as np

from modeling.datasets.shapes import draw_shapes


def test_shapes_are_a_function_of_seed_and_number():
    images = draw_shapes(0, 0, 20)
    assert images.shape == (20, 3, 32, 32)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(draw_shapes(0, 5, 3), images[5:8])
    assert (draw_shapes(1, 0, 20) != images).any()


def test_a_shape_is_one_saturated_thing_on_a_plain_grey_ground():
    for image in draw_shapes(0, 0, 50).astype(int):
        ground = image[:, 0, 0]
        assert ground.max() == ground.min()  # grey
        saturation = image.max(axis=0) - image.min(axis=0)
        is_shape = saturation > 90
        assert 0.05 < is_shape.mean() < 0.35
        rows, columns = is_shape.any(axis=1), is_shape.any(axis=0)
        for line in (rows, columns):  # one thing: its shadow on either axis has no gap
            assert np.abs(np.diff(line.astype(int))).sum() == 2


def test_edges_are_anti_aliased():
    values = {len(np.unique(image.reshape(3, -1), axis=1).T) for image in draw_shapes(0, 0, 5)}
    assert min(values) > 4
