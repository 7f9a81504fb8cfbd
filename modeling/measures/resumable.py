"""Work in numbered parts that a stopped process leaves for the next one."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from modeling.distributed.processes import ALONE, Processes
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
    processes: Processes = ALONE,
) -> Tensor:
    """Computes numbered rows (images, for example) batch by batch, saves each batch and resumes after the saved ones.

    A part is a batch. Several processes compute one each; process 0 alone reads and writes the folder. With the same
    batch_size and num_images, a process that resumes computes the batches that the stopped one would have computed: the
    rows are those of an uninterrupted process to the bit, whatever the number of processes, where the machine and the
    number of threads are the same. With others the rows are the same up to rounding: a kernel may depend on the size of
    the batch.

    Args:
        folder: of the parts; made if missing.
        identity: everything that the rows depend on, as plain values; written beside them.
        draw: called with (first number, how many), returns (B, ...).
        replace: deletes parts of another identity instead of rejecting them.
        processes: that share the batches; each gets all rows.

    Returns:
        (num_images, ...).

    Raises:
        UserError: when the folder's parts are of another identity, damaged, or one is missing.
        LockedError: when another process works in the folder.
    """
    with locked(folder / "lock") if processes.rank == 0 else contextlib.nullcontext():
        parts = processes.once(lambda: _read_parts(folder, identity, replace))
        starts = range(sum(map(len, parts)), num_images, batch_size)
        drawn = processes.map(lambda start: draw(start, min(batch_size, num_images - start)).cpu(), starts)
        for start, part in zip(starts, drawn, strict=True):
            if processes.rank == 0:
                write_atomically(folder / f"{start:09d}.npy", npy_bytes(part.numpy()))
            parts.append(part)
    return torch.cat(parts)[:num_images]


def _read_parts(folder: Path, identity: dict, replace: bool) -> list[Tensor]:
    """The parts in the folder, in order; it gets its identity if it has none."""
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
    if found == as_stored(identity):
        return [torch.from_numpy(part) for part in parts]
    if not replace:
        changed = ", ".join(key for key in identity | found if identity.get(key) != found.get(key))
        raise UserError(f"{folder} holds parts of something else ({changed} differ): delete it, or resume that")
    for path in folder.glob("*.npy"):
        path.unlink()
    write_atomically(folder / IDENTITY, encode_identity(identity))
    return []


def advancing(bar: tqdm, start: int, count: int) -> Callable[[Iterable[Item]], Iterator[Item]]:
    """Sets the bar to `start`; returns a wrapper of steps: each advances it by `count`, at most to the end."""
    bar.update(start - bar.n)

    def counted(steps: Iterable[Item]) -> Iterator[Item]:
        for step in steps:
            yield step
            bar.update(min(count, bar.total - bar.n))

    return counted
