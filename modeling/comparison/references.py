"""Finished runs that others are compared with: each is a JSON file with its curve and its losses at the end."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from modeling.comparison.curves import Curve, RunRecord, comparable
from modeling.run.identity import describe_differences, differences
from modeling.system.errors import UserError
from modeling.system.files import write_atomically
from modeling.system.overrides import override
from modeling.system.reading import check, parse_json, reading

NUM_POINTS = 100  # of a reference's curve, at most
MIN_LINES = 30  # of metrics.jsonl, below which the scatter is unknown
BINS = "eval/heldout_ema"  # the loss at the end that is also compared by timestep
CEILING = "eval/heldout_linear"  # of the data, not of the run: the best linear denoiser's
MUST_MATCH = ("dataset.name", "diffusion.")  # else the losses measure different things

Differences = dict[str, tuple[Any, Any]]  # dotted key -> (value in the reference, in the run)


class Point(TypedDict):
    """The mean training loss since the point before."""

    step: float
    images: float  # seen so far
    count: float  # images whose losses were averaged
    loss: float
    standard_error: float


class Hardware(TypedDict):
    device: str
    threads: int
    precision: str
    torch: str


class Reference(TypedDict):
    """A finished run; all but the first three keys come from its files."""

    name: str
    command: str  # that trains it
    date: str  # when it was saved
    steps: int
    images: int
    seconds: float
    images_per_second: float
    parameters: int
    bins: dict[str, dict[str, float]]  # name of a loss at the end -> range of timesteps -> loss
    data_sha256: str
    code_sha256: str
    hardware: Hardware
    losses: dict[str, float]  # at the end
    config: dict[str, Any]  # the part that shapes the curve
    curve: list[Point]


def image_scatter(curve: Curve) -> np.ndarray:
    """The standard deviation of one image's loss at each of N >= 3 lines, (N,), from the scatter of the lines nearby.

    The distance of a line from the straight line through its neighbours does not depend on a linear trend (Gasser et
    al. 1986, Biometrika 73). The 0.8 quantile of 51 such distances, as shares of the loss, leaves out the few lines
    where the loss falls steeply.
    """
    centres, losses, variances = (curve.edges[1:] + curve.edges[:-1]) / 2, curve.losses, 1 / curve.counts
    share = (centres[2:] - centres[1:-1]) / (centres[2:] - centres[:-2])  # of the neighbour before
    distances = np.abs(share * losses[:-2] + (1 - share) * losses[2:] - losses[1:-1]) / losses[1:-1]
    distances /= np.sqrt(share**2 * variances[:-2] + (1 - share) ** 2 * variances[2:] + variances[1:-1])
    first = np.clip(np.arange(len(losses)) - 26, 0, max(0, len(distances) - 51))
    # 1.2816 is the 0.8 quantile of a standard normal variable's distance from 0.
    return losses * [np.quantile(distances[start : start + 51], 0.8) / 1.2816 for start in first]


def make_reference(run: RunRecord, name: str, command: str, date: str) -> Reference:
    """A finished run as a reference.

    Raises:
        UserError: for an unfinished run, or one with too few lines or with lines in which no step counted.
    """
    curve, metrics = run.curve, run.metrics
    if metrics is None:
        raise UserError(f"a reference needs a finished run; this run is at step {run.step:,}")
    if len(curve.losses) < MIN_LINES or not curve.counts.all() or curve.edges[0]:
        raise UserError(
            f"a reference needs at least {MIN_LINES} lines in metrics.jsonl, from step 1 on, each with a loss; "
            f"this run has {np.count_nonzero(curve.counts)} of {len(curve.losses)}, from image {curve.edges[0]:,.0f} on"
        )
    ends = curve.edges[:0:-1][:: math.ceil(len(curve.losses) / NUM_POINTS)][::-1]  # the last line's is always kept
    edges, steps = np.concatenate([[0], ends]), ends / run.config["train"]["batch_size"]
    losses, counts = curve.average(edges)
    variances, _ = Curve(curve.edges, image_scatter(curve) ** 2, curve.counts).average(edges)
    table = np.stack([steps, ends, counts, losses, np.sqrt(variances / counts)], axis=1).tolist()
    about = {"name": name, "command": command, "date": date}
    made = {key: metrics[key] for key in Reference.__annotations__ if key in metrics} | {
        "hardware": {key: metrics[key] for key in Hardware.__annotations__ if key in metrics},
        "losses": {key: loss for key, loss in metrics.items() if key.startswith("eval/") and key != CEILING},
        "config": comparable(run.config),
        "curve": [dict(zip(Point.__annotations__, row, strict=True)) for row in table],
    }
    with reading("metrics.json or details.json", "file of a whole run"):
        return check(about | made, Reference)


def command_of(config: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """The command that trains with this configuration on any machine: it names what differs from the default."""
    default = comparable(default)
    wanted = {  # what an older configuration does not know stays as it is
        key: value | config[key] if isinstance(value, dict) else config[key] for key, value in default.items()
    }
    changed = differences(default, comparable(wanted))
    return " ".join(["python main.py", *(override(key, new) for key, (_, new) in changed.items())])


def save_reference(reference: Reference, folder: Path) -> Path:
    """Writes `<folder>/<name>.json`, a line for each key and each point of the curve.

    Raises:
        UserError: if the name is taken or cannot be a file's.
    """
    path = folder / f"{reference['name']}.json"
    if not re.fullmatch(r"\w[\w.-]*", reference["name"]):
        raise UserError(f"--save {reference['name']}: expected a name of letters, digits and . _ -")
    if path.exists():
        raise UserError(f"--save {reference['name']}: {path} exists already; choose another name or delete it")
    points = ",\n    ".join(json.dumps(point) for point in reference["curve"])
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in reference.items() if key != "curve"]
    lines.append(f'  "curve": [\n    {points}\n  ]')
    write_atomically(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    return path


def load_references(folder: Path) -> dict[str, Reference]:
    """A folder's references by name.

    Raises:
        UserError: if one is damaged.
    """
    references = {}
    for path in sorted(folder.glob("*.json")):
        with reading(path, "reference", "delete it, or name another folder with --references"):
            references[path.stem] = reference = parse_json(path.read_bytes(), Reference)
            if not reference["curve"] or not {BINS} <= reference["bins"].keys() & reference["losses"].keys():
                raise ValueError(f"it needs a curve and {BINS}")
    return references


def choose_reference(
    references: dict[str, Reference], config: Mapping[str, Any], name: str | None = None
) -> tuple[Reference, Differences]:
    """The reference of this name, else the one whose configuration differs from the run's in the fewest keys.

    Raises:
        UserError: if the name is unknown, the losses measure something else, or no single reference is nearest.
    """
    if name is not None and name not in references:
        raise UserError(f"--reference {name}: unknown, available: {', '.join(references) or 'none'}")
    found, rejected = {}, []
    for key in references if name is None else [name]:
        changed = differences(references[key]["config"], comparable(config))
        # A key that is null or missing on one side says nothing: it may be newer than the reference.
        other = {k: pair for k, pair in changed.items() if k.startswith(MUST_MATCH) and None not in pair}
        if other:
            rejected.append(f"{key} ({describe_differences(other, key)})")
        else:
            found[key] = changed
    if not found:
        raise UserError(f"no comparable reference: {'; '.join(rejected) or 'none is saved'}")
    fewest = min(map(len, found.values()))
    nearest = [key for key, changed in found.items() if len(changed) == fewest]
    if len(nearest) > 1:
        raise UserError(f"{', '.join(nearest)} differ in {fewest} keys each: choose one with --reference")
    return references[nearest[0]], found[nearest[0]]
