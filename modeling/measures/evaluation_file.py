"""`evaluation.json`: numbers, each with everything that it depends on."""

import json
from pathlib import Path
from typing import Any, TypedDict

from modeling.measures.resumable import as_stored
from modeling.system.errors import UserError

FILE = "evaluation.json"


class Record(TypedDict):
    """The numbers of one measure."""

    values: dict[str, Any]
    identity: dict[str, Any]  # everything that they depend on, plain values


def read_records(path: Path) -> dict[str, Record]:
    """Name -> record; nothing where there is no file.

    Raises:
        UserError: for a damaged file.
    """
    try:
        records = json.loads(path.read_text())
        for name, record in records.items():
            if not isinstance(record["values"], dict) or not isinstance(record["identity"], dict):
                raise TypeError(f"{name} is no record")
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, or name another folder with out=") from error
    return records


def is_of(record: Record, identity: dict[str, Any]) -> bool:
    """Whether a record has this identity; it may hold more keys."""
    return as_stored(identity).items() <= record["identity"].items()


def describe_record(name: str, record: Record) -> str:
    """A line for each number, for the terminal."""
    lines = []
    for key, value in record["values"].items():
        if name == "bits_per_dim":
            error = "?" if value["standard_error"] is None else f"{value['standard_error']:.3f}"
            text = f"{value['total']:.3f} +- {error} (rate {value['rate']:.3f}, distortion {value['distortion']:.3f})"
        elif isinstance(value, dict):
            text = ", ".join(f"{part} {number:.4f}" for part, number in value.items())
        else:
            text = f"{value:.4f}"
        lines.append(f"{name:14s}{key:30s}{text}")
    return "\n".join(lines)
