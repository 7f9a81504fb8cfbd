"""A DDPMPipeline's folder of diffusers, written and read."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from modeling import IMAGE_CHANNELS, IMAGE_SIZE, build
from modeling.checkpoint import CheckpointError, export_weights, load_weights, reading
from modeling.config import Config, ConfigError, parse
from modeling.interchange.network import from_diffusers, to_diffusers
from modeling.interchange.scheduler import diffusion_arguments, scheduler_config
from modeling.system.errors import UserError
from modeling.system.files import write_atomically, write_json

UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # beside the network's config
HEADER = {"_diffusers_version": "0.42.1"}
DIFFUSION_KEYS = ("num_timesteps", "schedule", "betas", "prediction")


def write_pipeline(checkpoint: str, folder: Path) -> None:
    """Our checkpoint as a DDPMPipeline's folder.

    Raises:
        CheckpointError, FileNotFoundError: where there is no checkpoint.
        UserError: for a network or diffusion process that diffusers does not have.
    """

    stored, weights = load_weights(checkpoint)
    config = parse(stored, Config)
    if config.model.name != "ddpm":
        raise ConfigError(f"model.name must be ddpm for diffusers, got {config.model.name}")
    image = {"in_channels": IMAGE_CHANNELS, "out_channels": IMAGE_CHANNELS, "image_size": IMAGE_SIZE}
    scheduler = scheduler_config(**config.diffusion.model_dump(include=set(DIFFUSION_KEYS)))
    unet, weights = to_diffusers(config.model.model_dump(exclude={"name"}) | image, weights)

    write_atomically(folder / Path(UNET).with_name(WEIGHTS[0]), save(weights, metadata={"format": "pt"}))
    for name, content in {
        UNET: {"_class_name": "UNet2DModel", **HEADER, **unet},
        SCHEDULER: {"_class_name": "DDPMScheduler", **HEADER, **scheduler},
        INDEX: {  # last: without it the folder is no pipeline
            "_class_name": "DDPMPipeline",
            **HEADER,
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
    }.items():
        write_json(folder / name, content)


def _read_config(folder: Path, name: str, class_name: str) -> tuple[Path, dict]:
    """A part's config and its path; it lies in its subfolder or at the top."""
    paths = [folder / name, folder / Path(name).name]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder}: there is neither {name} nor {Path(name).name}")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict) or content.get("_class_name") != class_name:
        raise CheckpointError(f"{path} is not the config of a {class_name}")
    return path, content


def _read_weights(folder: Path) -> dict:
    """A state dict, on the CPU; reading it executes nothing."""

    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder}: there is neither {' nor '.join(WEIGHTS)}")
    with reading(path, "file of weights"):
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(weights, dict) or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise CheckpointError(f"{path} holds more than named tensors")
    return weights


def read_pipeline(folder: Path, out: Path, config: Config) -> None:
    """A DDPMPipeline's folder as our checkpoint.

    Args:
        config: what it is to say; the model and the diffusion process are taken from the folder.

    Raises:
        CheckpointError, FileNotFoundError: where the folder holds no such pipeline.
        UserError: for a network or diffusion process that we do not have.
    """
    path, unet = _read_config(folder, UNET, "UNet2DModel")
    _, scheduler = _read_config(folder, SCHEDULER, "DDPMScheduler")
    diffusion = diffusion_arguments(scheduler)
    arguments, weights = from_diffusers(unet, _read_weights(path.parent))
    for key, expected in (
        ("in_channels", IMAGE_CHANNELS),
        ("out_channels", IMAGE_CHANNELS),
        ("image_size", IMAGE_SIZE),
    ):
        if (found := arguments.pop(key)) != expected:
            raise UserError(f"{path}: {key} must be {expected}, got {found}")
    values = config.model_dump()
    values["model"] = {"name": "ddpm", **arguments}
    values["diffusion"] |= diffusion
    model = build.build_trained_model(parse(values, Config), weights)
    export_weights(out, model.eps_model, values)
