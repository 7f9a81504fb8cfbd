"""Converts a trained network to or from diffusers, which need not be installed for it.

    python convert.py checkpoint=runs/<run of model=ddpm_paper>/model.safetensors out=exported
    python convert.py checkpoint=ddpm-cifar10-32 out=model.safetensors

The first writes a folder for `diffusers.DDPMPipeline.from_pretrained("exported")`. The second takes such a folder, for
example a downloaded copy of `google/ddpm-cifar10-32`; what it does not know of a run (data, optimizer, ...) is written
into our file as in params.yaml, or as given: `config.dataset.name=shapes`.
"""

import json
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from modeling.config import Config, ConfigError, parse
from modeling.options import ConvertConfig

UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # beside the network's config
HEADER = {"_diffusers_version": "0.42.1"}
DIFFUSION_KEYS = ("num_timesteps", "schedule", "betas", "prediction")


def write_pipeline(checkpoint: str, folder: Path) -> None:
    """Our checkpoint as a DDPMPipeline's folder.

    Raises:
        CheckpointError, FileNotFoundError: where there is no checkpoint.
        ValueError: for a network or diffusion process that diffusers does not have.
    """
    from safetensors.torch import save

    from modeling import build
    from modeling.checkpoint import load_weights
    from modeling.files import write_atomically
    from modeling.interchange import scheduler_config, to_diffusers

    stored, weights = load_weights(checkpoint)
    config = parse(stored, Config)
    if config.model.name != "ddpm":
        raise ConfigError(f"model.name must be ddpm for diffusers, got {config.model.name}")
    image = {"in_channels": build.IMAGE_CHANNELS, "out_channels": build.IMAGE_CHANNELS, "image_size": build.IMAGE_SIZE}
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
        write_atomically(folder / name, f"{json.dumps(content, indent=2, sort_keys=True)}\n".encode())


def _read_config(folder: Path, name: str, class_name: str) -> tuple[Path, dict]:
    """A part's config and its path; it lies in its subfolder or at the top."""
    from modeling.checkpoint import CheckpointError

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
    import torch
    from safetensors.torch import load_file

    from modeling.checkpoint import CheckpointError, reading

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
        ValueError: for a network or diffusion process that we do not have.
    """
    from modeling import build
    from modeling.checkpoint import export_weights
    from modeling.interchange import diffusion_arguments, from_diffusers

    path, unet = _read_config(folder, UNET, "UNet2DModel")
    _, scheduler = _read_config(folder, SCHEDULER, "DDPMScheduler")
    diffusion = diffusion_arguments(scheduler)
    arguments, weights = from_diffusers(unet, _read_weights(path.parent))
    for key, expected in (
        ("in_channels", build.IMAGE_CHANNELS),
        ("out_channels", build.IMAGE_CHANNELS),
        ("image_size", build.IMAGE_SIZE),
    ):
        if (found := arguments.pop(key)) != expected:
            raise ValueError(f"{path}: {key} must be {expected}, got {found}")
    values = config.model_dump()
    values["model"] = {"name": "ddpm", **arguments}
    values["diffusion"] |= diffusion
    model = build.build_trained_model(parse(values, Config), weights)
    export_weights(out, model.eps_model, values)


@hydra.main(version_base="1.3", config_path="conf", config_name="convert")
def main(values: DictConfig) -> None:
    try:
        options = parse(values, ConvertConfig)
        checkpoint, out = Path(options.checkpoint), Path(options.out)
        if out.exists() and not options.overwrite:
            raise ConfigError(f"out={out}: exists already; name another one or set overwrite=true")
        if checkpoint.is_dir() and (out.suffix != ".safetensors" or out.is_dir()):
            raise ConfigError(f"out={out}: must name a file *.safetensors, because checkpoint={checkpoint} is a folder")
        if not checkpoint.is_dir() and out.is_file():
            raise ConfigError(f"out={out}: must name a folder, because checkpoint={checkpoint} is none")
    except ConfigError as error:
        sys.exit(str(error))

    from modeling.checkpoint import CheckpointError

    try:
        if checkpoint.is_dir():
            read_pipeline(checkpoint, out, options.config)
        else:
            write_pipeline(options.checkpoint, out)
    except (CheckpointError, OSError, ValueError) as error:
        sys.exit(str(error))
    print(out)


if __name__ == "__main__":
    main()
