"""Training steps: the loop of the tutorials, what makes it faster, and ours as `main.py` runs it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contender import (
    BETAS,
    LOG_EVERY,
    NUM_TIMESTEPS,
    Contender,
    compose,
    network_flops,
    plain_network,
    synchronise,
)
from modeling import build
from modeling.config import Config
from modeling.data import load_images
from modeling.distributed.processes import ALONE, Processes
from modeling.images import to_model_range
from modeling.run.folder import RunFolder
from modeling.run.identity import identify
from modeling.run.objects import Run
from modeling.runtime import autocast, keep_freed_memory, resolve_device
from modeling.schedules import get_schedules
from modeling.stage import read_manifest
from modeling.system.signals import uninterrupted


def _torchvision_batches(folder: str, batch_size: int, num_workers: int) -> Iterator[Tensor]:
    """As in the tutorials: decoding, ToTensor, Normalize and flips for each image, in Python."""
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ]
    )
    dataset = datasets.CIFAR10(folder, transform=transform)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size, shuffle=True, drop_last=True, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    while True:
        for images, _ in loader:
            yield images


def _training_images(config: Config) -> Tensor:
    """(N, 3, H, W) uint8, as prepared."""
    return load_images(config.dataset.folder, "train", read_manifest(config.dataset))


def _memory_batches(images: Tensor, batch_size: int) -> Iterator[Tensor]:
    """uint8 images in memory, a batch at a time."""
    while True:
        batch = images[torch.randint(len(images), (batch_size,))]
        is_flipped = torch.rand(batch_size) < 0.5
        batch = torch.where(is_flipped[:, None, None, None], batch.flip(-1), batch)
        yield to_model_range(batch)


def reference_training(
    overrides: list[str],
    batch_size: int,
    cifar10: str,
    *,
    num_workers: int = 0,
    precision: str = "fp32",
    has_kept_memory: bool = False,
    has_images_in_memory: bool = False,
    is_channels_last: bool = False,
    fast_layers: Sequence[str] = (),
    is_fused: bool = False,
    is_compiled: bool = False,
) -> Contender:
    """The training loop as every tutorial writes it; each switch is one thing that makes it faster.

    Args:
        overrides: of the configuration, for the network.
        cifar10: the folder in which torchvision finds `cifar-10-batches-py`.
        num_workers: of the DataLoader.
        has_kept_memory: see `modeling.runtime.keep_freed_memory`.
        fast_layers: names of those from `modeling.layers` that are used.
        is_fused: one kernel for all of Adam, and the loss read every 25 steps only.
    """
    if has_kept_memory:
        keep_freed_memory()
    config = compose(overrides)
    device = resolve_device(config.runtime.device)
    network = plain_network(config, fast_layers).to(device)
    flops = network_flops(network, with_gradient=True)
    if is_channels_last:
        network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=is_fused)
    abar = get_schedules(*BETAS, NUM_TIMESTEPS)["alphas_cumprod"].to(device)
    if has_images_in_memory:
        loader = _memory_batches(_training_images(config), batch_size)
    else:
        loader = _torchvision_batches(cifar10, batch_size, num_workers)
    called = torch.compile(network) if is_compiled else network

    def run(num_steps: int) -> None:
        for step in range(num_steps):
            x_0 = next(loader).to(device)
            timesteps = torch.randint(1, NUM_TIMESTEPS + 1, (len(x_0),), device=device)
            noise = torch.randn_like(x_0)
            scale = abar[timesteps][:, None, None, None]
            x_t = scale.sqrt() * x_0 + (1 - scale).sqrt() * noise
            with autocast(device, precision):
                eps = called(x_t, timesteps / NUM_TIMESTEPS)
            loss = F.mse_loss(eps.float(), noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not is_fused or step % LOG_EVERY == 0:
                loss.item()
        synchronise(device)

    return Contender(run, batch_size, flops)


def reference_loading(batch_size: int, cifar10: str, *, num_workers: int = 0) -> Contender:
    """The batches of the tutorials' loop, without any training."""
    loader = _torchvision_batches(cifar10, batch_size, num_workers)

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            next(loader)

    return Contender(run, batch_size, 0)


def our_loading(overrides: list[str], batch_size: int) -> Contender:
    """The batches of `main.py`, without any training."""
    config = compose([*overrides, f"train.batch_size={batch_size}"])
    images = _training_images(config)
    device, _ = build.build_runtime(config.runtime)
    loader = build.build_batches(config, images, device).loader(range(10**9), device=device)

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            to_model_range(next(loader).to(device, non_blocking=True))
        synchronise(device)

    return Contender(run, batch_size, 0)


def our_run(overrides: list[str], folder: str, processes: Processes = ALONE) -> Run:
    """The objects that `main.py` makes from these overrides, in one of these processes; with the other loops' Adam."""
    config = compose(["optimizer=adam", *overrides])
    machine = build.build_runtime(config.runtime)
    identity = identify(config, 1, data_sha256="", code_sha256="")
    return Run(config, read_manifest(config.dataset), 1, RunFolder(Path(folder), identity), *machine, processes)


def our_training(overrides: list[str], batch_size: int, folder: str, processes: Processes = ALONE) -> Contender:
    """The loader, the step and the bookkeeping of `main.py`: averaged weights, clipping, exact random numbers."""
    run = our_run([*overrides, f"train.batch_size={batch_size}"], folder, processes)
    flops = network_flops(plain_network(run.config), with_gradient=True)
    step, books = run.make_step(), run.make_books()
    run.model.train()

    def steps(num_steps: int) -> None:
        start = run.state.step
        for images in run.batches.loader(range(start, start + num_steps), device=run.device):
            loss = step.backward(images)
            with uninterrupted():
                books.count_step(step.update(loss), batch_size)
                if books.is_line_due:
                    books.make_line(step.learning_rate(run.state.step - 1))
        synchronise(run.device)

    return Contender(steps, batch_size, flops)
