"""Signals and time limits of real processes, in every phase.

The moments are random, with a seed.
"""

import random
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from modeling.checkpoint import load_checkpoint
from tests.faults.processes import LONG, run_to_end, wait_for
from tests.helpers import TINY, equal, needs_compiler, result, start_script

CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138, "SIGHUP": 129, "SIGUSR2": 140}
SLOW_PHASES = [  # each lasts a second or more
    "diffusion.num_timesteps=300", "train.sample_steps=300", "train.num_samples=16", "train.num_eval_images=2000",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("signal")
@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("SIGTERM", "sampling (ema):"),
        ("SIGHUP", "training:"),
        ("SIGUSR2", "training:"),
        *[
            (name, phase)
            for name in ("SIGTERM", "SIGINT", "SIGUSR1")
            for phase in ("model ", "training:", "sampling (raw):", "loss (train, raw):")
        ],
    ],
)
def test_a_signal_saves_within_ten_seconds_and_ends_with_its_code(tmp_path, tiny_data, record_property, name, phase):
    options = *TINY, *SLOW_PHASES, f"dataset.root={tiny_data}", f"runtime.output_dir={tmp_path / 'run'}"
    with start_script("tests/faults/talkative_main.py", *options, "runtime.num_workers=2") as process:
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
@needs_compiler
@pytest.mark.fault("signal")
def test_a_signal_while_compiling_ends_at_once(tmp_path, tiny_data, record_property):
    options = *TINY, f"dataset.root={tiny_data}", f"runtime.output_dir={tmp_path / 'run'}", "runtime.compile=true"
    with start_script("main.py", *options, cwd=tmp_path) as process:
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


class Trickle(BaseHTTPRequestHandler):
    """Sends the head of a large file, then a little now and then."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(1 << 30))
        self.end_headers()
        try:
            for _ in range(600):
                self.wfile.write(bytes(1 << 10))
                time.sleep(0.05)
        except OSError:
            pass

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""


@pytest.mark.slow
@pytest.mark.fault("signal")
@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.long)])
def test_a_signal_while_downloading_ends_and_leaves_no_part(tmp_path, record_property, name):
    with ThreadingHTTPServer(("127.0.0.1", 0), Trickle) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/archive"
        options = f"dataset.root={tmp_path}/data", f"dataset.archive={tmp_path}/a.tar.gz", f"dataset.urls=[{url}]"
        with start_script("prepare_data.py", *options) as process:
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
@pytest.mark.fault("time limit")
def test_a_time_limit_ends_with_zero_until_the_run_is_finished(tmp_path, tiny_data, straight, record_property):
    """As in a queue with a time limit: the same command again until metrics.json exists."""
    options = *LONG, f"dataset.root={tiny_data}", f"runtime.output_dir={tmp_path / 'run'}", "runtime.max_seconds=8"
    num_jobs = 0
    while not (tmp_path / "run" / "metrics.json").exists():
        assert num_jobs < 20
        code, output = run_to_end("main.py", *options)
        assert code == 0, output
        num_jobs += 1
        assert "metrics " in output or "stopped by the time limit of 8 s: saved at step" in output
    assert equal(result(tmp_path / "run"), straight)
    record_property("outcome", f"{num_jobs} jobs of 8 s, all ended with 0; result equal to the uninterrupted one")
