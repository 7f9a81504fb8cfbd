"""What is compared: the loop of the tutorials, ours as `main.py` runs it, and other packages' networks.

Every contender is made anew in a process of its own (`benchmarks.worker`), so that allocator settings, threads and peak
memory are its own, too.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modeling import build
from modeling.config import parse
from modeling.data import load_images
from modeling.diffusion import get_schedules
from modeling.group_norm import GroupNorm
from modeling.images import to_model_range
from modeling.progress import progress_bar
from modeling.run import Run
from modeling.run_folder import RunFolder
from modeling.runtime import autocast, keep_freed_memory, place, resolve_device
from modeling.samplers import sample_images
from modeling.stage import identify, read_manifest
from modeling.training import fit

NUM_TIMESTEPS, BETAS = 1000, (1e-4, 0.02)
LOG_EVERY = 25


@dataclass
class Contender:
    """Something that can be timed.

    Args:
        run: does so many steps and returns when the device has done them.
        images_per_step: images in a training batch, or images sampled at a time.
        flops_per_image: of one step, for one image.
    """

    run: Callable[[int], None]
    images_per_step: int
    flops_per_image: float


def compose(overrides: list[str]):
    """The validated configuration that `main.py` would have with these overrides."""
    import hydra

    with hydra.initialize_config_dir(str(Path("conf").absolute()), version_base="1.3"):
        return parse(hydra.compose("config", overrides))


def _plain_network(config, has_fast_layers: bool = False) -> nn.Module:
    """The configured network as a tutorial has it: without what was done to its layers for speed."""
    torch.manual_seed(0)
    network = build.build_eps_model(config.model)
    for module in network.modules() if not has_fast_layers else ():
        if isinstance(module, nn.ReLU):
            module.inplace = False
        elif isinstance(module, GroupNorm):
            module.__class__ = nn.GroupNorm
    return network


def _count_flops(network: nn.Module, with_gradient: bool, *inputs: Tensor) -> float:
    """FLOPs (2 for a multiply-add) of one image through the network, by torch's own counter."""
    network = copy.deepcopy(network).cpu()
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(with_gradient):
        output = network(*inputs)
        if with_gradient:
            getattr(output, "sample", output).sum().backward()
    return counter.get_total_flops()


def _network_flops(network: nn.Module, with_gradient: bool, time: float = 0.5) -> float:
    return _count_flops(network, with_gradient, torch.zeros(1, 3, 32, 32), torch.tensor([time]))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- training


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
    has_fast_layers: bool = False,
    is_fused: bool = False,
    is_compiled: bool = False,
) -> Contender:
    """The training loop as every tutorial writes it; each switch is one of the things that can be done about it.

    Args:
        overrides: of the configuration, for the network.
        cifar10: the folder in which torchvision finds `cifar-10-batches-py`.
        num_workers: of the DataLoader.
        has_kept_memory: see `modeling.runtime.keep_freed_memory`.
        has_fast_layers: GroupNorm from `modeling.group_norm`, and ReLU in place.
        is_fused: one kernel for all of Adam, and the loss read every 25 steps only.
    """
    if has_kept_memory:
        keep_freed_memory()
    config = compose(overrides)
    device = resolve_device(config.runtime.device)
    network = _plain_network(config, has_fast_layers).to(device)
    flops = _network_flops(network, with_gradient=True)
    if is_channels_last:
        network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=is_fused)
    abar = get_schedules(*BETAS, NUM_TIMESTEPS)["alphas_cumprod"].to(device)
    if has_images_in_memory:
        manifest = read_manifest(config.dataset)
        data = Path(config.dataset.root) / config.dataset.name
        loader = _memory_batches(load_images(data, "train", manifest), batch_size)
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
        _synchronise(device)

    return Contender(run, batch_size, flops)


def our_run(overrides: list[str], folder: str) -> Run:
    """The objects that `main.py` makes from these overrides."""
    config = compose(overrides)
    machine = build.build_runtime(config.runtime)
    identity = identify(config, 1, data_sha256="", code_sha256="")
    return Run(config, read_manifest(config.dataset), RunFolder(Path(folder), identity), *machine)


def our_training(overrides: list[str], batch_size: int, folder: str) -> Contender:
    """The loader, the step and the epoch of `main.py`: averaged weights, clipping and exact random numbers included."""
    run = our_run([*overrides, f"train.batch_size={batch_size}"], folder)
    flops = _network_flops(_plain_network(run.config), with_gradient=True)
    step = run.step(log=lambda step, metrics: None, save=lambda state: None)

    def steps(num_steps: int) -> None:
        step.last_step = run.state.step + num_steps
        fit(
            run.model,
            run.batches,
            run.optimizer,
            run.device,
            step=step,
            sample=lambda step: None,
            sample_every=1,
            bar=progress_bar(disable=True),
        )
        _synchronise(run.device)

    return Contender(steps, batch_size, flops)


def _peer_training(loss_of, network: nn.Module, x_0: Tensor, precision: str, optimizer) -> Contender:
    """The training step that both packages' examples have; `loss_of(images)` is the package's own part."""
    device = resolve_device("auto")
    flops = _network_flops(network, with_gradient=True, time=500.0)
    network.to(device)
    optimizer = optimizer(network.parameters(), lr=1e-4)
    x_0 = x_0.to(device)

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            with autocast(device, precision):
                loss = loss_of(x_0)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

    return Contender(run, len(x_0), flops)


def diffusers_training(batch_size: int, precision: str = "fp32") -> Contender:
    """The training step of diffusers' unconditional example, with the network of google/ddpm-cifar10-32."""
    from diffusers import DDPMScheduler, UNet2DModel

    network = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
        norm_eps=1e-6,
    )
    scheduler = DDPMScheduler(NUM_TIMESTEPS)

    def loss_of(x_0: Tensor) -> Tensor:
        noise = torch.randn_like(x_0)
        timesteps = torch.randint(0, NUM_TIMESTEPS, (len(x_0),), device=x_0.device)
        eps = network(scheduler.add_noise(x_0, noise, timesteps), timesteps).sample
        return F.mse_loss(eps.float(), noise)

    return _peer_training(loss_of, network, torch.rand(batch_size, 3, 32, 32) * 2 - 1, precision, torch.optim.AdamW)


def lucidrains_training(batch_size: int, precision: str = "fp32") -> Contender:
    """The training step of denoising-diffusion-pytorch, with the network of its README."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    network = Unet(dim=64, dim_mults=(1, 2, 4, 8), flash_attn=False)
    diffusion = GaussianDiffusion(network, image_size=32, timesteps=NUM_TIMESTEPS).to(resolve_device("auto"))
    return _peer_training(diffusion, network, torch.rand(batch_size, 3, 32, 32), precision, torch.optim.Adam)


# ---- sampling: a step is one evaluation of the network for all images


def reference_sampling(overrides: list[str], batch_size: int) -> Contender:
    """Algorithm 2 as every tutorial writes it: fp32, a tensor operation for each term."""
    config = compose(overrides)
    device = resolve_device(config.runtime.device)
    network = _plain_network(config).to(device).eval()
    flops = _network_flops(network, with_gradient=False)
    tables = {name: table.to(device) for name, table in get_schedules(*BETAS, NUM_TIMESTEPS).items()}

    @torch.no_grad()
    def run(num_steps: int) -> None:
        x = torch.randn(batch_size, 3, 32, 32, device=device)
        for timestep in range(NUM_TIMESTEPS, NUM_TIMESTEPS - num_steps, -1):
            eps = network(x, torch.full((batch_size,), timestep / NUM_TIMESTEPS, device=device))
            mean = tables["inv_sqrt_alphas"][timestep] * (x - tables["one_minus_alpha_over_prod"][timestep] * eps)
            x = mean + tables["sqrt_betas"][timestep] * torch.randn_like(x)
        _synchronise(device)

    return Contender(run, batch_size, flops)


def our_sampling(overrides: list[str], batch_size: int) -> Contender:
    """What `sample.py` does for each batch."""
    config = compose(overrides)
    device, precision = build.build_runtime(config.runtime)
    eps_model = build.build_eps_model(config.model)
    flops = _network_flops(eps_model, with_gradient=False)
    model = place(build.build_diffusion(config, eps_model), device)

    def run(num_steps: int) -> None:
        sample_images(model, batch_size, (3, 32, 32), device, seed=0, precision=precision, num_steps=num_steps)
        _synchronise(device)

    return Contender(run, batch_size, flops)


# ---- a layer


def group_norm(channels: int, num_groups: int, pixels: int, is_channels_last: bool, is_ours: bool) -> Contender:
    """GroupNorm of 64 images in bf16, forward and backward."""
    keep_freed_memory()
    layer = (GroupNorm if is_ours else nn.GroupNorm)(num_groups, channels)
    x = torch.randn(64, channels, pixels, pixels, dtype=torch.bfloat16)
    if is_channels_last:
        x = x.to(memory_format=torch.channels_last)
    grad = torch.randn_like(x)
    x.requires_grad_()

    def run(num_steps: int) -> None:
        for _ in repeat(None, num_steps):
            torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), grad)

    return Contender(run, len(x), 0)


# ---- the machine's own limits


def peak_matmul(precision: str = "bf16", size: int = 4096) -> Contender:
    """A product of two large square matrices; an "image" is one product."""
    device = resolve_device("auto")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(size, size, dtype=dtype, device=device)
    out = torch.empty_like(a)

    def run(num_steps: int) -> None:
        for _ in repeat(None, num_steps):
            torch.mm(a, a, out=out)
        _synchronise(device)

    return Contender(run, 1, 2 * size**3)


def peak_convolution(precision: str = "bf16", batch_size: int = 32) -> Contender:
    """A 3x3 convolution of 256 to 256 channels at 16x16, channels last; an "image" is one of the batch."""
    device = resolve_device("auto")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layer = nn.Conv2d(256, 256, 3, padding=1).to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(batch_size, 256, 16, 16, device=device, dtype=dtype).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def run(num_steps: int) -> None:
        for _ in repeat(None, num_steps):
            layer(x)
        _synchronise(device)

    return Contender(run, batch_size, 2 * 9 * 256 * 256 * 16 * 16)


CONTENDERS = {
    "reference training": reference_training,
    "our training": our_training,
    "diffusers training": diffusers_training,
    "lucidrains training": lucidrains_training,
    "reference sampling": reference_sampling,
    "our sampling": our_sampling,
    "group norm": group_norm,
    "peak matmul": peak_matmul,
    "peak convolution": peak_convolution,
}
