"""A disk that is full, fails or forbids: the run ends with an error that names the file, and nothing is lost."""

import errno
import functools
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modeling.checkpoint import load_checkpoint
from modeling.system import files
from tests.faults.processes import LONG, run_to_end, wait_for
from tests.helpers import ends_in_error, equal, inject, start_script, train


@pytest.mark.slow
@pytest.mark.fault("disk")
@pytest.mark.long
@pytest.mark.parametrize("kind", ["tmpfs", "file size limit"])
def test_a_full_disk_ends_the_run_and_leaves_a_valid_checkpoint(tmp_path, tiny_data, record_property, kind):
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
            with start_script("main.py", *options, "runtime.checkpoint_seconds=0.001") as process:
                wait_for(process, "training:")
                while not (disk / "run" / "checkpoints" / "last.pt").exists():
                    time.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                process.communicate()
            half = (disk / "run" / "checkpoints" / "last.pt").stat().st_size // 2
            limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (half, half))
        code, output = run_to_end("main.py", *options, preexec_fn=limit)
        assert code == 1, output
        assert "Traceback" not in output
        reason = os.strerror(errno.ENOSPC if kind == "tmpfs" else errno.EFBIG)
        assert output.strip().splitlines()[-1] == f"{disk}/run/checkpoints/last.pt: {reason}"
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
    "details.json": "details.json",
    "metrics.json": "metrics.json",
}
REFUSALS = {"write": "ENOSPC", "fsync": "EIO", "replace": "EACCES", "open": "EROFS"}


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
def test_a_disk_that_fails_under_any_file_loses_nothing(tiny, monkeypatch, capsys, what, call):
    calls, code, write = [], REFUSALS[call], files.write_atomically

    def sometimes(path, *args, **kwargs):
        with monkeypatch.context() as patch:
            if str(path).endswith(WRITES[what]):
                calls.append(path)
                if what != "a checkpoint" or len(calls) == 2:  # the first one is the state before it
                    inject(patch, call, code)
            return write(path, *args, **kwargs)

    ours = [module for name, module in sys.modules.items() if name.startswith("modeling.")]
    message = rf"(?m)^run/{WRITES[what]}: {os.strerror(getattr(errno, code))}\n\Z"
    with monkeypatch.context() as patch:
        for module in ours:
            if hasattr(module, "write_atomically"):
                patch.setattr(module, "write_atomically", sometimes)
        with ends_in_error(capsys, message):
            train(tiny("train.checkpoint_every=4"), "run")
    assert load_checkpoint("run/checkpoints/last.pt")["state"]["step"] in (4, 8)
    assert not list(Path("run").rglob("*.partial"))
    train(tiny("train.checkpoint_every=4"), "run")
    assert Path("run/metrics.json").exists()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("disk")
def test_a_metrics_line_that_cannot_be_written_is_repaired(tiny, monkeypatch, capsys):
    whole = train(tiny(), "whole")
    opened = Path.open

    def fail_at_the_second_line(path, mode="r", *args, **kwargs):
        file = opened(path, mode, *args, **kwargs)
        if path.name == "metrics.jsonl" and mode == "a" and path.stat().st_size:
            file.write('{"step": 6, "tr')  # as far as there was room
            file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return file

    with monkeypatch.context() as patch, ends_in_error(capsys, r"run/metrics\.jsonl: No space left"):
        patch.setattr(Path, "open", fail_at_the_second_line)
        train(tiny(), "run")
    assert not (Path("run/metrics.json")).exists()
    assert equal(train(tiny(), "run"), whole)
