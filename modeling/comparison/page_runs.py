"""What the page shows of a run: the configuration, its lines, the losses by timestep, pictures and measures."""

import base64
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from modeling.comparison.bands import Comparison, compare
from modeling.comparison.measure_rows import Measured
from modeling.comparison.references import Reference, choose_reference, command_of
from modeling.comparison.report import judge
from modeling.comparison.summaries import RunSummary
from modeling.run.identity import ROOT
from modeling.system.errors import UserError
from modeling.system.reading import read_json_lines, read_yaml

NUM_POINTS = 250  # of a run's curves, at most: all are in the page
NUM_GRIDS = 12  # of a run's sample grids, of either weights, at most
_KINDS = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp"}


_Row = TypedDict(
    "_Row",
    {
        "step": int,
        "train/loss": NotRequired[float | None],
        "train/loss_smoothed": NotRequired[float | None],
        "train/lr": NotRequired[float | None],
        "images_per_second": NotRequired[float | None],
    },
)


@dataclass(frozen=True)
class Picture:
    """A picture as an address that holds it."""

    address: str
    name: str
    step: int = 0


@dataclass(frozen=True)
class PageRun(RunSummary):
    """A run as the page shows it.

    Args:
        lines: of metrics.jsonl, joined to at most NUM_POINTS.
        is_on_track: beside the nearest reference; None where there is none.
        verdict: the same in words, or why there is none.
        grids: of samples, "ema" and "raw" -> pictures by step.
        numbers: name of the file's record -> its numbers and what they depend on.
    """

    lines: list[dict[str, Any]]
    comparison: Comparison | None
    is_on_track: bool | None
    verdict: str
    command: str
    grids: dict[str, list[Picture]]
    inputs: list[Picture]
    numbers: list[tuple[str, Measured]]
    pictures: list[Picture]


def rounded(value: float | None) -> float | None:
    """With five digits, which are enough to draw; None for what is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def _mean(values: Iterable[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return rounded(sum(finite) / len(finite)) if finite else None


def _lines(path: Path, batch_size: int) -> list[dict[str, Any]]:
    """The curves: raw losses and speeds are means over the lines that are joined, the rest is the last one's."""
    rows = [row for row in read_json_lines(path, _Row) if row is not None] if path.exists() else []
    stride = max(1, math.ceil(len(rows) / NUM_POINTS))
    points = []
    for start in range(0, len(rows), stride):
        part = rows[start : start + stride]
        last = part[-1]
        points.append(
            {
                "step": last["step"],
                "images": last["step"] * batch_size,
                "loss": _mean(row.get("train/loss") for row in part),
                "smoothed": rounded(last.get("train/loss_smoothed")),
                "lr": rounded(last.get("train/lr")),
                "speed": _mean(row.get("images_per_second") for row in part),
            }
        )
    return points


def picture(path: Path) -> Picture:
    """A picture, inlined."""
    content = base64.b64encode(path.read_bytes()).decode()
    step = int(path.stem) if path.stem.isdecimal() else 0
    return Picture(f"data:{_KINDS[path.suffix]};base64,{content}", path.stem, step)


def _pictures(folder: Path) -> list[Picture]:
    return [picture(path) for path in sorted(folder.glob("*")) if path.suffix in _KINDS and path.is_file()]


def _pictures_of_samples(summary: RunSummary) -> list[Picture]:
    """Those that evaluate.py drew of samples of this run."""
    places = [
        place
        for place, records in summary.evaluations
        if any("samples" in record["identity"] for record in records.values())
    ]
    return [one for place in places for one in _pictures(place)]


def _grids(folder: Path) -> list[Picture]:
    """Those of at most NUM_GRIDS steps, evenly spaced, the first and the last among them."""
    paths = sorted((path for path in folder.glob("*.png") if path.stem.isdecimal()), key=lambda path: int(path.stem))
    if len(paths) > NUM_GRIDS:
        paths = [paths[round(i * (len(paths) - 1) / (NUM_GRIDS - 1))] for i in range(NUM_GRIDS)]
    return [picture(path) for path in paths]


def _own_measures(config: dict[str, Any], metrics: dict[str, Any]) -> list[tuple[str, Measured]]:
    """The losses at the end of the run, which are comparable for the same images and the same process."""
    values = {key.removeprefix("eval/"): value for key, value in metrics.items() if key.startswith("eval/")}
    identity = {"num_images": config["train"].get("num_eval_images"), "data_sha256": metrics.get("data_sha256")}
    return [("end of training", {"values": values, "identity": identity | config["diffusion"]})]


def read_page_run(summary: RunSummary, references: dict[str, Reference]) -> PageRun:
    """What the page shows of a run.

    Raises:
        UserError: if one of its files is damaged.
    """
    folder = summary.folder
    comparison, is_on_track, verdict = None, None, ""
    if summary.record is not None:
        try:
            comparison = compare(summary.record, *choose_reference(references, summary.config))
            is_on_track, verdict = judge(comparison)
        except UserError as error:  # nothing to compare with: the page says so
            verdict = str(error)
    return PageRun(
        **vars(summary),
        lines=_lines(folder / "metrics.jsonl", summary.batch_size),
        comparison=comparison,
        is_on_track=is_on_track,
        verdict=verdict,
        command=command_of(summary.config, read_yaml(ROOT / "params.yaml", dict[str, Any])),
        grids={kind: _grids(folder / "samples" / kind) for kind in ("ema", "raw")},
        inputs=[picture(path) for path in [folder / "samples" / "inputs.png"] if path.exists()],
        numbers=_own_measures(summary.config, summary.metrics) + summary.measures,
        pictures=_pictures(folder) + _pictures_of_samples(summary),
    )
