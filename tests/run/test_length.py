"""Runs of other lengths: longer than one that is finished, or shorter."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import main
from modeling.run import session
from modeling.system.signals import Stopped
from tests.helpers import ends_in_error, equal, train
from tests.run.test_session import CONSTANT


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("stop and resume")
def test_a_longer_cosine_is_another_run_that_names_the_first(tiny, capsys):
    main.main(tiny())
    capsys.readouterr()
    main.main(tiny("train.num_epochs=3"))
    assert re.search(
        r"note: \S+/last.pt is of a run like this one with optimizer.cosine_steps: that run 8, this run 12(; "
        r"optimizer.warmup_steps: that run 8, this run 12)?; to start from it, set runtime.resume=\S+/last.pt",
        capsys.readouterr().out,
    )
    assert len(list(Path("runs").iterdir())) == 2


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("stop and resume")
def test_a_longer_run_resumes_where_the_learning_rate_allows(tiny, capsys):
    longer = train(tiny(*CONSTANT, "train.num_epochs=3"), "longer")
    train(tiny(*CONSTANT, "train.num_epochs=2"), "extended")
    capsys.readouterr()
    extended = train(tiny(*CONSTANT, "train.num_epochs=3"), "extended")
    assert "from step 8" in capsys.readouterr().out
    assert equal(extended["state"], longer["state"])
    with ends_in_error(capsys, "12 steps, more than the 8 asked for"):
        train(tiny(*CONSTANT, "train.num_epochs=2"), "extended")


@pytest.mark.slow
@pytest.mark.fault("stop and resume")
def test_a_longer_run_that_is_stopped_is_no_finished_one(tiny, monkeypatch, capsys):
    """Its weights are not those that the shorter one's metrics.json is of."""
    train(tiny(*CONSTANT, "train.num_epochs=1"), "extended")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(session, "measure", lambda run, tracker: os.kill(os.getpid(), signal.SIGTERM))
        train(tiny(*CONSTANT, "train.num_epochs=2"), "extended")
    assert not Path("extended/metrics.json").exists()
    with ends_in_error(capsys, "8 steps, more than the 4 asked for"):
        train(tiny(*CONSTANT, "train.num_epochs=1"), "extended")


@pytest.mark.long
@pytest.mark.slow
def test_a_stage_replaces_a_longer_run_and_publishes_its_artefacts(tiny, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train")
    for num_epochs in (2, 1, 1):
        values = tiny(*CONSTANT, f"train.num_epochs={num_epochs}")
        Path("params.yaml").write_text(OmegaConf.to_yaml(values))
        main.main(values)
        assert json.loads(Path("outputs/metrics.json").read_text())["steps"] == 4 * num_epochs
        (folder,) = Path("runs").iterdir()
        assert Path("outputs/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        steps = {path.stem for path in Path("outputs/samples/ema").iterdir()}
        assert steps == {str(4 * epoch) for epoch in range(1, num_epochs + 1)}
        shutil.rmtree("outputs")
