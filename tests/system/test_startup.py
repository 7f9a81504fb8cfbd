"""A script's process: streams that outlive their readers or were never open, POSIX, threads that share CPUs."""

import io
import os
import pty
import subprocess
import sys

import pytest

from modeling.system.progress import progress_bar
from modeling.system.startup import SPIN_COUNT, prepare_process
from tests.helpers import ROOT

WORK = """
import sys
from modeling.system.errors import errors_in_one_line
from modeling.system.progress import progress_bar
with errors_in_one_line():
    with open("opened", "w") as file:
        assert file.fileno() > 2
    for _ in progress_bar(range(3)):
        for _ in range(2000):
            print("a line of the log")
            print("a warning", file=sys.stderr)
    open("done", "w").close()
"""


def start(tmp_path, **streams) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WORK], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, **streams
    )


@pytest.mark.fault("nobody reads")
def test_work_goes_on_when_the_reader_of_its_output_ends(tmp_path):
    with start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 0
    assert (tmp_path / "done").exists()


@pytest.mark.fault("nobody reads")
def test_work_goes_on_when_its_terminal_is_closed(tmp_path):
    terminal, end = pty.openpty()
    with start(tmp_path, stdin=end, stdout=end, stderr=end) as process:
        os.close(end)
        assert os.read(terminal, 1)
        os.close(terminal)
        assert process.wait(30) == 0
    assert (tmp_path / "done").exists()


@pytest.mark.fault("nobody reads")
@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error_and_no_file_takes_their_place(tmp_path, closed):
    command = f'exec "$0" "$@" {closed}'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(["sh", "-c", command, sys.executable, "-c", WORK], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "done").exists()


@pytest.mark.fault("nobody reads")
def test_a_full_disk_under_the_log_is_an_error_that_names_the_stream(tmp_path):
    with open("/dev/full", "w") as full, start(tmp_path, stdout=full, stderr=subprocess.PIPE) as process:
        *_, last = process.stderr.read().splitlines()
    assert process.returncode == 1
    assert last == b"standard output: No space left on device"


def test_a_full_disk_under_the_last_line_is_an_error_too(tmp_path):
    code = "from modeling.system.errors import errors_in_one_line\nwith errors_in_one_line():\n    print('done')"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"standard output: No space left on device\n")


@pytest.mark.parametrize("stream", [None, type("Interceptor", (), {"write": print, "flush": print})()])
def test_a_bar_without_a_whole_stderr_shows_nothing(monkeypatch, capsys, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(range(3), desc="x") as bar:
        assert list(bar) == [0, 1, 2]
        bar.set_postfix_str("y", refresh=False)
    assert capsys.readouterr().out == ""


def test_streams_that_another_program_has_put_there_stay(monkeypatch):
    theirs = io.StringIO()
    monkeypatch.setattr(sys, "stdout", theirs)
    prepare_process()
    assert sys.stdout is theirs


@pytest.mark.fault("system")
def test_a_system_without_posix_locks_ends_in_one_line():
    code = "import sys; sys.modules['fcntl'] = None\n" + WORK
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "this project runs on Linux and macOS, and on Windows inside WSL (`wsl --install`)\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_wait_for_a_bounded_time_unless_the_user_says_otherwise(monkeypatch, given, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    prepare_process()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
