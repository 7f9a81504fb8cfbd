"""The wrapper of all scripts: one line for a user's mistake and the machine's failures, a traceback for a bug."""

import errno
import os

import pytest

from modeling.system.errors import UserError, errors_in_one_line
from modeling.system.signals import Stopped


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("lr=-1: expected at least 0"), "lr=-1: expected at least 0"),
        (UserError("seed: missing"), "seed: missing"),
        (FloatingPointError("step 3: the loss is nan"), "step 3: the loss is nan"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/a.pt"), "run/a.pt: No space left on device"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a.pt"), "a.pt: No such file or directory"),
        (OSError("no network"), "no network"),
    ],
)
@pytest.mark.parametrize("code", [1, 2])
def test_a_mistake_or_a_failing_machine_is_one_line_and_the_exit_code(capsys, error, line, code):
    with pytest.raises(SystemExit) as ended, errors_in_one_line(code):
        raise error
    assert ended.value.code == code
    assert capsys.readouterr() == ("", f"{line}\n")


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, AssertionError, ZeroDivisionError, RuntimeError])
def test_any_other_error_is_a_bug_and_passes_unchanged(capsys, error):
    bug = error("a bug")
    with pytest.raises(error) as caught, errors_in_one_line():
        raise bug
    assert caught.value is bug
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [Stopped("SIGTERM", 143), KeyboardInterrupt()])
def test_a_request_to_end_passes_unchanged(error):
    with pytest.raises(type(error)) as caught, errors_in_one_line():
        raise error
    assert caught.value is error


def test_a_script_without_errors_is_left_alone(capsys):
    with errors_in_one_line():
        print("done")
    assert capsys.readouterr() == ("done\n", "")
