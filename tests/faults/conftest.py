"""The uninterrupted run that those with faults are compared with."""

import pytest

from tests.faults.processes import LONG, NUM_STEPS, PARTS, run_to_end, steps_of
from tests.helpers import result


@pytest.fixture(scope="session")
def straight(tiny_data, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("faults") / "straight"
    code, output = run_to_end("main.py", *LONG, f"dataset.root={tiny_data}", f"runtime.output_dir={folder}")
    assert code == 0, output
    assert steps_of(folder) == list(range(1, NUM_STEPS + 1))
    return result(folder)


@pytest.fixture(scope="session")
def whole(tiny_data, tmp_path_factory) -> dict:
    """The result of one process, in four parts a batch."""
    folder = tmp_path_factory.mktemp("faults") / "whole"
    code, output = run_to_end("main.py", *PARTS, f"dataset.root={tiny_data}", f"runtime.output_dir={folder}")
    assert code == 0, output
    return result(folder)
