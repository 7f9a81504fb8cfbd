"""References for `compare.py`: finished runs, each a JSON file with its curve, its losses and what they are of."""

import json
import math
import re
from pathlib import Path

import numpy as np

from modeling.comparison.bands import POINT, ComparisonError, Curve, RunRecord, comparable
from modeling.run.identity import describe_differences, differences
from modeling.system.files import write_atomically

NUM_POINTS = 100  # of a reference's curve, at most
MIN_LINES = 30  # of metrics.jsonl, to know a scatter
MUST_MATCH = ("dataset.name", "diffusion.")  # else the losses are of different things
_HARDWARE = ("device", "threads", "precision", "torch")
_COPIED = ("steps", "images", "seconds", "images_per_second", "parameters", "bins", "data_sha256", "code_sha256")
KEYS = {"name", "command", "date", "config", "hardware", "losses", "curve", *_COPIED}


def image_scatter(curve: Curve) -> np.ndarray:
    """(N,) standard deviation of one image's loss, at each of N >= 3 lines, from the scatter of the lines around there.

    A line's distance from the straight line through its neighbours knows no trend (Gasser et al. 1986, Biometrika 73).
    Of 51 of them, as shares of the loss, the 0.8 quantile counts: the few lines where the loss falls steeply do not.
    """
    centres, losses, variances = (curve.edges[1:] + curve.edges[:-1]) / 2, curve.losses, 1 / curve.counts
    share = (centres[2:] - centres[1:-1]) / (centres[2:] - centres[:-2])  # of the neighbour before
    distances = np.abs(share * losses[:-2] + (1 - share) * losses[2:] - losses[1:-1]) / losses[1:-1]
    distances /= np.sqrt(share**2 * variances[:-2] + (1 - share) ** 2 * variances[2:] + variances[1:-1])
    first = np.clip(np.arange(len(losses)) - 26, 0, max(0, len(distances) - 51))
    return losses * [np.quantile(distances[start : start + 51], 0.8) / 1.2816 for start in first]  # normal: 1.2816


def make_reference(run: RunRecord, name: str, command: str, date: str) -> dict:
    """A finished run as a reference.

    Raises:
        ComparisonError: for an unfinished run, or one with too few lines or some in which no step counted.
    """
    curve, metrics = run.curve, run.metrics
    if metrics is None:
        raise ComparisonError(f"a reference needs a finished run; this one stands at step {run.step:,}")
    if len(curve.losses) < MIN_LINES or not curve.counts.all() or curve.edges[0]:
        raise ComparisonError(
            f"a reference needs at least {MIN_LINES} lines in metrics.jsonl, from step 1 on, each with a loss; "
            f"this run has {np.count_nonzero(curve.counts)} of {len(curve.losses)}, from image {curve.edges[0]:,.0f} on"
        )
    ends = curve.edges[:0:-1][:: math.ceil(len(curve.losses) / NUM_POINTS)][::-1]  # the last line's is always kept
    edges, steps = np.concatenate([[0], ends]), ends / run.config["train"]["batch_size"]
    losses, counts = curve.average(edges)
    variances, _ = Curve(curve.edges, image_scatter(curve) ** 2, curve.counts).average(edges)
    table = np.stack([steps, ends, counts, losses, np.sqrt(variances / counts)], axis=1).tolist()
    try:
        return {
            "name": name,
            "command": command,
            "date": date,
            **{key: metrics[key] for key in _COPIED},
            "hardware": {key: metrics[key] for key in _HARDWARE},
            "losses": {key: value for key, value in metrics.items() if key.startswith("eval/")},
            "config": comparable(run.config),
            "curve": [dict(zip(POINT, row, strict=True)) for row in table],
        }
    except KeyError as error:
        raise ComparisonError(f"metrics.json lacks {error}") from error


def save_reference(reference: dict, folder: Path) -> Path:
    """Writes `<folder>/<name>.json`, a line for each key and each point of the curve.

    Raises:
        ComparisonError: for a name that is taken, or is none.
    """
    path = folder / f"{reference['name']}.json"
    if not re.fullmatch(r"\w[\w.-]*", reference["name"]):
        raise ComparisonError(f"--save {reference['name']}: expected a name of letters, digits and . _ -")
    if path.exists():
        raise ComparisonError(f"--save {reference['name']}: {path} exists already; choose another name or delete it")
    points = ",\n    ".join(json.dumps(point) for point in reference["curve"])
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in reference.items() if key != "curve"]
    lines.append(f'  "curve": [\n    {points}\n  ]')
    write_atomically(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    return path


def load_references(folder: Path) -> dict[str, dict]:
    """A folder's references by name.

    Raises:
        ComparisonError: when one is damaged.
    """
    references = {}
    for path in sorted(folder.glob("*.json")):
        try:
            references[path.stem] = json.loads(path.read_text())
            missing = ", ".join(sorted(KEYS - references[path.stem].keys()))
        except (ValueError, AttributeError) as error:
            raise ComparisonError(f"{path} is damaged: {error}") from error
        if missing:
            raise ComparisonError(f"{path} is no reference: it lacks {missing}")
    return references


def choose_reference(references: dict[str, dict], config: dict, name: str | None = None) -> tuple[dict, dict]:
    """The reference of this name, or else the one whose configuration differs in the fewest keys.

    Returns:
        It, and where it differs: dotted key -> (there, here).

    Raises:
        ComparisonError: where it is unknown, or its losses are of something else; or none or several are nearest.
    """
    if name is not None and name not in references:
        raise ComparisonError(f"--reference {name}: unknown, there are: {', '.join(references) or 'none'}")
    found, refused = {}, {}
    for key in references if name is None else [name]:
        changed = found[key] = differences(references[key]["config"], comparable(config))
        # A key that is null or missing on one side says nothing: it may be younger than the reference.
        other = [k for k, pair in changed.items() if k.startswith(MUST_MATCH) and None not in pair]
        if other:
            refused[key] = f"{key} ({describe_differences({k: changed[k] for k in other}, key)})"
            del found[key]
    if not found:
        raise ComparisonError(f"no comparable reference: {'; '.join(refused.values()) or 'there is none at all'}")
    fewest = min(map(len, found.values()))
    nearest = [key for key, changed in found.items() if len(changed) == fewest]
    if len(nearest) > 1:
        raise ComparisonError(f"{', '.join(nearest)} differ in {fewest} keys each: choose one with --reference")
    return references[nearest[0]], found[nearest[0]]
