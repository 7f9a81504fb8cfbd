"""A search that is killed: the next process takes up the same trial and ends as it would have."""

import time

import pytest

from tests.faults.processes import run_to_end, wait_for
from tests.helpers import TINY, start_script

pytest.importorskip("optuna")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("SIGKILL")
@pytest.mark.parametrize("signal", ["kill", "terminate"])
def test_a_search_that_ends_in_a_trial_takes_it_up_in_the_same_folder(tmp_path, tiny_data, signal):
    overrides = " ".join([*TINY, f"dataset.root={tiny_data}", "train.num_epochs=20", "train.checkpoint_every=1"])
    command = "search.py", f"out={tmp_path}", f'overrides="{overrides}"', "check_steps=[40]", "num_trials=3"
    with start_script(*command) as process:
        seen = wait_for(process, "trial 1: ") + wait_for(process, "\n")
        folders = [line.split()[-1] for line in seen.splitlines() if line.startswith("trial")]
        while process.poll() is None and not list(tmp_path.glob("*/checkpoints/last.pt"))[1:]:
            time.sleep(0.01)
        getattr(process, signal)()
        process.communicate()
    code, output = run_to_end(*command)
    assert code == 0, output
    assert "trial 2: " in output
    second, *_ = [line.split()[-1] for line in output.splitlines() if line.startswith("trial")]
    assert second == folders[1].strip()
    assert "best: eval/heldout_ema" in output
    assert len(list(tmp_path.glob("*/run.json"))) == 3
