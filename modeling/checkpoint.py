"""Saves and loads the full state of a run (`.pt`) and weights with their configuration (`.safetensors`).

Each file is written completely or not at all. Loading a file never executes code from it.
"""

import hashlib
import io
import json
import os
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modeling.system.errors import UserError
from modeling.system.files import write_atomically
from modeling.system.reading import parse_json, read_safetensors, reading

FORMAT = 2
_DIGEST_CHARACTERS = 64
_MAX_PICKLE_BYTES = 16 << 20  # the structure without the tensors; 0.2 MB for a network of 35.7M parameters


class Checkpoint(TypedDict):
    """What a full checkpoint holds; see `save_checkpoint`."""

    format: int
    about: dict
    config: dict
    state: dict
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict


class CheckpointError(UserError):
    """A file is no checkpoint of this project, is damaged, or does not fit."""


def _seal(archive: io.BytesIO) -> None:
    """Appends the SHA-256 of a zip archive as its comment, which zip readers ignore."""
    with archive.getbuffer() as view:  # in place: a copy would take longer than the hash
        assert view[-2:] == b"\0\0"  # the length of the comment: torch.save writes none
        view[-2:] = _DIGEST_CHARACTERS.to_bytes(2, "little")
        digest = hashlib.sha256(view).hexdigest()
    archive.seek(0, io.SEEK_END)
    archive.write(digest.encode())


def _check(path: Path) -> None:
    """Raises BadZipFile unless every bit is as written; memory and time are bounded by the file's size.

    `torch.load` verifies no checksum, so a flipped bit would become part of a weight. It would also inflate compressed
    members, which `torch.save` never writes.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{member.filename} is compressed")
            if member.filename.endswith("data.pkl") and member.file_size > _MAX_PICKLE_BYTES:
                raise zipfile.BadZipFile(f"{member.filename} has {member.file_size} bytes")
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise zipfile.BadZipFile("its members overlap")
    with path.open("rb") as file:
        digest, left = hashlib.sha256(), path.stat().st_size - _DIGEST_CHARACTERS
        while chunk := file.read(min(left, 1 << 20)):
            digest.update(chunk)
            left -= len(chunk)
        if file.read() != digest.hexdigest().encode():
            raise zipfile.BadZipFile("its SHA-256 is wrong")


def _non_finite(value: object, name: str) -> str | None:
    """Returns the name of the first tensor or number in a nested structure that is not finite; None if all are."""
    if isinstance(value, Tensor):
        # The float64 sum of float32 numbers is finite if and only if all of them are, and needs no memory.
        return None if torch.isfinite(value.sum(dtype=torch.float64)) else name
    if isinstance(value, float):
        return None if value - value == 0 else name
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return next((found for key, item in items if (found := _non_finite(item, f"{name}.{key}"))), None)


def save_checkpoint(
    path: str | Path,
    *,
    about: dict,
    config: dict,
    state: Any,
    model: nn.Module,
    ema: nn.Module,
    optimizer: Optimizer,
    keep_as: Path | None = None,
) -> None:
    """Writes all that a run needs to resume; reads it back before it replaces `path`, which an error leaves as it was.

    Args:
        about: what identifies the run and its state, plain values.
        config: the resolved configuration, plain values.
        state: a dataclass of the run's counters.
        model: the eps model that is trained.
        ema: the eps model with averaged weights.
        keep_as: a new name for the file that was at `path`; None replaces it.

    Raises:
        FloatingPointError: for a value that is not finite; nothing is written.
        OSError: if the file cannot be written; names `path`.
        CheckpointError: if the file does not read back as it was written.
    """
    content: Checkpoint = {
        "format": FORMAT,
        "about": about,
        "config": config,
        "state": asdict(state),
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    for key in ("state", "model", "ema", "optimizer"):
        if name := _non_finite(content[key], key):
            raise FloatingPointError(f"{name} is not finite: not saved, {path} is unchanged")
    buffer = io.BytesIO()  # torch.save to a path would write the path's stem into the file
    torch.save(content, buffer)
    _seal(buffer)

    def check(written: Path) -> None:
        try:
            load_checkpoint(written)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: the disk does not return what was written ({error})") from error
        if keep_as is not None:
            os.replace(path, keep_as)

    write_atomically(path, buffer.getbuffer(), check)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Loads what `save_checkpoint` wrote, onto the CPU.

    Raises:
        FileNotFoundError: for a missing file.
        CheckpointError: for a damaged file, or a value that is not finite or neither a tensor nor plain.
    """
    path = Path(path)
    with reading(path, "checkpoint", error=CheckpointError):
        _check(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this project (format {FORMAT} expected)")
    for key in Checkpoint.__annotations__:
        if key != "format" and not isinstance(content.get(key), dict):
            raise CheckpointError(f"{path} has no {key}")
    if name := _non_finite(content, path.name):
        raise CheckpointError(f"{path}: {name} is not finite")
    return cast(Checkpoint, content)


def load_tensors(path: str | Path, content: bytes | None = None) -> dict[str, Tensor]:
    """The named tensors of another project's `torch.save`, on the CPU; executes nothing.

    Args:
        content: of the file at `path`, where it is read already.

    Raises:
        CheckpointError: for a file that is damaged or holds anything but named tensors.
    """
    with reading(path, "file of weights", error=CheckpointError):
        file = path if content is None else io.BytesIO(content)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    items = tensors.items() if isinstance(tensors, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in items):
        raise CheckpointError(f"{path} holds more than named tensors")
    return tensors


def load_fitting(module: nn.Module | Optimizer, state: dict, path: str | Path) -> None:
    """`module.load_state_dict(state)`, converted to the memory layout of the module's weights.

    Raises:
        CheckpointError: if the state belongs to another module; names `path`.
    """
    try:
        if isinstance(module, Optimizer):  # with the values of this run; "fused" says where torch puts step counts
            groups = state["param_groups"]
            groups = [group | {key: module.defaults[key] for key in group.keys() & module.defaults} for group in groups]
            state = state | {"param_groups": groups}
        module.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit: {error}") from error
    if isinstance(module, Optimizer):
        # The fused kernels read weights and moments in memory order.
        for parameter, values in module.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def export_weights(path: str | Path, module: nn.Module, config: dict) -> None:
    """Writes a module's weights as safetensors, with the configuration in the header."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous().cpu() for name, tensor in module.state_dict().items()}
    # One metadata key: with several, their order in the file would change from process to process.
    write_atomically(path, save(tensors, metadata={"config": json.dumps(config, sort_keys=True)}))


def load_weights(path: str | Path, kind: str = "ema") -> tuple[dict, dict[str, Tensor]]:
    """Loads configuration and weights from an exported file (`.safetensors`) or a full checkpoint (`.pt`).

    Args:
        kind: "ema" for the averaged weights, "raw" for the trained ones, which only a full checkpoint holds.

    Raises:
        FileNotFoundError: for a missing file.
        CheckpointError: for a file of another format, or one that does not hold this kind of weights.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        content = load_checkpoint(path)
        return content["config"], content["ema" if kind == "ema" else "model"]
    if kind != "ema":
        raise CheckpointError(f"{path} holds averaged weights only: the {kind} ones are in a run's checkpoints/last.pt")
    kind = "exported model of this project"
    metadata, tensors = read_safetensors(path, kind, CheckpointError)
    with reading(path, kind, error=CheckpointError):
        return parse_json(metadata["config"], dict[str, Any]), tensors
