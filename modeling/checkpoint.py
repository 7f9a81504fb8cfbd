"""Checkpoints: the full state of a run (`.pt`) and the exported weights with their configuration (`.safetensors`).

Both are written whole or not at all, and loading either executes nothing.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modeling.system.errors import UserError
from modeling.system.files import write_atomically

FORMAT = 2
_CONTENT = {"about": dict, "config": dict, "state": dict, "model": dict, "ema": dict, "optimizer": dict}
_DIGEST_CHARACTERS = 64
_MAX_PICKLE_BYTES = 16 << 20  # the structure without the tensors; that of 35.7M parameters has 0.2 MB


class CheckpointError(UserError):
    """A file that is no checkpoint of this project, a damaged one, or one that does not fit."""


@contextlib.contextmanager
def reading(path: str | Path, kind: str) -> Iterator[None]:
    """Makes a CheckpointError of whatever a file raises while it is read inside; only an OSError passes.

    Args:
        kind: what the file should be, for the message.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # a file made to harm may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's text says how to load the file all the same
            reason = "it holds more than tensors and plain values"
        raise CheckpointError(f"{path} is no {kind}, or damaged: {reason}") from error


def _seal(archive: io.BytesIO) -> None:
    """Appends the SHA-256 of a zip archive as its comment, which every reader of archives skips."""
    with archive.getbuffer() as view:  # in place: a copy would cost more than the sum
        assert view[-2:] == b"\0\0"  # the length of the comment: torch.save writes none
        view[-2:] = _DIGEST_CHARACTERS.to_bytes(2, "little")
        digest = hashlib.sha256(view).hexdigest()
    archive.seek(0, io.SEEK_END)
    archive.write(digest.encode())


def _check(path: Path) -> None:
    """Raises BadZipFile unless every bit is what was written; bounded in memory and time by the file's size.

    `torch.load` checks no sums and would take a flipped bit for a weight. It would also inflate compressed members,
    which `torch.save` does not write.
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
    """The name of the first tensor or number in a nested structure that is not finite."""
    if isinstance(value, Tensor):
        # The float64 sum of float32 numbers is finite exactly where all of them are, and needs no memory.
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
    state: object,
    model: nn.Module,
    ema: nn.Module,
    optimizer: Optimizer,
    keep_as: Path | None = None,
) -> None:
    """Writes everything a run needs to go on, and reads it back before it takes the place of what was there.

    Args:
        about: what identifies the run and its state, plain values.
        config: the resolved configuration, plain values.
        state: the dataclass of a run's counters.
        model: the eps model that is trained.
        ema: the eps model with averaged weights.
        keep_as: the name that the file which was at `path` gets, at the last moment; None: it is replaced.

    Raises:
        FloatingPointError: for a value that is not finite; nothing is written.
        OSError: when the disk refuses, naming `path`; what was there stays.
        CheckpointError: when the disk does not give back what was written; what was there stays.
    """
    content = {
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
            raise FloatingPointError(f"{name} is not finite: not saved, {path} is left as it is")
    buffer = io.BytesIO()  # torch.save to a path would write the path's stem into the file
    torch.save(content, buffer)
    _seal(buffer)

    def check(written: Path) -> None:
        try:
            load_checkpoint(written)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: the disk does not give back what was written ({error})") from error
        if keep_as is not None:
            os.replace(path, keep_as)

    write_atomically(path, buffer.getbuffer(), check)


def load_checkpoint(path: str | Path) -> dict:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        FileNotFoundError: for a missing file.
        CheckpointError: for a file that is damaged, holds a value that is not finite, or anything but tensors and
            plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    with reading(path, "checkpoint"):
        _check(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this project (format {FORMAT} expected)")
    for key, kind in _CONTENT.items():
        if not isinstance(content.get(key), kind):
            raise CheckpointError(f"{path} has no {key}")
    if name := _non_finite({key: content[key] for key in _CONTENT}, path.name):
        raise CheckpointError(f"{path}: {name} is not finite")
    return content


def load_fitting(module: nn.Module | Optimizer, state: dict, path: str | Path) -> None:
    """`module.load_state_dict(state)`, in the module's own memory layout whatever the layout was.

    Raises:
        CheckpointError: when the state is another module's.
    """
    try:
        module.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit: {error}") from error
    if isinstance(module, Optimizer):  # the fused kernels walk through weights and moments in the order of memory
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
    """Configuration and weights from an exported file (`.safetensors`) or a full checkpoint (`.pt`).

    Args:
        kind: "ema" for the averaged weights, "raw" for the plain ones, which only a full checkpoint holds.

    Raises:
        FileNotFoundError: for a missing file.
        CheckpointError: for any other file that is neither, or does not hold that kind.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        content = load_checkpoint(path)
        return content["config"], content["ema" if kind == "ema" else "model"]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if kind != "ema":
        raise CheckpointError(f"{path} holds averaged weights only: the {kind} ones are in a run's checkpoints/last.pt")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {})["config"])
            return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} holds no exported model of this project: {error}") from error
