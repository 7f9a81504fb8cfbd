"""`evaluation.json`: numbers, each with everything that it depends on."""

from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from modeling.measures.resumable import as_stored
from modeling.system.reading import read_json

FILE = "evaluation.json"


class Bound(TypedDict):
    """What is shown of a bound in bits per dimension."""

    total: float
    standard_error: float | None
    rate: float
    distortion: float


class Record(TypedDict):
    """The numbers of one measure."""

    values: dict[str, float | dict[str, float] | Bound]
    identity: dict[str, Any]  # everything that they depend on, plain values


def read_records(path: Path) -> dict[str, Record]:
    """Name -> record; nothing where there is no file.

    Raises:
        UserError: for a damaged file.
    """
    if not path.exists():
        return {}
    return read_json(path, dict[str, Record], "delete it, or name another folder with out=")


def is_of(record: Record, identity: dict[str, Any]) -> bool:
    """Whether a record has this identity; it may hold more keys."""
    return as_stored(identity).items() <= record["identity"].items()


def describe_record(name: str, record: Record) -> str:
    """A line for each number, for the terminal."""
    lines = []
    for key, value in record["values"].items():
        if isinstance(value, dict) and "rate" in value:
            error = "?" if value["standard_error"] is None else f"{value['standard_error']:.3f}"
            text = f"{value['total']:.3f} +- {error} (rate {value['rate']:.3f}, distortion {value['distortion']:.3f})"
        elif isinstance(value, dict):
            text = ", ".join(f"{part} {number:.4f}" for part, number in value.items())
        else:
            text = f"{value:.4f}"
        lines.append(f"{name:14s}{key:30s}{text}")
    return "\n".join(lines)
