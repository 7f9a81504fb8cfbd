"""Conversion between the model's range [-1, 1] and 8-bit pictures; grids, enlarged, and PNG files.

The colours' scale is fixed. No picture is stretched to its own minimum and maximum, which would hide wrong colours.
"""

import io
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.system.files import write_atomically

_BORDER = 2  # white pixels around each image
_WIDTH = 500  # at least, of an enlarged picture: 32 pixels of a screen are a stamp


def to_model_range(images: Tensor) -> Tensor:
    """Converts uint8 0..255 of any shape to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Converts float of any shape, clamped to [-1, 1], to the nearest uint8 0..255."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def make_grid(images: Tensor, num_columns: int | None = None) -> Tensor:
    """Arranges images in a grid.

    Args:
        images: (N, C, H, W), float in [-1, 1] (clamped) or uint8.
        num_columns: images per row; None makes the grid about square.

    Returns:
        (3, height, width) uint8 on the CPU. An image that is not finite is one colour, magenta.

    Raises:
        ValueError: for a num_columns below 1.
    """
    if num_columns is not None and num_columns < 1:
        raise ValueError(f"num_columns must be at least 1, got {num_columns}")
    if images.dtype != torch.uint8:
        is_finite = images.isfinite().flatten(1).all(dim=1)[:, None, None, None]
        magenta = torch.tensor([255, 0, 255], dtype=torch.uint8, device=images.device)[:, None, None]
        images = to_uint8(images).expand(-1, 3, -1, -1)
        images = torch.where(is_finite, images, magenta)
    num_columns = min(len(images), max(1, round(len(images) ** 0.5)) if num_columns is None else num_columns)
    num_rows = -(-len(images) // num_columns)
    _, channels, height, width = images.shape
    tiles = images.new_full((num_rows * num_columns, channels, height + _BORDER, width + _BORDER), 255)
    tiles[: len(images), :, _BORDER:, _BORDER:] = images
    rows = tiles.unflatten(0, (num_rows, num_columns)).permute(2, 0, 3, 1, 4)  # (C, row, y, column, x)
    grid = rows.reshape(channels, num_rows * tiles.shape[2], num_columns * tiles.shape[3])
    return F.pad(grid, (0, _BORDER, 0, _BORDER), value=255).expand(3, -1, -1).cpu()


def enlarge(picture: Tensor, scale: int | None = None) -> Tensor:
    """Repeats each pixel of (3, H, W); a scale of None is the smallest that makes the picture 500 pixels wide."""
    scale = -(-_WIDTH // picture.shape[2]) if scale is None else scale
    return picture.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)


def encode_png(image: Tensor, about: dict[str, Any] | None = None) -> bytes:
    """Encodes (3, H, W) uint8 as the bytes of a PNG file, with plain values as JSON in its text `Comment`."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text, buffer = PngInfo(), io.BytesIO()
    if about is not None:
        text.add_text("Comment", json.dumps(about))
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG", pnginfo=text)
    return buffer.getvalue()


def save_grid(
    images: Tensor,
    path: str | Path,
    num_columns: int | None = None,
    *,
    scale: int | None = None,
    about: dict[str, Any] | None = None,
) -> Tensor:
    """Writes `make_grid` of the images, enlarged, to a PNG file, creating its folder; returns what it shows.

    Args:
        images, num_columns: as for `make_grid`.
        scale: as for `enlarge`.
        about: how the images were made, as for `encode_png`.
    """
    picture = enlarge(make_grid(images, num_columns), scale)
    write_atomically(path, encode_png(picture, about))
    return picture
