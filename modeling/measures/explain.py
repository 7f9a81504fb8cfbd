"""Pictures that explain a model: how images form out of noise, and the images between two samples."""

import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modeling.diffusion import DiffusionModel
from modeling.images import enlarge, make_grid, to_uint8
from modeling.measures.captions import Row, draw_rows
from modeling.runtime import autocast, check_finite
from modeling.samplers import Sampler, sample, sample_images
from modeling.seeding import image_noise
from modeling.system.progress import Bar

COLUMNS = 10  # of both pictures
FRAMES = 40  # at most, of an animation
_MILLISECONDS, _LAST_MILLISECONDS = 100, 3000  # that a frame is shown
_IMAGE_DESCRIPTION = 0x010E  # in EXIF


class Moment(NamedTuple):
    """What a sampler has before a step: x_t and the predicted x_0, (N, C, H, W) uint8; at timestep 0 the result."""

    timestep: int
    x_t: Tensor
    x_0: Tensor


def denoising_path(
    model: DiffusionModel,
    num_images: int,
    size: tuple[int, int, int],
    device: torch.device | str,
    sampler: Sampler,
    *,
    seed: int,
    precision: str = "fp32",
    num_moments: int = COLUMNS,
    bar: Bar = iter,
) -> list[Moment]:
    """How images form out of noise, at moments evenly spaced over the steps, the result last.

    Arguments are those of `sample_images`; of fewer steps than `num_moments` - 1, every one is a moment.
    """
    seen: list[Moment] = []

    def observe(timestep: int, x_t: Tensor, x_0: Tensor) -> None:
        seen.append(Moment(timestep, to_uint8(x_t).cpu(), to_uint8(x_0).cpu()))

    x = sample_images(
        model, num_images, size, device, sampler, seed=seed, precision=precision, bar=bar, observe=observe
    )
    check_finite(x, "a sample", precision)
    count = min(num_moments - 1, len(seen))
    result = to_uint8(x).cpu()
    return [*(seen[i * len(seen) // count] for i in range(count)), Moment(0, result, result)]


def draw_path(moments: Sequence[Moment], scale: int | None = None) -> Tensor:
    """A column for each moment; for each image a row of x_t and, below, one of the predicted x_0.

    Returns:
        (3, height, width) uint8; for the scale see `enlarge`.
    """
    rows: list[Row] = [("timestep", [str(moment.timestep) for moment in moments])]
    for image in range(len(moments[0].x_t)):
        for name, tiles in (
            ("x_t", [moment.x_t[image] for moment in moments]),
            ("predicted x_0", [moment.x_0[image] for moment in moments]),
        ):
            rows.append((name, enlarge(make_grid(torch.stack(tiles), len(tiles)), scale)))
    return draw_rows(rows)


def draw_moment(moment: Moment, scale: int | None = None) -> Tensor:
    """All images as x_t and, beside, as the predicted x_0; (3, height, width) uint8."""
    picture = torch.cat([make_grid(moment.x_t), make_grid(moment.x_0)], dim=2)
    return draw_rows([("", [f"x_t, timestep {moment.timestep}", "predicted x_0"]), ("", enlarge(picture, scale))])


def encode_animation(frames: Sequence[Tensor], suffix: str, about: dict[str, Any]) -> bytes:
    """Encodes frames (3, H, W) uint8 as the bytes of a file that shows them for ever, the last one longer.

    Args:
        suffix: ".gif", of 256 colours a frame, or ".webp", without loss.
        about: plain values, which the file holds as JSON: in the GIF's comment, in the WebP's EXIF ImageDescription.
    """
    from PIL import Image

    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    durations = [_MILLISECONDS] * (len(images) - 1) + [_LAST_MILLISECONDS]
    text, exif, buffer = json.dumps(about), Image.Exif(), io.BytesIO()
    exif[_IMAGE_DESCRIPTION] = text
    own = {".gif": {"comment": text}, ".webp": {"exif": exif, "lossless": True}}[suffix]
    images[0].save(
        buffer, suffix[1:], save_all=True, append_images=images[1:], duration=durations, loop=0, **own
    )  # fmt: skip
    return buffer.getvalue()


def interpolation(
    model: DiffusionModel,
    num_pairs: int,
    size: tuple[int, int, int],
    device: torch.device | str,
    sampler: Sampler,
    *,
    seed: int,
    precision: str = "fp32",
    num_columns: int = COLUMNS,
    bar: Bar = iter,
) -> Tensor:
    """Images between images 2k and 2k + 1: all their noises, the starting one and the later ones, joined by an arc.

    Returns:
        (num_pairs num_columns, C, H, W) uint8, row by row; a row begins and ends with the two images themselves.
    """
    first = 2 * torch.arange(num_pairs, device=device).repeat_interleave(num_columns)
    noises = [image_noise(seed, indices, size) for indices in (first, first + 1)]
    # Independent normals at right angles: the arc has their variance all along.
    angle = torch.linspace(0, torch.pi / 2, num_columns, device=device).repeat(num_pairs)[:, None, None, None]

    def arc(timestep: int) -> Tensor:
        return noises[0](timestep) * angle.cos() + noises[1](timestep) * angle.sin()

    with autocast(device, precision):
        images = sample(model, len(first), size, device, sampler, noise=arc, bar=bar)
    check_finite(images, "a sample", precision)
    return to_uint8(images).cpu()
