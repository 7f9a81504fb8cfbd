"""The features of a set of images in an extractor's space, kept for the next time."""

import hashlib
import io
import json
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modeling.distributed.processes import ALONE, Processes
from modeling.measures.encoder import images_sha256
from modeling.measures.extractors import Extractor
from modeling.system.errors import UserError
from modeling.system.files import write_atomically
from modeling.system.progress import progress_bar
from modeling.system.reading import reading_arrays

MIN_IMAGES = 10  # the Inception score's splits


@dataclass(frozen=True)
class Features:
    """Features of a set of images, and where they come from."""

    values: Tensor  # (N, D) float32 on the CPU
    logits: Tensor | None  # (N, K)
    identity: dict  # what they are features of, and whose


def extract_features(
    extractor: Extractor,
    images: Tensor,
    *,
    batch_size: int = 250,
    cache: str | Path | None = None,
    desc: str = "extracting features",
    processes: Processes = ALONE,
) -> Features:
    """The features of a set of images.

    Args:
        images: (N, 3, H, W) uint8, at least 10.
        batch_size: images at a time; the result depends on it by rounding only.
        cache: a folder where features are kept for the next time, without logits (410 MB for Inception's of 50,000
            images); the file's name is made of the hashes of extractor and images.
        processes: that share the batches; each gets all features.

    Raises:
        UserError: for other images, features that are not finite, or a damaged file in the cache.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) < MIN_IMAGES:
        raise UserError(
            f"images must be uint8 of shape (N, 3, H, W) with N at least {MIN_IMAGES}, "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    identity = {
        "num_images": len(images),
        "images_sha256": images_sha256(images),
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "torch_fidelity": version("torch-fidelity"),
    }
    path = None
    if cache is not None:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        path = Path(cache) / f"{extractor.name}-{len(images)}-{key[:16]}.npz"
        kept = processes.once(lambda: _read_values(path, len(images)) if path.is_file() else None)
        if kept is not None:
            return Features(kept, None, identity)

    def extract(start: int) -> tuple[Tensor, Tensor | None]:
        value, logit = extractor.function(images[start : start + batch_size].to(extractor.device))
        return value.cpu(), None if logit is None or path else logit.cpu()

    starts = range(0, len(images), batch_size)
    with torch.no_grad():
        found = list(progress_bar(processes.map(extract, starts), total=len(starts), desc=desc))
    values, logits = [value for value, _ in found], [logit for _, logit in found if logit is not None]
    features = Features(torch.cat(values), torch.cat(logits) if logits else None, identity)
    for rows in (features.values, features.logits):
        if rows is not None and not rows.isfinite().all():
            raise UserError(
                f"the features of {extractor.name} are not finite: its weights ({extractor.sha256}) are broken"
            )
    if path is not None and processes.rank == 0:
        buffer = io.BytesIO()
        np.savez(buffer, values=features.values.numpy())  # in a zip archive, which has checksums
        try:
            write_atomically(path, buffer.getbuffer())
        except OSError as error:  # a read-only disk of data, for example
            print(f"warning: {path}: {error.strerror}: the features are not kept for the next time", file=sys.stderr)
    return features


def _read_values(path: Path, num_images: int) -> Tensor:
    with reading_arrays(path, "file of features", "delete it, and it is made again") as archive:
        values = archive["values"]
        if values.dtype != np.float32 or values.ndim != 2 or len(values) != num_images:
            raise ValueError(f"expected float32 ({num_images}, D), got {values.dtype} {values.shape}")
        return torch.from_numpy(values)
