"""Samples and measures that several processes share: the files of one process, also after any of them was stopped."""

import shutil
import signal
import time
from pathlib import Path

import pytest

from modeling.measures.sample_files import read_samples
from tests.faults.processes import kill_all, launched, process_of, run_launched, run_to_end
from tests.helpers import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.fault("several processes"), pytest.mark.numeric]

SAMPLE, EVALUATE = ROOT / "sample.py", ROOT / "evaluate.py"
NUM_IMAGES, BATCH = 202, 4  # the last batch is smaller, and no number of processes divides their number, 51


@pytest.fixture(scope="module")
def options(finished_run) -> list[str]:
    checkpoint = f"checkpoint={finished_run}/model.safetensors"
    return [checkpoint, f"num_images={NUM_IMAGES}", f"batch_size={BATCH}", "num_steps=20", "device=cpu"]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory) -> bytes:
    """The samples of one process."""
    path = tmp_path_factory.mktemp("whole") / "samples.npz"
    code, output = run_to_end("sample.py", *options, f"out={path}")
    assert code == 0, output
    assert len(read_samples(path)[0]) == NUM_IMAGES
    return path.read_bytes()


def wait_for_parts(out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.with_name(f"{out.name}.partial").glob("*.npy"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("count", [2, 3])
def test_samples_of_several_processes_are_the_file_of_one(tmp_path, options, whole, record_property, count):
    code, output = run_launched(count, *options, f"out={tmp_path / 'a.npz'}", script=SAMPLE)
    assert code == 0, output
    assert output.count(f"{tmp_path}/a.npz") == 1  # process 0 alone prints
    assert (tmp_path / "a.npz").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    record_property("outcome", f"{NUM_IMAGES} samples by {count} processes: equal to the file of one")


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 1)])
def test_killed_processes_are_resumed_by_another_number(tmp_path, options, whole, record_property, first, second):
    out = tmp_path / "a.npz"
    with launched(first, *options, f"out={out}", script=SAMPLE) as process:
        wait_for_parts(out, 7)
        kill_all(process)
        process.communicate()
    assert not out.exists()
    num_kept = len(list(tmp_path.glob("*.partial/*.npy")))
    code, output = run_launched(second, *options, f"out={out}", script=SAMPLE)
    assert code == 0, output
    assert out.read_bytes() == whole
    record_property("outcome", f"{first} processes killed after {num_kept} of 51 parts, resumed by {second}: equal")


@pytest.mark.parametrize("rank", [None, 1])
def test_sigterm_to_all_or_one_ends_all(tmp_path, options, whole, rank):
    out = tmp_path / "a.npz"
    with launched(2, *options, f"out={out}", script=SAMPLE) as process:
        wait_for_parts(out, 3)
        target = process if rank is None else process_of(process, rank)
        target.send_signal(signal.SIGTERM)
        started = time.monotonic()
        output = process.communicate()[0]
    assert process.returncode != 0
    assert time.monotonic() - started < 20
    assert "Error" not in output.partition("Traceback")[0], output  # of torchrun, at its end
    assert not out.exists()
    code, output = run_launched(2, *options, f"out={out}", script=SAMPLE)
    assert code == 0, output
    assert out.read_bytes() == whole


@pytest.mark.parametrize("rank", [0, 1])
def test_one_killed_process_ends_all_with_its_number(tmp_path, options, whole, rank):
    out = tmp_path / "a.npz"
    with launched(2, *options, f"out={out}", script=SAMPLE) as process:
        wait_for_parts(out, 3)
        process_of(process, rank).kill()
        started = time.monotonic()
        output = process.communicate()[0]
    assert time.monotonic() - started < 60
    assert output.count(f"process {rank} of 2 is dead or does not answer") == 1, output
    code, output = run_launched(2, *options, f"out={out}", script=SAMPLE)
    assert code == 0, output
    assert out.read_bytes() == whole


def test_measures_of_two_processes_are_those_of_one(tmp_path, tiny_data, options, record_property):
    """The bound is in 3 batches, the loss in 15, and the features of the test images in 8."""
    measures = ["measures=[bits_per_dim,heldout_loss,encoder]", "bits_images=10", "loss_images=60", "num_images=12"]
    for count, name in ((1, "one"), (2, "two")):
        shutil.rmtree(tiny_data / "features", ignore_errors=True)
        code, output = run_launched(count, *options, *measures, f"out={tmp_path / name}", script=EVALUATE)
        assert code == 0, output
        assert output.count("encoder/frechet_distance") == 1
    names = ["evaluation.json", "neighbours.png", "samples.npz", "samples.png"]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted([*names, "lock"])
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    before = (tmp_path / "two" / "evaluation.json").stat().st_mtime_ns
    code, output = run_launched(2, *options, *measures, f"out={tmp_path / 'two'}", script=EVALUATE)
    assert (code, (tmp_path / "two" / "evaluation.json").stat().st_mtime_ns) == (0, before), output
    code, output = run_launched(2, *options, *measures, f"out={tmp_path / 'two'}", "loss_images=5", script=EVALUATE)
    assert (code, output.count("holds heldout_loss of another model or with other options")) == (1, 1), output
    record_property("outcome", "bits_per_dim, heldout_loss, encoder by 2 processes: evaluation.json equal to the byte")


def test_an_output_that_exists_is_reported(tmp_path, options):
    (tmp_path / "a.npz").touch()
    code, output = run_launched(2, *options, f"out={tmp_path / 'a.npz'}", script=SAMPLE)
    assert code == 1
    assert "exists already" in output
