"""Configuration to objects: the one module that knows both sides.

Classes are chosen by name from the tables below, never by a path in a configuration: a configuration found inside a
checkpoint must not be able to name code.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from modeling.config import Config, Model, Optimizer, Runtime
from modeling.data import Batches
from modeling.ddpm_unet import DdpmUnet
from modeling.diffusion import DiffusionModel
from modeling.runtime import resolve_device, resolve_precision
from modeling.seeding import Purpose, derive_seed
from modeling.tracking import JsonLines, Tracker, WandbTracker
from modeling.unet import UnetModel

IMAGE_CHANNELS, IMAGE_SIZE = 3, 32
MODELS = {"unet": UnetModel, "ddpm": DdpmUnet}
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def _options(section: Model | Optimizer, keys: Iterable[str]) -> dict:
    """The section's values under these keys, less those that the chosen alternative does not have."""
    return {key: value for key in keys if (value := getattr(section, key)) is not None}


def build_model(config: Config) -> DiffusionModel:
    """The diffusion model with weights drawn from the run's seed, on the CPU."""
    torch.manual_seed(derive_seed(config.seed, Purpose.WEIGHTS))
    keys = ("hidden_size", "multipliers", "num_blocks", "attention_resolutions", "dropout")
    eps_model = MODELS[config.model.name](IMAGE_CHANNELS, IMAGE_CHANNELS, **_options(config.model, keys))
    return build_diffusion(config, eps_model)


def build_diffusion(config: Config, eps_model: nn.Module) -> DiffusionModel:
    """The configured diffusion process around an eps model."""
    return DiffusionModel(eps_model, tuple(config.diffusion.betas), config.diffusion.num_timesteps)


def build_optimizer(section: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the model's parameters, wherever they are."""
    options = _options(section, ("lr", "momentum", "weight_decay"))
    is_fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return OPTIMIZERS[section.name](model.parameters(), fused=is_fused, **options)


def build_learning_rate(section: Optimizer, last_step: int) -> Callable[[int], float]:
    """step (from 0) -> learning rate: linear warm-up (cut to the run), then constant or half a cosine down to 0."""
    warmup = min(section.warmup_steps, last_step)

    def learning_rate(step: int) -> float:
        if step < warmup:
            return section.lr * (step + 1) / warmup
        if section.lr_schedule == "constant":
            return section.lr
        return section.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, last_step - warmup)))

    return learning_rate


def build_batches(config: Config, images: Tensor) -> Batches:
    """The run's training batches over images (N, 3, H, W) uint8."""
    return Batches(images, config.train.batch_size, config.seed, config.train.random_flip)


def build_tracker(config: Config, folder: Path, step: int) -> Tracker:
    """The run's records in its folder, going on at `step`."""
    wandb = None
    if config.wandb.mode != "disabled":
        wandb = WandbTracker(
            mode=config.wandb.mode,
            project=config.wandb.project,
            name=config.wandb.name or folder.name,
            folder=folder,
            config=config.model_dump(),
        )
    return Tracker(JsonLines(folder / "metrics.jsonl", step), wandb)


def build_runtime(section: Runtime) -> tuple[torch.device, str]:
    """Device and precision, with `auto` resolved."""
    device = resolve_device(section.device)
    return device, resolve_precision(section.precision, device)
