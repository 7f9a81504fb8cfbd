"""A run's folder: which run owns it, the lock that keeps other processes out, and its newest valid checkpoint."""

import contextlib
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from modeling.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from modeling.run.identity import Identity, describe_differences, differences, run_name
from modeling.system.errors import UserError
from modeling.system.files import LockedError, locked, remove_partial_files, write_json
from modeling.system.overrides import override
from modeling.system.reading import Kind, read_json

_LOCK, _MARKER = "lock", "run.json"
# `runtime.resume=PATH` still resumes when these have changed.
_HARMLESS = {"code", "optimizer.cosine_steps", "optimizer.warmup_steps"}


class _Marker(TypedDict):
    """The content of run.json."""

    run: str  # the name
    identity: dict[str, Any]  # an `Identity`, maybe of an older version
    wandb_id: str


class _Metrics(TypedDict):
    """What is read of metrics.json."""

    steps: int


class RunFolder:
    """The folder of one run.

    `checkpoints/last.pt` is the newest state; the ones before it are named by their step.

    Args:
        path: the folder.
        identity: of the run, see `modeling.run.identity`.
        num_checkpoints: how many are kept.
    """

    def __init__(self, path: Path, identity: Identity, num_checkpoints: int = 2):
        self.path, self.identity, self.num_checkpoints = path, identity, num_checkpoints
        self.name = run_name(identity)
        self.wandb_id = ""  # set by `claimed`
        self.started_from: str | None = None  # run and step of the checkpoint that this process started from
        self._last_step: int | None = None  # of last.pt

    @property
    def last_checkpoint(self) -> Path:
        return self.path / "checkpoints" / "last.pt"

    @property
    def metrics_path(self) -> Path:
        """metrics.json, written last: a run is finished exactly if it exists."""
        return self.path / "metrics.json"

    def finished_at(self) -> int | None:
        """The last step of the finished run in this folder; None if there is none."""
        metrics = self._read(self.metrics_path, _Metrics)
        return None if metrics is None else metrics["steps"]

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Makes this run the owner of the folder, and this process the only one that works in it.

        Raises:
            UserError: if the folder holds another run or other files, or another process works in it; nothing changes.
        """
        self._check_owner()
        try:
            with locked(self.path / _LOCK):
                self._check_owner()  # again: another process may have claimed it meanwhile
                remove_partial_files(self.path, self.path / "checkpoints", *self.path.glob("samples/**/"))
                self._mark()
                try:
                    yield
                except UserError:
                    self._remove_if_unused()
                    raise
        except LockedError as error:
            raise UserError(f"{self.path}: {error}; wait for it, or set runtime.output_dir to another folder") from None

    def _read(self, path: Path, kind: type[Kind]) -> Kind | None:
        """A JSON file of the folder; None if there is no such file."""
        if not path.is_file():
            return None
        remedy = f"if {self.path} holds other files, set runtime.output_dir to another folder, else delete {self.path}"
        return read_json(path, kind, remedy)

    def _read_marker(self) -> _Marker | None:
        return self._read(self.path / _MARKER, _Marker)

    def _check_owner(self) -> None:
        found = self._read_marker()
        if found is not None and found["run"] == self.name:
            return
        remedy = "set runtime.output_dir to another folder"
        if found is not None:
            how = describe_differences(differences(found["identity"], self.identity), "that run")
            raise UserError(f"{self.path} holds the run {found['run']}, not {self.name} ({how}): {remedy}")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is not a folder: {remedy}")
        if self.path.exists() and any(not _is_ours(entry.name) for entry in self.path.iterdir()):
            raise UserError(f"{self.path} holds other files, not {self.name}: {remedy}")

    def _mark(self) -> None:
        found = self._read_marker()
        self.wandb_id = found["wandb_id"] if found else secrets.token_hex(8)
        if found is None:
            write_json(self.path / _MARKER, {"run": self.name, "identity": self.identity, "wandb_id": self.wandb_id})

    def _remove_if_unused(self) -> None:
        """A run that is rejected leaves no folder, unless there was more in it than `claimed` writes."""
        if {entry.name for entry in self.path.iterdir()} == {_LOCK, _MARKER}:
            for name in (_MARKER, _LOCK):
                (self.path / name).unlink()
            with contextlib.suppress(OSError):  # network file systems keep a name for the open lock
                self.path.rmdir()

    def clear(self) -> None:
        """Removes all files of the run; it still owns the folder."""
        for entry in self.path.iterdir():
            if entry.name not in (_LOCK, _MARKER):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self._last_step = self.started_from = None

    def similar_run(self) -> str | None:
        """A hint that names a run beside this one which differs only in code or length; None if there is none."""
        found = []
        for marker in self.path.parent.glob(f"*/{_MARKER}"):
            with contextlib.suppress(OSError, UserError):  # other projects' files
                theirs = read_json(marker, _Marker)["identity"]
                checkpoint = marker.parent / "checkpoints" / "last.pt"
                if differences(theirs, self.identity).keys() - _HARMLESS == set() and theirs != self.identity:
                    found.append((checkpoint.stat().st_mtime, str(checkpoint), theirs))
        if not found:
            return None
        _, checkpoint, theirs = max(found)
        how = describe_differences(differences(theirs, self.identity), "that run")
        return f"note: {checkpoint} is of a run like this one with {how}; to start from it, set " + override(
            "runtime.resume", checkpoint
        )

    def _checkpoints(self) -> list[Path]:
        """The newest first."""
        older = [path for path in self.last_checkpoint.parent.glob("*.pt") if path.stem.isdigit()]
        last = [self.last_checkpoint] if self.last_checkpoint.exists() else []
        return last + sorted(older, key=lambda path: int(path.stem), reverse=True)

    def load_newest(self) -> Checkpoint | None:
        """The newest valid checkpoint of this run, with one warning if it is not the last; None without checkpoints.

        Raises:
            UserError: if there are checkpoints and none is valid.
        """
        problems = []
        for path in self._checkpoints():
            try:
                content = load_checkpoint(path)
                if changed := differences(content["about"].get("identity") or {}, self.identity):
                    how = describe_differences(changed, "checkpoint")
                    raise CheckpointError(f"{path} belongs to another run ({how})")
            except CheckpointError as error:
                problems.append(str(error))
                continue
            step = content["state"]["step"]
            if problems:
                print(f"warning: {'; '.join(problems)}: resuming from {path}, step {step}", file=sys.stderr)
            self._last_step = step if path == self.last_checkpoint else None
            return content
        if problems:
            raise UserError(
                f"{'; '.join(problems)}; no valid checkpoint is left: delete {self.path} to start from scratch"
            )
        return None

    def save(self, *, about: dict, state, **content) -> None:
        """Writes last.pt as `save_checkpoint` does and keeps the ones before it; does nothing if last.pt has this step.

        Args:
            about: what identifies the state, in addition to the run itself.
        """
        if self._last_step == state.step:
            return
        about = {
            "run": self.name, "identity": self.identity, "parent": self.started_from, "wandb_id": self.wandb_id,
            "step": state.step, **about,
        }  # fmt: skip
        last, keep_as = self.last_checkpoint, None
        if self._last_step is not None:  # else last.pt is missing or damaged
            keep_as = last.with_name(f"{self._last_step}.pt")
        save_checkpoint(last, about=about, state=state, keep_as=keep_as, **content)
        self._last_step = state.step
        for path in self._checkpoints()[self.num_checkpoints :]:
            path.unlink()


def describe_state(checkpoint: Checkpoint) -> str:
    """`<run>@<step>` of a loaded checkpoint."""
    return f"{checkpoint['about']['run']}@{checkpoint['about']['step']}"


def _is_ours(name: str) -> bool:
    """Whether a process killed before it had marked the folder may have left this file."""
    return name == _LOCK or name.endswith(".partial")
