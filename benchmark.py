"""How fast training, sampling and the start are: against the loop of the tutorials, other packages and the machine.

    python prepare_data.py && python benchmark.py       # everything; about 20 minutes on two cores
    python benchmark.py training sampling               # some of: peaks training steps sampling scaling start
    python benchmark.py --seconds 0.5 --rounds 1        # a quick look

Every contender is a process of its own and all of a table take turns, so that what else the machine does hits them
alike; the numbers are medians over the rounds, with the lowest and the highest. Writes benchmark.json and benchmark.md.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SECTIONS = ("peaks", "training", "steps", "sampling", "scaling", "start")
ARCHIVE = Path("downloads/cifar-10-python.tar.gz")
NETWORKS = {  # what the tables call it -> overrides
    "unet 32": ["model=unet", "model.hidden_size=32"],
    "unet 64": ["model=unet", "model.hidden_size=64"],
    "unet 128": ["model=unet", "model.hidden_size=128"],
    "ddpm 32": ["model=ddpm"],
    "ddpm 128": ["model=ddpm_paper"],
}


class Worker:
    """A contender's process."""

    def __init__(self, label: str, case: dict):
        self.label, self.case, self.rates = label, case, []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.label}: ended with {self.process.wait()}, see above")
        return json.loads(line)

    def take_turn(self, seconds: float) -> None:
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        done = self.read()
        self.rates.append(done["images"] / done["seconds"])

    def finish(self) -> int:
        self.process.stdin.close()
        memory = self.read()["memory_bytes"]
        self.process.wait()
        return memory


def measure(title: str, cases: dict[str, dict], options: argparse.Namespace) -> list[dict]:
    """Runs the cases in turns.

    Args:
        cases: label -> arguments of `benchmarks.worker`.

    Returns:
        A row for each: label, images_per_second (median), lowest, highest, gflops (a second), memory_bytes.
    """
    workers, flops = [], []
    try:
        for label, case in cases.items():
            print(f"{title}: starting {label}", file=sys.stderr, flush=True)
            workers.append(Worker(label, case))
            flops.append(workers[-1].read()["flops_per_image"])  # one after the other: the warm-up wants all cores
        for number in range(options.rounds):
            print(f"{title}: round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
            for worker in workers:
                worker.take_turn(options.seconds)
        memories = [worker.finish() for worker in workers]
    finally:
        for worker in workers:
            worker.process.kill()
    return [
        {
            "label": worker.label,
            "case": worker.case,
            "images_per_second": statistics.median(worker.rates),
            "lowest": min(worker.rates),
            "highest": max(worker.rates),
            "gflops": statistics.median(worker.rates) * per_image / 1e9,
            "memory_bytes": memory,
        }
        for worker, per_image, memory in zip(workers, flops, memories, strict=True)
    ]


def table(rows: list[dict], peak_gflops: float | None, over: str | None = "first") -> str:
    """Rows as Markdown.

    Args:
        over: what the ratio refers to: the first row, the previous one, or nothing.
    """
    lines = ["| | images/s | lowest-highest | ratio | GFLOP/s | of the peak | peak memory |", "|---|" + "---:|" * 6]
    for index, row in enumerate(rows):
        base = rows[0] if over == "first" else rows[max(0, index - 1)]
        ratio = f"{row['images_per_second'] / base['images_per_second']:.2f}" if over else ""
        share = f"{100 * row['gflops'] / peak_gflops:.0f} %" if peak_gflops else ""
        lines.append(
            f"| {row['label']} | {row['images_per_second']:.1f} | {row['lowest']:.1f}-{row['highest']:.1f} | {ratio} "
            f"| {row['gflops']:,.0f} | {share} | {row['memory_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


@contextlib.contextmanager
def extracted_cifar10():
    """A folder in which torchvision finds the data set (it checks the files' MD5 itself)."""
    if not ARCHIVE.exists():
        raise SystemExit(f"{ARCHIVE} is missing: run `python prepare_data.py`")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(folder, filter="data")
        yield folder


# ---- the sections; each returns {title: rows}


def peaks(options) -> dict:
    cases = {
        f"{precision} {what}": {"name": f"peak {kind}", "precision": precision}
        for what, kind in (("matrix product, 4096", "matmul"), ("convolution, 256 channels, 16x16", "convolution"))
        for precision in ("fp32", "bf16")
    }
    return {"Peaks": measure("peaks", cases, options)}


def training(options) -> dict:
    found = {}
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
                if network == "ddpm 128" and batch_size == 16:
                    for package, name in (("diffusers", "diffusers"), ("denoising_diffusion_pytorch", "lucidrains")):
                        for precision in ("fp32", "bf16"):
                            if find_spec(package):
                                peer = {"name": f"{name} training", "batch_size": 16, "precision": precision}
                                cases[f"{package}, {precision}"] = peer
                title = f"Training, {network}, batch {batch_size}"
                found[title] = measure(title, cases, options)
    return found


def steps(options) -> dict:
    """From the tutorials' loop to ours, one thing after the other."""
    switches = {
        "freed memory kept": {"has_kept_memory": True},
        "bf16": {"precision": "bf16"},
        "channels last": {"is_channels_last": True},
        "images in memory, batches at once": {"has_images_in_memory": True},
        "fused Adam, loss read every 25 steps": {"is_fused": True},
        "torch.compile": {"is_compiled": True},
    }
    found = {}
    with extracted_cifar10() as cifar10, tempfile.TemporaryDirectory() as folder:
        for network, batch_size in (("unet 128", 128), ("unet 32", 128), ("ddpm 32", 64)):
            case = {"overrides": NETWORKS[network], "batch_size": batch_size}
            reference = case | {"name": "reference training", "cifar10": cifar10}
            cases = {"the tutorials' loop": reference}
            for label, switch in switches.items():
                reference = reference | switch
                cases[f"+ {label}"] = reference
            cases["ours"] = case | {"name": "our training", "folder": folder}
            title = f"Step by step, {network}, batch {batch_size}"
            found[title] = measure(title, cases, options)
    return found


def sampling(options) -> dict:
    found = {}
    for network in ("unet 128", "ddpm 32", "ddpm 128"):
        for batch_size in (8, 64):
            case = {"overrides": NETWORKS[network], "batch_size": batch_size}
            cases = {
                "the tutorials' loop, fp32": case | {"name": "reference sampling"},
                "ours": case | {"name": "our sampling"},
            }
            title = f"Sampling, {network}, {batch_size} images at a time (evaluations of the network x images, a second)"
            found[title] = measure(title, cases, options)
    return found


def scaling(options) -> dict:
    """How the time of a step grows with the batch and the width: the slope of log(seconds) over log(size)."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        ours = {"name": "our training", "folder": folder}
        for title, cases in {
            "Scaling with the batch, unet 64": {
                f"batch {size}": ours | {"overrides": NETWORKS["unet 64"], "batch_size": size} for size in (8, 32, 128)
            },
            "Scaling with the width, unet, batch 32": {
                f"width {size}": ours | {"overrides": ["model=unet", f"model.hidden_size={size}"], "batch_size": 32}
                for size in (32, 64, 128)
            },
            "Scaling with the number of images, unet 32, batch 64": {
                f"{size} images": ours
                | {"overrides": [*NETWORKS["unet 32"], f"dataset.num_images={size}"], "batch_size": 64}
                for size in (5_000, 50_000)
            },
        }.items():
            found[title] = measure(title, cases, options)
    return found
