"""What was measured, as Markdown."""

import math
import platform
import statistics
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from modeling.runtime import available_cpus


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


def slope(rows: list[dict]) -> float:
    """Of log(seconds a step) over log(size), by least squares."""
    points = [(math.log(float(row["label"])), math.log(row["seconds_per_step"])) for row in rows]
    x, y = (statistics.mean(values) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, b in points)


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
            body = table(rows, peak, over=None) + f"\n\nSlope of log(seconds a step): {slope(rows):.2f}"
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
