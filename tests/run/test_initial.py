"""A run that starts from the weights of another one."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from modeling.config import parse
from modeling.run.initial import load_initial_weights
from modeling.stage import parse_stage
from modeling.system.errors import UserError
from modeling.system.files import sha256_of
from tests.helpers import ROOT, ends_in_error, equal, train

STILL = "optimizer.lr=0", "train.num_epochs=1"
FILE = "first/model.safetensors"


@pytest.fixture(scope="module")
def first(tiny_data, tmp_path_factory, compose_config):
    """Where the run `first` is, whose weights are given."""
    import main
    from tests.helpers import TINY

    folder = tmp_path_factory.mktemp("initial")
    overrides = f"dataset.root={tiny_data}", f"runtime.output_dir={folder}/first", "train.num_epochs=1"
    main.main(compose_config(*TINY, *overrides))
    return folder


@pytest.fixture
def given(tiny, first, monkeypatch):
    """Configurations of small runs beside it, from its weights."""
    monkeypatch.chdir(first)
    return lambda *overrides: tiny("train.init=first", "seed=1", *overrides)


def test_raw_and_averaged_weights_start_from_those_of_the_file(given, capsys):
    state = train(given(*STILL), "still")["state"]
    assert equal(state["model"], load_file(FILE))
    assert equal(state["ema"], state["model"])
    train(given(*STILL), "still")
    assert "this run is finished" in capsys.readouterr().out


def test_the_weights_belong_to_what_a_run_is(given, tiny, capsys):
    config = parse(given())
    assert load_initial_weights(config)[1] == f"weights {sha256_of(Path(FILE))}"
    train(given(*STILL), "mine")
    capsys.readouterr()
    with ends_in_error(capsys, r"mine holds the run .* \(origin: that run \"weights [0-9a-f]{64}\", this run null\)"):
        train(tiny("seed=1", *STILL), "mine")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.multipliers=[1,1]"], r"network \(model.multipliers: weights \[1, 2\], this run \[1, 1\]\)"),
        (["diffusion.prediction=v"], r'network \(diffusion.prediction: weights "eps", this run "v"\)'),
        (["model.attention_resolutions=[32]"], r"the weights do not fit .*attention"),
        (["train.init=nowhere"], "nowhere: No such file"),
        (
            ["runtime.resume=first"],
            "starts from weights or from runtime.resume=first, not both",
        ),
    ],
)
def test_weights_that_do_not_fit_are_rejected_and_leave_no_folder(given, capsys, overrides, message):
    with ends_in_error(capsys, message):
        train(given(*overrides), "rejected")
    assert not Path("rejected").exists()


def test_a_pipeline_of_diffusers_is_to_be_converted_first(given, tmp_path):
    (tmp_path / "model_index.json").touch()
    with pytest.raises(UserError, match=re.escape(f"`python convert.py checkpoint={tmp_path} out=FILE` first")):
        load_initial_weights(parse(given(f"train.init={tmp_path}")))


def test_a_recorded_stage_cannot_start_from_weights(compose_config, monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_STAGE", "train")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("init: null", "init: x"))
    with pytest.raises(UserError, match="train.init=x: a recorded stage cannot start from a file that DVC does not"):
        parse_stage(compose_config("train.init=x"))
