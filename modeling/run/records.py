"""What a run records: `metrics.jsonl`, always and completely, and beside it Weights & Biases, if that works."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from modeling.config import Config
from modeling.run.wandb_tracker import WandbTracker
from modeling.system.files import sync, write_atomically


class JsonLines:
    """`metrics.jsonl`: one JSON object a line, in the order of the steps.

    Args:
        path: the file; lines after `step` are dropped, because the run will write them again.
        step: where the run resumes.
    """

    def __init__(self, path: Path, step: int = 0):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # a killed run's last line may be cut
        self._write([row for row in rows if row["step"] <= step])

    def _write(self, rows: list[dict]) -> None:
        self._last = rows[-1] if rows else None
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Appends a line, or adds to the last one if that is of the same step."""
        if self._last and self._last["step"] == step:
            self._write([*self.rows()[:-1], {**self._last, **metrics}])
            return
        self._last = {"step": step, **metrics}
        with self.path.open("a") as file:
            file.write(json.dumps(self._last) + "\n")

    def rows(self) -> list[dict]:
        """All lines so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]


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
        if self.lines.path.exists():
            sync(self.lines.path)

    def finish(self, is_complete: bool = True) -> None:
        """Ends the records; `is_complete` says whether the run has reached its end."""
        if self.wandb:
            self.wandb.finish(is_complete)


def build_tracker(config: Config, folder: Path, step: int, wandb_id: str) -> Tracker:
    """The run's records in its folder, resumed at `step`, under this run id of Weights & Biases."""
    wandb = None
    if config.wandb.mode != "disabled":
        wandb = WandbTracker(
            mode=config.wandb.mode,
            project=config.wandb.project,
            name=config.wandb.name or folder.name,
            folder=folder,
            config=config.model_dump(),
            run_id=wandb_id,
        )
    return Tracker(JsonLines(folder / "metrics.jsonl", step), wandb)
