"""Where a run starts: from which state, in which folder, and what is rejected."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import main
from modeling.checkpoint import load_checkpoint
from modeling.config import parse
from modeling.distributed.processes import Processes
from modeling.run import objects, results, session
from modeling.run.loop import Training
from modeling.run.objects import Run
from modeling.stage import Manifest
from modeling.system.signals import Stopped
from tests.checkpoints import seal
from tests.helpers import ends_in_error, equal, result, run_script, train
from tests.run.interruptions import crash

CONSTANT = "optimizer.lr_schedule=constant", "optimizer.warmup_steps=0"

# ---- runtime.resume


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("another run's state")
def test_never_starts_from_scratch_and_overwrites_nothing(tiny, straight, monkeypatch, capsys):
    assert equal(train(tiny("runtime.resume=never"), "never"), straight)
    crash(tiny, monkeypatch, 6)
    with ends_in_error(capsys, r"runtime\.resume=never: stopped holds this run up to step 5: delete it"):
        train(tiny("runtime.resume=never"), "stopped")
    assert load_checkpoint("stopped/checkpoints/last.pt")["state"]["step"] == 5


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("another run's state")
def test_a_run_carried_elsewhere_is_the_same_run(tiny, straight, monkeypatch):
    """Its checkpoint alone is enough, and the result in the new folder bitwise that of the uninterrupted run."""
    crash(tiny, monkeypatch, 6)
    moved = train(tiny("runtime.resume=stopped"), "elsewhere")  # a run's folder
    assert equal(moved["state"], straight["state"])
    assert moved["lines"] == straight["lines"][1:] or moved["lines"][-1] == straight["lines"][-1]
    marker = json.loads(Path("elsewhere/run.json").read_text())
    assert marker["run"] == json.loads(Path("straight/run.json").read_text())["run"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("another run's state")
def test_another_learning_rate_goes_into_a_new_folder_and_is_reported(tiny, straight, capsys):
    options = "optimizer.lr=0.001", "runtime.resume=straight/checkpoints/5.pt"
    main.main(tiny(*options))
    out = capsys.readouterr().out
    name = json.loads(Path("straight/run.json").read_text())["run"]
    how = "optimizer.lr: checkpoint 0.004, this run 0.001"
    assert f"starting from straight/checkpoints/5.pt ({name}@5) with {how}" in out
    (folder,) = Path("runs").iterdir()
    about = load_checkpoint(folder / "checkpoints" / "last.pt")["about"]
    assert (about["parent"], about["identity"]["origin"]) == (f"{name}@5", f"{name}@5")
    assert [line["step"] for line in result(folder)["lines"]] == [6, 8]
    before = result(folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "metrics.json").unlink()
    main.main(tiny(*options))  # the same command resumes in the same folder
    assert equal(result(folder), before)
    main.main(tiny("optimizer.lr=0.001"))  # from scratch: another run, in another folder
    assert len(list(Path("runs").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "seed: checkpoint 0, this run 1"),
        (["model.hidden_size=16"], r"model\.hidden_size: checkpoint 8, this run 16"),
        (
            ["model=unet", "model.hidden_size=8", "model.multipliers=null"],
            r'model\.name: checkpoint "ddpm", this run "unet"',
        ),
        *[
            pytest.param(overrides, message, marks=pytest.mark.long)
            for overrides, message in [
                (["optimizer=sgd"], r'optimizer\.name: checkpoint "muon", this run "sgd"'),
                (["diffusion.num_timesteps=21"], r"diffusion\.num_timesteps: checkpoint 20, this run 21"),
                (["train.batch_size=8"], r"train\.batch_size: checkpoint 16, this run 8"),
            ]
        ],
        (["runtime.resume=nowhere.pt"], r"runtime\.resume=nowhere\.pt: No such file or directory"),
        (["runtime.resume=straight/config.yaml"], r"runtime\.resume=straight/config\.yaml: .*no checkpoint"),
    ],
)
@pytest.mark.fault("another run's state")
def test_a_state_of_another_run_is_rejected_with_the_difference(tiny, straight, capsys, overrides, message):
    with ends_in_error(capsys, message):
        main.main(tiny("runtime.resume=straight/checkpoints/last.pt", *overrides))
    assert not Path("runs").exists()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("another run's state")
def test_a_state_of_other_data_is_rejected(tiny, straight, tmp_path, capsys):
    other = "dataset.seed=5", f"dataset.root={tmp_path}/other"
    assert run_script("prepare_data.py", "dataset=shapes", "dataset.num_images=64", *other).returncode == 0
    message = r"belongs to another run and cannot be resumed \(other training or held-out images; dataset"
    with ends_in_error(capsys, message):
        main.main(tiny("runtime.resume=straight/checkpoints/last.pt", *other))


@pytest.mark.slow
@pytest.mark.fault("another run's state")
@pytest.mark.parametrize("is_of_these_images", [True, False])
def test_an_older_checkpoint_that_names_the_training_images_alone_starts_a_run(
    tiny, tiny_data, straight, capsys, is_of_these_images
):
    older, manifest = Path("older.pt"), json.loads((tiny_data / "shapes" / "manifest.json").read_text())
    content = torch.load("straight/checkpoints/5.pt", weights_only=True)
    train_sha256 = manifest["files"]["train.npy"]["sha256"]
    content["about"]["identity"] |= {"data": train_sha256 if is_of_these_images else "0" * 64, "code": "older"}
    torch.save(content, older)
    seal(older)
    if is_of_these_images:
        main.main(tiny("runtime.resume=older.pt"))
        assert re.search(r'starting from older\.pt \(\S+@5\) with other code\n',
                         capsys.readouterr().out)  # fmt: skip
    else:
        with ends_in_error(capsys, r"belongs to another run and cannot be resumed \(other training or held-out images"):
            main.main(tiny("runtime.resume=older.pt"))


@pytest.mark.fault("another run's state")
def test_a_run_whose_data_is_damaged_leaves_no_folder(tiny, tiny_data, tmp_path, capsys):
    shutil.copytree(tiny_data, tmp_path / "damaged")
    (tmp_path / "damaged" / "shapes" / "test.npy").write_bytes(b"")
    with ends_in_error(capsys, "test.npy"):
        main.main(tiny(f"dataset.root={tmp_path}/damaged"))
    assert list(Path("runs").iterdir()) == []


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.fault("another run's state")
def test_another_version_of_torch_is_warned_of(tiny, straight, monkeypatch, capsys):
    crash(tiny, monkeypatch, 6)
    version = str(torch.__version__)
    monkeypatch.setattr(torch, "__version__", "9.9")
    train(tiny(), "stopped")
    difference = f'torch: checkpoint "{version}", this run "9.9"'
    message = f"differ in the last bits from that of an uninterrupted run ({difference}"
    assert capsys.readouterr().err.count(message) == 1


@pytest.mark.slow
@pytest.mark.fault("another run's state")
def test_a_finished_run_is_not_started_from_scratch(tiny, straight, capsys):
    with ends_in_error(capsys, r"runtime\.resume=never: straight holds this run, finished: delete it"):
        train(tiny("runtime.resume=never"), "straight")


@pytest.mark.slow
@pytest.mark.fault("another run's state")
def test_a_state_after_the_end_of_the_run_is_rejected(tiny, capsys):
    train(tiny(*CONSTANT), "longer")
    with ends_in_error(capsys, r"longer/checkpoints/last\.pt: this checkpoint is at step 8, after the end .*\(4 steps"):
        train(tiny(*CONSTANT, "train.max_steps=4", "runtime.resume=longer/checkpoints/last.pt"), "short")


# ---- the end


@pytest.mark.parametrize("rank", [0, 1])
def test_process_0_alone_publishes(compose_config, monkeypatch, rank):
    published = []
    monkeypatch.setattr(session, "joined", lambda *_: contextlib.nullcontext(Processes(rank, 2)))
    monkeypatch.setattr(session, "_train", lambda *_, **options: Path("run"))
    monkeypatch.setattr(session, "_publish", lambda *paths: published.append(paths))
    config, manifest = parse(compose_config()), Manifest(dataset={}, source="", files={})
    assert session.train(config, manifest, outputs=Path("outputs")) == Path("run")
    assert published == [(Path("run"), Path("outputs"))][rank:]


@pytest.mark.slow
@pytest.mark.parametrize("lr", ["1e20", pytest.param("1e38", marks=pytest.mark.long)])
@pytest.mark.fault("not finite")
def test_an_absurd_learning_rate_ends_the_run_with_finite_checkpoints(tiny, capsys, lr):
    options = f"optimizer.lr={lr}", "optimizer.warmup_steps=0", "train.max_skipped_in_row=3"
    with ends_in_error(capsys, "not finite"):
        train(tiny(*options, "optimizer=sgd", "optimizer.max_grad_norm=null", "train.checkpoint_every=1"), "bad")
    assert not Path("bad/metrics.json").exists()
    assert Path("bad/error.txt").read_text().startswith("the loss or its gradient was not finite in 3 steps in a row")
    for path in Path("bad/checkpoints").iterdir():
        load_checkpoint(path)  # rejects what is not finite


@pytest.mark.slow
@pytest.mark.fault("not finite")
def test_a_run_that_failed_while_it_was_stopped_says_so(tiny, monkeypatch, capsys):
    def stop(training):
        raise Stopped("SIGTERM", 143)

    def fail(training):
        raise FloatingPointError("the weights are not finite")

    monkeypatch.setattr(Training, "fit", stop)
    monkeypatch.setattr(Training, "save", fail)
    monkeypatch.setattr(Run, "load", lambda run, origin: setattr(run.state, "step", 1))
    with ends_in_error(capsys, "the weights are not finite"):
        train(tiny(), "failed")
    assert Path("failed/error.txt").read_text() == "the weights are not finite\n"


@pytest.mark.slow
def test_grids_and_losses_take_no_more_images_at_a_time_than_is_set(tiny, monkeypatch):
    def recorded(function, place):
        def call(*args, **options):
            sizes.append(options["batch_size"] if place is None else args[place])
            return function(*args, **options)

        return call

    sizes: list[int] = []
    monkeypatch.setattr(objects, "sample_images", recorded(objects.sample_images, 1))
    monkeypatch.setattr(results, "denoising_loss", recorded(results.denoising_loss, None))
    train(tiny("runtime.micro_batch_size=3", "train.num_samples=4", "train.sample_every=9"), "run")
    assert sizes == [3, 1] * 2 + [3] * 4
