"""sample.py: a user's mistake is one line, a bug keeps its traceback."""

import pytest

import sample
from modeling.samplers import Ancestral
from tests.helpers import ends_in_error

pytestmark = pytest.mark.slow


def test_a_bug_inside_sampling_keeps_its_traceback(run, compose_config, monkeypatch, tmp_path):
    def fail(*arguments):
        raise ValueError("a bug")

    monkeypatch.setattr(Ancestral, "__call__", fail)
    options = [f"checkpoint={run}/model.safetensors", "num_images=2", "num_steps=3", f"out={tmp_path}/a.png"]
    with pytest.raises(ValueError, match="^a bug$"):  # no SystemExit
        sample.main(compose_config(*options, name="sample"))


@pytest.mark.parametrize("out", [".", "/"])
def test_an_output_without_a_name_is_rejected(compose_config, capsys, out):
    with ends_in_error(capsys, f"out must name a file or a folder, got {out}"):
        sample.main(compose_config("checkpoint=any.pt", f"out={out}", "overwrite=true", name="sample"))
