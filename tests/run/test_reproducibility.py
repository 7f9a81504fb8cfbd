"""A run repeated, or fed by other workers, is the same run to the bit; an edited comment leaves it as it is."""

from pathlib import Path

import pytest
import torch

from tests.helpers import TINY, equal, result, run_script, train

pytestmark = pytest.mark.numeric


@pytest.mark.slow
def test_a_repeated_run_is_the_same(tiny, straight):
    assert equal(train(tiny(), "again"), straight)
    files = [Path(folder, "model.safetensors").read_bytes() for folder in ("again", "straight")]
    assert files[0] == files[1]  # the header, too: it does not name the folder


@pytest.mark.long
@pytest.mark.slow
def test_another_seed_or_hyperparameter_gives_another_result(tiny, straight):
    for number, override in enumerate(["seed=1", "optimizer.lr=0.001", "train.random_flip=false"]):
        other = train(tiny(override), str(number))
        assert not equal(other["state"]["model"], straight["state"]["model"])
        assert other["samples"] != straight["samples"]


@pytest.mark.slow
@pytest.mark.fault("stop and resume")
def test_the_number_of_workers_changes_nothing(tiny, straight):
    assert equal(train(tiny("runtime.num_workers=2"), "workers"), straight)


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_deterministic_mode_repeats_a_run_on_cuda_to_the_bit(tiny_data, tmp_path):
    """Each in a process of its own, which the switch holds for; bf16 and a network with attention."""
    options = [*TINY, f"dataset.root={tiny_data}", "runtime.deterministic=true", "model.attention_resolutions=[16]"]
    for name in "ab":
        done = run_script("main.py", *options, "runtime.device=cuda", f"runtime.output_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
    assert equal(result(tmp_path / "a"), result(tmp_path / "b"))


@pytest.mark.long
@pytest.mark.slow
def test_the_same_command_finds_its_run_after_a_comment_is_edited(copied_main, tiny_data, tmp_path):
    """In a copy of the code; an edit that can change the result gives another run, beside the first."""

    def run() -> str:
        done = run_script(copied_main, *TINY, f"dataset.root={tiny_data}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "nothing to do" not in run()
    (first,) = (tmp_path / "runs").iterdir()
    module = tmp_path / "modeling" / "run" / "step.py"
    code = module.read_text()
    docstring = '"""Algorithm 1 in a run'
    assert code.count(docstring) == 1
    module.write_text(code.replace(docstring, '"""Other words for Algorithm 1 in a run') + "\n# A comment.\n")
    assert run() == f"{first.relative_to(tmp_path)}: this run is finished, nothing to do\n"
    assert list((tmp_path / "runs").iterdir()) == [first]

    module.write_text(code + "\nOTHER = 1\n")
    output = run()
    assert "nothing to do" not in output
    assert (
        f"note: {first.relative_to(tmp_path)}/checkpoints/last.pt is of a run like this one with other code" in output
    )
    assert len(list((tmp_path / "runs").iterdir())) == 2
