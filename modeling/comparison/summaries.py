"""What a run's folder says of the run, for the table and for the page: state, configuration, results and measures."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from modeling.comparison.curves import RunRecord, TooEarlyError, comparable, read_run
from modeling.comparison.measure_rows import Measured, flatten
from modeling.system.errors import UserError
from modeling.system.files import is_locked, sha256_of
from modeling.system.reading import read_json, read_yaml

EVALUATIONS = Path("evaluation")  # where evaluate.py writes if it is not told


class _Train(TypedDict):
    batch_size: int


class _Config(TypedDict):
    seed: int
    dataset: dict[str, Any]
    model: dict[str, Any]
    diffusion: dict[str, Any]
    optimizer: dict[str, Any]
    train: _Train


@dataclass(frozen=True)
class RunSummary:
    """A run, whatever has become of it.

    Args:
        name: the one that it was given, `runtime.name`.
        state: finished, running, stopped, failed (by its own numbers) or damaged.
        problem: why it failed, or why its curve cannot be read; empty for most.
        values: the configuration, dotted key -> value; `compared` is its part that shapes the curves.
        record: None where the curve cannot be read, or has not begun.
        metrics: what the run measured at its end; empty before it.
        evaluations: folder and content of each evaluation.json of this run's weights.
    """

    folder: Path
    name: str | None
    state: str
    problem: str
    config: dict[str, Any]
    values: dict[str, Any]
    compared: dict[str, Any]
    record: RunRecord | None
    metrics: dict[str, Any]
    evaluations: list[tuple[Path, dict[str, Measured]]]

    @property
    def batch_size(self) -> int:
        return self.config["train"]["batch_size"]

    @property
    def measures(self) -> list[tuple[str, Measured]]:
        """Name -> numbers of what was evaluated."""
        return [item for _, records in self.evaluations for item in records.items()]


def find_runs(places: Iterable[Path]) -> list[Path]:
    """The runs' folders among these or in them, at any depth, such as those of a search.

    Raises:
        UserError: if a place holds none.
    """
    found = []
    for place in places:
        before = len(found)
        for path, folders, files in os.walk(place):
            folders.sort()
            if "config.yaml" in files:
                found.append(Path(path))
                folders.clear()
        if len(found) == before:
            raise UserError(f"{place}: expected a run's folder, or one with runs in it")
    return found


def _read_evaluations(place: Path, problems: list[str] | None = None) -> dict[Path, dict[str, Measured]]:
    """What evaluate.py wrote below a folder, by file; one that is damaged is an error, or a line more of `problems`."""
    found = {}
    for path in sorted(path.resolve() for path in place.rglob("evaluation.json")):
        try:
            found[path] = read_json(path, dict[str, Measured])
        except UserError as error:
            if problems is None:
                raise
            problems.append(str(error))
    return found


def _weights_of(identity: dict[str, Any]) -> str | None:
    """The SHA-256 of what was measured, or of what drew the samples that were."""
    return (identity | identity.get("samples", {})).get("checkpoint_sha256")


def _evaluations(folder: Path, elsewhere: dict[Path, dict[str, Measured]]) -> list[tuple[Path, dict[str, Measured]]]:
    """What was measured of this run's weights, or of samples of them: folder, and name -> numbers."""
    found = elsewhere | _read_evaluations(folder)
    weights = [folder / "model.safetensors", folder / "checkpoints" / "last.pt"]
    own = {sha256_of(path) for path in weights if path.exists()} if found else set()
    evaluations = []
    for path, records in sorted(found.items()):
        if ours := {name: record for name, record in records.items() if _weights_of(record["identity"]) in own}:
            evaluations.append((path.parent, ours))
    return evaluations


def read_summary(folder: Path, elsewhere: dict[Path, dict[str, Measured]] | None = None) -> RunSummary:
    """What a run's folder holds, finished or just begun.

    Args:
        elsewhere: evaluations that may be of this run beside those in its folder; by default those in `evaluation/`.

    Raises:
        UserError: if it is no run's folder, or its configuration or an evaluation is damaged.
    """
    elsewhere = _read_evaluations(EVALUATIONS) if elsewhere is None else elsewhere
    try:
        config: dict[str, Any] = dict(read_yaml(folder / "config.yaml", _Config))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; expected the folder of a run that has begun") from error
    record, state, problem, failure = None, "stopped", "", folder / "error.txt"
    try:
        record = read_run(folder)
    except TooEarlyError as error:
        problem = str(error)
    except UserError as error:
        state, problem = "damaged", str(error)
    metrics = dict(record.metrics) if record is not None and record.metrics is not None else {}
    if is_locked(folder / "lock"):
        state = "running"
    elif metrics:
        state = "finished"
    elif state != "damaged" and failure.exists():
        state, problem = "failed", failure.read_text(errors="replace").strip()
    return RunSummary(
        folder=folder,
        name=config.get("runtime", {}).get("name"),
        state=state,
        problem=problem,
        config=config,
        values=flatten(config),
        compared=flatten(comparable(config)),
        record=record,
        metrics=metrics,
        evaluations=_evaluations(folder, elsewhere),
    )


def read_summaries(folders: Iterable[Path]) -> tuple[list[RunSummary], list[str]]:
    """The runs in these folders, and a line for each that failed or cannot be read, as for an evaluation elsewhere.

    Raises:
        UserError: if none can be read.
    """
    runs, problems = [], []
    elsewhere = _read_evaluations(EVALUATIONS, problems)
    for folder in folders:
        try:
            runs.append(read_summary(folder, elsewhere))
        except UserError as error:  # one damaged run hides no other
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{error.filename}: {error.strerror}")
        else:
            if runs[-1].problem:
                problems.append(f"{folder}: {runs[-1].state}: {runs[-1].problem}")
    if not runs:
        raise UserError("\n".join(problems))
    return runs, problems


# ---- what differs between runs


def as_text(value: Any) -> str:
    """A configuration's value as it is typed."""
    return value if isinstance(value, str) else json.dumps(value)


def _is_missing(key: str, values: list[dict[str, Any]]) -> bool:
    return any(one.get(key) is None for one in values)


def differing_keys(values: list[dict[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all, those that every run has first."""
    keys = {key for one in values for key in one}
    differing = [key for key in keys if len({as_text(one.get(key)) for one in values}) > 1]
    return sorted(differing, key=lambda key: (_is_missing(key, values), not key.endswith(".name"), key))


def telling_keys(values: list[dict[str, Any]]) -> list[str]:
    """The keys that tell runs apart: a value that some lack follows from another choice, such as the network's."""
    differing = differing_keys(values)
    return [key for key in differing if not _is_missing(key, values)] or differing


def order(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then text."""
    is_number = isinstance(value, int | float)
    return not is_number, value if is_number else 0, as_text(value)


def in_order_of_settings(runs: list[RunSummary]) -> list[RunSummary]:
    """The same runs by the first setting that tells them apart, those equal in it by the second, and so on."""
    keys = telling_keys([run.compared for run in runs])
    return sorted(runs, key=lambda run: [order(run.compared.get(key)) for key in keys])
