"""The numbers of several runs beside each other: only what can be compared shares a row."""

import json
from typing import Any

from typing_extensions import TypedDict

_HIGHER, _LOWER = "higher is better", "lower is better"
_HIGHER_IS_BETTER = ("precision", "recall", "inception_score")
# Of a number's identity: which model and samples, and on which machine.
_NOT_OF_A_MEASURE = {"checkpoint", "checkpoint_sha256", "images_sha256", "sha256", "device", "threads", "torch"}


class Measured(TypedDict):
    """Numbers by name, and everything that they depend on."""

    values: dict[str, float | dict[str, Any]]
    identity: dict[str, Any]


class Cell(TypedDict):
    """A run's number."""

    text: str
    total: float
    is_best: bool


class MeasureRow(TypedDict):
    """A number of several runs, and what it depends on beside the run."""

    name: str
    better: str  # which way
    identity: dict[str, Any]
    cells: dict[int, Cell]  # by the run's place


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of nested dictionaries."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _without_model(identity: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for two models to be compared, dotted key -> value."""
    flat = flatten(identity)
    return {key: value for key, value in flat.items() if key.rpartition(".")[2] not in _NOT_OF_A_MEASURE}


def _better(key: str) -> str:
    name = key.rpartition("/")[2]
    if name.endswith("_std"):
        return "spread"
    if name == "heldout_linear":
        return "of the best linear denoiser: a ceiling"
    if name == "memorisation_ratio":
        return "near 1: as new as held-out images; 0: copies"
    return _HIGHER if name in _HIGHER_IS_BETTER else _LOWER


def measure_rows(measures: list[list[tuple[str, Measured]]]) -> list[MeasureRow]:
    """A row for each number and each identity; the best of a row is marked where there are several.

    Args:
        measures: of each run, name -> numbers; those by timestep are left out.
    """
    rows: dict[str, MeasureRow] = {}
    for place, records in enumerate(measures):
        for name, record in records:
            identity = _without_model(record["identity"])
            for key, value in record["values"].items():
                bound = value if isinstance(value, dict) else {"total": value}
                if (total := bound.get("total")) is None or key == "bins":
                    continue
                error = bound.get("standard_error")
                text = f"{total:.4f}" if error is None else f"{total:.4f} ± {error:.4f}"
                title = key if "/" in key else f"{name}: {key}"
                new = MeasureRow(name=title, better=_better(key), identity=identity, cells={})
                row = rows.setdefault(json.dumps([name, key, identity], sort_keys=True), new)
                row["cells"][place] = Cell(text=text, total=total, is_best=False)
    for row in rows.values():
        totals = [cell["total"] for cell in row["cells"].values()]
        best = {_HIGHER: max, _LOWER: min}.get(row["better"])
        if best is not None and len(totals) > 1:
            for cell in row["cells"].values():
                cell["is_best"] = cell["total"] == best(totals)
    return list(rows.values())
