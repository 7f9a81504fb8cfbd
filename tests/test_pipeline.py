"""The DVC pipeline: a stage runs exactly when something changed that can change its result."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from modeling.config import Config
from modeling.run.identity import code_files
from tests.helpers import ROOT, changed, clean_environment, leaves
from tests.pipeline import MAKE, command

DVC_YAML = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = DVC_YAML["stages"]
PARAMS = leaves(yaml.safe_load((ROOT / "params.yaml").read_text()))
WITHOUT_EFFECT = {
    "runtime.keep_freed_memory", "runtime.num_threads", "runtime.num_workers", "runtime.processes",
    "runtime.name", "runtime.output_dir", "runtime.resume", "runtime.max_seconds", "runtime.checkpoint_seconds",
    "runtime.keep_checkpoints", "wandb.mode", "wandb.project", "wandb.name",
    "wandb.entity", "wandb.group", "wandb.tags", "wandb.notes",
}  # fmt: skip


# ---- what dvc.yaml says


def test_there_are_two_stages_with_plain_commands():
    assert {name: stage["cmd"] for name, stage in STAGES.items()} == {
        "prepare_data": "python prepare_data.py",
        "train": "python main.py",
    }


def files_of(stage: str) -> set[str]:
    """The project's Python files that a stage depends on, those of its folders included."""
    deps = [ROOT / dep for dep in STAGES[stage]["deps"] if not dep.startswith("${")]
    files = [file for dep in deps for file in (dep.rglob("*.py") if dep.is_dir() else [dep])]
    return {file.relative_to(ROOT).as_posix() for file in files if file.suffix == ".py"}


@pytest.mark.parametrize(("stage", "script"), [("prepare_data", "prepare_data.py"), ("train", "main.py")])
def test_a_stage_depends_on_every_file_it_imports_and_no_other(stage, script):
    assert files_of(stage) == {path.relative_to(ROOT).as_posix() for path in code_files(ROOT / script)}


def test_every_value_is_a_parameter_of_a_stage_or_known_to_have_no_effect():
    watched = [key for stage in STAGES.values() for key in stage["params"]]
    unwatched = {key for key in PARAMS if not any(key == w or key.startswith(f"{w}.") for w in watched)}
    assert unwatched == WITHOUT_EFFECT
    for section in ("model", "diffusion", "optimizer", "train"):
        assert section in STAGES["train"]["params"]
    assert not set(Config.model_fields) - {key.split(".")[0] for key in PARAMS}


def test_the_plots_have_numbers_on_their_axis():
    for plot in STAGES["train"]["plots"]:
        (path, axes), *_ = plot.items()
        with (ROOT / path).open() as file:
            assert all(float(row[axes["x"]]) >= 0 for row in csv.DictReader(file))


# ---- what it does: a copy of the repository, with a run of two seconds

STATUS = """
import json, sys
from pathlib import Path
from dvc.repo import Repo

for line in sys.stdin:  # one edit a line: a file and its new text; answers with the stages that would run
    path, text = json.loads(line)
    path = Path(path)
    old = path.read_bytes() if path.exists() else None
    path.write_text(text)
    with Repo(".") as repo:
        print(json.dumps(sorted(repo.status())), flush=True)
    path.unlink() if old is None else path.write_bytes(old)
"""


def stages_after(repository: Path, edits: dict[str, str]) -> dict[str, set[str]]:
    """For each edit (file -> new text) alone: the stages that would run."""
    results = {}
    with subprocess.Popen(
        [sys.executable, "-c", STATUS], cwd=repository, env=clean_environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        for name, (path, text) in edits.items():
            process.stdin.write(json.dumps([path, text]) + "\n")
            process.stdin.flush()
            results[name] = {stage.partition(":")[2] or stage for stage in json.loads(process.stdout.readline())}
    return results


@pytest.mark.long
@pytest.mark.slow
def test_every_parameter_runs_exactly_the_right_stages(repository):
    text = (repository / "params.yaml").read_text()
    edits = {"nothing": ("params.yaml", text)}
    for key, value in leaves(yaml.safe_load(text)).items():
        edited = OmegaConf.create(text)
        OmegaConf.update(edited, key, changed(value))
        edits[key] = ("params.yaml", OmegaConf.to_yaml(edited))
    expected = {}
    for key in edits:
        if key in ("dataset.name", "dataset.root"):
            expected[key] = {"prepare_data", "train"}  # the path of the data is in it
        elif key.startswith("dataset."):
            expected[key] = {"prepare_data"}  # and train after it, if the data has changed
        else:
            expected[key] = set() if key in WITHOUT_EFFECT | {"nothing"} else {"train"}
    found = stages_after(repository, edits)
    print(f"{len(found)} edits of params.yaml")
    assert found == expected


@pytest.mark.long
@pytest.mark.slow
def test_every_file_runs_exactly_the_right_stages(repository):
    files = [str(path.relative_to(repository)) for path in repository.rglob("*.py") if path.parent != repository]
    files += [str(path.relative_to(repository)) for path in repository.glob("conf/**/*.yaml") if not path.is_symlink()]
    files += [
        "main.py",
        "prepare_data.py",
        "sample.py",
        "README.md",
        "Makefile",
        "modeling/new.py",
        "modeling/run/new.py",
    ]
    edits, expected = {}, {}
    for name in files:
        path = repository / name
        edits[name] = (name, (path.read_text() if path.exists() else "") + "\n# edited\n")
        expected[name] = {
            stage for stage in STAGES if any(Path(name).is_relative_to(dep) for dep in STAGES[stage]["deps"])
        }
    found = stages_after(repository, edits)
    print(f"{len(found)} edited files")
    assert found == expected
    assert {name for name, stages in found.items() if not stages} >= {
        "README.md", "sample.py", "tests/test_pipeline.py", "conf/optimizer/sgd.yaml", "conf/sample.yaml",
    }  # fmt: skip


@pytest.mark.long
@pytest.mark.slow
def test_importing_the_package_changes_nothing(repository):
    command("python", "-c", "import modeling.run.objects, modeling.datasets.preparation", cwd=repository)
    assert list(repository.glob("modeling/__pycache__/*.pyc"))
    assert "Data and pipelines are up to date" in command("dvc", "repro", cwd=repository)


@pytest.mark.long
@pytest.mark.slow
def test_the_check_of_the_lock_passes_exactly_if_nothing_would_run(repository):
    words = (*MAKE, "check-lock")
    assert command(*words, cwd=repository) == "dvc.lock is true\n"
    params = repository / "params.yaml"
    text = params.read_text()
    params.write_text(text.replace("random_flip: true", "random_flip: false"))
    with pytest.raises(AssertionError, match="dvc.lock is stale: run `make record`"):
        command(*words, cwd=repository)
    params.write_text(text)
