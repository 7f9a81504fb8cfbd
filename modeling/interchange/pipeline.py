"""Our checkpoint as the folder of a DDPMPipeline of diffusers, and such a folder as our checkpoint."""

from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from modeling import IMAGE_CHANNELS, IMAGE_SIZE, build
from modeling.checkpoint import CheckpointError, export_weights, load_tensors, load_weights
from modeling.config import Config, Trained, parse
from modeling.interchange.network import from_diffusers, to_diffusers, unet_arguments
from modeling.interchange.scheduler import diffusion_arguments, scheduler_config
from modeling.system.errors import UserError
from modeling.system.files import write_atomically, write_json
from modeling.system.reading import read_json, read_safetensors, reading

UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # beside the network's config
DIFFUSERS_VERSION = "0.42.1"
IMAGE = {"in_channels": IMAGE_CHANNELS, "out_channels": IMAGE_CHANNELS, "image_size": IMAGE_SIZE}


def _write_config(path: Path, class_name: str, values: dict[str, Any]) -> None:
    content = {"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION, **values}
    write_json(path, dict(sorted(content.items())))


def write_pipeline(checkpoint: Path, folder: Path) -> None:
    """Writes our checkpoint as a DDPMPipeline's folder.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        UserError: if it is damaged, or diffusers does not have its network or diffusion process.
    """
    stored, weights = load_weights(checkpoint)
    with reading(checkpoint, "trained model of this project"):
        config = parse(stored, Trained)
    if config.model.name != "ddpm":
        raise UserError(f"model.name must be ddpm for diffusers, got {config.model.name}")
    process = config.diffusion.model_dump(include={"num_timesteps", "schedule", "betas", "prediction"})
    scheduler = scheduler_config(**process)
    unet, weights = to_diffusers(config.model.model_dump(exclude={"name"}) | IMAGE, weights)

    write_atomically(folder / Path(UNET).with_name(WEIGHTS[0]), save(weights, metadata={"format": "pt"}))
    _write_config(folder / UNET, "UNet2DModel", unet)
    _write_config(folder / SCHEDULER, "DDPMScheduler", scheduler)
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    _write_config(folder / INDEX, "DDPMPipeline", parts)  # last: without it the folder is no pipeline


def _read_config(folder: Path, name: str, class_name: str) -> tuple[Path, dict[str, Any]]:
    """A part's config and its path, in the part's own folder or at the top."""
    paths = [folder / name, folder / Path(name).name]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder}: there is neither {name} nor {Path(name).name}")
    content = read_json(path, dict[str, Any])
    if content.get("_class_name") != class_name:
        raise CheckpointError(f"{path} is not the config of a {class_name}")
    return path, content


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """A state dict, on the CPU; reading it executes nothing."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder}: there is neither {' nor '.join(WEIGHTS)}")
    if path.suffix != ".safetensors":
        return load_tensors(path)
    return read_safetensors(path, "file of weights")[1]


def read_pipeline(folder: Path, out: Path, config: Config) -> None:
    """Writes a DDPMPipeline's folder as our checkpoint.

    Args:
        config: the checkpoint's, except for the model and the diffusion process, which are the folder's.

    Raises:
        FileNotFoundError: if a file of the pipeline is missing.
        UserError: if one is damaged, or we do not have its network or diffusion process.
    """
    path, unet = _read_config(folder, UNET, "UNet2DModel")
    scheduler_path, scheduler = _read_config(folder, SCHEDULER, "DDPMScheduler")
    values = config.model_dump()
    with reading(scheduler_path, "diffusion process of this project"):
        values["diffusion"] |= diffusion_arguments(scheduler)
        parse(values, Config)
    with reading(path, "network of this project"):
        arguments = unet_arguments(unet)
        for key, expected in IMAGE.items():
            if (found := arguments.pop(key)) != expected:
                raise UserError(f"{key} must be {expected}, got {found}")
        values["model"] = {"name": "ddpm", **arguments}
        trained = parse(values, Trained)
    _, weights = from_diffusers(unet, _read_weights(path.parent))
    export_weights(out, build.build_trained_model(trained, weights).eps_model, values)
