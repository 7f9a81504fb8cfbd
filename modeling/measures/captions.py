"""Pictures with captions: rows of tiles and of text, drawn with Pillow's own font."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_FONT, _LINE, _GAP = 13, 20, 6  # pixels: the font, a row of text, beside a text at the side

Row = tuple[str, Tensor | Sequence[str]]  # a text at its left, and a picture (3, H, W) uint8 or evenly spaced texts


def draw_rows(rows: Sequence[Row]) -> Tensor:
    """Draws pictures of one width, and texts, one below the other, black on white.

    Returns:
        (3, height, width) uint8.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT)
    left = math.ceil(max(font.getlength(side) for side, _ in rows))
    left += 2 * _GAP if left else 0
    width = max(content.shape[2] for _, content in rows if isinstance(content, Tensor))
    heights = [content.shape[1] if isinstance(content, Tensor) else _LINE for _, content in rows]
    page = Image.new("RGB", (left + width, sum(heights)), "white")
    draw, top = ImageDraw.Draw(page), 0
    for (side, content), height in zip(rows, heights, strict=True):
        middle = top + height / 2
        draw.text((left - _GAP, middle), side, "black", font, anchor="rm")
        if isinstance(content, Tensor):
            page.paste(Image.fromarray(content.permute(1, 2, 0).numpy()), (left, top))
        else:
            for number, text in enumerate(content):
                draw.text((left + (number + 0.5) * width / len(content), middle), text, "black", font, anchor="mm")
        top += height
    return torch.from_numpy(np.array(page)).permute(2, 0, 1)
