"""Real processes in poor surroundings: nobody reads their output, the shared memory is too small."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.processes import LONG
from tests.helpers import ROOT, TINY, clean_environment, equal, result


def run_in_shell(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash in the repository's root; `$PYTHON` is this one."""
    environment = clean_environment(OMP_NUM_THREADS="1", PYTHON=sys.executable, **variables)
    return subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("nobody reads")
@pytest.mark.parametrize("reader", ["2>&1 | head -1", ">&- 2>&-"])
def test_a_run_that_nobody_reads_has_the_result_of_another(tmp_path, tiny_data, straight, record_property, reader):
    options = " ".join([*LONG, f"dataset.root={tiny_data}", f"runtime.output_dir={tmp_path / 'run'}"])
    done = run_in_shell(f"$PYTHON main.py {options} {reader}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 0, done
    assert "Traceback" not in done.stderr
    assert equal(result(tmp_path / "run"), straight)
    record_property("outcome", f"main.py {reader}: code 0, result equal to that of a run that is read")


IMPATIENT = """
import runpy, sys
from modeling import data
data.MAX_WAITS = 2
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("loader workers")
def test_loader_workers_without_shared_memory_end_the_run(tmp_path: Path, tiny_data, record_property):
    """As in a container with too little of it, which is otherwise waited for."""
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    if run_in_shell(f"unshare -m bash -c '{mount}'").returncode:
        pytest.skip("a mount of our own needs root")
    options = " ".join(
        [
            *TINY,
            "train.batch_size=64",
            f"dataset.root={tiny_data}",
            f"runtime.output_dir={tmp_path}",
            "runtime.num_workers=1",
        ]
    )
    command = f'unshare -m bash -c \'{mount} && "$PYTHON" -c "$IMPATIENT" {options}\''
    done = run_in_shell(command, IMPATIENT=IMPATIENT, PYTHONPATH=str(ROOT))
    assert done.returncode == 1, done
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("the loader workers delivered nothing for 10 s, probably for lack of shared memory")
    assert last.endswith("runtime.num_workers=0")
    record_property("outcome", "a /dev/shm of 64 KB: code 1 after the time limit, the remedy named")
