"""What the page shows of a run: the configuration, its lines, the losses by timestep, pictures and measures."""

import base64
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from modeling.comparison.bands import Comparison, compare
from modeling.comparison.curves import RunRecord, comparable, read_run
from modeling.comparison.measure_rows import Measured, flatten
from modeling.comparison.references import Reference, choose_reference, command_of
from modeling.comparison.report import judge
from modeling.run.identity import ROOT
from modeling.system.errors import UserError
from modeling.system.files import sha256_of
from modeling.system.reading import read_json, read_json_lines, read_yaml

NUM_POINTS = 250  # of a run's curves, at most: all are in the page
NUM_GRIDS = 12  # of a run's sample grids, of either weights, at most
_KINDS = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp"}


class _Train(TypedDict):
    batch_size: int


class _Config(TypedDict):
    seed: int
    dataset: dict[str, Any]
    model: dict[str, Any]
    diffusion: dict[str, Any]
    optimizer: dict[str, Any]
    train: _Train


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
class PageRun:
    """A run as the page shows it.

    Args:
        values: the configuration, dotted key -> value; `compared` is its part that shapes the curves.
        record: None for a run whose curve cannot be read; `problem` then says why.
        metrics: what the run measured at its end; empty before it.
        lines: of metrics.jsonl, joined to at most NUM_POINTS.
        is_on_track: beside the nearest reference; None where there is none.
        verdict: the same in words, or why there is none.
        grids: of samples, "ema" and "raw" -> pictures by step.
        measures: name of the file's record -> its numbers and what they depend on.
    """

    folder: Path
    name: str | None
    values: dict[str, Any]
    compared: dict[str, Any]
    batch_size: int
    record: RunRecord | None
    problem: str
    metrics: dict[str, Any]
    lines: list[dict[str, Any]]
    comparison: Comparison | None
    is_on_track: bool | None
    verdict: str
    command: str
    grids: dict[str, list[Picture]]
    inputs: list[Picture]
    measures: list[tuple[str, Measured]]
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


def _grids(folder: Path) -> list[Picture]:
    """Those of at most NUM_GRIDS steps, evenly spaced, the first and the last among them."""
    paths = sorted((path for path in folder.glob("*.png") if path.stem.isdecimal()), key=lambda path: int(path.stem))
    if len(paths) > NUM_GRIDS:
        paths = [paths[round(i * (len(paths) - 1) / (NUM_GRIDS - 1))] for i in range(NUM_GRIDS)]
    return [picture(path) for path in paths]


def _evaluations(folder: Path) -> list[tuple[Path, dict[str, Measured]]]:
    """What evaluate.py measured of this run's weights, in its folder or in `evaluation/`."""
    found = {path.resolve() for place in (folder, Path("evaluation")) for path in place.rglob("evaluation.json")}
    weights = [folder / "model.safetensors", folder / "checkpoints" / "last.pt"]
    own = {sha256_of(path) for path in weights if path.exists()} if found else set()
    evaluations = []
    for path in sorted(found):
        records = read_json(path, dict[str, Measured])
        identities = [record["identity"] for record in records.values()]
        if own & {(one | one.get("samples", {})).get("checkpoint_sha256") for one in identities}:
            evaluations.append((path.parent, records))
    return evaluations


def _own_measures(config: dict[str, Any], metrics: dict[str, Any]) -> list[tuple[str, Measured]]:
    """The losses at the end of the run, which are comparable for the same images and the same process."""
    values = {key.removeprefix("eval/"): value for key, value in metrics.items() if key.startswith("eval/")}
    identity = {"num_images": config["train"].get("num_eval_images"), "data_sha256": metrics.get("data_sha256")}
    return [("end of training", {"values": values, "identity": identity | config["diffusion"]})]


def read_page_run(folder: Path, references: dict[str, Reference]) -> PageRun:
    """What a run's folder holds, finished or just begun.

    Raises:
        UserError: if it is no run's folder, or one of its files is damaged.
    """
    try:
        config: dict[str, Any] = dict(read_yaml(folder / "config.yaml", _Config))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; expected the folder of a run that has begun") from error
    record, problem, comparison, is_on_track, verdict = None, "", None, None, ""
    try:
        record = read_run(folder)
        comparison = compare(record, *choose_reference(references, config))
        is_on_track, verdict = judge(comparison)
    except UserError as error:  # too early, or nothing to compare with: the page says so
        problem, verdict = (str(error), "") if record is None else ("", str(error))
    metrics = dict(record.metrics) if record is not None and record.metrics is not None else {}
    batch_size = config["train"]["batch_size"]
    evaluations = _evaluations(folder)
    return PageRun(
        folder=folder,
        name=config.get("runtime", {}).get("name"),
        values=flatten(config),
        compared=flatten(comparable(config)),
        batch_size=batch_size,
        record=record,
        problem=problem,
        metrics=metrics,
        lines=_lines(folder / "metrics.jsonl", batch_size),
        comparison=comparison,
        is_on_track=is_on_track,
        verdict=verdict,
        command=command_of(config, read_yaml(ROOT / "params.yaml", dict[str, Any])),
        grids={kind: _grids(folder / "samples" / kind) for kind in ("ema", "raw")},
        inputs=[picture(path) for path in [folder / "samples" / "inputs.png"] if path.exists()],
        measures=_own_measures(config, metrics) + [item for _, records in evaluations for item in records.items()],
        pictures=_pictures(folder) + [one for place, _ in evaluations for one in _pictures(place)],
    )
