"""The targets of the Makefile that a newcomer meets first, in a folder without Git and in an empty one."""

import shutil
import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo
from dvc.scm import SCMError

from tests.helpers import ROOT


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True)


def test_train_works_in_a_downloaded_zip_which_has_no_git(tmp_path):
    for name in ("Makefile", "dvc.yaml", "params.yaml", ".dvc/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    with pytest.raises(SCMError):
        Repo(tmp_path)
    planned = "-n", "-o", ".venv/installed", "train"
    (rule,) = [word for word in make(tmp_path, *planned).stdout.split() if word.startswith(".dvc")]
    make(tmp_path, rule)
    with Repo(tmp_path) as repo:
        assert {stage.name for stage in repo.index.stages} == {"prepare_data", "train"}
    (tmp_path / rule).unlink()
    (tmp_path / ".git").mkdir()
    assert rule not in make(tmp_path, *planned).stdout


@pytest.mark.long
def test_the_installation_is_one_line_unless_it_fails(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").write_text("./missing\n")
    failed = make(tmp_path, ".venv/installed")
    assert failed.returncode != 0
    assert "missing" in failed.stderr
    assert not (tmp_path / ".venv" / "installed").exists()
    (tmp_path / "requirements.txt").write_text("")
    done = make(tmp_path, ".venv/installed")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    assert "6 GB" in done.stdout
