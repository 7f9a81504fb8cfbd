"""Given pictures, edited by an unconditional model without training: holes are filled, and variations are drawn."""

import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modeling.datasets.decoding import open_picture, reduce
from modeling.diffusion import DiffusionModel
from modeling.images import to_model_range, to_uint8
from modeling.measures.trained import TrainedModel
from modeling.options import SampleConfig
from modeling.runtime import autocast, check_finite
from modeling.samplers import Sampler, follow, timesteps_of
from modeling.seeding import image_noise
from modeling.system.errors import UserError
from modeling.system.progress import Bar

NUM_RESAMPLINGS, JUMP_LENGTH = 10, 5  # RePaint's are 10 and 10, of 250 steps instead of 100
STRENGTH = 0.5


def read_given(key: str, path: str, image_shape: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int]]:
    """A picture that a key names, cut and reduced as a data set's pictures are, and its own width and height.

    Returns:
        (C, H, W) uint8, and the size.

    Raises:
        UserError: for a file that is no picture, or too small.
        OSError: for a missing one.
    """
    Path(path).open("rb").close()  # else a missing file would not be named
    try:
        picture = open_picture(Path(path))
        return torch.from_numpy(np.array(reduce(picture, image_shape))), picture.size
    except ValueError as error:
        raise UserError(f"{key}={path}: {error}") from error


def draw_edited(trained: TrainedModel, options: SampleConfig, num_images: int, bar: Bar = iter) -> Tensor:
    """The images of `picture=inpaint` or `picture=variations`: the given one, with the hole if it has one, the results.

    Returns:
        (N, C, H, W) uint8, N = num_images + 2 or + 1.

    Raises:
        UserError: for files that are not as options.py says, or a mask that draws nothing.
        OSError: for a missing file.
        FloatingPointError: for an image that is not finite.
    """
    assert options.image is not None
    pixels, size = read_given("image", options.image, trained.image_shape)
    image = to_model_range(pixels)
    place = (num_images, trained.device, trained.sampler)
    if options.mask is None:
        images = variations(
            trained.model, image, *place, seed=options.seed, precision=trained.precision, bar=bar,
            strength=options.strength or STRENGTH,
        )  # fmt: skip
        return to_uint8(torch.cat([image[None], images.cpu()]))
    mask, mask_size = read_given("mask", options.mask, (1, *trained.image_shape[1:]))
    if mask_size != size:
        found, wanted = ("x".join(map(str, pair)) for pair in (mask_size, size))
        raise UserError(f"mask={options.mask}: {found} pixels, expected the size of image={options.image}, {wanted}")
    is_drawn = mask > 127
    if is_drawn.all() or not is_drawn.any():
        colour = "white everywhere (transparent is white)" if is_drawn.any() else "black everywhere"
        raise UserError(
            f"mask={options.mask}: is {colour}, expected white where the picture is to be drawn and black elsewhere"
        )
    images = inpaint(
        trained.model, image, is_drawn, *place, seed=options.seed, precision=trained.precision, bar=bar,
        num_resamplings=options.num_resamplings or NUM_RESAMPLINGS, jump_length=options.jump_length or JUMP_LENGTH,
    )  # fmt: skip
    hole = image.masked_fill(is_drawn, 0)  # grey
    return to_uint8(torch.cat([image[None], hole[None], images.cpu()]))


def inpaint(
    model: DiffusionModel,
    image: Tensor,
    is_drawn: Tensor,
    num_images: int,
    device: torch.device | str,
    sampler: Sampler,
    *,
    seed: int,
    num_resamplings: int = NUM_RESAMPLINGS,
    jump_length: int = JUMP_LENGTH,
    precision: str = "fp32",
    bar: Bar = iter,
) -> Tensor:
    """Draws a part of an image anew, so that it fits the rest (RePaint, Lugmayr et al. 2022, arXiv 2201.09865).

    After each step the rest is replaced by a draw from q(x_t | x_0) of the image. The model sees it in the next step
    only, so what was drawn does not fit it yet: every `jump_length` steps the noise of as many steps is added again.

    Note: approximate. With more resamplings the drawn part comes closer to its distribution given the rest, up to
        an error that remains (tests/measures/test_edit.py).

    Args:
        image: x_0, (C, H, W), float in [-1, 1].
        is_drawn: true where it is to be drawn, bool that broadcasts to the image.
        num_images: B, each a function of the seed and its number.
        device: the model's.
        num_resamplings: how often each stretch of `jump_length` steps is taken; 1 resamples nothing.
        jump_length: in steps of the sampler.
        precision: as for `sample_images`.

    Returns:
        (B, C, H, W), about [-1, 1]; where it is not drawn, the image to the bit.

    Raises:
        FloatingPointError: for an image that is not finite.
    """
    timesteps = timesteps_of(sampler, model)
    steps = []
    for first in range(0, len(timesteps) - 1, jump_length):
        stretch = timesteps[first : first + jump_length + 1]
        down, up = list(itertools.pairwise(stretch)), (stretch[-1], stretch[0])
        steps += [*down, *([up, *down] * (num_resamplings - 1))]
    steps.append((timesteps[-1], 0))

    numbered = image_noise(seed, torch.arange(num_images, device=device), image.shape)
    visits = defaultdict(itertools.count)

    def noise(timestep: int, purpose: int = 0) -> Tensor:
        """Another draw each time; the first ones are those of a sample."""
        return numbered(timestep + (model.num_timesteps + 1) * (2 * next(visits[timestep, purpose]) + purpose))

    known, is_drawn = image.to(device).expand(num_images, *image.shape), is_drawn.to(device)

    def constrain(x: Tensor, timestep: int) -> Tensor:
        timesteps = torch.full((num_images,), timestep, device=device)
        return torch.where(is_drawn, x, model.q_sample(known, timesteps, noise(timestep, purpose=1)))

    with autocast(device, precision):
        x = follow(model, noise(0), steps, sampler, noise=noise, bar=bar, constrain=constrain)
    check_finite(x, "an image", precision)
    return x


def variations(
    model: DiffusionModel,
    image: Tensor,
    num_images: int,
    device: torch.device | str,
    sampler: Sampler,
    *,
    seed: int,
    strength: float = STRENGTH,
    precision: str = "fp32",
    bar: Bar = iter,
) -> Tensor:
    """Draws images like a given one: noise is added to it and taken away (SDEdit, Meng et al. 2022, arXiv 2108.01073).

    Args:
        image: x_0, (C, H, W), float in [-1, 1].
        num_images: B, each a function of the seed and its number.
        device: the model's.
        strength: where the sampler begins, in (0, 1] of T: at its last timestep that is no later. Where it has none,
            the result is the image; with 1 the images are those of `sample_images`, and nothing of it is left.
        precision: as for `sample_images`.

    Returns:
        (B, C, H, W), about [-1, 1].

    Raises:
        FloatingPointError: for an image that is not finite.
    """
    noise = image_noise(seed, torch.arange(num_images, device=device), image.shape)
    timesteps = [timestep for timestep in timesteps_of(sampler, model) if timestep <= strength * model.num_timesteps]
    x = image.to(device).expand(num_images, *image.shape)
    if strength == 1:
        x = noise(0)
    elif timesteps:
        x = model.q_sample(x, torch.full((num_images,), timesteps[0], device=device), noise(0))
    with autocast(device, precision):
        x = follow(model, x, list(itertools.pairwise([*timesteps, 0])), sampler, noise=noise, bar=bar)
    check_finite(x, "an image", precision)
    return x
