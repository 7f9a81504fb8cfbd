"""What was measured, as Markdown."""

import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from modeling.runtime import available_cpus


def table(rows: list[dict], over: str = "first") -> str:
    """Rows as Markdown; the share of the peak is of the fastest of the machine's own limits, if any is among the rows.

    Args:
        over: the row that a ratio refers to, "first" or "previous".
    """
    peak = max((row["gflops"] for row in rows if row["case"]["name"].startswith("peak")), default=None)
    has_launches = any(row["launches"] is not None for row in rows)
    header = "| | images/s | lowest-highest | ratio | GFLOP/s | of the peak | peak memory |"
    lines = [header + " launches a step |" * has_launches, "|---|" + "---:|" * (6 + has_launches)]
    for index, row in enumerate(rows):
        rate = row["images_per_second"]
        cells = [row["label"], f"{rate:.1f}", f"{row['lowest']:.1f}-{row['highest']:.1f}"]
        if row["case"]["name"].startswith("peak"):
            cells[1:] = ["", "", ""]
        else:
            base = rows[0] if over == "first" else rows[max(0, index - 1)]
            cells.append(f"{rate / base['images_per_second']:.2f}")
        cells.append(f"{row['gflops']:,.0f}" if row["gflops"] else "")
        cells.append(f"{100 * row['gflops'] / peak:.0f} %" if peak and row["gflops"] else "")
        cells.append(f"{row['memory_bytes'] / 1e9:.2f} GB")
        if has_launches:
            cells.append(f"{row['launches']:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def to_markdown(found: dict[str, list[dict]], environment: dict) -> str:
    """Every table, and the machine on which they were measured."""
    parts = [" · ".join(f"{key} {value}" for key, value in environment.items())]
    for title, rows in found.items():
        if title == "Start":
            body = "| | seconds | lowest-highest |\n|---|---:|---:|\n" + "\n".join(
                f"| {row['label']} | {row['seconds']:.2f} | {row['lowest']:.2f}-{row['highest']:.2f} |" for row in rows
            )
        else:
            body = table(rows, over="previous" if title.startswith("Step") else "first")
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
