"""A run that is asked to end saves its state in any phase, and the same command resumes it to the same result."""

import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import main
from modeling.checkpoint import load_checkpoint
from tests.helpers import ends_in_error, equal, train
from tests.run.interruptions import PHASES, send_signal_in


@pytest.mark.slow
@pytest.mark.parametrize(
    "phase",
    [pytest.param(phase, marks=[] if phase == "sampling" else pytest.mark.long) for phase in PHASES],
)
@pytest.mark.fault("signal")
def test_a_signal_in_any_phase_saves_and_the_same_command_resumes(tiny, straight, monkeypatch, capsys, phase):
    step = PHASES[phase][2]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        sent = send_signal_in(phase, patch)
        train(tiny(), "stopped")
    assert (stopped.value.code, len(sent)) == (143, 1)
    at = f"saved at step {step} of 8 in stopped/checkpoints/last.pt" if step else "no step was done yet"
    assert f"stopped by SIGTERM: {at}; the same command resumes it" in capsys.readouterr().out
    if step:
        assert load_checkpoint("stopped/checkpoints/last.pt")["state"]["step"] == step
    assert equal(train(tiny(), "stopped"), straight)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["writing a grid", "evaluation"])
@pytest.mark.fault("time limit")
def test_a_time_limit_ends_well_and_the_same_command_resumes(tiny, straight, monkeypatch, capsys, phase):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        send_signal_in(phase, patch, signal.SIGALRM)
        train(tiny("runtime.max_seconds=1000"), "limited")
    assert stopped.value.code == 0
    at = f"saved at step {PHASES[phase][2]} of 8"
    assert f"stopped by the time limit of 1000 s: {at}" in capsys.readouterr().out
    assert equal(train(tiny(), "limited"), straight)


@pytest.mark.slow
@pytest.mark.fault("time limit")
def test_a_recorded_stage_that_runs_out_of_time_is_no_success(tiny, monkeypatch, capsys):
    monkeypatch.setenv("DVC_STAGE", "train")
    send_signal_in("sampling", monkeypatch, signal.SIGALRM)
    values = tiny("runtime.max_seconds=1000")
    Path("params.yaml").write_text(OmegaConf.to_yaml(values))
    with ends_in_error(capsys, "time limit of 1000 s is over before the stage is done: `dvc repro` resumes it"):
        main.main(values)
