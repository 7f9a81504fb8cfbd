"""A run's folder: whose it is, which checkpoint is taken, what is refused."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

from modeling.checkpoint import save_checkpoint
from modeling.run.folder import RunError, RunFolder, describe_state
from tests.helpers import ROOT

IDENTITY = {
    "seed": 0,
    "dataset": {"name": "shapes"},
    "model": {"name": "ddpm", "hidden_size": 8},
    "optimizer": {"name": "adam", "lr": 0.1, "warmup_steps": 0, "cosine_steps": 8},
    "code": "c",
}


@dataclass
class State:
    step: int


def content() -> dict:
    model = nn.Linear(2, 2)
    return {"config": {}, "model": model, "ema": model, "optimizer": SGD(model.parameters(), 0.1)}


def folder(path: Path, identity: dict = IDENTITY, num_checkpoints: int = 2) -> RunFolder:
    return RunFolder(path, identity, num_checkpoints)


def save(run: RunFolder, *steps: int) -> None:
    for step in steps:
        run.save(about={"images": step}, state=State(step), **content())


def names(path: Path) -> set[str]:
    return {entry.name for entry in (path / "checkpoints").iterdir()}


def test_a_checkpoint_says_whose_it_is(tmp_path):
    run = folder(tmp_path / "run")
    with run.claimed():
        run.parent = "other@3"
        save(run, 4)
        about = run.load_newest()["about"]
    assert about == {
        "run": run.name, "identity": IDENTITY, "parent": "other@3", "wandb_id": run.wandb_id, "step": 4, "images": 4,
    }  # fmt: skip
    assert describe_state({"about": about}) == f"{run.name}@4"


@pytest.mark.parametrize(("keep", "expected"), [(1, {"last.pt"}), (3, {"last.pt", "8.pt", "9.pt"})])
def test_the_newest_checkpoints_are_kept(tmp_path, keep, expected):
    run = folder(tmp_path, num_checkpoints=keep)
    save(run, 3, 8, 9, 10)
    assert names(tmp_path) == expected
    assert run.load_newest()["state"]["step"] == 10
    again = folder(tmp_path, num_checkpoints=keep)
    again.load_newest()
    save(again, 10)  # nothing new
    save(again, 12)
    assert names(tmp_path) == ({"last.pt"} if keep == 1 else {"last.pt", "9.pt", "10.pt"})


DAMAGES = ["empty", "cut", "flipped", "of another architecture", "not finite", "missing"]


def damage(path: Path, kind: str, run: RunFolder) -> None:
    original = bytearray(path.read_bytes())
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(original[:-30])
    elif kind == "flipped":
        original[len(original) // 2] ^= 1
        path.write_bytes(original)
    elif kind == "of another architecture":
        other = IDENTITY | {"model": {"name": "unet", "hidden_size": 8}}
        save_checkpoint(path, about={"identity": other}, state=State(99), **content())
    elif kind == "not finite":
        spoiled = content()
        spoiled["model"].weight.data.fill_(1e38)
        save_checkpoint(path, about={"identity": IDENTITY}, state=State(99), **spoiled)
        from modeling import checkpoint

        torch_save, checkpoint._non_finite = checkpoint._non_finite, lambda *args: None
        spoiled["model"].weight.data.fill_(torch.nan)
        save_checkpoint(path, about={"identity": IDENTITY}, state=State(99), **spoiled)
        checkpoint._non_finite = torch_save
    else:
        path.unlink()


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.fault("damaged checkpoint")
def test_from_a_damaged_checkpoint_the_one_before_is_taken_with_one_warning(tmp_path, capsys, kind):
    run = folder(tmp_path)
    save(run, 3, 8)
    damage(tmp_path / "checkpoints" / "last.pt", kind, run)
    fresh = folder(tmp_path)
    assert fresh.load_newest()["state"]["step"] == 3
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == (0 if kind == "missing" else 1)  # missing: killed between the two renamings
    assert all(line.startswith("warning: ") and line.endswith("3.pt, step 3") for line in warnings)
    save(fresh, 12)  # the damaged one is not kept as if it were valid
    assert folder(tmp_path).load_newest()["state"]["step"] == 12
    assert names(tmp_path) == {"last.pt", "3.pt"}


@pytest.mark.parametrize("kind", DAMAGES[:-1])
@pytest.mark.fault("damaged checkpoint")
def test_with_no_valid_checkpoint_left_there_is_an_error_and_no_fresh_start(tmp_path, kind):
    run = folder(tmp_path)
    save(run, 3, 8)
    for name in ("last.pt", "3.pt"):
        damage(tmp_path / "checkpoints" / name, kind, run)
    with pytest.raises(RunError, match="no valid checkpoint is left: delete .* to start anew"):
        folder(tmp_path).load_newest()


@pytest.mark.fault("another run's state")
def test_a_folder_of_another_run_is_refused_with_the_differences(tmp_path):
    with folder(tmp_path / "run").claimed():
        pass
    other = IDENTITY | {"seed": 1, "optimizer": IDENTITY["optimizer"] | {"lr": 0.2}}
    with pytest.raises(RunError, match=r"optimizer\.lr: 0\.1 there, 0\.2 here; seed: 0 there, 1 here"):
        folder(tmp_path / "run", other).claimed().__enter__()


def test_a_folder_of_other_files_and_a_file_are_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name, message in (("thesis", "holds other files"), ("file", "is no folder")):
        with pytest.raises(RunError, match=message):
            folder(tmp_path / name).claimed().__enter__()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "file", "thesis", "thesis/thesis.tex"
    ]  # fmt: skip


@pytest.mark.fault("SIGKILL")
def test_what_a_process_killed_at_its_first_write_left_is_no_hindrance(tmp_path):
    (tmp_path / "lock").write_text("123\n")
    (tmp_path / ".run.json.abc.partial").write_text("{")
    with folder(tmp_path).claimed():
        assert {entry.name for entry in tmp_path.iterdir()} == {"lock", "run.json"}


def test_a_damaged_marker_is_an_error(tmp_path):
    (tmp_path / "run.json").write_text('{"run": ')
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        folder(tmp_path).claimed().__enter__()


def test_the_id_for_weights_and_biases_stays_and_is_the_runs_own(tmp_path):
    ids = []
    for name in ("a", "a", "b"):
        run = folder(tmp_path / name)
        with run.claimed():
            ids.append(run.wandb_id)
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.fault("two runs in one folder")
def test_a_second_process_is_refused_while_the_first_is_at_work(tmp_path):
    code = """
import sys
from pathlib import Path
from tests.run.test_folder import folder
with folder(Path(sys.argv[1])).claimed():
    print("claimed", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout.readline() == "claimed\n"
        with pytest.raises(RunError, match=f"process {first.pid} is at work there; wait for it"):
            folder(tmp_path).claimed().__enter__()
        first.kill()
        first.wait()
        with folder(tmp_path).claimed():
            pass


def test_clearing_a_folder_keeps_its_owner(tmp_path):
    run = folder(tmp_path)
    with run.claimed():
        save(run, 3)
        (tmp_path / "metrics.jsonl").write_text("")
        run.clear()
        assert {entry.name for entry in tmp_path.iterdir()} == {"lock", "run.json"}
        assert run.load_newest() is None


def test_a_run_that_differs_in_code_or_length_only_is_pointed_at(tmp_path):
    with folder(tmp_path / "first").claimed():
        save(folder(tmp_path / "first"), 5)
    longer = IDENTITY | {"optimizer": IDENTITY["optimizer"] | {"cosine_steps": 20}}
    note = folder(tmp_path / "second", longer).similar_run()
    path = tmp_path / "first" / "checkpoints" / "last.pt"
    assert note == (
        f"note: {path} is of the same run but for optimizer.cosine_steps: 8 there, 20 here; "
        f"to start from it, set runtime.resume={path}"
    )
    assert folder(tmp_path / "third", IDENTITY | {"code": "d", "seed": 1}).similar_run() is None
    assert folder(tmp_path / "fourth", IDENTITY).similar_run() is None
