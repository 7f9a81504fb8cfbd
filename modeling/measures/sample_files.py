"""Samples as files: an array with its identity, a folder of pictures."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling.images import encode_png
from modeling.measures.resumable import IDENTITY, encode_identity
from modeling.system.files import write_atomically
from modeling.system.reading import parse_json, reading_arrays


def write_samples(images: Tensor, identity: dict, out: Path) -> None:
    """Writes images (N, C, H, W) uint8 as the kind that `out` names: *.npz, or else a folder of PNG files.

    The .npz holds `arr_0`, (N, H, W, C) as other projects' evaluation expects it, and `identity`, a JSON text.
    """
    if out.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, arr_0=images.permute(0, 2, 3, 1).numpy(), identity=json.dumps(identity, sort_keys=True))
        write_atomically(out, buffer.getbuffer())
    else:
        new = out.with_name(f".{out.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        digits = len(str(len(images) - 1))
        for number, image in enumerate(images):
            write_atomically(new / f"{number:0{digits}d}.png", encode_png(image.expand(3, -1, -1)))
        write_atomically(new / IDENTITY, encode_identity(identity))
        if (out / IDENTITY).exists():  # made by this function, and asked to be replaced
            shutil.rmtree(out)
        new.rename(out)


def read_samples(path: Path, remedy: str = "") -> tuple[Tensor, dict]:
    """Images (N, C, H, W) uint8 and their identity from an .npz of `write_samples`, or of another project.

    Raises:
        UserError: for a file that holds no such array.
        OSError: for one that cannot be read.
    """
    with reading_arrays(path, ".npz with an array arr_0", remedy) as archive:
        images = archive["arr_0"]
        identity = parse_json(str(archive["identity"]), dict[str, Any]) if "identity" in archive else {}
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(f"expected uint8 (N, H, W, 3) or (N, H, W, 1), got {images.dtype} {images.shape}")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), identity
