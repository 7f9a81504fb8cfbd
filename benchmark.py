"""How fast training, sampling and the start are: against the loop of the tutorials, other packages and the machine.

    python prepare_data.py && python benchmark.py       # everything; about 40 minutes on two cores
    python benchmark.py training sampling               # some of the sections; --help lists them
    python benchmark.py --seconds 0.5 --rounds 1        # a quick look

Every contender is a process of its own and all of a table take turns, so that what else the machine does hits them
alike; the numbers are medians over the rounds, with the lowest and the highest. Writes benchmark.json and benchmark.md.
"""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torchvision import datasets

from benchmarks.report import describe_machine, to_markdown
from benchmarks.start import measure_start
from benchmarks.turns import measure
from modeling.datasets.cifar10 import PreparationError, read_members
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
Tables = Iterator[tuple[str, dict[str, dict]]]


@contextlib.contextmanager
def extracted_cifar10():
    """A folder in which torchvision finds the data set: the archive's verified files."""
    try:
        members = read_members(ARCHIVE)
    except PreparationError as error:
        raise SystemExit(str(error)) from error
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / datasets.CIFAR10.base_folder
        target.mkdir()
        for name, content in members.items():
            (target / name).write_bytes(content)
        yield folder


# ---- the sections; each yields (title, cases as `measure` takes them)


def peaks() -> Tables:
    cases = {
        f"{precision} {what}": {"name": f"peak {kind}", "precision": precision}
        for what, kind in (("matrix product, 4096", "matmul"), ("convolution, 256 channels, 16x16", "convolution"))
        for precision in ("fp32", FAST)
    }
    yield "Peaks", cases


def loading() -> Tables:
    """Batches without training: what the input pipeline can give."""
    with extracted_cifar10() as cifar10:
        reference = {"name": "reference loading", "batch_size": 128, "cifar10": cifar10}
        yield (
            "Loading, batch 128",
            {
                "the tutorials' loader": reference,
                "the same, 2 loader workers": reference | {"num_workers": 2},
                "ours": {"name": "our loading", "overrides": [], "batch_size": 128},
            },
        )


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
                if network == "ddpm 128" and batch_size == 16:
                    for package, name in (("diffusers", "diffusers"), ("denoising_diffusion_pytorch", "lucidrains")):
                        for precision in ("fp32", "bf16"):
                            if find_spec(package):
                                peer = {"name": f"{name} training", "batch_size": 16, "precision": precision}
                                cases[f"{package}, {precision}"] = peer
                cases |= PEAK
                title = f"Training, {network}, batch {batch_size}"
                yield title, cases


def steps() -> Tables:
    """From the tutorials' loop to ours, one thing after the other."""
    switches = {
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
            cases |= PEAK
            title = f"Step by step, {network}, batch {batch_size}"
            yield title, cases


def micro_batches() -> Tables:
    """What is saved by letting a part of the batch through the network at a time."""
    with tempfile.TemporaryDirectory() as folder:
        for network in ("unet 128", "unet 32", "ddpm 32"):
            case = {"name": "our training", "batch_size": 128, "folder": folder}
            cases = {
                str(size): case | {"overrides": [*NETWORKS[network], f"runtime.micro_batch_size={size}"]}
                for size in (128, 64, 32, 16)
            }
            title = f"Micro-batches of a batch of 128, {network}"
            yield title, cases


def layers() -> Tables:
    """What PyTorch's kernels for the CPU are slow at: GroupNorm with the channels last and few in a group, and ReLU."""
    for channels, num_groups, pixels in ((32, 8, 32), (64, 16, 16), (128, 32, 16), (128, 8, 32)):
        case = {"name": "group norm", "channels": channels, "num_groups": num_groups, "pixels": pixels}
        cases = {
            "PyTorch's, channels last": case | {"is_channels_last": True, "is_ours": False},
            "PyTorch's, contiguous": case | {"is_channels_last": False, "is_ours": False},
            "ours, channels last": case | {"is_channels_last": True, "is_ours": True},
        }
        title = f"GroupNorm of {channels} channels in {num_groups} groups at {pixels}x{pixels}, bf16"
        yield title, cases
    case = {"name": "relu", "channels": 128, "pixels": 32}
    yield "ReLU of 128 channels at 32x32, bf16, forward", {
        "PyTorch's": case | {"is_ours": False}, "ours": case | {"is_ours": True}
    }  # fmt: skip


def sampling() -> Tables:
    for network in ("unet 128", "ddpm 32", "ddpm 128"):
        for batch_size in (8, 64):
            case = {"overrides": NETWORKS[network], "batch_size": batch_size}
            cases = {
                "the tutorials' loop, fp32": case | {"name": "reference sampling"},
                "ours, with PyTorch's layers": case | {"name": "our sampling", "has_fast_layers": False},
                "ours": case | {"name": "our sampling"},
            }
            cases |= PEAK
            title = (
                f"Sampling, {network}, {batch_size} images at a time (evaluations of the network x images, a second)"
            )
            yield title, cases


def scaling() -> Tables:
    """How the time of a step grows with the batch, the width and the number of images."""
    with tempfile.TemporaryDirectory() as folder:
        ours = {"name": "our training", "folder": folder}
        yield (
            "Scaling of a training step with the batch, unet 64",
            {str(size): ours | {"overrides": NETWORKS["unet 64"], "batch_size": size} for size in (8, 32, 128)},
        )
        yield (
            "Scaling of a training step with the width, unet, batch 32",
            {
                str(size): ours | {"overrides": ["model=unet", f"model.hidden_size={size}"], "batch_size": 32}
                for size in (32, 64, 128)
            },
        )
    sampled = {"name": "our sampling", "overrides": NETWORKS["ddpm 32"]}
    yield (
        "Scaling of sampling with the number of images, ddpm 32",
        {str(size): sampled | {"batch_size": size} for size in (16, 64, 256)},
    )


def _measured(options: argparse.Namespace) -> Iterator[tuple[str, list[dict]]]:
    """The chosen tables, one after the other."""
    for name in options.sections or [*SECTIONS, "start"]:
        if name == "start":
            yield "Start", measure_start(options.rounds)
            continue
        for title, cases in SECTIONS[name]():
            if options.only in title:
                yield title, measure(title, cases, options.rounds, options.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"some of {' '.join(SECTIONS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each contender takes")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn")
    parser.add_argument("--only", default="", metavar="TEXT", help="of these, the tables whose title contains this")
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="without .json and .md")
    options = parser.parse_args()
    if unknown := set(options.sections) - {*SECTIONS, "start"}:
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {' '.join(SECTIONS)} start")
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be positive")
    found, environment, report = {}, describe_machine(), "nothing was measured"
    for title, rows in _measured(options):
        found[title] = rows
        report = to_markdown(found, environment)  # after each table: the next one may run out of memory
        record = {"environment": environment, "tables": found}
        options.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
        options.out.with_suffix(".md").write_text(report)
    print(report)


SECTIONS = {
    section.__name__: section for section in (peaks, loading, training, steps, micro_batches, layers, sampling, scaling)
}

if __name__ == "__main__":
    main()
