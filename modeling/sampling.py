"""Many samples, in parts that a stopped process leaves for the next one; and two pictures that explain a model."""

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from modeling.diffusion import DiffusionModel
from modeling.files import locked, write_atomically
from modeling.images import encode_png, save_grid, to_uint8
from modeling.progress import progress_bar
from modeling.runtime import autocast, check_finite
from modeling.samplers import sample, sample_images
from modeling.seeding import image_noise

_IDENTITY = "identity.json"


def _encode(identity: dict) -> bytes:
    return (json.dumps(identity, indent=2, sort_keys=True) + "\n").encode()


def draw_in_parts(
    folder: Path, identity: dict, num_images: int, batch_size: int, draw: Callable, *, replace: bool = False
) -> Tensor:
    """Makes numbered rows, such as images, batch by batch, each written to the folder; goes on after those there are.

    Args:
        folder: of the parts; made if missing.
        identity: everything that the rows depend on, as plain values; written beside them.
        draw: called with (first number, how many), returns (B, ...).
        replace: deletes parts of another identity instead of refusing.

    Returns:
        (num_images, ...).

    Raises:
        ValueError: when the folder's parts are of another identity, damaged, or one is missing.
        LockedError: when another process is at work there.
    """
    with locked(folder / "lock"):
        parts, start = [], 0
        try:
            if not (folder / _IDENTITY).exists():
                write_atomically(folder / _IDENTITY, _encode(identity))
            found = json.loads((folder / _IDENTITY).read_text())
            for path in sorted(folder.glob("*.npy")):
                if int(path.stem) != start:
                    raise ValueError(f"part {start:09d}.npy is missing")
                parts.append(np.load(path, allow_pickle=False))
                start += len(parts[-1])
        except (ValueError, EOFError) as error:
            raise ValueError(f"{folder} is damaged ({error}): delete it, and its parts are made again") from error
        if found != json.loads(_encode(identity)) and replace:
            for path in folder.glob("*.npy"):
                path.unlink()
            write_atomically(folder / _IDENTITY, _encode(identity))
            parts, start = [], 0
        elif found != json.loads(_encode(identity)):
            changed = ", ".join(key for key in identity | found if identity.get(key) != found.get(key))
            raise ValueError(f"{folder} holds parts of something else ({changed} differ): delete it, or go on with it")
        while start < num_images:
            parts.append(draw(start, min(batch_size, num_images - start)).cpu().numpy())
            write_atomically(folder / f"{start:09d}.npy", _npy(parts[-1]))
            start += len(parts[-1])
    return torch.from_numpy(np.concatenate(parts)[:num_images])


def advancing(bar: tqdm, start: int, count: int) -> Callable[[Iterable], Iterator]:
    """Sets the bar to `start`; returns a wrapper of steps that advances it by `count` after each."""
    bar.update(start - bar.n)

    def counted(steps: Iterable) -> Iterator:
        for step in steps:
            yield step
            bar.update(count)

    return counted


def draw_samples(
    model: DiffusionModel,
    num_images: int,
    size: tuple[int, int, int],
    device: torch.device | str,
    folder: Path,
    identity: dict,
    *,
    batch_size: int,
    num_steps: int,
    replace: bool = False,
    **options,
) -> Tensor:
    """Images 0..num_images - 1 by `samplers.sample_images`, in parts as `draw_in_parts`, with a progress bar.

    Args:
        options: of `sample_images`.

    Returns:
        (num_images, C, H, W) uint8.

    Raises:
        FloatingPointError: for a sample that is not finite.
        ValueError, LockedError: as `draw_in_parts`.
    """
    with progress_bar(total=num_images * num_steps, unit="image", unit_scale=1 / num_steps, desc="sampling") as bar:

        def draw(start: int, count: int) -> Tensor:
            counted = advancing(bar, start * num_steps, count)
            images = sample_images(
                model, count, size, device, first_image=start, num_steps=num_steps, bar=counted, **options
            )
            check_finite(images, "a sample", options.get("precision", "fp32"))
            return to_uint8(images)

        return draw_in_parts(folder, identity, num_images, batch_size, draw, replace=replace)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_samples(images: Tensor, identity: dict, out: Path) -> None:
    """Writes images (N, 3, H, W) uint8 as what `out` is named: *.png, a grid; *.npz; else a folder of PNG files.

    The .npz holds `arr_0`, (N, H, W, 3) as other projects' evaluation expects it, and `identity`, a JSON text.
    """
    if out.suffix == ".png":
        save_grid(images, out)
    elif out.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, arr_0=images.permute(0, 2, 3, 1).numpy(), identity=json.dumps(identity, sort_keys=True))
        write_atomically(out, buffer.getbuffer())
    else:
        new = out.with_name(f".{out.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        digits = len(str(len(images) - 1))
        for number, image in enumerate(images):
            write_atomically(new / f"{number:0{digits}d}.png", encode_png(image))
        write_atomically(new / _IDENTITY, _encode(identity))
        if (out / _IDENTITY).exists():  # made by this function, and asked to be replaced
            shutil.rmtree(out)
        new.rename(out)


def read_samples(path: Path) -> tuple[Tensor, dict]:
    """Images (N, 3, H, W) uint8 and their identity from an .npz of `write_samples`, or of another project.

    Raises:
        ValueError: for a file that holds no such array.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            images = torch.from_numpy(archive["arr_0"])
            identity = json.loads(str(archive["identity"])) if "identity" in archive else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz with an array arr_0, or damaged: {error}") from error
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"{path}: expected uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}")
    return images.permute(0, 3, 1, 2).contiguous(), identity


def denoising_path(
    model: DiffusionModel,
    num_images: int,
    size: tuple[int, int, int],
    device: torch.device | str,
    *,
    num_columns: int = 10,
    **options,
) -> Tensor:
    """How images come out of noise, in columns evenly spaced over the steps, the result last.

    Args:
        options: of `sample_images`.

    Returns:
        (2 num_images num_columns, C, H, W) uint8: for each image a row of x_t and, below, one of the predicted x_0.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    x = sample_images(
        model, num_images, size, device,
        observe=lambda timestep, x_t, x_0: seen.append((to_uint8(x_t).cpu(), to_uint8(x_0).cpu())), **options,
    )  # fmt: skip
    chosen = [seen[i * len(seen) // (num_columns - 1)] for i in range(num_columns - 1)]
    columns = [*chosen, (to_uint8(x).cpu(),) * 2]
    return torch.stack([torch.stack(pair) for pair in columns], dim=2).transpose(0, 1).flatten(0, 2)


def interpolation(
    model: DiffusionModel,
    num_pairs: int,
    size: tuple[int, int, int],
    device: torch.device | str,
    *,
    seed: int,
    precision: str = "fp32",
    num_columns: int = 10,
    **options,
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
        return to_uint8(sample(model, len(first), size, device, noise=arc(0), step_noise=arc, **options)).cpu()
