"""Samples drawn in parts, and what is written of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.diffusion import DiffusionModel
from modeling.measures.resumable import (
    denoising_path,
    draw_in_parts,
    draw_samples,
    interpolation,
    read_samples,
    write_samples,
)
from modeling.samplers import sample_images
from tests.helpers import Lambda

SIZE = (3, 4, 4)


def model() -> DiffusionModel:
    return DiffusionModel(Lambda(lambda x, t: torch.tanh(0.7 * x) * t[:, None, None, None]), (0.01, 0.3), 12)


def draw(folder, count=7, batch_size=3, identity=None):
    options = {"seed": 1, "num_steps": 5}
    return draw_samples(model(), count, SIZE, "cpu", folder, identity or options, batch_size=batch_size, **options)


def test_images_do_not_depend_on_the_parts_they_are_drawn_in(tmp_path):
    whole = draw(tmp_path / "a", batch_size=7)
    assert torch.equal(draw(tmp_path / "b", batch_size=3), whole)
    assert torch.equal(draw(tmp_path / "c", count=4), whole[:4])
    assert whole.dtype == torch.uint8
    assert len(whole.unique(dim=0)) == 7


def test_samples_that_are_not_finite_are_an_error_and_leave_no_part(tmp_path):
    broken = DiffusionModel(Lambda(lambda x, t: x * float("nan")), (0.01, 0.3), 12)
    with pytest.raises(FloatingPointError, match="a sample is not finite in fp32"):
        draw_samples(broken, 2, SIZE, "cpu", tmp_path, {}, batch_size=2, seed=1, num_steps=5)
    assert not list(tmp_path.glob("*.npy"))


def test_a_stopped_process_leaves_its_parts_to_the_next(tmp_path):
    drawn = []

    def from_zero(start, count):
        drawn.append((start, count))
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return torch.arange(start, start + count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)

    with pytest.raises(KeyboardInterrupt):
        draw_in_parts(tmp_path, {"seed": 1}, 10, 3, from_zero)
    images = draw_in_parts(tmp_path, {"seed": 1}, 10, 4, from_zero)
    assert drawn == [(0, 3), (3, 3), (6, 3), (6, 4)]
    assert images[:, 0, 0, 0].tolist() == list(range(10))
    assert torch.equal(draw_in_parts(tmp_path, {"seed": 1}, 10, 4, lambda *part: pytest.fail("drawn again")), images)
    assert len(draw_in_parts(tmp_path, {"seed": 1}, 5, 4, lambda *part: pytest.fail("drawn again"))) == 5


def test_parts_of_other_samples_are_refused(tmp_path):
    draw(tmp_path, identity={"seed": 1, "sampler": "ddim"})
    other = {"seed": 2, "sampler": "ddim", "eta": 0.5}
    with pytest.raises(ValueError, match=r"holds parts of something else \(seed, eta differ\)"):
        draw(tmp_path, identity=other)
    ones = draw_in_parts(tmp_path, other, 7, 3, lambda start, count: torch.ones(count, 1), replace=True)
    assert ones.tolist() == [[1.0]] * 7


@pytest.mark.parametrize("harm", ["missing", "cut off", "identity"])
def test_damaged_parts_are_noticed(tmp_path, harm):
    draw(tmp_path)
    part = tmp_path / "000000003.npy"
    if harm == "missing":
        part.unlink()
    elif harm == "cut off":
        part.write_bytes(part.read_bytes()[:-5])
    else:
        (tmp_path / "identity.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged .*: delete it"):
        draw(tmp_path)


def test_an_npz_holds_images_and_identity_in_the_usual_layout(tmp_path):
    images, identity = draw(tmp_path / "parts"), {"seed": 1, "sampler": "ddim"}
    write_samples(images, identity, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (7, 4, 4, 3)
    found, found_identity = read_samples(tmp_path / "samples.npz")
    assert torch.equal(found, images)
    assert found_identity == identity


def test_a_folder_holds_a_png_for_each_image_and_the_identity(tmp_path):
    images = draw(tmp_path / "parts", count=11)
    write_samples(images, {"seed": 1}, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == [f"{number:02d}.png" for number in range(11)]
    read = np.stack([np.asarray(Image.open(tmp_path / "out" / name)) for name in names])
    assert np.array_equal(read, images.permute(0, 2, 3, 1).numpy())
    assert json.loads((tmp_path / "out" / "identity.json").read_text()) == {"seed": 1}
    write_samples(images[:2], {"seed": 1}, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.png"))) == 2  # nothing is left of the larger set


@pytest.mark.parametrize("kind", ["text", "floats", "cut off", "empty", "npy"])
def test_other_files_are_no_samples(tmp_path, kind):
    path = tmp_path / "x.npz"
    if kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        np.savez(path, arr_0=np.zeros((2, 4, 4, 3)))
        content = {"text": b"no archive", "cut off": path.read_bytes()[:200], "empty": b""}
        path.write_bytes(content.get(kind, path.read_bytes()))
    with pytest.raises(ValueError, match=r"x\.npz"):
        read_samples(path)


def test_the_path_of_an_image_begins_in_noise_and_ends_in_its_sample():
    options = {"seed": 1, "num_steps": 9}
    found = denoising_path(model(), 2, SIZE, "cpu", num_columns=4, **options).reshape(2, 2, 4, *SIZE)
    samples = sample_images(model(), 2, SIZE, "cpu", **options)
    expected = ((samples.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(found[:, 0, -1], expected)
    assert torch.equal(found[:, 1, -1], expected)
    steps = {}
    sample_images(
        model(), 2, SIZE, "cpu", observe=lambda timestep, x, x_0: steps.__setitem__(timestep, (x, x_0)), **options
    )
    x_t, x_0 = steps[12]
    assert torch.equal(found[:, 0, 0], ((x_t.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    assert torch.equal(found[:, 1, 0], ((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_an_interpolation_goes_from_one_image_to_the_other(sampler):
    options = {"seed": 1, "num_steps": 6, "sampler": sampler}
    rows = interpolation(model(), 2, SIZE, "cpu", num_columns=5, **options).reshape(2, 5, *SIZE).int()
    images = ((sample_images(model(), 4, SIZE, "cpu", **options).clamp(-1, 1) + 1) * 127.5).round().int()
    assert (rows[:, 0] - images[[0, 2]]).abs().max() <= 1
    assert (rows[:, -1] - images[[1, 3]]).abs().max() <= 1
    changes = (rows[:, 1:] - rows[:, :-1]).float().abs().mean((2, 3, 4))
    assert changes.max() < 3 * changes.min()
