"""Two pictures that explain a model: how images form out of noise, and the images between two samples."""

import torch
from torch import Tensor

from modeling.diffusion import DiffusionModel
from modeling.images import to_uint8
from modeling.runtime import autocast, check_finite
from modeling.samplers import Sampler, sample, sample_images
from modeling.seeding import image_noise
from modeling.system.progress import Bar

COLUMNS = 10  # of both pictures


def denoising_path(
    model: DiffusionModel,
    num_images: int,
    size: tuple[int, int, int],
    device: torch.device | str,
    sampler: Sampler,
    *,
    seed: int,
    precision: str = "fp32",
    num_columns: int = COLUMNS,
    bar: Bar = iter,
) -> Tensor:
    """How images form out of noise, in columns evenly spaced over the steps, the result last.

    Arguments are those of `sample_images`.

    Returns:
        (2 num_images num_columns, C, H, W) uint8: for each image a row of x_t and, below, one of the predicted x_0.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def observe(timestep: int, x_t: Tensor, x_0: Tensor) -> None:
        seen.append((to_uint8(x_t).cpu(), to_uint8(x_0).cpu()))

    x = sample_images(
        model, num_images, size, device, sampler, seed=seed, precision=precision, bar=bar, observe=observe
    )
    check_finite(x, "a sample", precision)
    chosen = [seen[i * len(seen) // (num_columns - 1)] for i in range(num_columns - 1)]
    columns = [*chosen, (to_uint8(x).cpu(),) * 2]
    return torch.stack([torch.stack(pair) for pair in columns], dim=2).transpose(0, 1).flatten(0, 2)


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
