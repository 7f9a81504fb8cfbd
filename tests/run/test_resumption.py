"""A run that ended early resumes to the result of the uninterrupted run, bit by bit."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from modeling.run import folder
from modeling.run import step as step_module
from modeling.run.bookkeeping import TrainState
from modeling.run.objects import Run
from tests.helpers import ended_after, ends_in_error, equal, needs_compiler, train
from tests.run.interruptions import Interrupted, crash

pytestmark = pytest.mark.numeric


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop_at", [pytest.param(step, marks=[] if step == 5 else pytest.mark.long) for step in range(9)]
)
@pytest.mark.fault("stop and resume")
def test_a_run_that_crashed_resumes_to_the_same_result(tiny, straight, monkeypatch, stop_at):
    """Checkpoints are at steps 5 and 8 of 8, epochs end at 4 and 8, lines are written at 3, 6 and 8."""
    crash(tiny, monkeypatch, stop_at)
    assert Path("stopped/checkpoints/last.pt").exists() == (stop_at >= 5)
    with Path("stopped/metrics.jsonl").open("ab") as file:
        file.write(b'\0\0{"step": 9}\n')  # as a power failure may leave it
    Path("stopped/error.txt").write_text("why it ended before\n")
    assert equal(train(tiny(), "stopped"), straight)
    assert not Path("stopped/error.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        ["runtime.micro_batch_size=5", "model.dropout=0.2"],
        pytest.param(["runtime.precision=fp32"], marks=pytest.mark.long),
        pytest.param(["runtime.precision=fp16"], marks=pytest.mark.long),
        pytest.param(["runtime.compile=true"], marks=[pytest.mark.long, needs_compiler]),
    ],
)
@pytest.mark.fault("stop and resume")
def test_a_run_that_crashed_resumes_to_the_same_result_in_each_mode(tiny, monkeypatch, mode):
    expected = train(tiny(*mode), "straight")
    crash(tiny, monkeypatch, 6, *mode)
    assert equal(train(tiny(*mode), "stopped"), expected)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("stop and resume")
def test_a_run_that_crashed_at_every_step_resumes_to_the_same_result(tiny, straight, monkeypatch):
    """A process a step, with loader workers and without, and a checkpoint after every step."""
    for number in range(7):
        crash(tiny, monkeypatch, 1, "train.checkpoint_every=1", f"runtime.num_workers={number % 3 and 2}")
    assert equal(train(tiny(), "stopped"), straight)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("stop and resume")
def test_samples_due_after_the_checkpoints_step_are_made_on_resuming(tiny, straight, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Run, "sample", ended_after(Run.sample, 0, Interrupted))
        train(tiny("train.checkpoint_every=4"), "stopped")
    assert not list(Path("stopped").rglob("samples/ema/*"))
    assert equal(train(tiny(), "stopped"), straight)


# ---- the negative control


def forget(key: str, content: dict) -> None:
    """Replaces one item of a checkpoint by what a run begins with."""
    section, _, name = key.partition(".")
    if section == "state":
        content["state"][name] = getattr(TrainState(), name)
    elif section == "optimizer":
        with_it = [moments for moments in content["optimizer"]["state"].values() if name in moments]
        assert with_it, f"no parameter has {name}"
        for moments in with_it:
            moments[name].zero_()
    else:
        generator = torch.Generator().manual_seed(1)
        for tensor in content[section].values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=1e-3)


STATE = ["model", "ema", *(f"optimizer.{name}" for name in ("momentum_buffer", "exp_avg", "exp_avg_sq", "step"))]
STATE += [f"state.{name}" for name in dataclasses.asdict(TrainState()) if name != "seconds"]  # of the machine
BAD_STEPS = {"state.num_skipped": {4}, "state.num_skipped_in_row": {5, 6, 7}, "state.loss_scale": {4}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=[] if key in (None, "ema", "state.loss_sum") else pytest.mark.long)
        for key in [None, *STATE]
    ],
)
@pytest.mark.fault("stop and resume")
def test_an_item_missing_from_a_checkpoint_is_missed_in_the_result(tiny, monkeypatch, key):
    """Were any item of the state not saved, the tests above would fail."""
    options = ["train.log_every=4", "train.checkpoint_every=6"]  # resumed at 6, between two lines
    if key in ("state.loss_scale", "state.num_finite_at_scale"):
        options += ["runtime.precision=fp16"]
    draw, load = step_module.draw_normal, folder.load_checkpoint

    def draw_sometimes_nan(seed, purpose, step, *rest):
        return draw(seed, purpose, step, *rest) * (torch.nan if step in BAD_STEPS.get(key, ()) else 1)

    def load_spoiled(path):
        content = load(path)
        if key is not None:
            forget(key, content)
        return content

    monkeypatch.setattr(step_module, "draw_normal", draw_sometimes_nan)
    complete = train(tiny(*options), "complete")
    shutil.copytree("complete", "spoiled")
    for path in ("metrics.json", "checkpoints/last.pt"):
        (Path("spoiled") / path).unlink()
    monkeypatch.setattr(folder, "load_checkpoint", load_spoiled)
    assert equal(train(tiny(*options), "spoiled"), complete) == (key is None)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("damaged checkpoint")
def test_a_damaged_checkpoint_costs_one_interval_and_changes_nothing(tiny, straight, capsys):
    train(tiny(), "run")
    Path("run/metrics.json").unlink()
    last = Path("run/checkpoints/last.pt")
    last.write_bytes(last.read_bytes()[:-100])
    capsys.readouterr()
    assert equal(train(tiny(), "run"), straight)
    assert capsys.readouterr().err.count("warning: run/checkpoints/last.pt is no checkpoint, or damaged") == 1
    for path in [Path("run/metrics.json"), Path("run/checkpoints/5.pt")]:
        path.unlink()
    last.write_bytes(b"")
    with ends_in_error(capsys, "no valid checkpoint is left: delete run to start from scratch"):
        train(tiny(), "run")
