"""What a run records: `metrics.jsonl`, always and completely; Weights & Biases beside it, if it works."""

import contextlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from modeling.files import write_atomically

START_SECONDS, FINISH_SECONDS = 15, 10  # how long a run waits for Weights & Biases at its start and at its end


class JsonLines:
    """`metrics.jsonl`: one JSON object a line, in the order of the steps.

    Args:
        path: the file; lines after `step` are dropped, because the run will write them again.
        step: where the run goes on.
    """

    def __init__(self, path: Path, step: int = 0):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # a killed run's last line may be cut
        self._write([row for row in rows if row["step"] <= step])

    def _write(self, rows: list[dict]) -> None:
        self._last = rows[-1] if rows else None
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a line, or adds to the last one if that is of the same step."""
        if self._last and self._last["step"] == step:
            self._write([*self.rows()[:-1], self._last | metrics])
            return
        self._last = {"step": step} | metrics
        with self.path.open("a") as file:
            file.write(json.dumps(self._last) + "\n")

    def rows(self) -> list[dict]:
        """All lines so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def write_csv(path: Path, rows: list[dict], columns: list[str]) -> None:
    """Those columns of the rows that have them all, as CSV: DVC's plots cannot read JSON lines."""
    lines = [",".join(columns)]
    lines += [",".join(str(row[column]) for column in columns) for row in rows if set(columns) <= set(row)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


class WandbTracker:
    """Weights & Biases in a thread of its own, so that it can neither delay nor end a run.

    When it is missing, slow or dies, that is said once and the run goes on with its local files.

    Args:
        mode: "offline" (a folder that `wandb sync` uploads) or "online".
        project: the project's name.
        name: the run's name.
        folder: the run's folder; everything of W&B lies in `<folder>/wandb`.
        config: the resolved configuration, nested as in params.yaml.
    """

    def __init__(self, *, mode: str, project: str, name: str, folder: Path, config: dict):
        self._options = {"mode": mode, "project": project, "name": name, "dir": str(folder), "config": config}
        files = folder / "wandb"
        files.mkdir(parents=True, exist_ok=True)
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # else even an offline run looks up a server
        for kind in ("DATA", "CACHE", "CONFIG", "ARTIFACT"):  # else artifacts wait under the home folder
            os.environ[f"WANDB_{kind}_DIR"] = str(files.resolve())
        self._calls: queue.Queue[Callable | None] = queue.Queue()
        self._is_alive = True
        self._has_started = threading.Event()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()
        # Waits, although the thread could start on its own: it changes the environment, and a getenv from torch at the
        # same moment would crash the process (glibc's setenv is not thread-safe).
        if not self._has_started.wait(START_SECONDS):
            self._give_up(f"it did not start within {START_SECONDS} s")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics at this step."""
        self._calls.put(lambda run: run.log(metrics, step=step))

    def image(self, step: int, name: str, grid: Tensor) -> None:
        """Logs a grid, (3, H, W) uint8, at this step."""

        def call(run) -> None:
            import wandb

            run.log({name: wandb.Image(grid.permute(1, 2, 0).numpy())}, step=step)

        self._calls.put(call)

    def artifact(self, path: Path, name: str, kind: str) -> None:
        """Logs a file as an artifact."""

        def call(run) -> None:
            import wandb

            artifact = wandb.Artifact(name, type=kind)
            artifact.add_file(str(path))
            run.log_artifact(artifact)

        self._calls.put(call)

    def finish(self) -> None:
        """Waits for what was logged, at most 10 s."""
        self._calls.put(None)
        if self._is_alive:
            self._thread.join(FINISH_SECONDS)
        if self._thread.is_alive():
            self._give_up(f"it did not finish within {FINISH_SECONDS} s")

    def _give_up(self, reason: str) -> None:
        if self._is_alive:
            self._is_alive = False
            print(f"Weights & Biases: {reason}; the local files are complete without it", file=sys.stderr)

    def _work(self) -> None:
        try:
            run = self._start()
            self._has_started.set()
            while (call := self._calls.get()) is not None:
                call(run)
            run.finish()
        except Exception as error:  # of whatever kind: tracking must never end training
            self._give_up(str(error) or type(error).__name__)
            with contextlib.suppress(Exception):  # else its exit hook fails once more, with a traceback
                sys.modules["wandb"].teardown()
        finally:
            self._has_started.set()

    def _start(self):
        import wandb

        if self._options["mode"] == "online" and not wandb.api.api_key:
            print("Weights & Biases: no API key (run `wandb login`), so this run is logged offline", file=sys.stderr)
            self._options["mode"] = "offline"
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        return wandb.init(**self._options, settings=settings)


class Tracker:
    """All records of a run behind one interface; `wandb` may be None."""

    def __init__(self, lines: JsonLines, wandb: WandbTracker | None):
        self.lines, self.wandb = lines, wandb

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics at this step."""
        self.lines.log(step, metrics)
        if self.wandb:
            self.wandb.log(step, metrics)

    def image(self, step: int, name: str, grid: Tensor) -> None:
        """Records a grid, (3, H, W) uint8, at this step; its PNG is written by whoever made it."""
        if self.wandb:
            self.wandb.image(step, name, grid)

    def artifact(self, path: Path, name: str, kind: str) -> None:
        """Records a file of the run."""
        if self.wandb:
            self.wandb.artifact(path, name, kind)

    def finish(self) -> None:
        """Ends the records."""
        if self.wandb:
            self.wandb.finish()
