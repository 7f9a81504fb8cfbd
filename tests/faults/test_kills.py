"""Processes killed at any moment: every start succeeds, and the result is that of the uninterrupted run.

The moments are random, with a seed.
"""

import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.processes import LONG, NUM_STEPS, run_to_end, steps_of, wait_for
from tests.helpers import equal, result, start_script


class Kills:
    """Kills runs and starts them again; each run that finishes is compared with `straight`."""

    def __init__(self, tmp_path: Path, tiny_data: Path, straight: dict, seed: int, *options: str):
        self.tmp_path, self.straight, self.random = tmp_path, straight, random.Random(seed)
        self.options = [*LONG, f"dataset.root={tiny_data}", *options]
        self.num_kills = self.num_finished = self.most_lost = 0

    def run(self, num_kills: int) -> None:
        number = 0
        while self.num_kills < num_kills:
            folder, number = self.tmp_path / f"run{number}", number + 1
            while self.num_kills < num_kills and self.start_and_kill(folder):
                pass
            if not (folder / "metrics.json").exists():  # no kills left: this run may finish
                assert not self.start_and_kill(folder, is_last=True)
            assert equal(result(folder), self.straight)
            assert steps_of(folder) == list(range(1, NUM_STEPS + 1))
            assert not list(folder.rglob("*.partial"))
            assert len(list((folder / "checkpoints").iterdir())) == 2
            self.num_finished += 1

    def start_and_kill(self, folder: Path, is_last: bool = False) -> bool:
        """Starts the run; True if it was killed, False if it ended first, and well."""
        before = max(steps_of(folder), default=0)
        with start_script("main.py", *self.options, f"runtime.output_dir={folder}") as process:
            output = ""
            if not is_last and self.random.random() < 0.85:  # else at any moment, while torch is imported, too
                output = wait_for(process, "run folder")
                seconds = self.random.uniform(0, 1)
            else:
                seconds = self.random.uniform(0, 4)
            try:
                output += process.communicate(timeout=None if is_last else seconds)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                output += process.communicate()[0]
        if "run folder" in output:
            at = output.partition("from step ")[2].partition("\n")[0]
            self.most_lost = max(self.most_lost, before - int(at.replace(",", "") or 0))
        if process.returncode == -signal.SIGKILL:
            self.num_kills += 1
            return True
        assert process.returncode == 0, output
        assert "Traceback" not in output
        return False


@pytest.mark.slow
@pytest.mark.fault("SIGKILL")
@pytest.mark.parametrize(
    ("num_kills", "checkpoint_every", "num_workers"),
    [
        (2, 3, 0),
        pytest.param(30, 1, 0, marks=pytest.mark.long),
        pytest.param(30, 5, 2, marks=pytest.mark.long),
        pytest.param(40, 2, 0, marks=pytest.mark.long),
    ],
)
def test_a_run_killed_at_any_moment_resumes_to_the_same_result(
    tmp_path, tiny_data, straight, record_property, num_kills, checkpoint_every, num_workers
):
    options = f"train.checkpoint_every={checkpoint_every}", f"runtime.num_workers={num_workers}"
    shares = [num_kills - num_kills // 2, num_kills // 2]  # two runs side by side, for the time it takes
    kills = [Kills(tmp_path / str(n), tiny_data, straight, num_kills + n, *options) for n in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Kills.run, kills, shares))
    survived, finished = (sum(getattr(k, name) for k in kills) for name in ("num_kills", "num_finished"))
    most_lost = max(k.most_lost for k in kills)
    assert survived == num_kills
    assert most_lost <= checkpoint_every
    outcome = (
        f"{survived} of {num_kills} kills survived in {finished} runs, all equal to the uninterrupted one; at most "
        f"{most_lost} steps lost (a checkpoint every {checkpoint_every}, {num_workers} workers)"
    )
    print(outcome)
    record_property("outcome", outcome)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("SIGKILL")
def test_a_killed_preparation_leaves_nothing_that_is_taken_for_data(tmp_path, record_property):
    moments, options = random.Random(1), ("dataset=shapes", f"dataset.root={tmp_path}", "dataset.num_images=1500")
    for number in range(8):
        with start_script("prepare_data.py", *options[:2], f"dataset.num_images={1400 + number}") as process:
            assert "writing test.npy" in wait_for(process, "writing test.npy")
            time.sleep(moments.uniform(0, 1.3))
            process.kill()
    code, output = run_to_end("prepare_data.py", *options)
    assert code == 0, output
    assert {path.name for path in tmp_path.iterdir()} == {"shapes", ".shapes.lock"}
    record_property("outcome", "8 of 8 preparations killed and made up for")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("two runs in one folder")
def test_a_second_run_in_a_folder_is_rejected_unless_the_first_is_dead(tmp_path, tiny_data, record_property):
    options = *LONG, f"dataset.root={tiny_data}", f"runtime.output_dir={tmp_path / 'run'}"
    with start_script("main.py", *options) as first:
        wait_for(first, "training:")
        code, output = run_to_end("main.py", *options)
        assert code == 1
        assert f"process {first.pid} is working there" in output
        first.kill()
    _, output = run_to_end("main.py", *options, "train.max_steps=20")
    assert "is working there" not in output
    record_property("outcome", "the second is rejected, the lock of a killed one taken over")
