"""The sections of the benchmark; each yields its tables as (title, label of a contender -> what it is asked for)."""

import contextlib
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torchvision import datasets

from modeling.datasets.cifar10 import read_members
from modeling.runtime import resolve_precision

ARCHIVE = Path("downloads/cifar-10-python.tar.gz")
FAST = "fp16" if torch.cuda.is_available() and resolve_precision("auto", torch.device("cuda")) == "fp32" else "bf16"
PEAK = {f"the peak: a {FAST} matrix product": {"name": "peak matmul", "precision": FAST}}  # in turns with the rest
NETWORKS = {  # what the tables call it -> overrides
    "unet 32": ["model=unet", "model.hidden_size=32"],
    "unet 64": ["model=unet", "model.hidden_size=64"],
    "unet 128": ["model=unet", "model.hidden_size=128"],
    "ddpm 32": ["model=ddpm"],
    "ddpm 128": ["model=ddpm_paper"],
}
SMALL = {"the demo's network": (["model=ddpm_small"], 32), "ddpm 32": (NETWORKS["ddpm 32"], 64)}  # with batch sizes
BESIDE = {"alone": 0, "beside a busy process": 1}
Cases = dict[str, dict[str, Any]]
Tables = Iterator[tuple[str, Cases]]


@contextlib.contextmanager
def extracted_cifar10() -> Iterator[str]:
    """A folder in which torchvision finds the data set: the archive's verified files."""
    members = read_members(ARCHIVE)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / datasets.CIFAR10.base_folder
        target.mkdir()
        for name, content in members.items():
            (target / name).write_bytes(content)
        yield folder


def peaks() -> Tables:
    kinds = {"matrix product, 4096": "peak matmul", "convolution, 256 channels, 16x16": "peak convolution"}
    yield (
        "Peaks",
        {
            f"{precision} {what}": {"name": name, "precision": precision}
            for what, name in kinds.items()
            for precision in ("fp32", FAST)
        },
    )


def loading() -> Tables:
    """Batches without training: the most that the input pipeline can deliver."""
    with extracted_cifar10() as cifar10:
        reference = {"name": "reference loading", "batch_size": 128, "cifar10": cifar10}
        cases = {
            "the tutorials' loader": reference,
            "the same, 2 loader workers": reference | {"num_workers": 2},
            "ours": {"name": "our loading", "overrides": [], "batch_size": 128},
        }
        yield "Loading, batch 128", cases


def training() -> Tables:
    with extracted_cifar10() as cifar10, tempfile.TemporaryDirectory() as folder:
        for network, overrides in NETWORKS.items():
            for batch_size in (16, 128):
                case = {"overrides": overrides, "batch_size": batch_size}
                reference = case | {"name": "reference training", "cifar10": cifar10}
                ours = case | {"name": "our training", "folder": folder}
                cases = {"the tutorials' loop, fp32": reference}
                if batch_size == 128:
                    cases["the same, 2 loader workers"] = reference | {"num_workers": 2}
                cases["ours"] = ours
                if torch.cuda.is_available():
                    cases["ours, torch.compile"] = ours | {"overrides": [*overrides, "runtime.compile=true"]}
                    if FAST == "fp16":
                        cases["ours, fp16"] = ours | {"overrides": [*overrides, "runtime.precision=fp16"]}
                if network == "ddpm 128" and batch_size == 16 and find_spec("diffusers"):
                    for precision in ("fp32", "bf16"):
                        peer = {"name": "diffusers training", "batch_size": batch_size, "precision": precision}
                        cases[f"diffusers, {precision}"] = peer
                yield f"Training, {network}, batch {batch_size}", cases | PEAK


def steps() -> Tables:
    """From the tutorials' loop to ours, one change after the other."""
    switches: Cases = {
        "freed memory kept": {"has_kept_memory": True},
        "bf16": {"precision": "bf16"},
        "channels last": {"is_channels_last": True},
        "GroupNorm on contiguous copies": {"fast_layers": ["GroupNorm"]},
        "ReLU in place, on integers": {"fast_layers": ["GroupNorm", "ReLU"]},
        "images in memory, batches at once": {"has_images_in_memory": True},
        "fused Adam, loss read every 25 steps": {"is_fused": True},
    }
    with extracted_cifar10() as cifar10, tempfile.TemporaryDirectory() as folder:
        for network, batch_size in (("unet 128", 32), ("unet 32", 128), ("ddpm 32", 64)):  # all fit in 16 GB
            case = {"overrides": NETWORKS[network], "batch_size": batch_size}
            reference = case | {"name": "reference training", "cifar10": cifar10}
            cases = {"the tutorials' loop": reference}
            for label, switch in switches.items():
                reference = reference | switch
                cases[f"+ {label}"] = reference
            if network == "unet 128":  # each takes a minute to compile
                cases["+ torch.compile"] = reference | {"is_compiled": True}
            cases["ours"] = case | {"name": "our training", "folder": folder}
            yield f"Step by step, {network}, batch {batch_size}", cases | PEAK


def micro_batches() -> Tables:
    """What is saved when only a part of the batch is in the network at a time."""
    with tempfile.TemporaryDirectory() as folder:
        for network in ("unet 128", "unet 32", "ddpm 32"):
            case = {"name": "our training", "batch_size": 128, "folder": folder}
            cases = {
                str(size): case | {"overrides": [*NETWORKS[network], f"runtime.micro_batch_size={size}"]}
                for size in (128, 64, 32, 16)
            }
            yield f"Micro-batches of a batch of 128, {network}", cases


def busy() -> Tables:
    """Beside a process that needs a CPU for itself: what threads lose that wait for each other."""
    threads: dict[str, tuple[str, dict[str, str]]] = {
        "a thread for each CPU": ("null", {}),
        "the same, waiting as OpenMP does by itself": ("null", {"GOMP_SPINCOUNT": "300000"}),
        "one thread": ("1", {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        for network, (overrides, batch_size) in SMALL.items():
            for where, num_busy in BESIDE.items():
                case = {"name": "our training", "batch_size": batch_size, "folder": folder, "num_busy": num_busy}
                cases = {
                    label: case | {"overrides": [*overrides, f"runtime.num_threads={count}"], "environment": variables}
                    for label, (count, variables) in threads.items()
                }
                yield f"Training {where}, {network}, batch {batch_size}", cases


def processes() -> Tables:
    """A process with two threads against two processes with one each, on two CPUs; the sum of gradients by gloo."""
    with tempfile.TemporaryDirectory() as folder:
        for network, (overrides, batch_size) in SMALL.items():
            for where, num_busy in BESIDE.items():
                case = {"batch_size": batch_size, "folder": folder, "num_busy": num_busy}
                ours = case | {"name": "our training"}
                shared = case | {"name": "shared training", "count": 2, "overrides": overrides}
                cases = {
                    "1 process": ours | {"overrides": overrides},
                    "1 process, one thread": ours | {"overrides": [*overrides, "runtime.num_threads=1"]},
                    "2 processes": shared | {"what": "steps"},
                }
                if not num_busy:
                    cases["the same, gradients not added up"] = shared | {"what": "apart"}
                    cases["gradients added up, and nothing else"] = shared | {"what": "sums"}
                yield f"Training by processes, {where}, {network}, batch {batch_size}", cases


def layers() -> Tables:
    """Where PyTorch's kernels for the CPU are slow: GroupNorm with channels last and few in a group, and ReLU."""
    for channels, num_groups, pixels in ((32, 8, 32), (64, 16, 16), (128, 32, 16), (128, 8, 32)):
        case = {"name": "group norm", "channels": channels, "num_groups": num_groups, "pixels": pixels}
        cases = {
            "PyTorch's, channels last": case | {"is_channels_last": True, "is_ours": False},
            "PyTorch's, contiguous": case | {"is_channels_last": False, "is_ours": False},
            "ours, channels last": case | {"is_channels_last": True, "is_ours": True},
        }
        yield f"GroupNorm of {channels} channels in {num_groups} groups at {pixels}x{pixels}, bf16", cases
    case = {"name": "relu", "channels": 128, "pixels": 32}
    cases = {"PyTorch's": case | {"is_ours": False}, "ours": case | {"is_ours": True}}
    yield "ReLU of 128 channels at 32x32, bf16, forward", cases


def sampling() -> Tables:
    for network in ("unet 128", "ddpm 32", "ddpm 128"):
        for batch_size in (8, 64):
            case = {"overrides": NETWORKS[network], "batch_size": batch_size}
            cases = {
                "the tutorials' loop, fp32": case | {"name": "reference sampling"},
                "ours, with PyTorch's layers": case | {"name": "our sampling", "has_fast_layers": False},
                "ours": case | {"name": "our sampling"},
            }
            what = f"{network}, {batch_size} images at a time"
            yield f"Sampling, {what} (evaluations of the network x images, a second)", cases | PEAK


SECTIONS = {
    section.__name__: section
    for section in (peaks, loading, training, steps, micro_batches, busy, processes, layers, sampling)
}
