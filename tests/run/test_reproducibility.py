"""A run repeated, stopped and taken up again, or fed by other workers, is the same run to the bit."""

import dataclasses
import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import main
from modeling import preparation, run_folder, run_step
from modeling.checkpoint import load_checkpoint
from modeling.config import parse
from modeling.run.objects import Run
from modeling.run.step import TrainState
from modeling.training import train_step
from tests.helpers import ROOT, TINY, equal, needs_compiler, result, train

VERSION = str(torch.__version__)


@pytest.fixture(scope="module")
def straight_folder(tiny_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        values = compose("config", overrides=[*TINY, f"dataset.root={tiny_data}", f"runtime.output_dir={folder}"])
    main.main(values)
    return folder


@pytest.fixture
def straight(straight_folder, tmp_path) -> dict:
    """The uninterrupted run's result; its folder lies in the working folder, as `straight`."""
    shutil.copytree(straight_folder, tmp_path / "straight")
    return result(straight_folder)


@pytest.mark.slow
def test_a_run_repeated_is_the_same(tiny, straight):
    assert equal(train(tiny(), "again"), straight)
    files = [Path(folder, "model.safetensors").read_bytes() for folder in ("again", "straight")]
    assert files[0] == files[1]  # the header, too: it does not name the folder


@pytest.mark.long
@pytest.mark.slow
def test_another_seed_or_hyperparameter_is_another_result(tiny, straight):
    for number, override in enumerate(["seed=1", "optimizer.lr=0.001", "train.random_flip=false"]):
        other = train(tiny(override), str(number))
        assert not equal(other["state"]["model"], straight["state"]["model"])
        assert other["samples"] != straight["samples"]


@pytest.mark.slow
@pytest.mark.fault("stop and go on")
def test_the_number_of_workers_changes_nothing(tiny, straight):
    assert equal(train(tiny("runtime.num_workers=2"), "workers"), straight)


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_cuda_the_deterministic_mode_repeats_a_run_to_the_bit(tiny_data, tmp_path):
    """Each in a process of its own, which the switch holds for; bf16 and a network with attention."""
    options = [*TINY, f"dataset.root={tiny_data}", "runtime.deterministic=true", "model.attention_resolutions=[16]"]
    for name in "ab":
        command = [sys.executable, "main.py", *options, "runtime.device=cuda", f"runtime.output_dir={tmp_path / name}"]
        subprocess.run(command, cwd=ROOT, check=True)
    assert equal(result(tmp_path / "a"), result(tmp_path / "b"))


class Interrupted(Exception):
    pass


def crash(tiny, monkeypatch, stop_at: int, *overrides: str) -> None:
    """A run in `stopped` that ends without a word: before step `stop_at` (from 0), or measuring after the last."""
    calls = []

    def stop(*args, **kwargs):
        if len(calls) == stop_at:
            raise Interrupted
        calls.append(1)
        return train_step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr("modeling.run.objects.train_step", stop)
        if stop_at == 8:
            patch.setattr(Run, "measure", lambda *args: (_ for _ in ()).throw(Interrupted()))
        train(tiny(*overrides), "stopped")


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop_at", [pytest.param(step, marks=[] if step == 5 else pytest.mark.long) for step in range(9)]
)
@pytest.mark.fault("stop and go on")
def test_a_run_that_crashed_goes_on_to_the_same_result(tiny, straight, monkeypatch, stop_at):
    """Checkpoints are at steps 5 and 8 of 8, epochs end at 4 and 8, lines are written at 3, 6 and 8."""
    crash(tiny, monkeypatch, stop_at)
    assert Path("stopped/checkpoints/last.pt").exists() == (stop_at >= 5)
    assert equal(train(tiny(), "stopped"), straight)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        ["runtime.micro_batch_size=5", "model.dropout=0.2"],
        pytest.param(["runtime.precision=fp32"], marks=pytest.mark.long),
        pytest.param(["runtime.precision=fp16"], marks=pytest.mark.long),
        pytest.param(["runtime.compile=true"], marks=[pytest.mark.long, needs_compiler]),
    ],
)
@pytest.mark.fault("stop and go on")
def test_a_run_that_crashed_goes_on_to_the_same_result_in_each_mode(tiny, monkeypatch, mode):
    expected = train(tiny(*mode), "straight")
    crash(tiny, monkeypatch, 6, *mode)
    assert equal(train(tiny(*mode), "stopped"), expected)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("stop and go on")
def test_a_run_that_crashed_at_every_step_goes_on_to_the_same_result(tiny, straight, monkeypatch):
    """A process a step, with loader workers and without, and a checkpoint after every step."""
    for number in range(7):
        crash(tiny, monkeypatch, 1, "train.checkpoint_every=1", f"runtime.num_workers={number % 3 and 2}")
    assert equal(train(tiny(), "stopped"), straight)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("stop and go on")
def test_samples_due_after_the_step_of_the_checkpoint_are_made_up_for(tiny, straight, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Run, "sample", lambda *args: (_ for _ in ()).throw(Interrupted()))
        train(tiny("train.checkpoint_every=4"), "stopped")
    assert not list(Path("stopped").rglob("samples/ema/*"))
    assert equal(train(tiny(), "stopped"), straight)


def forget(key: str, content: dict) -> None:
    """Puts into a checkpoint what a run begins with, in the place of one item."""
    section, _, name = key.partition(".")
    if section == "state":
        content["state"][name] = getattr(TrainState(), name)
    elif section == "optimizer":
        for moments in content["optimizer"]["state"].values():
            moments[name].zero_()
    else:
        generator = torch.Generator().manual_seed(1)
        for tensor in content[section].values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=1e-3)


STATE = ["model", "ema", "optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step"]
STATE += [f"state.{name}" for name in dataclasses.asdict(TrainState()) if name != "seconds"]  # of the machine


@pytest.mark.slow
@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=[] if key in (None, "ema", "state.loss_sum") else pytest.mark.long)
        for key in [None, *STATE]
    ],
)
@pytest.mark.fault("stop and go on")
def test_whatever_is_missing_from_a_checkpoint_is_missed_in_the_result(tiny, monkeypatch, key):
    """The negative control: were any item of the state not saved, the tests above would fail."""
    options = "train.log_every=4", "train.checkpoint_every=6"  # taken up at 6, between two lines
    if key in ("state.loss_scale", "state.num_finite_at_scale"):
        options += ("runtime.precision=fp16",)
    bad_steps = {"state.num_skipped": {4}, "state.num_skipped_in_row": {5, 6, 7}, "state.loss_scale": {4}}
    bad_steps = bad_steps.get(key, set())
    draw = run_step.draw_normal

    def sometimes_nan(seed, purpose, step, *rest):
        return draw(seed, purpose, step, *rest) * (torch.nan if step in bad_steps else 1)

    monkeypatch.setattr(run_step, "draw_normal", sometimes_nan)
    complete = train(tiny(*options), "complete")
    shutil.copytree("complete", "spoiled")
    for path in ("metrics.json", "checkpoints/last.pt"):
        (Path("spoiled") / path).unlink()
    load = run_folder.load_checkpoint

    def load_spoiled(path):
        content = load(path)
        if key is not None:
            forget(key, content)
        return content

    monkeypatch.setattr(run_folder, "load_checkpoint", load_spoiled)
    assert equal(train(tiny(*options), "spoiled"), complete) == (key is None)


class Stopper:
    """Sends this process a signal when a function is called, and lets it go on."""

    def __init__(self, patch, target: str, name: str = "SIGTERM"):
        module, _, attribute = target.rpartition(".")
        owner = functools.reduce(getattr, module.split(".")[1:], importlib.import_module(module.split(".")[0]))
        original = getattr(owner, attribute)
        self.num_calls = 0

        def stop(*args, **kwargs):
            self.num_calls += 1
            os.kill(os.getpid(), getattr(signal, name))
            return original(*args, **kwargs)

        patch.setattr(owner, attribute, stop)


PHASES = {  # what is called there -> the step that is saved
    "training": ("modeling.training.autocast", 0),
    "sampling": ("modeling.training.evaluating", 4),
    "writing a grid": ("modeling.training.save_grid", 4),
    "saving": ("modeling.run.folder.save_checkpoint", 5),
    "exporting": ("modeling.run.session.export_weights", 8),
    "evaluation": ("modeling.run.objects.denoising_loss", 8),
    "writing tables": ("modeling.run.objects.write_csv", 8),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "phase",
    [pytest.param(phase, marks=[] if phase == "sampling" else pytest.mark.long) for phase in PHASES],
)
@pytest.mark.fault("signal")
def test_a_signal_in_any_phase_saves_and_ends_and_the_same_command_goes_on(tiny, straight, monkeypatch, capsys, phase):
    target, step = PHASES[phase]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        stopper = Stopper(patch, target)
        train(tiny(), "stopped")
    assert (stopped.value.code, stopper.num_calls) == (143, 1)
    where = f"saved at step {step} of 8 in stopped/checkpoints/last.pt" if step else "no step was done yet"
    assert f"stopped by SIGTERM: {where}; the same command goes on" in capsys.readouterr().out
    if step:
        assert load_checkpoint("stopped/checkpoints/last.pt")["state"]["step"] == step
    assert equal(train(tiny(), "stopped"), straight)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["writing a grid", "evaluation"])
@pytest.mark.fault("time limit")
def test_a_time_limit_ends_well_and_the_same_command_goes_on(tiny, straight, monkeypatch, capsys, phase):
    target, step = PHASES[phase]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        Stopper(patch, target, "SIGALRM")
        train(tiny("runtime.max_seconds=1000"), "limited")
    assert stopped.value.code == 0
    assert f"stopped by the time limit of 1000 s: saved at step {step} of 8" in capsys.readouterr().out
    assert equal(train(tiny(), "limited"), straight)


@pytest.mark.slow
@pytest.mark.fault("time limit")
def test_a_recorded_stage_that_runs_out_of_time_is_no_success(tiny, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "train")
    monkeypatch.setattr(main, "parse_stage", parse)
    Stopper(monkeypatch, PHASES["sampling"][0], "SIGALRM")
    with pytest.raises(SystemExit, match="time limit of 1000 s is over before the stage is done: `dvc repro` again"):
        main.main(tiny("runtime.max_seconds=1000"))


# ---- runtime.resume


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("another run's state")
def test_never_starts_from_zero_and_overwrites_nothing(tiny, straight, monkeypatch):
    assert equal(train(tiny("runtime.resume=never"), "never"), straight)
    crash(tiny, monkeypatch, 6)
    with pytest.raises(SystemExit, match=r"runtime\.resume=never: stopped holds this run up to step 5: delete it"):
        train(tiny("runtime.resume=never"), "stopped")
    assert load_checkpoint("stopped/checkpoints/last.pt")["state"]["step"] == 5


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("another run's state")
def test_a_run_carried_elsewhere_is_the_same_run(tiny, straight, monkeypatch):
    """Its checkpoint alone is enough, and the result in the new folder bitwise that of the uninterrupted run."""
    crash(tiny, monkeypatch, 6)
    moved = train(tiny("runtime.resume=stopped/checkpoints/last.pt"), "elsewhere")
    assert equal(moved["state"], straight["state"])
    assert moved["lines"] == straight["lines"][1:] or moved["lines"][-1] == straight["lines"][-1]
    marker = json.loads(Path("elsewhere/run.json").read_text())
    assert marker["run"] == json.loads(Path("straight/run.json").read_text())["run"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("another run's state")
def test_another_learning_rate_goes_into_a_new_folder_and_is_told(tiny, straight, capsys):
    options = "optimizer.lr=0.001", "runtime.resume=straight/checkpoints/5.pt"
    main.main(tiny(*options))
    out = capsys.readouterr().out
    name = json.loads(Path("straight/run.json").read_text())["run"]
    assert f"starting from straight/checkpoints/5.pt ({name}@5) with optimizer.lr: 0.004 there, 0.001 here" in out
    (folder,) = Path("runs").iterdir()
    about = load_checkpoint(folder / "checkpoints" / "last.pt")["about"]
    assert (about["parent"], about["identity"]["origin"]) == (f"{name}@5", f"{name}@5")
    assert [line["step"] for line in result(folder)["lines"]] == [6, 8]
    before = result(folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "metrics.json").unlink()
    main.main(tiny(*options))  # the same command goes on in the same folder
    assert equal(result(folder), before)
    main.main(tiny("optimizer.lr=0.001"))  # from zero: another run, in another folder
    assert len(list(Path("runs").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "seed: 0 there, 1 here"),
        (["model.hidden_size=16"], r"model\.hidden_size: 8 there, 16 here"),
        (["model=unet", "model.hidden_size=8", "model.multipliers=null"], r'model\.name: "ddpm" there, "unet" here'),
        *[
            pytest.param(overrides, message, marks=pytest.mark.long)
            for overrides, message in [
                (["optimizer=sgd"], r'optimizer\.name: "adam" there, "sgd" here'),
                (["diffusion.num_timesteps=21"], r"diffusion\.num_timesteps: 20 there, 21 here"),
                (["train.batch_size=8"], r"train\.batch_size: 16 there, 8 here"),
            ]
        ],
        (["runtime.resume=nowhere.pt"], r"runtime\.resume=nowhere\.pt: .*there is no such file"),
        (["runtime.resume=straight/config.yaml"], r"runtime\.resume=straight/config\.yaml: .*no checkpoint"),
    ],
)
@pytest.mark.fault("another run's state")
def test_a_state_that_does_not_belong_to_the_run_is_refused_with_the_difference(tiny, straight, overrides, message):
    with pytest.raises(SystemExit, match=message):
        main.main(tiny("runtime.resume=straight/checkpoints/last.pt", *overrides))
    assert not Path("runs").exists()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("another run's state")
def test_other_data_is_refused(tiny, straight, tmp_path):
    preparation.prepare("shapes", tmp_path / "other" / "shapes", num_images=64, seed=5)
    config = tiny("runtime.resume=straight/checkpoints/last.pt", "dataset.seed=5", f"dataset.root={tmp_path}/other")
    with pytest.raises(
        SystemExit, match=r'another run.s state cannot be taken up \(data: "\w+" there, "\w+" here; dataset'
    ):
        main.main(config)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("another run's state")
def test_another_version_of_torch_is_warned_of(tiny, straight, monkeypatch, capsys):
    crash(tiny, monkeypatch, 6)
    monkeypatch.setattr("torch.__version__", "9.9")
    train(tiny(), "stopped")
    assert (
        capsys.readouterr().err.count(f'differ in the last bits from that of one run (torch: "{VERSION}" there, "9.9')
        == 1
    )


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("stop and go on")
def test_a_longer_cosine_is_another_run_and_is_told_so(tiny, capsys):
    main.main(tiny())
    capsys.readouterr()
    main.main(tiny("train.num_epochs=3"))
    assert re.search(
        r"note: \S+/last.pt is of the same run but for optimizer.cosine_steps: 8 there, 12 here(; "
        r"optimizer.warmup_steps: 8 there, 12 here)?; to start from it, set runtime.resume=\S+/last.pt",
        capsys.readouterr().out,
    )
    assert len(list(Path("runs").iterdir())) == 2


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("stop and go on")
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


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("damaged checkpoint")
def test_a_damaged_checkpoint_costs_one_interval_and_changes_nothing(tiny, straight, capsys):
    train(tiny(), "run")
    Path("run/metrics.json").unlink()
    last = Path("run/checkpoints/last.pt")
    last.write_bytes(last.read_bytes()[:-100])
    capsys.readouterr()
    assert equal(train(tiny(), "run"), straight)
    assert capsys.readouterr().err.count("warning: run/checkpoints/last.pt is no checkpoint, or damaged") == 1
    for path in [Path("run/metrics.json"), Path("run/checkpoints/5.pt")]:
        path.unlink()
    last.write_bytes(b"")
    with pytest.raises(SystemExit, match="no valid checkpoint is left: delete run to start anew"):
        train(tiny(), "run")


@pytest.mark.slow
@pytest.mark.parametrize("lr", ["1e20", pytest.param("1e38", marks=pytest.mark.long)])
@pytest.mark.fault("not finite")
def test_an_absurd_learning_rate_ends_the_run_and_the_last_checkpoint_is_finite(tiny, lr):
    options = f"optimizer.lr={lr}", "optimizer.warmup_steps=0", "train.max_skipped_in_row=3"
    with pytest.raises(SystemExit, match="not finite"):
        train(tiny(*options, "optimizer=sgd", "optimizer.max_grad_norm=null", "train.checkpoint_every=1"), "bad")
    assert not Path("bad/metrics.json").exists()
    for path in Path("bad/checkpoints").iterdir():
        load_checkpoint(path)  # refuses what is not finite
