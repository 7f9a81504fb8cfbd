"""The records of a run: complete local files, and what Weights & Biases is told, read back from its own log."""

import base64
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import weakref
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch

from modeling.run.wandb_tracker import JsonLines, Tracker, WandbTracker, write_csv
from tests.helpers import ROOT, TINY

# ---- local files


def test_lines_are_appended_and_read_back(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.log(1, {"a": 0.5})
    lines.log(2, {"a": 0.25})
    assert lines.rows() == [{"step": 1, "a": 0.5}, {"step": 2, "a": 0.25}]


def test_a_second_record_of_a_step_joins_its_line(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.log(1, {"a": 0.5})
    lines.log(2, {"a": 0.25})
    lines.log(2, {"b": 3})
    assert lines.rows() == [{"step": 1, "a": 0.5}, {"step": 2, "a": 0.25, "b": 3}]


def test_going_on_drops_the_lines_that_will_come_again_and_a_cut_one(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "a"')
    lines = JsonLines(path, step=2)
    lines.log(3, {"a": 1})
    assert [row["step"] for row in lines.rows()] == [1, 2, 3]


def test_csv_holds_the_rows_that_have_all_columns(tmp_path):
    write_csv(
        tmp_path / "t.csv", [{"step": 1, "loss": 0.5, "x": 1}, {"step": 2}, {"step": 3, "loss": 0.1}], ["step", "loss"]
    )
    assert (tmp_path / "t.csv").read_text() == "step,loss\n1,0.5\n3,0.1\n"


# ---- Weights & Biases


@pytest.fixture(autouse=True)
def _environment():
    """W&B's variables are read from the machine by none of these tests, and left on it by none."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    yield
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ.update(before)


def wandb_records(path: Path) -> Iterator:
    """The records of an offline run: LevelDB's log framing around protobuf messages (wandb ships no reader)."""
    from wandb.proto import wandb_internal_pb2

    block_bytes, head_bytes, kinds_that_end = 32768, 7, (1, 4)
    data, position, parts = path.read_bytes(), 7, []
    assert struct.unpack("<4sHB", data[:7]) == (b":W&B", 0xBEE1, 0)
    while position + head_bytes <= len(data):
        left = block_bytes - position % block_bytes
        if left < head_bytes:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + head_bytes])
        body = data[position + head_bytes : position + head_bytes + length]
        assert zlib.crc32(body, zlib.crc32(bytes([kind]))) == checksum
        position += head_bytes + length
        parts.append(body)
        if kind in kinds_that_end:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def read_wandb(folder: Path) -> dict:
    """What a folder of one start of a run tells: config, rows by step, artifacts with their files, logged files."""
    (path,) = folder.glob("wandb/*run-*/run-*.wandb")
    return read_wandb_file(path)


def read_wandb_file(path: Path) -> dict:
    found = {"config": {}, "rows": {}, "axes": {}, "artifacts": {}, "files": [], "exit": None}

    def values(items):
        return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}

    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= values(record.run.config.update)
        elif kind == "config":
            found["config"] |= values(record.config.update)
        elif kind == "history":
            row = values(record.history.item)
            found["rows"].setdefault(row["_step"], {}).update(row)
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            artifact = record.request.log_artifact.artifact
            found["artifacts"][artifact.name] = (artifact.type, [entry.path for entry in artifact.manifest.contents])
        elif kind == "artifact":
            found["artifacts"][record.artifact.name] = (
                record.artifact.type,
                [entry.path for entry in record.artifact.manifest.contents],
            )
        elif kind == "files":
            found["files"] += [file.path for file in record.files.files]
        elif kind == "metric":
            found["axes"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


@pytest.mark.slow
def test_a_run_tells_wandb_everything_and_never_the_code(tiny, capsys):
    import main
    from modeling.config import parse

    config = tiny("wandb.mode=offline", "runtime.output_dir=run", "wandb.project=here")
    main.main(config)
    found = read_wandb(Path("run"))
    assert found["run"].project == "here"
    assert found["run"].display_name == "run"
    assert {key: found["config"][key] for key in config} == parse(config).model_dump()  # all hyperparameters, nested
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 8]
    for line in lines:  # loss, smoothed loss, learning rate, images/s, at the same steps as in the local file
        row = found["rows"][line["step"]]
        assert {key: row[key] for key in line if key != "step"} == {key: line[key] for key in line if key != "step"}
    assert {"train/loss", "train/loss_smoothed", "train/lr", "images_per_second"} <= set(lines[0])
    assert found["rows"][0]["inputs._type"] == "image-file"
    for step in (4, 8):
        for kind in ("raw", "ema"):
            assert found["rows"][step][f"samples/{kind}._type"] == "image-file"
    assert list(found["artifacts"].values()) == [("config", ["config.yaml"])]
    media = [file.name for file in Path("run/wandb").rglob("*.png")]
    assert len(media) == 5  # inputs, and two grids at two steps
    assert not [file for file in Path("run/wandb").rglob("*") if file.suffix in (".py", ".patch", ".ipynb")]
    assert not any(name.startswith("code/") or name.endswith(".py") for name in found["files"])
    assert "Weights & Biases" not in capsys.readouterr().err


def track(tmp_path: Path, mode: str = "offline") -> None:
    """A run's worth of calls; the local file must be complete whatever becomes of W&B."""
    wandb = WandbTracker(mode=mode, project="p", name="n", folder=tmp_path, config={"a": 1})
    tracker = Tracker(JsonLines(tmp_path / "m.jsonl"), wandb)
    tracker.image(0, "inputs", torch.zeros(3, 4, 4, dtype=torch.uint8))
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0})
    (tmp_path / "config.yaml").write_text("a: 1\n")
    tracker.artifact(tmp_path / "config.yaml", "config", "config")
    tracker.finish()
    assert [row["step"] for row in tracker.lines.rows()] == [1, 2]


@pytest.mark.slow
def test_a_run_that_was_stopped_is_no_success_for_wandb(tmp_path):
    wandb = WandbTracker(mode="offline", project="p", name="n", folder=tmp_path, config={})
    wandb.log(1, {"loss": 1.0})
    wandb.finish(is_complete=False)
    assert read_wandb(tmp_path)["exit"] == 1


@pytest.mark.fault("Weights & Biases")
def test_without_wandb_the_run_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    track(tmp_path)
    assert capsys.readouterr().err.count("the local files are complete without it") == 1


@pytest.mark.fault("Weights & Biases")
def test_when_wandb_fails_to_start_the_run_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    def fail(**options):
        raise ConnectionResetError("the service is gone")

    monkeypatch.setattr("wandb.init", fail)
    track(tmp_path)
    assert capsys.readouterr().err.count("the service is gone; the local files are complete without it") == 1


@pytest.mark.slow
@pytest.mark.fault("Weights & Biases")
def test_when_wandbs_process_dies_the_run_goes_on_and_says_so_once(tmp_path):
    """In a process of its own, which must end well, too."""
    code = """
import psutil, sys, wandb
from pathlib import Path
from tests.run.test_wandb_tracker import track

log = wandb.Run.log

def kill_the_service_first(run, *args, **options):
    for child in psutil.Process().children(recursive=True):
        if "wandb" in child.name():
            child.kill()
            child.wait(5)
            print("killed")
    return log(run, *args, **options)

wandb.Run.log = kill_the_service_first
track(Path(sys.argv[1]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "killed" in done.stdout
    assert done.stderr.count("the local files are complete without it") == 1
    assert "Traceback" not in done.stderr


def slow_run(seconds: float) -> types.SimpleNamespace:
    """What wandb.init returns, with a log() that takes this long."""
    run = types.SimpleNamespace(dir="run/files", log_artifact=print, finish=lambda exit_code: None)
    run.define_metric = lambda *args, **options: None
    run.log = lambda *args, **options: time.sleep(seconds)
    return run


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["start", "finish"])
@pytest.mark.fault("Weights & Biases")
def test_a_slow_wandb_delays_a_run_by_a_bounded_time(tmp_path, monkeypatch, capsys, phase):
    monkeypatch.setattr(f"modeling.run.wandb_tracker.{phase.upper()}_SECONDS", 0.2)
    if phase == "start":
        monkeypatch.setattr("wandb.init", lambda **options: time.sleep(1.5))
    else:
        monkeypatch.setattr("wandb.init", lambda **options: slow_run(1.5))
    started = time.perf_counter()
    track(tmp_path)
    assert time.perf_counter() - started < 1.2
    assert capsys.readouterr().err.count(f"did not {phase} within 0.2 s; the local files are complete") == 1
    time.sleep(2.5)  # lets the thread end inside this test


def test_calls_for_a_wandb_that_was_given_up_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    wandb = WandbTracker(mode="offline", project="p", name="n", folder=tmp_path, config={})
    grid = torch.zeros(3, 4, 4, dtype=torch.uint8)
    kept = weakref.ref(grid)
    wandb.image(1, "grid", grid)
    del grid
    assert kept() is None


@pytest.mark.fault("Weights & Biases")
def test_calls_that_wandb_does_not_take_do_not_pile_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("modeling.run.wandb_tracker.MAX_CALLS", 3)
    monkeypatch.setattr("modeling.run.wandb_tracker.FINISH_SECONDS", 0.2)
    monkeypatch.setattr("wandb.init", lambda **options: slow_run(1))
    wandb = WandbTracker(mode="offline", project="p", name="n", folder=tmp_path, config={})
    started = time.perf_counter()
    for step in range(20):
        wandb.log(step, {"loss": 1.0})
    wandb.finish()
    assert time.perf_counter() - started < 0.8
    assert capsys.readouterr().err.count("3 calls wait for it; the local files are complete without it") == 1
    time.sleep(1.2)  # lets the thread end inside this test


def wandb_processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.name() == "wandb-core"]


def test_after_the_end_nothing_of_wandb_is_left(tmp_path):
    """Its file is complete, and no process, thread or hook could hold up or change the end of ours."""
    numbers = signal.SIGINT, signal.SIGTERM
    before, threads = (sys.exit, sys.excepthook, *map(signal.getsignal, numbers)), set(threading.enumerate())
    tracker = WandbTracker(mode="offline", project="p", name="n", folder=tmp_path, config={})
    assert len(wandb_processes()) == 1
    assert tuple(map(signal.getsignal, numbers)) == before[2:]
    tracker.log(1, {"loss": 1.0})
    tracker.finish()
    assert wandb_processes() == []
    found = read_wandb(tmp_path)
    assert found["rows"][1]["loss"] == 1.0
    assert found["exit"] == 0  # the last record
    assert (sys.exit, sys.excepthook, *map(signal.getsignal, numbers)) == before
    assert set(threading.enumerate()) <= threads


@pytest.mark.slow
@pytest.mark.fault("Weights & Biases")
def test_online_without_a_key_is_logged_offline_and_asks_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    track(tmp_path, mode="online")
    assert "no API key" in capsys.readouterr().err
    assert read_wandb(tmp_path)["rows"][2]["loss"] == 1.0


# ---- Weights & Biases over a network that fails

KEY = "canary" + "0123456789" * 4
CREDENTIALS = base64.b64encode(f"api:{KEY}".encode())


class FakeWandb(ThreadingHTTPServer):
    """As much of W&B's server as runs without media need.

    Args:
        status: of its answers.
        dies: whether it falls silent once a run has started.
    """

    def __init__(self, status: int = 200, dies: bool = False):
        super().__init__(("127.0.0.1", 0), Answer)
        self.status, self.dies = status, dies
        self.authorizations: set[str] = set()
        self.history: list[str] = []  # the lines of the one run
        self.is_silent, self.is_closed = False, threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self.thread.start()

    def handle_error(self, request, client_address):
        """Says nothing: clients that are killed drop their connections."""

    def close(self) -> None:
        self.is_closed.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Says nothing."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.authorizations.add(self.headers["Authorization"])
        if self.server.is_silent:
            self.server.is_closed.wait()
            self.close_connection = True
        elif self.server.status != 200:
            self.answer({"errors": [{"message": "user is not logged in"}]})
        elif self.path.endswith("/file_stream"):
            if history := json.loads(body).get("files", {}).get("wandb-history.jsonl"):
                lines, start = history["content"], history["offset"]
                self.server.history[start : start + len(lines)] = lines
            self.answer({})
        else:
            self.answer({"data": self.data(**json.loads(body))})

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def data(self, query: str, variables: dict | None = None, operationName: str = "") -> dict:
        """What GraphQL's operation returns."""
        lines, port = self.server.history, self.server.server_port
        if operationName == "RunResumeStatus" and lines:
            tails = {"historyTail": json.dumps(lines[-1:]), "eventsTail": "[]", "summaryMetrics": lines[-1]}
            counts = {"historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0}
            return {
                "model": {
                    "bucket": {"name": variables["name"], "config": "{}", "wandbConfig": '{"t": 1}'} | tails | counts
                }
            }
        if operationName == "UpsertBucket":
            self.server.is_silent = self.server.dies
            project = {"name": variables["project"], "entity": {"name": "someone"}}
            return {"upsertBucket": {"bucket": {"name": variables["name"], "displayName": "n", "project": project}}}
        if operationName == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"http://127.0.0.1:{port}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {}

    def answer(self, data: dict) -> None:
        content = json.dumps(data).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def fake_wandb(monkeypatch):
    """Makes a FakeWandb, to which the environment then leads."""
    servers = []

    def make(**options) -> FakeWandb:
        servers.append(FakeWandb(**options))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{servers[-1].server_port}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port that is nobody else's: it refuses, and after listen() it accepts what nobody then answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener


RUN = """
import sys, time
from pathlib import Path
import psutil, torch, wandb
from modeling import tracking

fault, folder = sys.argv[1], Path(sys.argv[2])
tracking.START_SECONDS, tracking.FINISH_SECONDS = map(int, sys.argv[3:])
started = time.time()
wandb = tracking.WandbTracker(
    mode="offline" if fault == "offline" else "online", project="p", name="n", folder=folder, config={"a": 1}
)
print(time.time() - started)
tracker = tracking.Tracker(tracking.JsonLines(folder / "m.jsonl"), wandb)
for step in (1, 2, 3):
    tracker.log(step, {"loss": 1.0})
if fault == "hangs":
    (core,) = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
    core.suspend()
print(time.time())
tracker.finish()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "seconds", "said"),
    [
        ("offline", (15, 10), ()),
        ("silent", (4, 1), ("Timed out initializing run", "did not start within 4 s")),  # the latter on a slow machine
        ("refuses", (4, 1), ("connection refused", "did not start within 4 s")),
        ("wrong key", (15, 10), ("user is not logged in",)),
        ("dies", (15, 4), ("Timed out finishing run",)),
        ("hangs", (15, 1), ("did not finish within 1 s",)),
    ],
)
@pytest.mark.long
@pytest.mark.fault("Weights & Biases")
@pytest.mark.fault("API key")
def test_a_fault_costs_a_bounded_time_and_nothing_else(tmp_path, fake_wandb, listener, fault, seconds, said):
    """A whole process each, to the end of it and of W&B's own process."""
    if fault in ("offline", "silent"):
        listener.listen()
    port = listener.getsockname()[1]
    if fault in ("wrong key", "dies", "hangs"):
        server = fake_wandb(status=401 if fault == "wrong key" else 200, dies=fault == "dies")
        port = server.server_port
    folder, home = tmp_path / "run", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    address = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{port}", "HOME": str(home)}
    command = [sys.executable, "-c", RUN, fault, str(folder), *map(str, seconds)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | address, **options) as process:
        cores, limit = set(), time.time() + 60
        while process.poll() is None:
            if time.time() > limit:  # W&B's process, first: it holds our pipes, too
                for victim in [*cores, process]:
                    victim.kill()
            try:
                children = psutil.Process(process.pid).children()
                cores |= {child for child in children if child.name() == "wandb-core"}
            except psutil.Error:
                pass  # ended meanwhile
            time.sleep(0.02)
        ended = time.time()
        output, errors = process.stdout.read(), process.stderr.read()

    assert process.returncode == 0, errors
    start_seconds, finished_at = map(float, output.split())
    assert start_seconds < seconds[0]
    assert ended - finished_at < seconds[1] + 2  # 2 s for Python's own end
    assert [json.loads(line)["step"] for line in (folder / "m.jsonl").read_text().splitlines()] == [1, 2, 3]
    if said:
        assert any(text in errors for text in said)
        assert errors.count("the local files are complete without it") == errors.count("\n") == 1
    else:
        assert errors == ""
    assert len(cores) == 1
    (core,) = cores
    assert not core.is_running() or core.status() == psutil.STATUS_ZOMBIE

    if fault in ("offline", "dies"):  # what W&B was told can still be uploaded
        found = read_wandb(folder)
        assert [found["rows"][step]["loss"] for step in (1, 2, 3)] == [1.0, 1.0, 1.0]
        assert found["exit"] == 0
    if fault == "dies":
        (path,) = folder.glob("wandb/run-*")
        assert f"`wandb sync --include-online {path}`" in errors

    if fault in ("wrong key", "dies", "hangs"):  # the key was used, but lies nowhere
        assert server.authorizations == {f"Basic {CREDENTIALS.decode()}"}
    elif fault in ("silent", "offline"):
        listener.settimeout(0.1)
        try:
            with listener.accept()[0] as connection:
                assert CREDENTIALS in connection.recv(65536)
                assert fault == "silent"
        except TimeoutError:
            assert fault == "offline"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for secret in (KEY.encode(), CREDENTIALS):
        assert [path for path in files if secret in path.read_bytes()] == []
    assert list(home.rglob("*")) == []


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("Weights & Biases")
def test_a_run_that_wandb_fails_is_the_run_without_it(tiny, tiny_data, fake_wandb):
    from safetensors.torch import load_file

    import main

    main.main(tiny("runtime.output_dir=disabled"))
    fake_wandb(dies=True)
    code = """
import sys
from hydra import compose, initialize_config_dir
import main
from modeling import tracking

tracking.FINISH_SECONDS = 1
with initialize_config_dir(sys.argv[1], version_base="1.3"):
    config = compose("config", overrides=sys.argv[2:])
main.main(config)
"""
    overrides = [
        *TINY,
        f"dataset.root={tiny_data}",
        "wandb.mode=online",
        f"runtime.output_dir={Path('online').resolve()}",
    ]
    command = [sys.executable, "-c", code, str(ROOT / "conf"), *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the local files are complete without it") == 1
    assert "Traceback" not in done.stderr

    first, second = (load_file(f"{mode}/model.safetensors") for mode in ("online", "disabled"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    machine = {"images_per_second": 0, "seconds": 0, "memory_bytes": 0}  # differs from run to run
    first, second = (
        [json.loads(line) | machine for line in Path(mode, "metrics.jsonl").read_text().splitlines()]
        for mode in ("online", "disabled")
    )
    assert first == second
    assert len(first) == 3
    grids = [path.relative_to("online") for path in Path("online/samples").rglob("*.png")]
    assert len(grids) == 5
    assert all(Path("online", grid).read_bytes() == Path("disabled", grid).read_bytes() for grid in grids)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("Weights & Biases")
def test_signals_to_the_whole_group_do_not_reach_wandbs_process(tmp_path):
    """Ctrl-C does so; what the run logs while it ends must arrive, too."""
    code = """
import signal, sys, time
from pathlib import Path
from modeling.run.wandb_tracker import WandbTracker

seen = set()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: seen.add(number))
wandb = WandbTracker(mode="offline", project="p", name="n", folder=Path(sys.argv[1]), config={})
wandb.log(1, {"loss": 1.0})
print("ready", flush=True)
while len(seen) < 2:
    time.sleep(0.05)
wandb.log(2, {"loss": 2.0})
wandb.finish()
"""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, **options) as process:
        assert process.stdout.readline() == "ready\n"
        for number in (signal.SIGINT, signal.SIGTERM):
            os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    found = read_wandb(tmp_path)
    assert [found["rows"][step]["loss"] for step in (1, 2)] == [1.0, 2.0]
    assert found["exit"] == 0


# ---- Weights & Biases when a run is resumed


def steps_of(server: FakeWandb, axis: str) -> list[int]:
    return [json.loads(line)[axis] for line in server.history]


def start_and_resume(folder: Path, mode: str) -> None:
    """Steps 1 to 4, and again from 3, as after a kill: the last checkpoint was of step 2."""
    for steps in ((10, 20, 30, 40), (30, 40, 50, 60)):
        wandb = WandbTracker(mode=mode, project="p", name="n", folder=folder, config={"a": 1}, run_id="same")
        for step in steps:
            wandb.log(step, {"loss": step / 10})
        wandb.finish()


@pytest.mark.fault("Weights & Biases")
def test_a_resumed_online_run_goes_on_where_it_was(tmp_path, fake_wandb, monkeypatch, capfd):
    server = fake_wandb()
    monkeypatch.setenv("WANDB_MODE", "offline")  # what the configuration says is what counts
    start_and_resume(tmp_path, "online")
    assert steps_of(server, "_step") == steps_of(server, "step") == [10, 20, 30, 40, 50, 60]
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
        found = read_wandb_file(path)
        assert found["run"].run_id == "same"
        assert list(found["rows"]) == steps
        assert found["axes"]["*"] == "step"
    assert server.history == []  # so far

    command = [sys.executable, "-m", "wandb", "sync", str(tmp_path / "wandb")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert steps_of(server, "step") == [10, 20, 30, 40, 30, 40, 50, 60]  # the axis of the charts
    assert steps_of(server, "_step") == [10, 20, 30, 40, 41, 42, 50, 60]  # W&B's own must rise
