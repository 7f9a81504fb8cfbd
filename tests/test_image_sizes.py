"""Images of other sizes and in grey: prepared, trained on, sampled and measured; what does not fit is said first."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import main
import prepare_data
import sample
from modeling.config import Trained, parse
from modeling.datasets import preparation
from modeling.datasets.decoding import read_picture
from modeling.datasets.shapes import draw_shapes
from modeling.evaluation import bits_per_dim
from modeling.images import make_grid
from modeling.measures.sample_files import read_samples
from modeling.stage import read_manifest
from modeling.system.errors import UserError
from tests.datasets.drawings import noise, stored
from tests.helpers import TINY, dataset, ends_in_error, zero_model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "channels", "model"),
    [
        ("8", 1, ["model.multipliers=[1,1,2]", "model.attention_resolutions=[4]"]),
        pytest.param("64", 3, ["model.multipliers=[1,1]"], marks=pytest.mark.long),
        ("[48,64]", 3, ["model.multipliers=[1,1,1]", "model.attention_resolutions=[12]"]),
        pytest.param("[32,64]", 1, ["model=unet", "model.multipliers=null"], marks=pytest.mark.long),
    ],
)
def test_a_run_is_of_images_of_the_configured_size(
    tmp_path, monkeypatch, compose_config, capsys, size, channels, model
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preparation, "NUM_TEST_SHAPES", 4)
    images = [f"dataset.image_size={size}", f"dataset.channels={channels}", "dataset.num_images=128"]
    values = compose_config(
        *TINY, *images, *model, "train.max_steps=1", "train.num_samples=1", "runtime.output_dir=run"
    )
    shape = parse(values).dataset.image_shape
    assert shape == (channels, *(json.loads(size) if size.startswith("[") else [int(size)] * 2))
    prepare_data.main(values)
    main.main(values)
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["steps"] == 1
    # Of the best linear denoiser where an image has few enough numbers.
    rows = [line.split(",") for line in Path("run/heldout.csv").read_text().splitlines()]
    assert rows[0] == ["timesteps", "raw", "ema", "linear"]
    is_small = size == "8"
    assert ({row[3] == "" for row in rows}, "eval/heldout_linear" in metrics) == ({False, not is_small}, is_small)
    scale = -(-500 // (shape[2] + 4))
    with Image.open("run/samples/ema/1.png") as grid:
        assert grid.size == ((shape[2] + 4) * scale, (shape[1] + 4) * scale)
    options = ["checkpoint=run", "num_steps=2", "device=cpu"]
    sample.main(compose_config(*options, "num_images=2", "out=samples.npz", name="sample"))
    assert read_samples(Path("samples.npz"))[0].shape == (2, *shape)
    sample.main(compose_config(*options, "picture=path", "num_images=1", "out=path.png", name="sample"))
    measured = [*options, "bits_timesteps=1", "out=measured"]
    evaluate.main(compose_config(*measured, "measures=[bits_per_dim,heldout_loss]", name="evaluate"))
    with ends_in_error(
        capsys, rf"encoder is for images of shape \(3, 32, 32\) only, got .* \({channels}, .*bits_per_dim\]"
    ):
        evaluate.main(compose_config(*measured, "measures=[encoder,bits_per_dim]", name="evaluate"))
    if channels == 1:
        with ends_in_error(capsys, r"fid is for images in colour only, got images of shape \(1,"):
            evaluate.main(compose_config(*measured, "measures=[fid]", name="evaluate"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=unet", "dataset.image_size=[48,64]"], "multiples of 32 with model.name=unet, got 48 and 64"),
        (["dataset.image_size=10"], r"multiples of 4 with model.multipliers=\[1, 2, 2\], got 10 and 10"),
        (
            ["dataset.image_size=8", "model.attention_resolutions=[16]"],
            r"attention_resolutions must be among \[8, 4, 2\], got \[16\]",
        ),
        (
            ["dataset.image_size=[8]"],
            r"dataset.image_size=\[8\]: must be a whole number of pixels or \[height, width\]",
        ),
        (["dataset.image_size=2"], "dataset.image_size=2: must be .*, each 4 to 1024"),
        (["dataset.channels=2"], "dataset.channels=2: input should be 1 or 3"),
        (["dataset=cifar10", "dataset.image_size=64"], "image_size must be null with dataset.name=cifar10, got 64"),
    ],
)
@pytest.mark.fault("wrong input")
def test_a_size_that_does_not_fit_is_one_line_before_the_start(compose_config, overrides, message):
    with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
        parse(compose_config("dataset=shapes", *overrides))


def test_prepared_images_of_another_size_are_rejected_and_prepared_again(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "NUM_TEST_SHAPES", 2)
    values = {"num_images": 3, "seed": 0}
    before, _ = preparation.prepare(dataset("shapes", tmp_path, **values))
    small = dataset("shapes", tmp_path, **values, image_size=[8, 12], channels=1)
    command = r"python prepare_data.py .*'dataset.image_size=\[8,12\]' dataset.channels=1"
    with pytest.raises(UserError, match=rf"prepared with images=\[3, 32, 32\], not \[1, 8, 12\]: run `{command}`"):
        read_manifest(small)
    manifest, is_new = preparation.prepare(small)
    assert is_new
    assert manifest["files"]["train.npy"]["shape"] == [3, 1, 8, 12]
    assert preparation.prepare(small) == (manifest, False)
    assert read_manifest(small) == manifest
    assert preparation.prepare(dataset("shapes", tmp_path, **values, image_size=32)) == (before, True)


@pytest.mark.parametrize(("height", "width", "top", "left"), [(48, 71, 0, 3), (50, 64, 1, 0), (48, 64, 0, 0)])
def test_the_centre_rectangle_of_a_picture_is_taken(tmp_path, height, width, top, left):
    path, cut = stored(noise(height, width), tmp_path / "a.png"), noise(height, width)[top : top + 48, left : left + 64]
    np.testing.assert_array_equal(read_picture(path, (3, 48, 64)), cut.transpose(2, 0, 1))
    np.testing.assert_array_equal(read_picture(path, (1, 48, 64)), np.asarray(Image.fromarray(cut).convert("L"))[None])
    with pytest.raises(ValueError, match=f"{width}x{height} pixels, at least 72x40 needed"):
        read_picture(path, (3, 40, 72))


def test_shapes_of_another_size_are_the_same_drawings():
    whole, small = (draw_shapes(0, 0, 6, (3, size, size)).astype(float) for size in (64, 32))
    averaged = whole.reshape(6, 3, 32, 2, 32, 2).mean(axis=(3, 5))
    assert np.abs(averaged - small).max() < 40  # at edges; another drawing differs by 255
    assert np.abs(averaged - small).mean() < 0.5
    colours, grey = draw_shapes(0, 0, 6, (3, 24, 40)), draw_shapes(0, 0, 6, (1, 24, 40))
    expected = np.stack([np.asarray(Image.fromarray(image.transpose(1, 2, 0)).convert("L")) for image in colours])
    np.testing.assert_allclose(grey[:, 0].astype(int), expected, atol=1)


def test_a_bound_is_per_dimension_of_the_image():
    images = torch.full((1, 3, 4, 4), 200, dtype=torch.uint8)
    model = zero_model((0.001, 0.3), 20)
    priors = [bits_per_dim(model, images[:, :c, :h]).prior for c, h in ((3, 4), (1, 4), (1, 2))]
    assert priors[0] > 0.001
    assert priors == [pytest.approx(priors[0], rel=1e-6)] * 3


def test_a_grid_of_grey_images_is_grey_and_magenta_where_it_is_not_finite():
    images = torch.tensor([-1.0, 1.0, torch.nan])[:, None, None, None].expand(3, 1, 2, 2)
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 255]], dtype=torch.uint8)
    assert torch.equal(make_grid(images), make_grid(colours[:, :, None, None].expand(-1, -1, 2, 2)))


def test_a_file_without_a_size_is_of_32x32_in_colour(compose_config):
    values = parse(compose_config()).model_dump()
    del values["dataset"]["image_size"], values["dataset"]["channels"]
    assert parse(values, Trained).image_shape == (3, 32, 32)
    assert parse(values).dataset == parse(compose_config()).dataset
