"""What the stages agree on: the values they run on, where data lies, what a run is called. Imports no torch."""

import hashlib
import json
import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from modeling.config import Config, ConfigError, Dataset, parse

# What cannot change a result, or where the length of the run does so only through the learning rate (see `run_name`).
NO_EFFECT = {
    "dataset": {"root", "archive", "urls"},
    "optimizer": {"warmup_steps"},
    "train": {"num_epochs", "max_steps"},
    "runtime": {"num_workers", "output_dir"},
    "wandb": True,
}


def run_name(config: Config, num_steps: int, data_sha256: str, code_sha256: str) -> str:
    """`<dataset>-<model>-<hash>`: the same name exactly where the same training is meant.

    The hash is over everything that can change the result of a step: configuration, data and code. The length of the
    run is left out, so that a run can be made longer, except where the learning rate depends on it.
    """
    values = config.model_dump(exclude=NO_EFFECT)
    optimizer = config.optimizer
    values["warmup_steps"] = min(optimizer.warmup_steps, num_steps)
    values["horizon"] = num_steps if optimizer.lr_schedule == "cosine" else None
    values["data"], values["code"] = data_sha256, code_sha256
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"{config.dataset.name}-{config.model.name}{config.model.hidden_size}-{optimizer.name}-{digest[:10]}"


def parse_stage(values: DictConfig) -> Config:
    """`parse` for the scripts that are DVC stages: inside DVC they run on exactly what params.yaml says.

    Raises:
        ConfigError: also where DVC would record other values than the ones that run.
    """
    config = parse(values)
    if "DVC_STAGE" in os.environ and config != parse(OmegaConf.load("params.yaml")):
        raise ConfigError("inside a DVC stage the values must be those of params.yaml: use `dvc exp run -S key=value`")
    return config


def archive_path(dataset: Dataset) -> Path | None:
    """Where the archive lies; in a temporary copy that DVC works in, that is still the original repository."""
    if dataset.archive is None:
        return None
    return Path(os.environ.get("DVC_ROOT", ".")) / dataset.archive


def read_manifest(dataset: Dataset) -> dict:
    """The manifest of the prepared data.

    Raises:
        ConfigError: when the data is not prepared, or otherwise than configured; names the command to run.
    """
    wanted = {"name": dataset.name, "num_images": dataset.num_images, "seed": dataset.seed}
    folder = Path(dataset.root) / dataset.name
    command = f"python prepare_data.py dataset={dataset.name}"
    for key in ("root", "archive", "num_images", "seed"):
        if (value := getattr(dataset, key)) is not None:
            command += f" dataset.{key}={value}"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no prepared data: run `{command}`") from None
    if (found := manifest["dataset"]) != wanted:
        raise ConfigError(f"{folder} was prepared with {found}, not with {wanted}: run `{command}`")
    return manifest
