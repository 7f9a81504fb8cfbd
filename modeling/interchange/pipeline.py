"""Our checkpoint as the folder of a DDPMPipeline of diffusers, and such a folder as our checkpoint."""

from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor
from typing_extensions import TypedDict  # pydantic reads typing's from Python 3.12 on only

from modeling import build
from modeling.checkpoint import export_weights, load_tensors, load_weights
from modeling.config import Config, Trained, parse
from modeling.interchange.network import from_diffusers, image_shape, to_diffusers, unet_arguments
from modeling.interchange.scheduler import diffusion_arguments, scheduler_config
from modeling.sections import Model
from modeling.system.errors import UserError
from modeling.system.files import write_atomically, write_json
from modeling.system.reading import read_json, read_safetensors, reading

UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
# Beside the network's config, the first that is there: weights, or a list of the files with parts of them.
WEIGHTS = tuple(
    f"diffusion_pytorch_model.{suffix}"
    for suffix in ("safetensors", "safetensors.index.json", "bin", "fp16.safetensors", "fp16.bin")
)
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")  # one diffusion process, sampled differently
DIFFUSERS_VERSION = "0.42.1"


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
    channels, height, width = config.image_shape
    image = {"in_channels": channels, "out_channels": channels, "image_size": height}
    unet, weights = to_diffusers(config.model.model_dump(exclude={"name"}) | image, weights)
    if width != height:
        unet["sample_size"] = [height, width]

    (folder / INDEX).unlink(missing_ok=True)  # without it the folder is no pipeline, so it is the last to be written
    write_atomically(folder / Path(UNET).with_name(WEIGHTS[0]), save(weights, metadata={"format": "pt"}))
    _write_config(folder / UNET, "UNet2DModel", unet)
    _write_config(folder / SCHEDULER, "DDPMScheduler", scheduler)
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    _write_config(folder / INDEX, "DDPMPipeline", parts)


def _read_config(folder: Path, name: str, class_names: tuple[str, ...]) -> tuple[Path, dict[str, Any]]:
    """A part's config and its path, in the part's own folder or at the top."""
    paths = [folder / name, folder / Path(name).name]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder}: there is neither {name} nor {Path(name).name}")
    content = read_json(path, dict[str, Any])
    if (found := content.get("_class_name")) not in class_names:
        raise UserError(f"{path} must be the config of a {' or '.join(class_names)}, got {found}")
    return path, content


class _Index(TypedDict):
    """Which file beside it has which weight."""

    weight_map: dict[str, str]


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """A state dict, on the CPU; reading it executes nothing."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder}: there is none of {', '.join(WEIGHTS)}")
    if path.suffix == ".bin":
        return load_tensors(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path, "file of weights")[1]
    parts = read_json(path, _Index)["weight_map"].values()
    weights = {}
    for part in sorted(set(parts)):
        if Path(part).name != part or not part.endswith(".safetensors"):
            raise UserError(f"{path}: weight_map must name files *.safetensors beside it, got {part}")
        weights |= read_safetensors(folder / part, "file of weights")[1]
    return weights


def _check_channels(unet: dict[str, Any]) -> None:
    """Raises UserError unless the network is for grey or colour images."""
    channels, found = unet.get("in_channels"), unet.get("out_channels")
    if channels not in (1, 3):
        raise UserError(f"in_channels must be 1 or 3, got {channels}")
    if found != channels:
        raise UserError(f"out_channels must be {channels}, got {found}: a learned variance is not supported")


def read_pipeline(folder: Path, out: Path, config: Config) -> None:
    """Writes a DDPMPipeline's or DDIMPipeline's folder as our checkpoint.

    Args:
        config: the checkpoint's, except for the model and the diffusion process, which are the folder's; and the data
            set, where its images are of another size than the folder's.

    Raises:
        FileNotFoundError: if a file of the pipeline is missing.
        UserError: if one is damaged, or we do not have its network or diffusion process.
    """
    path, unet = _read_config(folder, UNET, ("UNet2DModel",))
    values = config.model_dump()
    with reading(path, "network of this project"):
        _check_channels(unet)  # first: what else a network for other images has is not the reason
        channels, height, width = image_shape(unet)
        if (channels, height, width) != config.dataset.image_shape:
            values["dataset"] = {"image_size": [height, width], "channels": channels}
        arguments = unet_arguments(unet)
        values["model"] = {"name": "ddpm", **{key: arguments[key] for key in Model.model_fields if key in arguments}}
        parse(values, Trained)
    scheduler_path, scheduler = _read_config(folder, SCHEDULER, SCHEDULERS)
    with reading(scheduler_path, "diffusion process of this project"):
        values["diffusion"] |= diffusion_arguments(scheduler)
        trained = parse(values, Trained)
    _, weights = from_diffusers(unet, _read_weights(path.parent))
    export_weights(out, build.build_trained_model(trained, weights).eps_model, values)
