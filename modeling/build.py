"""Builds networks, the diffusion process, optimizers and batches from the configuration.

Classes are chosen by name from the tables below, never by a path in a configuration: the configuration inside a
checkpoint must not be able to name code.
"""

import math
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from modeling import IMAGE_SHAPE
from modeling.config import Config, Trained, parse
from modeling.data import Batches
from modeling.ddpm_unet import DdpmUnet
from modeling.diffusion import DiffusionModel
from modeling.muon import Muon
from modeling.runtime import (
    keep_freed_memory,
    limit_threads,
    prepare_cuda,
    resolve_device,
    resolve_precision,
    warn_if_busy,
)
from modeling.schedules import cosine_betas, linear_betas
from modeling.sections import Diffusion, Machine, Model, Optimizer
from modeling.seeding import Purpose, derive_seed
from modeling.system.errors import UserError
from modeling.unet import UnetModel

MODELS = {"unet": UnetModel, "ddpm": DdpmUnet}
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon, "sgd": torch.optim.SGD}


def _options(section: Model | Optimizer, keys: Iterable[str]) -> dict:
    """The section's values under these keys, without the nulls: keys that the chosen alternative does not have."""
    return {key: value for key in keys if (value := getattr(section, key)) is not None}


def build_eps_model(section: Model, image_shape: tuple[int, int, int] = IMAGE_SHAPE) -> nn.Module:
    """Builds the network for images (C, H, W); its weights are drawn from torch's default generator."""
    keys = ("hidden_size", "multipliers", "num_blocks", "attention_resolutions", "dropout")
    channels, height, _ = image_shape
    options = _options(section, keys) | ({"image_size": height} if section.name == "ddpm" else {})
    return MODELS[section.name](channels, channels, **options)


def build_model(config: Config, weights: dict[str, Tensor] | None = None) -> DiffusionModel:
    """Builds the diffusion model on the CPU, with these weights or with some that are drawn from the run's seed.

    Raises:
        UserError: as `build_trained_model`.
    """
    if weights is not None:
        return build_trained_model(parse(config.model_dump(), Trained), weights)
    torch.manual_seed(derive_seed(config.seed, Purpose.WEIGHTS))
    return build_diffusion(config.diffusion, build_eps_model(config.model, config.dataset.image_shape))


def build_trained_model(config: Trained, weights: dict[str, Tensor]) -> DiffusionModel:
    """Builds the diffusion model on the CPU, with these weights.

    Raises:
        UserError: if the weights do not fit the configured network. This is checked before the network takes any
            memory, because both may come from a malicious file.
    """
    with torch.device("meta"):
        network = build_eps_model(config.model, config.image_shape)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != expected:
        name = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))[0]
        raise UserError(
            f"the weights do not fit {config.model}: {name} is {found.get(name, 'missing')}, "
            f"expected {expected.get(name, 'nothing of that name')}"
        )
    model = build_diffusion(config.diffusion, build_eps_model(config.model, config.image_shape))
    model.eps_model.load_state_dict(weights)
    return model


def build_diffusion(section: Diffusion, eps_model: nn.Module) -> DiffusionModel:
    """Builds the configured diffusion process around an eps model."""
    if section.schedule == "cosine":
        betas = cosine_betas(section.num_timesteps)
    else:
        assert section.betas is not None  # the schema requires them
        betas = linear_betas(*section.betas, num_timesteps=section.num_timesteps)
    return DiffusionModel(
        eps_model, betas, section.num_timesteps, prediction=section.prediction, weighting=section.weighting
    )


def build_optimizer(section: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer of the model's parameters, on their device."""
    options = _options(section, ("lr", "momentum", "weight_decay"))
    is_fused = next(model.parameters()).device.type in ("cpu", "cuda")
    optimizer = OPTIMIZERS[section.name](model.parameters(), fused=is_fused, **options)
    if section.name == "sgd":  # a first step that the device skips would leave it uninitialised
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def build_learning_rate(section: Optimizer, last_step: int) -> Callable[[int], float]:
    """Returns step (from 0) -> learning rate: linear warm-up (cut to the run), then constant or half a cosine to 0."""
    warmup = min(section.warmup_steps, last_step)

    def learning_rate(step: int) -> float:
        if step < warmup:
            return section.lr * (step + 1) / warmup
        if section.lr_schedule == "constant":
            return section.lr
        return section.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, last_step - warmup)))

    return learning_rate


def build_batches(config: Config, images: Tensor, device: torch.device, rows: range | None = None) -> Batches:
    """Builds these rows of the run's batches of images (N, C, H, W) uint8.

    They are made on a GPU that has room for the images in half of its free memory, unless workers make them.
    """
    if device.type == "cuda" and config.runtime.num_workers == 0:
        free, _ = torch.cuda.mem_get_info(device)
        if images.nbytes <= free // 2:
            images = images.to(device)  # 154 MB for CIFAR-10
    return Batches(images, config.train.batch_size, config.seed, config.train.random_flip, rows)


def build_runtime(section: Machine) -> tuple[torch.device, str]:
    """Sets up the process for the configured machine; returns device and precision, with `auto` resolved."""
    device = resolve_device(section.device)
    limit_threads(section.num_threads)
    if device.type == "cuda":
        prepare_cuda(section.deterministic)
    else:
        if device.type == "cpu" and section.precision == "fp16":
            print("warning: precision=fp16 on a CPU is emulated, 20 to 80 times slower than fp32", file=sys.stderr)
        warn_if_busy()
        if section.keep_freed_memory:
            keep_freed_memory()
    return device, resolve_precision(section.precision, device)
