"""Real processes, killed, starved and stopped: what `make test-faults` runs beside the tests marked `fault` elsewhere.

Moments are random but seeded. Every test that holds a row of docs/faults.md is marked `fault("the row")`.
"""

import errno
import functools
import http.server
import json
import os
import random
import re
import resource
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from modeling.checkpoint import load_checkpoint
from modeling.config import parse
from modeling.images import to_model_range
from modeling.run.folder import RunFolder
from modeling.run.objects import Run
from modeling.runtime import resolve_precision
from modeling.stage import identify, read_manifest
from modeling.system.files import write_atomically
from modeling.training import train_step
from tests.helpers import ROOT, TINY, equal, inject, result, train

NUM_STEPS = 100
LONG = [*TINY, "train.num_epochs=25", "train.sample_every=10", "train.log_every=1"]


def launch(script: str, *arguments: str, **options) -> subprocess.Popen:
    """A script in a process of its own, output and errors in one pipe."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "COV_"))}
    environment["OMP_NUM_THREADS"] = "1"  # small networks, and other processes at work beside them
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments], env=environment, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Reads the output until `text` has been in it, or it ends; returns what was read."""
    seen = ""
    while text not in seen and (character := process.stdout.read(1)):
        seen += character
    return seen


def steps_of(folder: Path) -> list[int]:
    """The steps in metrics.jsonl; a killed process's last line may be cut."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


@pytest.fixture(scope="module")
def straight(tiny_data, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("faults") / "straight"
    with launch("main.py", *LONG, f"dataset.root={tiny_data}", f"runtime.output_dir={folder}") as process:
        output = process.communicate()[0]
    assert process.returncode == 0, output
    assert steps_of(folder) == list(range(1, NUM_STEPS + 1))
    return result(folder)


class Kills:
    """Runs, killed and started again until `num_kills` were dealt; each run that ends is compared with `straight`."""

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
            if not (folder / "metrics.json").exists():  # no kills left: this one may end in peace
                assert not self.start_and_kill(folder, is_last=True)
            assert equal(result(folder), self.straight)
            assert steps_of(folder) == list(range(1, NUM_STEPS + 1))
            assert not list(folder.rglob("*.partial"))
            assert len(list((folder / "checkpoints").iterdir())) == 2
            self.num_finished += 1

    def start_and_kill(self, folder: Path, is_last: bool = False) -> bool:
        """Starts the run; True if it was killed, False if it ended first, and well."""
        before = max(steps_of(folder), default=0)
        with launch("main.py", *self.options, f"runtime.output_dir={folder}") as process:
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
        (3, 3, 0),
        pytest.param(30, 1, 0, marks=pytest.mark.long),
        pytest.param(30, 5, 2, marks=pytest.mark.long),
        pytest.param(40, 2, 0, marks=pytest.mark.long),
    ],
)
def test_killed_at_any_moment_every_start_succeeds_and_the_result_is_the_same(
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


# ---- signals, to real processes in every phase

SLOW_PHASES = [  # each lasts a second or more
    "diffusion.num_timesteps=300", "train.sample_steps=300", "train.num_samples=16", "train.num_eval_images=2000",
]  # fmt: skip
CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("signal")
@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("SIGTERM", "sampling (ema):"),
        *[
            (name, phase)
            for name in CODES
            for phase in ("model ", "training:", "sampling (raw):", "loss (train, raw):")
        ],
    ],
)
def test_a_signal_saves_within_ten_seconds_and_ends_with_its_code(tmp_path, tiny_data, record_property, name, phase):
    options = *TINY, *SLOW_PHASES, f"dataset.root={tiny_data}", f"runtime.output_dir={tmp_path / 'run'}"
    with launch("main.py", *options, "runtime.num_workers=2") as process:
        wait_for(process, phase)
        time.sleep(random.Random(f"{name} {phase}").uniform(0, 0.5))
        sent = time.perf_counter()
        process.send_signal(getattr(signal, name))
        output = process.communicate(timeout=20)[0]
    seconds = time.perf_counter() - sent
    assert process.returncode == CODES[name], output
    assert seconds < 10
    assert "Traceback" not in output
    if "saved at step" in output:
        step = int(output.partition("saved at step ")[2].split()[0])
        assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["state"]["step"] == step
    else:
        assert "no step was done yet" in output
    assert not list(tmp_path.rglob("*.partial"))
    record_property("outcome", f"{name} in {phase.strip(' :')}: code {process.returncode} after {seconds:.1f} s")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("signal")
def test_a_signal_while_compiling_ends_at_once(tmp_path, tiny_data, record_property):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    options = *TINY, f"dataset.root={tiny_data}", f"runtime.output_dir={tmp_path / 'run'}", "runtime.compile=true"
    with launch("main.py", *options, cwd=tmp_path) as process:
        wait_for(process, "training:")
        time.sleep(2)  # the first step compiles for much longer
        sent = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=30)[0]
    seconds = time.perf_counter() - sent
    assert process.returncode == 143, output
    assert "no step was done yet" in output
    assert seconds < 10
    record_property("outcome", f"SIGTERM while compiling: code 143 after {seconds:.1f} s")


class TricklingServer(socketserver.ThreadingTCPServer):
    """Sends the head of a large file, then a byte now and then."""

    allow_reuse_address = True
    daemon_threads = True


class Trickle(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(1 << 30))
        self.end_headers()
        try:
            for _ in range(600):
                self.wfile.write(bytes(1 << 10))
                time.sleep(0.05)
        except OSError:
            pass

    def log_message(self, *args):
        pass


@pytest.mark.slow
@pytest.mark.fault("signal")
@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.long)])
def test_a_signal_while_downloading_ends_and_leaves_no_part(tmp_path, record_property, name):
    with TricklingServer(("127.0.0.1", 0), Trickle) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/archive"
        options = f"dataset.root={tmp_path}/data", f"dataset.archive={tmp_path}/a.tar.gz", f"dataset.urls=[{url}]"
        with launch("prepare_data.py", *options) as process:
            wait_for(process, "downloading")
            time.sleep(0.3)
            assert (tmp_path / "a.tar.gz.part").exists()
            sent = time.perf_counter()
            process.send_signal(getattr(signal, name))
            output = process.communicate(timeout=20)[0]
        server.shutdown()
    assert process.returncode == CODES[name], output
    assert "Traceback" not in output
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {".a.tar.gz.lock"}
    record_property(
        "outcome", f"{name} while downloading: code {process.returncode} after {time.perf_counter() - sent:.1f} s"
    )


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("SIGKILL")
def test_preparation_killed_at_any_moment_leaves_nothing_that_is_taken_for_data(tmp_path, record_property):
    moments, options = random.Random(1), ("dataset=shapes", "dataset.num_images=1500", f"dataset.root={tmp_path}")
    for _ in range(8):
        with launch("prepare_data.py", *options) as process:
            wait_for(process, "drawing test")
            time.sleep(moments.uniform(0, 1.3))
            process.kill()
    with launch("prepare_data.py", *options) as process:
        output = process.communicate()[0]
    assert process.returncode == 0, output
    assert {path.name for path in tmp_path.iterdir()} == {"shapes", ".shapes.lock"}
    record_property("outcome", "8 of 8 preparations killed and made up for")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("time limit")
def test_a_time_limit_ends_with_zero_until_the_run_is_finished(tmp_path, tiny_data, straight, record_property):
    """As in a queue that ends jobs: the same command until metrics.json is there."""
    options = *LONG, f"dataset.root={tiny_data}", f"runtime.output_dir={tmp_path / 'run'}", "runtime.max_seconds=8"
    num_jobs = 0
    while not (tmp_path / "run" / "metrics.json").exists():
        assert num_jobs < 20
        with launch("main.py", *options) as process:
            output = process.communicate()[0]
        assert process.returncode == 0, output
        num_jobs += 1
        assert "metrics " in output or "stopped by the time limit of 8 s: saved at step" in output
    assert equal(result(tmp_path / "run"), straight)
    record_property("outcome", f"{num_jobs} jobs of 8 s, all ended with 0; result equal to the uninterrupted one")


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("two runs in one folder")
def test_a_second_run_in_a_folder_is_refused_and_a_dead_ones_lock_taken_over(tmp_path, tiny_data, record_property):
    options = *LONG, f"dataset.root={tiny_data}", f"runtime.output_dir={tmp_path / 'run'}"
    with launch("main.py", *options) as first:
        wait_for(first, "training:")
        with launch("main.py", *options) as second:
            output = second.communicate()[0]
        assert second.returncode == 1
        assert f"process {first.pid} is at work there" in output
        first.kill()
    with launch("main.py", *options, "train.max_steps=20") as third:
        output = third.communicate()[0]
    assert "is at work there" not in output
    record_property("outcome", "the second is refused, the lock of a killed one taken over")


# ---- the disk


@pytest.mark.slow
@pytest.mark.fault("disk")
@pytest.mark.long
@pytest.mark.parametrize("kind", ["tmpfs", "file size limit"])
def test_a_full_disk_ends_the_run_with_an_error_and_the_checkpoint_before_is_valid(
    tmp_path, tiny_data, record_property, kind
):
    """A real ENOSPC where a tmpfs can be mounted; the real EFBIG of a file size limit anywhere."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = [*LONG, f"dataset.root={tiny_data}", f"runtime.output_dir={disk / 'run'}", "train.checkpoint_every=5"]
    limit = None
    mount = ["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", str(disk)]  # room for one checkpoint of 0.7 MB
    if kind == "tmpfs" and subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        if kind != "tmpfs":
            # The first start makes two steps and their checkpoint; then files may not be larger than half of it.
            with launch("main.py", *options, "runtime.checkpoint_seconds=0.001") as process:
                wait_for(process, "training:")
                while not (disk / "run" / "checkpoints" / "last.pt").exists():
                    time.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                process.communicate()
            half = (disk / "run" / "checkpoints" / "last.pt").stat().st_size // 2
            limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (half, half))
        with launch("main.py", *options, preexec_fn=limit) as process:
            output = process.communicate()[0]
        assert process.returncode == 1, output
        assert "Traceback" not in output
        reason = os.strerror(errno.ENOSPC if kind == "tmpfs" else errno.EFBIG)
        message = output.strip().splitlines()[-1]
        assert message == f"{disk}/run/checkpoints/last.pt: {reason}; what was saved before is untouched"
        step = load_checkpoint(disk / "run" / "checkpoints" / "last.pt")["state"]["step"]
        assert step >= 1
        assert not list(disk.rglob("*.partial"))
    finally:
        if kind == "tmpfs":
            subprocess.run(["umount", str(disk)], check=True)
    record_property("outcome", f"{reason}: code 1, the path named, step {step} still loads")


WRITES = {  # whose file -> the end of its path
    "a checkpoint": "checkpoints/last.pt",
    "a sample": "samples/ema/4.png",
    "the exported weights": "model.safetensors",
    "a table": "loss.csv",
    "metrics.json": "metrics.json",
}
REFUSALS = {"write": "ENOSPC", "fsync": "EIO", "replace": "EACCES", "mkstemp": "EROFS"}


@pytest.mark.slow
@pytest.mark.fault("disk")
@pytest.mark.parametrize(
    ("what", "call"),
    [
        pytest.param(what, call, marks=[] if (what, call) == ("a checkpoint", "write") else pytest.mark.long)
        for what in WRITES
        for call in REFUSALS
    ],
)
def test_a_disk_that_fails_under_any_file_ends_the_run_and_loses_nothing(tiny, monkeypatch, what, call):
    calls, code = [], REFUSALS[call]

    def sometimes(path, *args, **kwargs):
        with monkeypatch.context() as patch:
            if str(path).endswith(WRITES[what]):
                calls.append(path)
                if what != "a checkpoint" or len(calls) == 2:  # so that there is one before it
                    inject(patch, call, code)
            return write_atomically(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        for module in ("checkpoint", "images", "tracking", "run"):
            patch.setattr(f"modeling.{module}.write_atomically", sometimes)
        with pytest.raises(SystemExit) as stopped:
            train(tiny("train.checkpoint_every=4"), "run")
    message = str(stopped.value.code)
    assert message.startswith(f"run/{WRITES[what]}: ")
    assert message.endswith(f": {os.strerror(getattr(errno, code))}; what was saved before is untouched")
    assert load_checkpoint("run/checkpoints/last.pt")["state"]["step"] in (4, 8)
    assert not list(Path("run").rglob("*.partial"))
    train(tiny("train.checkpoint_every=4"), "run")
    assert Path("run/metrics.json").exists()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("disk")
def test_a_metrics_line_that_cannot_be_written_ends_the_run_and_is_repaired(tiny, monkeypatch):
    whole = train(tiny(), "whole")
    opened = Path.open

    def fail_at_the_second_line(path, mode="r", *args, **kwargs):
        file = opened(path, mode, *args, **kwargs)
        if path.name == "metrics.jsonl" and mode == "a" and path.stat().st_size:
            file.write('{"step": 6, "tr')  # as far as there was room
            file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return file

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=r"run/metrics\.jsonl: No space left"):
        patch.setattr(Path, "open", fail_at_the_second_line)
        train(tiny(), "run")
    assert not (Path("run/metrics.json")).exists()
    assert equal(train(tiny(), "run"), whole)


# ---- endurance


def anonymous_bytes(pid: int) -> int:
    """Memory of a process's own; without pages of files, which the system takes away and gives back as it likes."""
    status = Path(f"/proc/{pid}/status").read_text()
    if "RssAnon:" not in status:
        raise psutil.ZombieProcess(pid)
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.fault("5,000 steps")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_five_thousand_steps_take_no_more_memory_files_or_threads(tmp_path, tiny_data, record_property, num_workers):
    folder = tmp_path / "run"
    options = [
        *TINY, f"dataset.root={tiny_data}", f"runtime.output_dir={folder}", "model.multipliers=[1]",
        "train.batch_size=2", "train.num_epochs=200", "train.max_steps=5000", "train.sample_every=20",
        "train.log_every=50", "train.checkpoint_every=100", "wandb.mode=offline",
        f"runtime.num_workers={num_workers}",
    ]  # fmt: skip
    rows = []
    with launch("main.py", *options) as process:
        threading.Thread(target=process.stdout.read, daemon=True).start()
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            steps = steps_of(folder)
            try:
                with watched.oneshot():
                    if steps:
                        rows.append([steps[-1], anonymous_bytes(process.pid), watched.num_fds(), watched.num_threads()])
            except (psutil.Error, FileNotFoundError):
                break
            time.sleep(0.2)
    assert process.returncode == 0
    assert len(list((folder / "checkpoints").iterdir())) == 2
    steps, memory, files, threads = np.array([row for row in rows if 1000 <= row[0] < 5000]).T
    assert len(steps) > 50
    assert steps.max() > 4500
    slope = np.polyfit(steps / 1000, memory / 1e6, 1)[0]
    per_epoch = 6 * num_workers  # a loader's pipes and queues come and go
    outcome = (
        f"{slope:+.2f} MB per 1,000 steps, {files.min()}-{files.max()} open files, {threads.min()}-{threads.max()} "
        f"threads ({num_workers} workers)"
    )
    print(outcome)
    record_property("outcome", outcome)
    assert slope < 1
    early, late = steps < 2500, steps >= 3500
    assert np.median(files[late]) <= np.median(files[early]) + per_epoch
    assert np.median(threads[late]) <= np.median(threads[early]) + num_workers


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("cost")
@pytest.mark.parametrize("experiment", ["default", "demo"])
def test_checkpoints_cost_less_than_one_percent(tiny_data, compose_config, tmp_path, record_property, experiment):
    """A save and its verification, against the training steps of an interval; side by side, medians of five."""
    names = [] if experiment == "default" else [f"experiment={experiment}"]
    options = ["dataset=shapes", "dataset.num_images=64", f"dataset.root={tiny_data}"]
    config = parse(compose_config(*names, *options))
    manifest = read_manifest(config.dataset)
    folder = RunFolder(tmp_path / "run", identify(config, 100, "data", "code"))
    run = Run(config, manifest, folder, torch.device("cpu"), resolve_precision("auto", torch.device("cpu")))
    batch = run.batches[0]
    times = {"step": [], "save": []}
    for number in range(15):
        started = time.perf_counter()
        train_step(run.model, to_model_range(batch), run.optimizer, "cpu", precision=run.precision)
        times["step"].append(time.perf_counter() - started)
        if number % 3 == 2:
            run.state.step = number
            started = time.perf_counter()
            run.save(run.state)
            times["save"].append(time.perf_counter() - started)
    step, save = (float(np.median(times[name])) for name in ("step", "save"))
    share = save / (config.train.checkpoint_every * step)
    size = (tmp_path / "run" / "checkpoints" / "last.pt").stat().st_size / 1e6
    outcome = (
        f"{experiment}: a save of {size:.0f} MB takes {save:.2f} s ({min(times['save']):.2f}-"
        f"{max(times['save']):.2f}), a step {step:.3f} s: {share:.2%} of the time at a save every "
        f"{config.train.checkpoint_every} steps"
    )
    print(outcome)
    record_property("outcome", outcome)
    assert share < 0.01


def test_the_documents_rows_are_those_that_tests_hold():
    lines = (ROOT / "docs" / "faults.md").read_text().splitlines()
    documented = {line.split("|")[1].strip() for line in lines if line.startswith("| ")} - {"fault"}
    held = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        held |= set(re.findall(r'@?pytest\.mark\.fault\("([^"]+)"\)', path.read_text())) - {"the row"}
    assert documented == held
