"""The benchmark measures what it claims: the same network, its true FLOPs, right ratios."""

import json
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

import benchmark
from benchmarks import sampling, training, turns
from benchmarks.contender import compose, network_flops, plain_network
from benchmarks.processes import shared_training
from benchmarks.report import table
from benchmarks.worker import busy_processes, timed
from modeling.build import build_batches
from modeling.data import load_images
from modeling.stage import read_manifest
from tests.helpers import ROOT, TINY, ends_in_error, equal


@pytest.fixture
def overrides(tiny_data, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(ROOT)
    return [*TINY, f"dataset.root={tiny_data}"]


@pytest.mark.parametrize(
    ("over", "ratios"), [("first", ["1.00", "2.00", "4.00"]), ("previous", ["1.00", "2.00", "2.00"])]
)
def test_ratios_are_of_the_named_row_and_shares_of_the_peak(over, ratios):
    row = {"label": "x", "lowest": 1, "highest": 2, "memory_bytes": 1e9, "launches": None}
    rows = [
        row | {"case": {"name": name}, "images_per_second": rate, "gflops": rate}
        for name, rate in (("ours", 10), ("ours", 20), ("ours", 40), ("peak matmul", 80))
    ]
    cells = [line.split("|") for line in table(rows, over=over).splitlines()[2:]]
    assert [row[4].strip() for row in cells] == [*ratios, ""]
    assert [row[6].strip() for row in cells] == ["12 %", "25 %", "50 %", "100 %"]


def test_launches_a_step_are_a_column_where_a_gpu_counted_them():
    row = {"label": "x", "lowest": 1, "highest": 2, "memory_bytes": 1e9, "images_per_second": 1, "gflops": 0}
    row |= {"case": {"name": "ours"}}
    plain, counted = (table([row | {"launches": launches}]).splitlines() for launches in (None, 624.0))
    assert plain[0].endswith("| peak memory |")
    assert counted[0] == plain[0] + " launches a step |"
    assert counted[2] == plain[2] + " 624 |"


def test_the_assignments_network_has_the_flops_worked_out_by_hand():
    """0.34 GFLOP an image forward at width 32, three times that for a training step (less the gradient of x)."""
    network = plain_network(compose(["model=unet", "model.hidden_size=32"]))
    forward = network_flops(network, with_gradient=False)
    assert forward == pytest.approx(0.34e9, rel=0.02)
    assert network_flops(network, with_gradient=True) == pytest.approx(3 * forward, rel=0.02)


@pytest.mark.parametrize(("name", "layers"), [("ddpm", ["GroupNorm"]), ("unet", ["GroupNorm", "ReLU"])])
def test_the_plain_network_is_the_same_function(name, layers):
    config = compose([f"model={name}", "model.hidden_size=32"])
    ours, plain = plain_network(config, layers), plain_network(config)
    for network, expected in ((plain, set()), (ours, set(layers))):
        classes = {type(module) for module in network.modules()}
        assert {cls.__name__ for cls in classes if cls.__module__ == "modeling.layers"} == expected
    for network in (ours, plain):
        if name == "ddpm":  # zero in a new network
            torch.nn.init.ones_(network.conv_out.weight)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([0.1, 0.9])
    torch.testing.assert_close(ours.to(memory_format=torch.channels_last)(x, t), plain(x, t), rtol=1e-3, atol=1e-3)


def test_both_loops_train_the_same_network_and_advance(overrides, tmp_path):
    ours = training.our_training(overrides, 4, str(tmp_path / "run"))
    theirs = training.reference_training(overrides, 4, "", has_images_in_memory=True)
    assert ours.flops_per_image == theirs.flops_per_image > 1e6
    for contender in (ours, theirs):
        done, seconds = timed(contender.run, 0.05)
        assert done >= 1
        assert seconds > 0


def test_our_batches_alone_are_those_of_a_run(overrides, monkeypatch):
    made = []
    monkeypatch.setattr(training, "to_model_range", made.append)
    overrides = [*overrides, "runtime.device=cpu"]
    training.our_loading(overrides, 4).run(3)
    config = compose([*overrides, "train.batch_size=4"])
    images = load_images(config.dataset.folder, "train", read_manifest(config.dataset))
    assert equal(made, [build_batches(config, images, torch.device("cpu"))[step] for step in range(3)])


def test_our_loop_does_the_steps_it_counts(overrides, tmp_path, monkeypatch):
    made, original = [], training.our_run
    monkeypatch.setattr(training, "our_run", lambda *args: made.append(original(*args)) or made[-1])
    contender = training.our_training(overrides, 4, str(tmp_path / "run"))
    contender.run(3)
    contender.run(20)
    assert made[0].state.step == 23


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(("what", "is_equal"), [("steps", True), ("apart", False)])
def test_processes_train_together_unless_they_are_measured_apart(overrides, tmp_path, monkeypatch, what, is_equal):
    made, original = [], training.our_run
    monkeypatch.setattr(training, "our_run", lambda *args: made.append(original(*args)) or made[-1])
    overrides = [*overrides, "runtime.micro_batch_size=2"]
    shared = shared_training(what, 2, overrides, 4, str(tmp_path / "shared"))
    for contender in (shared, training.our_training(overrides, 4, str(tmp_path / "alone"))):
        contender.run(2)
        contender.run(1)
        contender.close()
    assert [run.state.step for run in made] == [3, 3]
    assert equal(made[0].model.state_dict(), made[1].model.state_dict()) == is_equal


def test_both_samplers_evaluate_the_network_once_a_step(overrides):
    calls = []
    for make in (sampling.reference_sampling, sampling.our_sampling):
        contender = make(overrides, 2)
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: calls.append(1) if type(module).__name__ == "DdpmUnet" else None
        )
        contender.run(5)
        hook.remove()
        assert len(calls) == 5, make
        calls.clear()


@pytest.mark.parametrize(("room", "expected"), [(80e9, [["a", "b"]]), (24e9, [["a"], ["b"]])])
def test_contenders_come_one_after_the_other_where_a_gpu_has_no_room_for_all(room, expected, monkeypatch):
    groups = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=room))
    monkeypatch.setattr(turns, "_take_turns", lambda title, cases, *rest: groups.append([*cases]) or [])
    turns.measure("title", {"a": {}, "b": {}}, 1, 0.1)
    assert groups == expected


def test_busy_processes_end_with_their_section():
    with busy_processes(2):
        found = psutil.Process().children()
        assert len(found) == 2
    assert not any(process.is_running() for process in found)


@pytest.mark.long
@pytest.mark.slow
def test_the_command_writes_tables_and_their_numbers(tmp_path):
    out = tmp_path / "speed"
    command = [sys.executable, "benchmark.py", "peaks", "--rounds", "2", "--seconds", "0.1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads(out.with_suffix(".json").read_text())["tables"]["Peaks"]
    assert len(rows) == 4
    for row in rows:
        assert row["lowest"] <= row["images_per_second"] <= row["highest"]
        assert row["gflops"] > 1
        assert row["memory_bytes"] > 1e8
    assert out.with_suffix(".md").read_text() in done.stdout
    assert "100 %" in done.stdout  # the fastest is the peak


@pytest.mark.fault("disk")
def test_an_output_that_cannot_be_written_is_found_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "peaks", "--out", "/dev/null/x"])
    with ends_in_error(capsys, r"^/dev/null/x\.json: Not a directory\n$"):
        benchmark.main()


@pytest.mark.parametrize("arguments", [["sampeling"], ["--rounds", "0"], ["--seconds", "-1"]])
def test_wrong_arguments_are_rejected_at_once(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
    assert "benchmark.py: error" in capsys.readouterr().err
