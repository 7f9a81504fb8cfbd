"""What both stages agree on: the values they run on, and the prepared data."""

import shlex
from pathlib import Path

import pytest

from modeling.config import parse
from modeling.stage import parse_stage, read_manifest, repository
from modeling.system.errors import UserError
from tests.helpers import ROOT, dataset


def test_data_that_is_not_prepared_names_the_command(compose_config, tmp_path, tiny_data):
    config = parse(compose_config("dataset=shapes", "dataset.num_images=256", f"dataset.root={tmp_path}"))
    command = f"python prepare_data.py dataset=shapes dataset.root={tmp_path} dataset.num_images=256 dataset.seed=0"
    with pytest.raises(UserError, match=f"holds no prepared data: run `{command}`"):
        read_manifest(config.dataset)
    config = parse(compose_config("dataset=shapes", "dataset.num_images=256", f"dataset.root={tiny_data}"))
    with pytest.raises(UserError, match=r"was prepared with num_images=64, not 256: run `python prepare_data.py"):
        read_manifest(config.dataset)


@pytest.mark.parametrize("text", ["{", '{"dataset": {"seed": 0}}'])
def test_a_damaged_manifest_names_the_command(tmp_path, text):
    section = dataset("shapes", tmp_path, seed=0)
    section.folder.mkdir()
    (section.folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is no manifest .*; run `python prepare_data\.py"):
        read_manifest(section)


@pytest.mark.parametrize("pictures", ["/a/b-1.0", "it's (2), $x", "été/~a=b#\n", "${oc.env:HOME}\\"])
def test_the_command_that_an_error_names_sets_the_very_value(compose_config, tmp_path, pictures):
    values = dataset("folder", tmp_path, pictures=pictures, skip_unusable=True, num_images=3)
    with pytest.raises(UserError) as caught:
        read_manifest(values)
    _, script, *overrides = shlex.split(str(caught.value).partition("`")[2].removesuffix("`"))
    assert script == "prepare_data.py"
    assert parse(compose_config(*overrides, "train.batch_size=1")).dataset == values


def test_only_params_yaml_runs_inside_a_dvc_stage(compose_config, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DVC_STAGE", "train")
    parse_stage(compose_config())
    with pytest.raises(UserError, match=r"must be those of params\.yaml"):
        parse_stage(compose_config("optimizer.lr=0.5"))


def test_a_tilde_is_no_path_of_dvc(compose_config, monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_STAGE", "train")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("root: data", "root: ~/data"))
    message = "dataset.root=~/data: DVC does not know ~, expected the whole path, /home/me/data"
    with pytest.raises(UserError, match=message):
        parse_stage(compose_config("dataset.root='~/data'"))


def test_a_recorded_stage_starts_from_no_file(compose_config, monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_STAGE", "train")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("resume: auto", "resume: a.pt"))
    with pytest.raises(UserError, match="runtime.resume=a.pt: a recorded stage cannot start from a file"):
        parse_stage(compose_config("runtime.resume=a.pt"))


def test_relative_paths_begin_at_the_original_repository_even_in_dvcs_copy(monkeypatch):
    assert repository() == Path()
    monkeypatch.setenv("DVC_ROOT", "/original")
    assert repository() == Path("/original")
    monkeypatch.setenv("DVC_ROOT", str(Path.cwd()))  # so that a run's lines name its folder as they do without DVC
    assert repository() == Path()
