"""How fast training, sampling and the start are: against the loop of the tutorials, other packages and the machine.

    python prepare_data.py && python benchmark.py       # everything; about 20 minutes on two cores
    python benchmark.py training sampling               # some of: peaks training steps layers sampling scaling start
    python benchmark.py --seconds 0.5 --rounds 1        # a quick look

Every contender is a process of its own and all of a table take turns, so that what else the machine does hits them
alike; the numbers are medians over the rounds, with the lowest and the highest. Writes benchmark.json and benchmark.md.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from modeling.runtime import available_cpus

ARCHIVE = Path("downloads/cifar-10-python.tar.gz")
NETWORKS = {  # what the tables call it -> overrides
    "unet 32": ["model=unet", "model.hidden_size=32"],
    "unet 64": ["model=unet", "model.hidden_size=64"],
    "unet 128": ["model=unet", "model.hidden_size=128"],
    "ddpm 32": ["model=ddpm"],
    "ddpm 128": ["model=ddpm_paper"],
}


Tables = Iterator[tuple[str, list[dict]]]


class Worker:
    """A contender's process."""

    def __init__(self, label: str, case: dict):
        self.label, self.case, self.rates = label, case, []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.label}: ended with {self.process.wait()} (-9: out of memory)")
        return json.loads(line)

    def ask(self, question: object) -> dict:
        with contextlib.suppress(BrokenPipeError):  # then there is nothing to read, either
            self.process.stdin.write(f"{json.dumps(question)}\n")
            self.process.stdin.flush()
        return self.read()

    def take_turn(self, seconds: float) -> None:
        done = self.ask(seconds)
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
        workers += [Worker(label, case) for label, case in cases.items()]
        for worker in workers:  # one after the other: the warm-up wants all cores
            print(f"{title}: warming up {worker.label}", file=sys.stderr, flush=True)
            flops.append(worker.ask(worker.case)["flops_per_image"])
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


# ---- the sections; each yields (title, rows)


def peaks(options) -> Tables:
    cases = {
        f"{precision} {what}": {"name": f"peak {kind}", "precision": precision}
        for what, kind in (("matrix product, 4096", "matmul"), ("convolution, 256 channels, 16x16", "convolution"))
        for precision in ("fp32", "bf16")
    }
    yield "Peaks", measure("peaks", cases, options)


def training(options) -> Tables:
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
                if network == "ddpm 128" and batch_size == 16:
                    for package, name in (("diffusers", "diffusers"), ("denoising_diffusion_pytorch", "lucidrains")):
                        for precision in ("fp32", "bf16"):
                            if find_spec(package):
                                peer = {"name": f"{name} training", "batch_size": 16, "precision": precision}
                                cases[f"{package}, {precision}"] = peer
                title = f"Training, {network}, batch {batch_size}"
                yield title, measure(title, cases, options)


def steps(options) -> Tables:
    """From the tutorials' loop to ours, one thing after the other."""
    switches = {
        "freed memory kept": {"has_kept_memory": True},
        "bf16": {"precision": "bf16"},
        "channels last": {"is_channels_last": True},
        "GroupNorm on contiguous copies, ReLU in place": {"has_fast_layers": True},
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
            title = f"Step by step, {network}, batch {batch_size}"
            yield title, measure(title, cases, options)


def layers(options) -> Tables:
    """GroupNorm, which is slow with the channels last where a group has few of them."""
    for channels, num_groups, pixels in ((32, 8, 32), (64, 16, 16), (128, 32, 16), (128, 8, 32)):
        case = {"name": "group norm", "channels": channels, "num_groups": num_groups, "pixels": pixels}
        cases = {
            "PyTorch's, channels last": case | {"is_channels_last": True, "is_ours": False},
            "PyTorch's, contiguous": case | {"is_channels_last": False, "is_ours": False},
            "ours, channels last": case | {"is_channels_last": True, "is_ours": True},
        }
        title = f"GroupNorm of {channels} channels in {num_groups} groups at {pixels}x{pixels}, bf16"
        yield title, measure(title, cases, options)


def sampling(options) -> Tables:
    for network in ("unet 128", "ddpm 32", "ddpm 128"):
        for batch_size in (8, 64):
            case = {"overrides": NETWORKS[network], "batch_size": batch_size}
            cases = {
                "the tutorials' loop, fp32": case | {"name": "reference sampling"},
                "ours": case | {"name": "our sampling"},
            }
            title = (
                f"Sampling, {network}, {batch_size} images at a time (evaluations of the network x images, a second)"
            )
            yield title, measure(title, cases, options)


def scaling(options) -> Tables:
    """How the time of a step grows with the batch and the width: the slope of log(seconds) over log(size)."""
    with tempfile.TemporaryDirectory() as folder:
        ours = {"name": "our training", "folder": folder}
        training = {
            "Training step over batch size, unet 64": {
                size: ours | {"overrides": NETWORKS["unet 64"], "batch_size": size} for size in (8, 32, 128)
            },
            "Training step over width, unet, batch 32": {
                size: ours | {"overrides": ["model=unet", f"model.hidden_size={size}"], "batch_size": 32}
                for size in (32, 64, 128)
            },
        }
        sampling = {
            "Sampling over number of images, ddpm 32": {
                size: {"name": "our sampling", "overrides": NETWORKS["ddpm 32"], "batch_size": size}
                for size in (16, 64, 256)
            }
        }
        for title, cases in (training | sampling).items():
            rows = measure(title, {str(size): case for size, case in cases.items()}, options)
            for row in rows:
                row["seconds_per_step"] = row["case"]["batch_size"] / row["images_per_second"]
            yield title, rows


def _slope(rows: list[dict]) -> float:
    """Of log(seconds a step) over log(size), by least squares."""
    points = [(math.log(float(row["label"])), math.log(row["seconds_per_step"])) for row in rows]
    x, y = (statistics.mean(values) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, b in points)


def _forget_files(folder: Path) -> None:
    """Drops the files of a folder from the system's cache, as after a restart of the machine."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _seconds_to_first_step() -> float:
    """From the command to the line of the first training step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "main.py", "experiment=demo", "train.log_every=1", f"runtime.output_dir={run}"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not ((metrics := run / "metrics.jsonl").exists() and metrics.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)}: ended with {process.returncode}")
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        process.terminate()
        process.wait()
    return seconds


def start(options) -> Tables:
    """How long a user waits."""

    def seconds_of(*arguments: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "main.py", *arguments], capture_output=True, check=False)
        return time.perf_counter() - begin

    subprocess.run([sys.executable, "prepare_data.py", "experiment=demo"], check=True, stdout=subprocess.DEVNULL)
    waits = {
        "`python main.py --help`": lambda: seconds_of("--help"),
        "`python main.py train.lr=1`, an error": lambda: seconds_of("train.lr=1"),
        "`python main.py experiment=demo`, first step": _seconds_to_first_step,
    }
    rows = []
    for label, wait in waits.items():
        for is_cold in (True, False) if hasattr(os, "posix_fadvise") else (False,):
            found = []
            for _ in range(max(3, options.rounds)):
                if is_cold:
                    _forget_files(Path(sys.prefix))
                found.append(wait())
            state = "cold" if is_cold else "warm"
            seconds = {"seconds": statistics.median(found), "lowest": min(found), "highest": max(found)}
            rows.append({"label": f"{label}, {state}"} | seconds)
    yield "Start", rows


# ---- the report


def to_markdown(found: dict, environment: dict) -> str:
    """Every table, and the machine they were measured on."""
    peak = max((row["gflops"] for row in found.get("Peaks", [])), default=None)
    parts = [" · ".join(f"{key} {value}" for key, value in environment.items())]
    for title, rows in found.items():
        if title == "Start":
            body = "| | seconds | lowest-highest |\n|---|---:|---:|\n" + "\n".join(
                f"| {row['label']} | {row['seconds']:.2f} | {row['lowest']:.2f}-{row['highest']:.2f} |" for row in rows
            )
        elif "seconds_per_step" in rows[0]:
            body = table(rows, peak, over=None) + f"\n\nSlope of log(seconds a step): {_slope(rows):.2f}"
        else:
            over = None if title == "Peaks" else "previous" if title.startswith("Step") else "first"
            body = table(rows, peak, over)
        parts.append(f"### {title}\n\n{body}")
    return "\n\n".join(parts) + "\n"


def describe_machine() -> dict:
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), processor)
    device = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return device | {
        "processor": f"{processor}, {available_cpus()} CPUs",
        "torch": version("torch"),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"some of {' '.join(SECTIONS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each contender takes")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn")
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="without .json and .md")
    options = parser.parse_args()
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {' '.join(SECTIONS)}")
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be positive")
    found, environment = {}, describe_machine()
    for name in options.sections or SECTIONS:
        for title, rows in SECTIONS[name](options):
            found[title] = rows
            report = to_markdown(found, environment)  # after each table: the next one may run out of memory
            record = {"environment": environment, "tables": found}
            options.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
            options.out.with_suffix(".md").write_text(report)
    print(report)


SECTIONS = {section.__name__: section for section in (peaks, training, steps, layers, sampling, scaling, start)}

if __name__ == "__main__":
    main()
