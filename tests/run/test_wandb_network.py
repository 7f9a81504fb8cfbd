"""Weights & Biases over a network, also one that fails: a fault costs a bounded time and nothing else."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import main
from tests.helpers import TINY, run_script
from tests.run.wandb_file import read_wandb
from tests.run.wandb_process import GAVE_UP, run_tracked, start_wandb
from tests.run.wandb_server import CREDENTIALS, KEY

AUTHORIZATION = f"Basic {CREDENTIALS.decode()}"

# ---- a process for each fault, watched to its end


def in_a_process(test: Callable) -> Callable:
    """Marks a test of `run_tracked`."""
    for mark in (pytest.mark.slow, pytest.mark.long):
        test = mark(test)
    return pytest.mark.fault("Weights & Biases")(pytest.mark.fault("API key")(test))


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port of our own: it refuses connections, and after listen() it accepts them and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.settimeout(0.1)
        yield listener


def url_of(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@in_a_process
def test_offline_logging_is_complete_and_connects_to_nothing(tmp_path, listener):
    listener.listen()
    ended = run_tracked(tmp_path, url_of(listener), mode="offline")
    assert ended.errors == ""
    found = read_wandb(ended.folder)
    assert [found.rows[step]["loss"] for step in (1, 2, 3)] == [1.0, 1.0, 1.0]
    assert found.exit_code == 0
    with pytest.raises(TimeoutError):
        listener.accept()


# What is said on a slow machine, where our limit or W&B's own for its first request is over before its limit for all.
SLOW = "did not start within 4 s", "context deadline exceeded"


@in_a_process
def test_a_network_that_swallows_everything_delays_the_start_at_most(tmp_path, listener):
    listener.listen()
    ended = run_tracked(tmp_path, url_of(listener), 4, 1)
    ended.assert_gave_up("Timed out initializing run", *SLOW)
    with listener.accept()[0] as connection:
        assert CREDENTIALS in connection.recv(65536)


@in_a_process
def test_a_refused_connection_delays_the_start_at_most(tmp_path, listener):
    ended = run_tracked(tmp_path, url_of(listener), 4, 1)
    ended.assert_gave_up("connection refused", *SLOW)


@in_a_process
def test_a_wrong_key_costs_a_bounded_time(tmp_path, fake_wandb):
    server = fake_wandb(status=401)
    ended = run_tracked(tmp_path, server.url)
    ended.assert_gave_up("user is not logged in")
    assert server.authorizations == {AUTHORIZATION}


@in_a_process
def test_a_server_that_dies_delays_the_end_and_all_can_be_uploaded(tmp_path, fake_wandb):
    server = fake_wandb(dies=True)
    ended = run_tracked(tmp_path, server.url, 15, 4)
    ended.assert_gave_up("Timed out finishing run")
    (path,) = ended.folder.glob("wandb/run-*")
    assert f"`wandb sync --include-online {path}`" in ended.errors
    found = read_wandb(ended.folder)
    assert [found.rows[step]["loss"] for step in (1, 2, 3)] == [1.0, 1.0, 1.0]
    assert found.exit_code == 0
    assert server.authorizations == {AUTHORIZATION}


@in_a_process
def test_a_wandb_process_that_hangs_delays_the_end_at_most(tmp_path, fake_wandb):
    server = fake_wandb()
    ended = run_tracked(tmp_path, server.url, 15, 1, fault="hangs")
    ended.assert_gave_up("did not finish within 1 s")
    assert server.authorizations == {AUTHORIZATION}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("Weights & Biases")
def test_a_run_that_wandb_fails_is_the_run_without_it(tiny, tiny_data, fake_wandb):
    main.main(tiny("runtime.output_dir=disabled"))
    server = fake_wandb(dies=True)
    overrides = (
        f"dataset.root={tiny_data}",
        "wandb.mode=online",
        "wandb.notes=private",
        f"runtime.output_dir={Path('online').resolve()}",
    )
    done = run_script("main.py", *TINY, *overrides, env={"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(GAVE_UP) == 1
    assert "Traceback" not in done.stderr

    machine = {"images_per_second": 0, "seconds": 0, "memory_bytes": 0}  # differs from run to run
    first, second = (
        [json.loads(line) | machine for line in Path(mode, "metrics.jsonl").read_text().splitlines()]
        for mode in ("online", "disabled")
    )
    assert first == second
    assert len(first) == 3
    grids = [path.relative_to("online") for path in Path("online/samples").rglob("*.png")]
    assert len(grids) == 5
    for name in (*grids, "model.safetensors"):  # the weights say nothing of W&B
        assert Path("online", name).read_bytes() == Path("disabled", name).read_bytes()


# ---- a resumed run


def start_and_resume(folder: Path, mode: str) -> None:
    """Steps 1 to 4, and again from 3, as after a kill: the last checkpoint was of step 2."""
    for steps in ((10, 20, 30, 40), (30, 40, 50, 60)):
        tracker = start_wandb(folder, mode)
        for step in steps:
            tracker.log(step, {"loss": step / 10})
        tracker.finish(is_complete=True)


@pytest.mark.fault("Weights & Biases")
def test_a_resumed_online_run_continues_its_history(tmp_path, fake_wandb, monkeypatch, capfd):
    server = fake_wandb()
    monkeypatch.setenv("WANDB_MODE", "offline")  # what the configuration says is what counts
    start_and_resume(tmp_path, "online")
    assert server.steps("_step") == server.steps("step") == [10, 20, 30, 40, 50, 60]
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.fault("Weights & Biases")
def test_a_resumed_offline_run_is_uploaded_as_one(tmp_path, fake_wandb, capfd):
    server = fake_wandb()
    start_and_resume(tmp_path, "offline")
    assert capfd.readouterr().err == ""
    paths = sorted(tmp_path.glob("wandb/offline-run-*-same*/run-same.wandb"))
    assert len(paths) == 2
    for path, steps in zip(paths, ([10, 20, 30, 40], [30, 40, 50, 60]), strict=True):
        found = read_wandb(path)
        assert found.run.run_id == "same"
        assert list(found.rows) == steps
        assert found.axes["*"] == "step"
    assert server.history == []  # so far

    command = [sys.executable, "-m", "wandb", "sync", str(tmp_path / "wandb")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert server.steps("step") == [10, 20, 30, 40, 30, 40, 50, 60]  # the axis of the charts
    assert server.steps("_step") == [10, 20, 30, 40, 41, 42, 50, 60]  # W&B's own must rise
