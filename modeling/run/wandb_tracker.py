"""Weights & Biases beside a run's own records, if it works."""

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

# The longest that Weights & Biases may delay a run at its start and at its end. It is to give up by itself after the
# first share of that, and is ended from outside after the second.
START_SECONDS, FINISH_SECONDS = 15, 10
OWN_SHARE, WAIT_SHARE = 0.7, 0.9
MAX_CALLS = 1000  # that may wait for it


class WandbTracker:
    """Weights & Biases in a thread of its own, so that it can neither delay nor end a run.

    When it is missing, slow or dies, that is said once and the run goes on with its local files. What W&B has not
    uploaded by then stays in `<folder>/wandb`, and the message says how to upload it.

    A resumed run adds a folder of the same id there. `wandb sync <folder>/wandb` uploads them all, the oldest first, as
    one run (`--include-online` for those that began online). Rows that a resumed run repeats are ignored by W&B online,
    and get the next free W&B steps when offline folders are merged; charts are drawn over the logged `step`, so they
    are right all the same.

    Args:
        mode: "offline" (a folder that `wandb sync` uploads) or "online".
        project: the project's name.
        name: the run's name.
        folder: the run's folder; everything of W&B lies in `<folder>/wandb`.
        config: the resolved configuration, nested as in params.yaml.
        run_id: W&B's id of the run, the same whenever the run is resumed; None draws one.
    """

    def __init__(self, *, mode: str, project: str, name: str, folder: Path, config: dict, run_id: str | None = None):
        self._options = {"mode": mode, "project": project, "name": name, "dir": str(folder), "config": config}
        if run_id:
            self._options |= {"id": run_id, "resume": "allow"}  # offline, too: `wandb sync` heeds what was set here
        files = folder / "wandb"
        files.mkdir(parents=True, exist_ok=True)
        os.environ["WANDB_MODE"] = mode  # else one set there would confuse the login
        os.environ["WANDB_SILENT"] = "true"  # as a setting of the run it would not cover the login
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # else even an offline run looks up a server
        for kind in ("DATA", "CACHE", "ARTIFACT"):  # else artifacts wait under the home folder
            os.environ[f"WANDB_{kind}_DIR"] = str(files.resolve())
        self._calls: queue.Queue[Callable | None] = queue.Queue(MAX_CALLS)
        self._is_alive = True
        self._has_started = threading.Event()
        self._kept, self._exit_code = "", 0
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()
        # Waits, although the thread could start on its own: it changes the environment, and a getenv from torch at the
        # same moment would crash the process (glibc's setenv is not thread-safe).
        if not self._has_started.wait(WAIT_SHARE * START_SECONDS):
            self._end(f"it did not start within {START_SECONDS} s", START_SECONDS)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics at this step."""
        self._put(lambda run: run.log({"step": step} | metrics, step=step))

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

    def finish(self, is_complete: bool = True) -> None:
        """Waits for what was logged, at most 10 s; then nothing of W&B is left that could delay the exit.

        Args:
            is_complete: whether the run has come to its end; else W&B shows it as failed until it goes on.
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
        """Gives up from outside the thread: without W&B's own process, neither thread nor exit hook waits any more.

        This can cost W&B's file what was logged in the last 15 s, which is how often it is written.
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
        hooks = sys.exit, sys.excepthook  # W&B replaces them, and would keep its own after its end
        try:
            run = self._start()
            self._has_started.set()
            while self._is_alive and (call := self._calls.get()) is not None:
                call(run)
            run.finish(exit_code=self._exit_code)
            # Waits for W&B's own process, which run.finish() only tells to write the end of its file.
            sys.modules["wandb"].teardown()
        except BaseException as error:  # of whatever kind, also the SystemExit of teardown(): it must not end training
            self._give_up((str(error) or type(error).__name__).splitlines()[0].rstrip("."))
            with contextlib.suppress(BaseException):  # else its exit hook fails once more, with a traceback
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
