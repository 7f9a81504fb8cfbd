"""What the stages agree on: the values they run on, where data lies, what a run is called. Imports no torch."""

import hashlib
import json
import os
import re
import shlex
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from modeling.config import Config, ConfigError, Dataset, parse

# What cannot change a result, or where the length of the run does so only through the learning rate (see `identify`).
NO_EFFECT = {
    "dataset": {"root", "archive", "urls", "pictures"},
    "optimizer": {"warmup_steps"},
    "train": {"num_epochs", "max_steps", "checkpoint_every"},
    "runtime": {
        "keep_freed_memory", "num_workers", "output_dir", "resume", "max_seconds", "checkpoint_seconds",
        "keep_checkpoints",
    },
    "wandb": True,
}  # fmt: skip


def run_length(config: Config, manifest: dict) -> int:
    """Steps of the run: `train.num_epochs` of whole batches, or `train.max_steps` if that is less."""
    length = manifest["files"]["train.npy"]["count"] // config.train.batch_size * config.train.num_epochs
    return length if config.train.max_steps is None else min(length, config.train.max_steps)


def identify(config: Config, num_steps: int, data_sha256: str, code_sha256: str, origin: str | None = None) -> dict:
    """Everything that can change the result of a step: configuration, data, code, and where it did not start from zero.

    The length of the run is left out, so that a run can be made longer, except where the learning rate depends on it.

    Args:
        origin: name and step of another run, from whose checkpoint this one started.
    """
    values = config.model_dump(exclude=NO_EFFECT)
    values["optimizer"]["warmup_steps"] = min(config.optimizer.warmup_steps, num_steps)
    values["optimizer"]["cosine_steps"] = num_steps if config.optimizer.lr_schedule == "cosine" else None
    return values | {"data": data_sha256, "code": code_sha256, "origin": origin}


def run_name(identity: dict) -> str:
    """`<dataset>-<model>-<optimizer>-<hash>`: the same name exactly where the same training is meant."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    dataset, model, optimizer = (identity[key] for key in ("dataset", "model", "optimizer"))
    return f"{dataset['name']}-{model['name']}{model['hidden_size']}-{optimizer['name']}-{digest[:10]}"


def differences(found: dict, wanted: dict, prefix: str = "") -> dict[str, tuple]:
    """Where two nested dictionaries differ: dotted key -> (found, wanted)."""
    result = {}
    for key in sorted(found.keys() | wanted.keys()):
        pair = found.get(key), wanted.get(key)
        if isinstance(pair[0], dict) and isinstance(pair[1], dict):
            result |= differences(*pair, prefix=f"{prefix}{key}.")
        elif pair[0] != pair[1]:
            result[prefix + key] = pair
    return result


def describe_changes(changed: dict[str, tuple]) -> str:
    """What `differences` found, in a line."""
    return "; ".join(
        f"{key}: {json.dumps(there)} there, {json.dumps(here)} here" for key, (there, here) in changed.items()
    )


def describe_differences(found: dict, wanted: dict) -> str:
    """`differences` in a line."""
    return describe_changes(differences(found, wanted))


def parse_stage(values: DictConfig) -> Config:
    """`parse` for the scripts that are DVC stages: inside DVC they run on exactly what params.yaml says.

    Raises:
        ConfigError: also where DVC would record other values than the ones that run.
    """
    config = parse(values)
    if "DVC_STAGE" in os.environ:
        if config != parse(OmegaConf.load("params.yaml")):
            raise ConfigError(
                "inside a DVC stage the values must be those of params.yaml: use `dvc exp run -S key=value`"
            )
        if config.runtime.resume not in ("auto", "never"):
            raise ConfigError(
                f"runtime.resume={config.runtime.resume}: a recorded stage cannot start from a file that DVC does not "
                "know, expected auto or never"
            )
    return config


def repository() -> Path:
    """Where relative paths of archive and pictures begin: the original repository, even in DVC's temporary copy."""
    return Path(os.environ.get("DVC_ROOT", "."))


def archive_path(dataset: Dataset) -> Path | None:
    """Where the archive lies."""
    return None if dataset.archive is None else repository() / dataset.archive


def _override(key: str, value: object) -> str:
    """`key=value` for a command line, quoted where the shell or Hydra would read it otherwise."""
    if not re.fullmatch(r"[\w./:-]+", str(value), re.ASCII):
        value = "'" + str(value).replace("'", "\\'") + "'"
    return shlex.quote(f"{key}={value}")


def read_manifest(dataset: Dataset) -> dict:
    """The manifest of the prepared data.

    Raises:
        ConfigError: when the data is not prepared, or otherwise than configured; names the command to run.
    """
    folder = Path(dataset.root) / dataset.name
    command = f"python prepare_data.py dataset={dataset.name}"
    for key in ("root", "archive", "pictures", "num_images", "seed"):
        if (value := getattr(dataset, key)) is not None:
            command += f" {_override(f'dataset.{key}', value)}"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        found = manifest["dataset"]
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no prepared data: run `{command}`") from None
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{folder}/manifest.json is damaged: run `{command}`") from None
    if found != (wanted := {key: getattr(dataset, key, None) for key in found}):
        raise ConfigError(f"{folder} was prepared with {found}, not with {wanted}: run `{command}`")
    return manifest
