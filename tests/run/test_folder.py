"""A run's folder: whose it is, which checkpoint it resumes from, what it rejects."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from modeling import checkpoint
from modeling.run.folder import RunFolder, describe_state
from modeling.run.identity import Identity
from modeling.system.errors import UserError
from tests.helpers import ROOT

OPTIMIZER = {"name": "adam", "lr": 0.1, "warmup_steps": 0, "cosine_steps": 8}
IDENTITY = Identity(
    seed=0, dataset={"name": "shapes"}, model={"name": "ddpm", "hidden_size": 8}, diffusion={}, optimizer=OPTIMIZER,
    train={}, runtime={}, data="d", code="c", origin=None,
)  # fmt: skip


@dataclass
class State:
    step: int


def content() -> dict[str, Any]:
    model = nn.Linear(2, 2)
    return {"config": {}, "model": model, "ema": model, "optimizer": SGD(model.parameters(), 0.1)}


def save(run: RunFolder, *steps: int) -> None:
    for step in steps:
        run.save(about={"images": step}, state=State(step), **content())


def newest(run: RunFolder) -> dict:
    content = run.load_newest()
    assert content is not None
    return content


def names(path: Path) -> set[str]:
    return {entry.name for entry in (path / "checkpoints").iterdir()}


def test_a_checkpoint_says_whose_it_is(tmp_path):
    run = RunFolder(tmp_path / "run", IDENTITY)
    with run.claimed():
        run.started_from = "other@3"
        save(run, 4)
        about = newest(run)["about"]
    assert about == {
        "run": run.name, "identity": IDENTITY, "parent": "other@3", "wandb_id": run.wandb_id, "step": 4, "images": 4,
    }  # fmt: skip
    assert describe_state({"about": about}) == f"{run.name}@4"


@pytest.mark.parametrize(("keep", "expected"), [(1, {"last.pt"}), (3, {"last.pt", "8.pt", "9.pt"})])
def test_the_newest_checkpoints_are_kept(tmp_path, keep, expected):
    run = RunFolder(tmp_path, IDENTITY, keep)
    save(run, 3, 8, 9, 10)
    assert names(tmp_path) == expected
    assert newest(run)["state"]["step"] == 10
    again = RunFolder(tmp_path, IDENTITY, keep)
    again.load_newest()
    save(again, 10)  # nothing new
    save(again, 12)
    assert names(tmp_path) == ({"last.pt"} if keep == 1 else {"last.pt", "9.pt", "10.pt"})


def flip_a_bit(path: Path) -> None:
    original = bytearray(path.read_bytes())
    original[len(original) // 2] ^= 1
    path.write_bytes(original)


def save_another_architecture(path: Path) -> None:
    other = IDENTITY | {"model": {"name": "unet", "hidden_size": 8}}
    checkpoint.save_checkpoint(path, about={"identity": other}, state=State(99), **content())


def save_not_finite(path: Path) -> None:
    spoiled = content()
    spoiled["model"].weight.data.fill_(torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_non_finite", lambda *args: None)  # else nothing would be written
        checkpoint.save_checkpoint(path, about={"identity": IDENTITY}, state=State(99), **spoiled)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "flipped": flip_a_bit,
    "of another architecture": save_another_architecture,
    "not finite": save_not_finite,
    "missing": Path.unlink,
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.fault("damaged checkpoint")
def test_a_damaged_checkpoint_gives_way_to_the_one_before_with_a_warning(tmp_path, capsys, kind):
    run = RunFolder(tmp_path, IDENTITY)
    save(run, 3, 8)
    DAMAGES[kind](tmp_path / "checkpoints" / "last.pt")
    fresh = RunFolder(tmp_path, IDENTITY)
    assert newest(fresh)["state"]["step"] == 3
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == (0 if kind == "missing" else 1)  # missing: killed between the two renamings
    assert all(line.startswith("warning: ") and line.endswith("3.pt, step 3") for line in warnings)
    save(fresh, 12)  # the damaged one is not kept as if it were valid
    assert newest(RunFolder(tmp_path, IDENTITY))["state"]["step"] == 12
    assert names(tmp_path) == {"last.pt", "3.pt"}


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "missing"])
@pytest.mark.fault("damaged checkpoint")
def test_a_folder_without_any_valid_checkpoint_is_no_fresh_start(tmp_path, kind):
    run = RunFolder(tmp_path, IDENTITY)
    save(run, 3, 8)
    for name in ("last.pt", "3.pt"):
        DAMAGES[kind](tmp_path / "checkpoints" / name)
    with pytest.raises(UserError, match="no valid checkpoint is left: delete .* to start from scratch"):
        RunFolder(tmp_path, IDENTITY).load_newest()


@pytest.mark.fault("another run's state")
def test_a_folder_of_another_run_is_rejected_with_the_differences(tmp_path):
    with RunFolder(tmp_path / "run", IDENTITY).claimed():
        pass
    other = Identity({**IDENTITY, "seed": 1, "optimizer": OPTIMIZER | {"lr": 0.2}})
    with pytest.raises(UserError, match=r"optimizer\.lr: that run 0\.1, this run 0\.2; seed: that run 0, this run 1"):
        RunFolder(tmp_path / "run", other).claimed().__enter__()


def test_a_folder_of_other_files_and_a_file_are_rejected_and_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name, message in (("thesis", "holds other files"), ("file", "is not a folder")):
        with pytest.raises(UserError, match=message):
            RunFolder(tmp_path / name, IDENTITY).claimed().__enter__()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "file", "thesis", "thesis/thesis.tex"
    ]  # fmt: skip


@pytest.mark.fault("SIGKILL")
def test_files_of_a_process_killed_at_its_first_write_are_removed(tmp_path):
    (tmp_path / "lock").write_text("123\n")
    (tmp_path / ".run.json.abc.partial").write_text("{")
    with RunFolder(tmp_path, IDENTITY).claimed():
        assert {entry.name for entry in tmp_path.iterdir()} == {"lock", "run.json"}
    for name in (".", "checkpoints", "samples/ema", "evaluation"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / ".run.json.abc.partial").write_text("{")
    with RunFolder(tmp_path, IDENTITY).claimed():
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
        assert left == {"lock", "run.json", "evaluation/.run.json.abc.partial"}  # the last is evaluate.py's


def test_a_marker_of_another_project_is_rejected_in_the_folder_and_passed_over_beside_it(tmp_path):
    for number, text in enumerate(['{"status": "COMPLETED"}', "[]", "5", '{"run": ', '{"run": "a", "identity": []}']):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "run.json").write_text(text)
        message = f"{number}/run.json is no .*; if .* holds other files, set runtime.output_dir to another folder"
        with pytest.raises(UserError, match=message):
            RunFolder(tmp_path / str(number), IDENTITY).claimed().__enter__()
    run = RunFolder(tmp_path / "run", IDENTITY)
    with run.claimed():
        assert run.similar_run() is None


def test_the_id_for_weights_and_biases_is_the_runs_own_and_stays(tmp_path):
    ids = []
    for name in ("a", "a", "b"):
        run = RunFolder(tmp_path / name, IDENTITY)
        with run.claimed():
            ids.append(run.wandb_id)
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.fault("two runs in one folder")
def test_a_second_process_is_rejected_while_the_first_is_working(tmp_path):
    code = """
import json, sys
from pathlib import Path
from modeling.run.folder import RunFolder
with RunFolder(Path(sys.argv[1]), json.loads(sys.argv[2])).claimed():
    print("claimed", flush=True)
    sys.stdin.read()
"""
    command, pipe = [sys.executable, "-c", code, str(tmp_path), json.dumps(IDENTITY)], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=pipe, stdout=pipe) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match=f"process {first.pid} is working there; wait for it"):
            RunFolder(tmp_path, IDENTITY).claimed().__enter__()
        first.kill()
        first.wait()
        with RunFolder(tmp_path, IDENTITY).claimed():
            pass


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_rejected_run_leaves_no_folder_but_one_that_has_begun_does(tmp_path, has_begun):
    run = RunFolder(tmp_path / "run", IDENTITY)
    with pytest.raises(UserError, match="no good"), run.claimed():
        if has_begun:
            save(run, 3)
        raise UserError("no good")
    assert run.path.exists() == run.last_checkpoint.exists() == has_begun


def test_clearing_a_folder_keeps_its_owner(tmp_path):
    run = RunFolder(tmp_path, IDENTITY)
    with run.claimed():
        save(run, 3)
        (tmp_path / "metrics.jsonl").write_text("")
        run.clear()
        assert {entry.name for entry in tmp_path.iterdir()} == {"lock", "run.json"}
        assert run.load_newest() is None


def test_a_run_that_differs_only_in_code_or_length_is_named(tmp_path):
    with RunFolder(tmp_path / "first", IDENTITY).claimed():
        save(RunFolder(tmp_path / "first", IDENTITY), 5)
    longer = Identity({**IDENTITY, "optimizer": OPTIMIZER | {"cosine_steps": 20}})
    note = RunFolder(tmp_path / "second", longer).similar_run()
    path = tmp_path / "first" / "checkpoints" / "last.pt"
    assert note == (
        f"note: {path} is of a run like this one with optimizer.cosine_steps: that run 8, this run 20; "
        f"to start from it, set runtime.resume={path}"
    )
    another = Identity({**IDENTITY, "code": "d", "seed": 1})
    assert RunFolder(tmp_path / "third", another).similar_run() is None
    assert RunFolder(tmp_path / "fourth", IDENTITY).similar_run() is None
