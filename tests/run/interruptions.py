"""Ends a run at a chosen point: without a word, or by a signal."""

import os
import signal

import pytest

from modeling import samplers, training
from modeling.run import folder, objects, results, session
from modeling.run.step import Step
from tests.helpers import ended_after, train


class Interrupted(Exception):
    """Ends a run as a crash would."""


def crash(tiny, monkeypatch, stop_at: int, *overrides: str) -> None:
    """A run in `stopped` that ends without a word: before step `stop_at` (from 0), or measuring after the last."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Step, "backward", ended_after(Step.backward, stop_at, Interrupted))
        if stop_at == 8:
            patch.setattr(session, "measure", ended_after(session.measure, 0, Interrupted))
        train(tiny(*overrides), "stopped")


PHASES = {  # what is called in it -> the step of TINY that is saved
    "training": (training, "autocast", 0),
    "sampling": (samplers, "evaluating", 4),
    "writing a grid": (objects, "save_grid", 4),
    "saving": (folder, "save_checkpoint", 5),
    "exporting": (session, "export_weights", 8),
    "evaluation": (results, "denoising_loss", 8),
    "writing tables": (results, "write_csv", 8),
}


def send_signal_in(phase: str, patch, number: signal.Signals = signal.SIGTERM) -> list[int]:
    """Sends this process a signal whenever the phase's function is called; the list grows with each call."""
    module, name, _ = PHASES[phase]
    original, sent = getattr(module, name), []

    def stop(*args, **kwargs):
        sent.append(number)
        os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    patch.setattr(module, name, stop)
    return sent
