"""What a run records: `metrics.jsonl`, always and completely, and beside it Weights & Biases, if that works."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from typing_extensions import TypedDict

from modeling.config import Config
from modeling.run.wandb_tracker import WandbTracker
from modeling.system.files import naming, sync, write_atomically
from modeling.system.reading import read_json_lines


class _Row(TypedDict):
    """A line of metrics.jsonl, with the metrics beside its step."""

    step: int


class JsonLines:
    """`metrics.jsonl`: one JSON object a line, in the order of the steps.

    `rows` are all lines so far. Those after `step` are dropped, damaged or not, because the run will write them again;
    a warning says how many lines before it are damaged or missing.

    Args:
        path: the file.
        step: where the run resumes.
        log_every: steps between lines.
    """

    def __init__(self, path: Path, step: int = 0, log_every: int = 1):
        self.path, self.rows = path, []
        num_lost = num_damaged = last = 0
        for row in read_json_lines(path, _Row) if path.exists() else []:
            if row is None or row["step"] <= last:
                num_damaged += 1
            elif row["step"] <= step:
                self.rows.append(dict(row))
                num_lost, num_damaged, last = num_lost + num_damaged, 0, row["step"]
        # Behind the last whole line: how many were due. A run that began from another folder's checkpoint has none.
        num_due = step // log_every - last // log_every
        num_lost += num_due if self.rows else min(num_damaged, num_due)
        if num_lost:
            print(f"warning: {path}: {num_lost} lines up to step {step} are damaged and lost", file=sys.stderr)
        self._write()

    def _write(self) -> None:
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Appends a line, or adds to the last one if that is of the same step."""
        if self.rows and self.rows[-1]["step"] == step:
            self.rows[-1] |= metrics
            self._write()
            return
        self.rows.append({"step": step, **metrics})
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")


def write_csv(path: Path, rows: list[dict], columns: list[str]) -> None:
    """Writes these columns of the rows that have all of them, for DVC's plots, which cannot read JSON lines."""
    lines = [",".join(columns)]
    lines += [",".join(str(row[column]) for column in columns) for row in rows if set(columns) <= set(row)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


class Tracker:
    """All records of a run behind one interface; `wandb` may be None."""

    def __init__(self, lines: JsonLines, wandb: WandbTracker | None):
        self.lines, self.wandb = lines, wandb

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Records the metrics at this step."""
        self.lines.log(step, metrics)
        if self.wandb:
            self.wandb.log(step, metrics)

    def image(self, step: int, name: str, grid: Tensor) -> None:
        """Records a grid, (3, H, W) uint8, at this step; its PNG is already written."""
        if self.wandb:
            self.wandb.image(step, name, grid)

    def artifact(self, path: Path, name: str, kind: str) -> None:
        """Records a file of the run."""
        if self.wandb:
            self.wandb.artifact(path, name, kind)

    def sync(self) -> None:
        """Makes the lines so far survive a power failure."""
        with naming(self.lines.path):
            sync(self.lines.path)

    def finish(self, is_complete: bool) -> None:
        """Ends the records; `is_complete` says whether the run has reached its end."""
        if self.wandb:
            self.wandb.finish(is_complete)


def build_tracker(config: Config, folder: Path, step: int, wandb_id: str) -> Tracker:
    """The run's records in its folder, resumed at `step`, under this run id of Weights & Biases."""
    wandb = None
    if config.wandb.mode != "disabled":
        wandb = WandbTracker(
            config.wandb,
            name=config.runtime.name or folder.name,
            folder=folder,
            config=config.model_dump(),
            run_id=wandb_id,
        )
    return Tracker(JsonLines(folder / "metrics.jsonl", step, config.train.log_every), wandb)
