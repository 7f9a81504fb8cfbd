"""A run repeated, stopped and taken up again, or fed by other workers, is the same run to the bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import main
from modeling.checkpoint import load_checkpoint
from modeling.config import parse
from modeling.run import Run

MACHINE_DEPENDENT = {"seconds", "images_per_second", "memory_bytes"}


def equal(first, second) -> bool:
    """Whether two nested structures of tensors and plain values are the same to the bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def result(folder: Path) -> dict:
    """All that a run leaves, less what depends on the machine's speed."""
    content = load_checkpoint(folder / "checkpoints" / "last.pt")
    del content["config"], content["state"]["seconds"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "state": content,
        "lines": [{key: value for key, value in line.items() if key not in MACHINE_DEPENDENT} for line in lines],
        "weights": (folder / "model.safetensors").read_bytes()[-1000:],
        "samples": {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("samples/*/*.png"))
        },
    }


def train(config, folder: str) -> dict:
    config.runtime.output_dir = folder
    main.main(config)
    return result(Path(folder))


@pytest.fixture
def straight(tiny) -> dict:
    return train(tiny(), "straight")


@pytest.mark.slow
def test_a_run_repeated_is_the_same(tiny, straight):
    assert equal(train(tiny(), "again"), straight)


@pytest.mark.slow
def test_another_seed_or_hyperparameter_is_another_result(tiny, straight):
    for number, override in enumerate(["seed=1", "optimizer.lr=0.001", "train.random_flip=false"]):
        other = train(tiny(override), str(number))
        assert not equal(other["state"]["model"], straight["state"]["model"])
        assert other["samples"] != straight["samples"]


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(tiny, straight):
    assert equal(train(tiny("runtime.num_workers=2"), "workers"), straight)


class Interrupted(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 4, 5, 6, 8])
def test_a_run_that_was_stopped_goes_on_to_the_same_result(tiny, straight, monkeypatch, stop_at):
    """Checkpoints are at steps 5 and 8 of 8, epochs end at 4 and 8, lines are written at 3, 6 and 8."""
    from modeling import training

    original, calls = training.train_step, []

    def stop(*args, **kwargs):
        if len(calls) == stop_at:
            raise Interrupted
        calls.append(1)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(training, "train_step", stop)
        if stop_at == 8:  # every step done: stopped while measuring
            patch.setattr(Run, "measure", lambda *args: (_ for _ in ()).throw(Interrupted()))
        train(tiny(), "stopped")
    assert Path("stopped/checkpoints/last.pt").exists() == (stop_at >= 5)
    assert equal(train(tiny(), "stopped"), straight)


@pytest.mark.slow
def test_a_longer_run_goes_on_where_the_learning_rate_allows(tiny, capsys):
    constant = "optimizer.lr_schedule=constant", "optimizer.warmup_steps=0"
    longer = train(tiny(*constant, "train.num_epochs=3"), "longer")
    train(tiny(*constant, "train.num_epochs=2"), "extended")
    capsys.readouterr()
    extended = train(tiny(*constant, "train.num_epochs=3"), "extended")
    assert "from step 8" in capsys.readouterr().out
    assert equal(extended["state"], longer["state"])
    with pytest.raises(SystemExit, match="12 steps, more than the 8 asked for"):
        train(tiny(*constant, "train.num_epochs=2"), "extended")


@pytest.mark.slow
def test_a_stage_replaces_a_longer_run_and_publishes_its_artefacts(tiny, monkeypatch):
    constant = "optimizer.lr_schedule=constant", "optimizer.warmup_steps=0"
    monkeypatch.setenv("DVC_STAGE", "train")
    monkeypatch.setattr(main, "parse_stage", parse)  # here the values come from no params.yaml
    for num_epochs in (2, 1, 1):
        main.main(tiny(*constant, f"train.num_epochs={num_epochs}"))
        assert json.loads(Path("outputs/metrics.json").read_text())["steps"] == 4 * num_epochs
        (folder,) = Path("runs").iterdir()
        assert Path("outputs/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        assert {path.stem for path in Path("outputs/samples/ema").iterdir()} == {
            str(4 * n + 4) for n in range(num_epochs)
        }
        shutil.rmtree("outputs")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_an_error_and_no_fresh_start(tiny):
    train(tiny(), "run")
    Path("run/metrics.json").unlink()
    checkpoint = Path("run/checkpoints/last.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(SystemExit, match=r"last\.pt is no checkpoint, or damaged.*delete run to start anew"):
        train(tiny(), "run")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(tiny):
    with pytest.raises(SystemExit, match=r"the loss is (nan|inf) at step \d+: try a lower optimizer\.lr"):
        train(
            tiny("optimizer=sgd", "optimizer.lr=1e30", "optimizer.max_grad_norm=null", "optimizer.warmup_steps=0"),
            "bad",
        )
    assert not Path("bad/metrics.json").exists()
