"""Weights & Biases beside a run's own records, if it works."""

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from modeling.sections import Wandb

# Upper bounds on how long W&B may delay the start and the end of a run. W&B's own timeout is OWN_SHARE of each; after
# WAIT_SHARE its process is killed.
START_SECONDS, FINISH_SECONDS = 15, 10
OWN_SHARE, WAIT_SHARE = 0.7, 0.9
MAX_CALLS = 1000  # that may wait for W&B


class WandbTracker:
    """Weights & Biases in a thread of its own, so that it cannot hold up or end a run.

    When W&B is missing, slow or dies, one message says so and the run continues with its local files. What was not
    uploaded by then stays in `<folder>/wandb`; the message names the command that uploads it.

    A resumed run adds a folder with the same id. `wandb sync <folder>/wandb` uploads all of them as one run, the oldest
    first (`--include-online` for those that began online). A resumed run repeats some rows: W&B ignores them online,
    and gives them its next free steps when it merges offline folders. Charts are drawn over the logged `step`, so they
    are right in both cases.

    Args:
        section: of the configuration; offline is a folder that `wandb sync` uploads.
        name: the run's name, if the section has none.
        folder: the run's folder; all files of W&B are in `<folder>/wandb`.
        config: the resolved configuration, nested as in params.yaml.
        run_id: W&B's id of the run, the same whenever the run is resumed.
    """

    def __init__(self, section: Wandb, *, name: str, folder: Path, config: dict, run_id: str):
        self._options = {
            **section.model_dump(), "name": section.name or name, "dir": str(folder), "config": config,
            "id": run_id, "resume": "allow",  # also offline: `wandb sync` reads it
        }  # fmt: skip
        files = folder / "wandb"
        files.mkdir(parents=True, exist_ok=True)
        os.environ["WANDB_MODE"] = section.mode  # else a value set by the user would confuse the login
        os.environ["WANDB_SILENT"] = "true"  # a setting of the run would not cover the login
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # else even an offline run looks up a server
        for kind in ("DATA", "CACHE", "ARTIFACT"):  # else artifacts are staged under the home folder
            os.environ[f"WANDB_{kind}_DIR"] = str(files.resolve())
        self._calls: queue.Queue[Callable | None] = queue.Queue(MAX_CALLS)
        self._is_alive = True
        self._has_started = threading.Event()
        self._kept, self._exit_code = "", 0
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()
        # The thread changes the environment while it starts. We wait, because a getenv from torch at the same moment
        # would crash the process (glibc's setenv is not thread-safe).
        if not self._has_started.wait(WAIT_SHARE * START_SECONDS):
            self._end(f"it did not start within {START_SECONDS} s", START_SECONDS)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Logs the metrics at this step."""
        self._put(lambda run: run.log({"step": step, **metrics}, step=step))

    def image(self, step: int, name: str, grid: Tensor) -> None:
        """Logs a grid, (3, H, W) uint8, at this step."""

        def call(run) -> None:
            import wandb

            run.log({"step": step, name: wandb.Image(grid.permute(1, 2, 0).numpy())}, step=step)

        self._put(call)

    def artifact(self, path: Path, name: str, kind: str) -> None:
        """Logs a file as an artifact."""

        def call(run) -> None:
            import wandb

            artifact = wandb.Artifact(name, type=kind)
            artifact.add_file(str(path))
            run.log_artifact(artifact)

        self._put(call)

    def finish(self, is_complete: bool) -> None:
        """Waits at most 10 s until W&B has what was logged; nothing of W&B can delay the exit afterwards.

        Args:
            is_complete: whether the run has reached its end; if not, W&B shows it as failed until it is resumed.
        """
        self._exit_code = 0 if is_complete else 1
        self._put(None)
        if self._is_alive:
            self._thread.join(WAIT_SHARE * FINISH_SECONDS)
            if self._thread.is_alive():
                self._end(f"it did not finish within {FINISH_SECONDS} s", FINISH_SECONDS)

    def _put(self, call: Callable | None) -> None:
        if self._is_alive:
            try:
                self._calls.put_nowait(call)
            except queue.Full:
                self._end(f"{MAX_CALLS} calls wait for it", FINISH_SECONDS)

    def _end(self, reason: str, seconds: float) -> None:
        """Gives up from outside the thread: kills W&B's own process, for which thread and exit hook would wait.

        W&B writes its file every 15 s, so the file can lack what was logged since.
        """
        import psutil

        self._give_up(reason)
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.name() == "wandb-core":
                    child.kill()
        self._thread.join((1 - WAIT_SHARE) * seconds)

    def _give_up(self, reason: str) -> None:
        if self._is_alive:
            self._is_alive = False
            print(f"Weights & Biases: {reason}; the local files are complete without it{self._kept}", file=sys.stderr)

    def _work(self) -> None:
        hooks = sys.exit, sys.excepthook  # W&B replaces them and does not restore them
        try:
            run = self._start()
            self._has_started.set()
            while self._is_alive and (call := self._calls.get()) is not None:
                call(run)
            run.finish(exit_code=self._exit_code)
            # Waits for W&B's own process: run.finish() only asks it to write the end of its file.
            sys.modules["wandb"].teardown()
        except BaseException as error:  # no error may end training, not even the SystemExit of teardown()
            self._give_up((str(error) or type(error).__name__).splitlines()[0].rstrip("."))
            with contextlib.suppress(BaseException):  # else its exit hook fails again, with a traceback
                sys.modules["wandb"].teardown()
        finally:
            sys.exit, sys.excepthook = hooks
            self._has_started.set()

    def _start(self):
        import wandb

        if self._options["mode"] == "online" and not wandb.login(prompt=False, verify=False):
            print("Weights & Biases: no API key (run `wandb login`), so this run is logged offline", file=sys.stderr)
            self._options["mode"] = "offline"
        settings = wandb.Settings(
            console="off",
            disable_git=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=OWN_SHARE * START_SECONDS,
            finish_timeout=OWN_SHARE * FINISH_SECONDS,
            finish_timeout_raises=True,
        )
        run = wandb.init(**self._options, settings=settings)
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        self._kept = f", and `wandb sync --include-online {Path(run.dir).parent}` uploads what it has"
        return run
