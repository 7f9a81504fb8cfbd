"""A search over Optuna's ask and tell: trials are runs of main.py, compared at fixed steps, stopped and resumed.

A trial continues past a check step while its loss is in the best part of all losses known there (successive halving
without waiting, ASHA, https://arxiv.org/abs/1810.05934). One that was stopped continues when others turn out worse.
"""

import contextlib
import hashlib
import math
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from typing_extensions import TypedDict

from modeling.options import Range, SearchConfig
from modeling.system.errors import UserError
from modeling.system.files import LockedError, locked, write_json
from modeling.system.overrides import assignment
from modeling.system.reading import read_json, read_json_lines

MAIN = Path(__file__).resolve().parents[2] / "main.py"
LOSS: Final = "train/loss_smoothed"  # while it trains there is no held-out loss
RESULT: Final = "eval/heldout_ema"
WATCH_SECONDS = 0.2

_Row = TypedDict("_Row", {"step": int, "train/loss_smoothed": float})
_Result = TypedDict("_Result", {"eval/heldout_ema": float})


class Search:
    """A search in a folder, with all that was found in it before.

    Raises:
        UserError: if the folder holds another search.
    """

    def __init__(self, options: SearchConfig):
        self.options, self.out = options, Path(options.out)
        values, path = options.model_dump(mode="json", exclude={"out", "num_trials"}), self.out / "search.json"
        if not path.exists():
            write_json(path, values)
        elif read_json(path, dict[str, Any]) != values:
            raise UserError(f"{self.out} holds a search with other values ({path}): set out to another folder")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(self.out / "journal.jsonl")))
        self.study = optuna.create_study(storage=storage, study_name="search", load_if_exists=True)

    def _enqueue(self, trial: FrozenTrial) -> None:
        self.study.enqueue_trial(trial.params, user_attrs={"is_again": True})

    def take_up_killed(self) -> None:
        """Draws the trials again that were running when their process was killed, with their values.

        Only for who holds the folder's lock: another process's trials run still.
        """
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            self._enqueue(trial)
            self.study.tell(trial.number, state=TrialState.FAIL)

    def run(self) -> str:
        """Runs trials until all are drawn and none that was stopped is in play; returns the best, for the terminal.

        Raises:
            UserError: if no trial was finished, or one failed before its first line of metrics: others would, too.
        """
        with locked(self.out / "lock"):
            self.take_up_killed()
            while True:
                trials = self.study.get_trials()
                num_drawn = sum("is_again" not in trial.user_attrs for trial in trials)
                if not any(trial.state == TrialState.WAITING for trial in trials):
                    if (stopped := self.back_in_play(trials)) is not None:
                        self._enqueue(stopped)
                    elif num_drawn >= self.options.num_trials:
                        break
                self.seed_sampler()
                self._carry_out(self.study.ask())
        finished = self.study.get_trials(states=[TrialState.COMPLETE])
        if not finished:
            raise UserError(f"no trial was finished: {self.out}/*.log say why")
        best = self.study.best_trial
        return f"best: {RESULT} {best.value:.6f}, {self._words(best.params)}, {self.folder(best.params)}"

    def seed_sampler(self) -> None:
        """For the next trial: a sampler that is seeded once would repeat its first draws in the next process."""
        digest = hashlib.sha256(f"{self.options.seed} {len(self.study.get_trials())}".encode()).digest()
        self.study.sampler = optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4], "big"))

    def suggest(self, trial: Trial) -> None:
        """Draws the trial's values; those of one that was enqueued are known."""
        for key, values in self.options.space.items():
            match values:
                case Range(low=int() as low, high=int() as high, log=log):
                    trial.suggest_int(key, low, high, log=log)
                case Range(low=low, high=high, log=log):
                    trial.suggest_float(key, low, high, log=log)
                case choices:
                    trial.suggest_categorical(key, choices)

    def _words(self, params: dict[str, Any]) -> str:
        return " ".join(assignment(key, params[key]) for key in self.options.space)

    def folder(self, params: dict[str, Any]) -> Path:
        """Of the run with these values: the same for every trial that has them."""
        return self.out / hashlib.sha256(self._words(params).encode()).hexdigest()[:10]

    # ---- comparison at the check steps

    def _losses(self, trials: list[FrozenTrial], step: int) -> dict[Path, float]:
        found = [trial for trial in trials if step in trial.intermediate_values]
        return {self.folder(trial.params): trial.intermediate_values[step] for trial in found}

    def is_in_play(self, folder: Path, step: int, trials: list[FrozenTrial]) -> bool:
        """Whether the run in a folder is among the best at a check step that it has reached."""
        losses = self._losses(trials, step)
        rank = 1 + sum(loss < losses[folder] for loss in losses.values())
        return rank <= math.ceil(self.options.keep * len(losses))

    def back_in_play(self, trials: list[FrozenTrial]) -> FrozenTrial | None:
        """The best stopped trial that would not be stopped today."""
        latest = {self.folder(trial.params): trial for trial in trials if trial.params}
        stopped = [trial for trial in latest.values() if trial.state == TrialState.PRUNED]
        found = [t for t in stopped if self.is_in_play(self.folder(t.params), max(t.intermediate_values), trials)]
        return min(found, key=lambda trial: (-max(trial.intermediate_values), trial.value), default=None)

    # ---- one trial

    def _carry_out(self, trial: Trial) -> None:
        self.suggest(trial)
        folder = self.folder(trial.params)
        self._wait_for(folder)
        command = [*shlex.split(self.options.overrides), *(assignment(*item) for item in trial.params.items())]
        command.append(assignment("runtime.output_dir", str(folder)))
        print(f"trial {trial.number}: {self._words(trial.params)}: {folder}/", flush=True)
        log = folder.with_suffix(".log")
        with log.open("ab") as output:
            process = subprocess.Popen([sys.executable, str(MAIN), *command], stdout=output, stderr=output)
        try:
            stopped_at = self._watch(trial, folder, process)
        finally:
            process.terminate()  # which it may have been already
            process.wait()
        self._conclude(trial, folder, log, process.returncode, stopped_at)

    def _wait_for(self, folder: Path) -> None:
        """Waits while a run works in the folder that a killed search had started."""
        while folder.exists():
            with contextlib.suppress(LockedError), locked(folder / "lock"):
                return
            time.sleep(WATCH_SECONDS)

    def _watch(self, trial: Trial, folder: Path, process: subprocess.Popen) -> int | None:
        """Reports the losses at the check steps; returns the step at which the trial is out of play, if it is."""
        is_alive = True
        while is_alive:
            is_alive = process.poll() is None  # before the last look at its file
            path = folder / "metrics.jsonl"
            rows = [row for row in read_json_lines(path, _Row) if row] if path.exists() else []
            for step in sorted(set(self.options.check_steps)):
                reached = next((row for row in rows if row["step"] >= step), None)
                if reached is None:
                    break
                if step not in self.study.get_trials()[trial.number].intermediate_values:
                    trial.report(reached[LOSS], step)
                    if not self.is_in_play(folder, step, self.study.get_trials()):
                        return step
            time.sleep(WATCH_SECONDS if is_alive else 0)
        return None

    def _conclude(self, trial: Trial, folder: Path, log: Path, code: int, stopped_at: int | None) -> None:
        if code == 0 and (folder / "metrics.json").exists():
            value = read_json(folder / "metrics.json", _Result)[RESULT]
            self.study.tell(trial, value)
            print(f"  finished: {RESULT} {value:.6f}")
        elif stopped_at is not None:
            self.study.tell(trial, state=TrialState.PRUNED)
            print(f"  stopped at step {stopped_at}: its {LOSS} is not among the best {self.options.keep:.0%}")
        else:
            self.study.tell(trial, state=TrialState.FAIL)
            if not (folder / "metrics.jsonl").exists():
                self._enqueue(self.study.get_trials()[trial.number])  # for when the cause is mended
                reason = (log.read_text(errors="replace").strip() or f"exit code {code}").splitlines()[-1]
                raise UserError(f"trial {trial.number} failed before its first step: {reason} ({log})")
            print(f"  failed with exit code {code}: {log}")
