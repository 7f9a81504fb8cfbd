"""Checkpoints: the full state of a run (`.pt`) and the exported weights with their configuration (`.safetensors`).

Both are written whole or not at all, and loading either executes nothing.
"""

import io
import json
import pickle
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from modeling.files import write_atomically

FORMAT = 1


class CheckpointError(Exception):
    """A file that is no checkpoint of this project, or a damaged one."""


def save_checkpoint(
    path: str | Path, *, config: dict, state: object, model: nn.Module, ema: nn.Module, optimizer: Optimizer
) -> None:
    """Writes everything a run needs to go on.

    Args:
        config: the resolved configuration, plain values.
        state: the dataclass of a run's counters.
        model: the eps model that is trained.
        ema: the eps model with averaged weights.
    """
    content = {
        "format": FORMAT,
        "config": config,
        "state": asdict(state),
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    buffer = io.BytesIO()  # torch.save to a path would write the path's stem into the file
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        CheckpointError: for a file that is damaged, or holds anything but tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load checks no sums and would take a flipped bit for a weight
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} has a wrong checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no checkpoint, or damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this project (format {FORMAT} expected)")
    return content


def export_weights(path: str | Path, module: nn.Module, config: dict) -> None:
    """Writes a module's weights as safetensors, with the configuration in the header."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous().cpu() for name, tensor in module.state_dict().items()}
    # One metadata key: with several, their order in the file would change from process to process.
    write_atomically(path, save(tensors, metadata={"config": json.dumps(config, sort_keys=True)}))


def load_weights(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Configuration and averaged weights from an exported file (`.safetensors`) or a full checkpoint (`.pt`).

    Raises:
        FileNotFoundError: for a missing file.
        CheckpointError: for any other file that is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if path.suffix != ".safetensors":
        content = load_checkpoint(path)
        return content["config"], content["ema"]
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {})["config"])
            return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} holds no exported model of this project: {error}") from error
