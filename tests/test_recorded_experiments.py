"""DVC's experiments: each trains with the values that it records, and the way back is named and works."""

import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from tests.pipeline import MAKE, command


def recorded(repository: Path) -> dict:
    """The parameters that the lock records for the last training, and those that were trained with."""
    lock = yaml.safe_load((repository / "dvc.lock").read_text())["stages"]["train"]["params"]["params.yaml"]
    trained = yaml.safe_load((repository / "outputs" / "config.yaml").read_text())
    return {"lr": (lock["optimizer"]["lr"], trained["optimizer"]["lr"]), "lock": lock, "trained": trained}


@pytest.mark.long
@pytest.mark.slow
def test_experiments_train_with_the_values_they_record_and_are_shown_side_by_side(repository, monkeypatch):
    command("dvc", "exp", "run", "-q", "-S", "optimizer.lr=0.003", "-S", "train.batch_size=8", cwd=repository)
    found = recorded(repository)
    assert found["lr"] == (0.003, 0.003)
    assert found["trained"]["train"]["batch_size"] == found["lock"]["train"]["batch_size"] == 8
    diff = json.loads(command("dvc", "metrics", "diff", "--json", cwd=repository))
    assert diff["outputs/metrics.json"]["eval/heldout_ema"]["diff"] != 0
    lines = command("dvc", "metrics", "diff", cwd=repository).splitlines()
    assert len(lines) <= 15
    assert max(map(len, lines)) <= 100
    monkeypatch.setenv("COLUMNS", "120")
    shown = command(*MAKE, "experiments", cwd=repository)
    header = next(line.split() for line in shown.splitlines() if "Experiment" in line)
    assert header == [
        "Experiment", "eval/heldout_ema", "train/loss_smoothed", "seconds", "optimizer.lr", "train.batch_size",
    ]  # fmt: skip
    command("dvc", "exp", "run", "-q", "-S", "optimizer=sgd", "-S", "train.num_epochs=1", cwd=repository)
    found = recorded(repository)
    assert found["trained"]["optimizer"]["name"] == found["lock"]["optimizer"]["name"] == "sgd"
    assert found["trained"]["optimizer"]["momentum"] == found["lock"]["optimizer"]["momentum"] == 0.9
    command(*MAKE, "plots", cwd=repository)
    page = (repository / "dvc_plots" / "index.html").read_text()
    assert page.count("vegaEmbed(") >= 2
    assert "<script src" not in page  # it needs no network
    command(*MAKE, "restore", cwd=repository)
    assert "Data and pipelines are up to date" in command("dvc", "repro", cwd=repository)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("has_cache", [True, False])
def test_a_failed_experiment_names_the_way_back(repository, tmp_path, has_cache):
    if not has_cache:
        command("git", "clone", "-q", str(repository), str(tmp_path / "clone"), cwd=repository)
        repository = tmp_path / "clone"
        command("git", "config", "user.email", "test@example.com", cwd=repository)
        command("git", "config", "user.name", "Test", cwd=repository)
    before = {path: path.read_bytes() for path in repository.glob("outputs/*") if path.is_file()}
    with pytest.raises(AssertionError, match="`make restore` brings back params.yaml and outputs/ as they were"):
        command("dvc", "exp", "run", "-q", "-S", "train.batch_size=0", cwd=repository)
    assert command("git", "status", "--short", "-uno", cwd=repository)
    command(*MAKE, "restore", cwd=repository)
    assert command("git", "status", "--short", "-uno", cwd=repository) == ""
    assert {path: path.read_bytes() for path in repository.glob("outputs/*") if path.is_file()} == before
    assert "batch_size: 0" in command("git", "stash", "show", "-p", cwd=repository)


@pytest.mark.long
@pytest.mark.slow
def test_queued_experiments_train_with_the_values_they_record(repository):
    command("dvc", "exp", "run", "-q", "--temp", "-n", "temporary", "-S", "optimizer.lr=0.004", cwd=repository)
    command("dvc", "exp", "run", "-q", "--queue", "-S", "optimizer.lr=0.005,0.006", cwd=repository)
    command("dvc", "exp", "run", "-q", "--run-all", "-j", "1", cwd=repository)
    rates = {}
    for line in command("git", "for-each-ref", "refs/exps", "--format=%(refname)", cwd=repository).splitlines():
        if "/celery/" in line or "stash" in line:
            continue
        params = yaml.safe_load(command("git", "show", f"{line}:params.yaml", cwd=repository))
        lock = yaml.safe_load(command("git", "show", f"{line}:dvc.lock", cwd=repository))["stages"]["train"]
        metrics = json.loads(command("git", "show", f"{line}:outputs/metrics.json", cwd=repository))
        assert lock["params"]["params.yaml"]["optimizer"]["lr"] == params["optimizer"]["lr"]
        rates[params["optimizer"]["lr"]] = metrics["eval/heldout_ema"]
    assert set(rates) >= {0.004, 0.005, 0.006}
    assert len(set(rates.values())) == len(rates)  # each trained with its own
    kept = [OmegaConf.load(folder / "config.yaml").optimizer.lr for folder in (repository / "runs").iterdir()]
    assert {0.004, 0.005, 0.006} <= set(kept)  # DVC deletes the copies in which they ran
