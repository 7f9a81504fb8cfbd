"""Work in numbered parts that a stopped process leaves for the next one."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from modeling.system.errors import UserError
from modeling.system.files import locked, npy_bytes, write_atomically
from modeling.system.reading import parse_json, read_array, read_json

Item = TypeVar("Item")
IDENTITY = "identity.json"


def encode_identity(identity: dict) -> bytes:
    """An identity as the content of its JSON file."""
    return (json.dumps(identity, indent=2, sort_keys=True) + "\n").encode()


def as_stored(identity: dict) -> dict:
    """An identity as it is read from its JSON file: lists for tuples, text for keys."""
    return parse_json(encode_identity(identity), dict[str, Any])


def draw_in_parts(
    folder: Path,
    identity: dict,
    num_images: int,
    batch_size: int,
    draw: Callable[[int, int], Tensor],
    *,
    replace: bool = False,
) -> Tensor:
    """Computes numbered rows (images, for example) batch by batch, saves each batch and resumes after the saved ones.

    A part is a batch. With the same batch_size and num_images, a process that resumes computes the batches that the
    stopped one would have computed: the rows are those of an uninterrupted process to the bit, where the machine and
    the number of threads are the same. With others the rows are the same up to rounding: a kernel may depend on the
    size of the batch.

    Args:
        folder: of the parts; made if missing.
        identity: everything that the rows depend on, as plain values; written beside them.
        draw: called with (first number, how many), returns (B, ...).
        replace: deletes parts of another identity instead of rejecting them.

    Returns:
        (num_images, ...).

    Raises:
        UserError: when the folder's parts are of another identity, damaged, or one is missing.
        LockedError: when another process works in the folder.
    """
    with locked(folder / "lock"):
        parts, start, remedy = [], 0, f"delete {folder}, and its parts are made again"
        if not (folder / IDENTITY).exists():
            write_atomically(folder / IDENTITY, encode_identity(identity))
        found = read_json(folder / IDENTITY, dict[str, Any], remedy)
        for path in sorted(folder.glob("*.npy")):
            if path.stem != f"{start:09d}":
                raise UserError(f"{folder}: part {start:09d}.npy is missing; {remedy}")
            parts.append(part := read_array(path, remedy))
            if not part.shape or (part.dtype, part.shape[1:]) != (parts[0].dtype, parts[0].shape[1:]):
                raise UserError(f"{path} does not fit the parts before it: {part.dtype} {part.shape}; {remedy}")
            start += len(part)
        if found != as_stored(identity) and replace:
            for path in folder.glob("*.npy"):
                path.unlink()
            write_atomically(folder / IDENTITY, encode_identity(identity))
            parts, start = [], 0
        elif found != as_stored(identity):
            changed = ", ".join(key for key in identity | found if identity.get(key) != found.get(key))
            raise UserError(f"{folder} holds parts of something else ({changed} differ): delete it, or resume that")
        while start < num_images:
            parts.append(draw(start, min(batch_size, num_images - start)).cpu().numpy())
            write_atomically(folder / f"{start:09d}.npy", npy_bytes(parts[-1]))
            start += len(parts[-1])
    return torch.from_numpy(np.concatenate(parts)[:num_images])


def advancing(bar: tqdm, start: int, count: int) -> Callable[[Iterable[Item]], Iterator[Item]]:
    """Sets the bar to `start`; returns a wrapper of steps that advances it by `count` after each."""
    bar.update(start - bar.n)

    def counted(steps: Iterable[Item]) -> Iterator[Item]:
        for step in steps:
            yield step
            bar.update(count)

    return counted
