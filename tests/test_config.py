"""The schema: what is refused, in which words; and what a run's name depends on."""

import itertools
import shlex
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from modeling.config import Config, ConfigError, Dataset, parse, to_yaml
from modeling.options import SampleConfig
from modeling.stage import (
    archive_path,
    describe_differences,
    identify,
    parse_stage,
    read_manifest,
    repository,
    run_name,
)
from tests.helpers import ROOT, changed, leaves

GROUPS = sorted(str(path.relative_to(ROOT / "conf").with_suffix("")) for path in (ROOT / "conf").glob("*/*.yaml"))


REQUIRED = {"dataset/folder": ["dataset.pictures=pictures"]}  # what an alternative leaves to the user


def test_params_yaml_is_canonical_so_that_dvc_and_hydra_read_the_same():
    text = (ROOT / "params.yaml").read_text()
    assert text == OmegaConf.to_yaml(OmegaConf.create(text))
    assert yaml.safe_load(text) == OmegaConf.to_container(OmegaConf.create(text))


def test_without_overrides_what_params_yaml_says_is_what_runs(compose_config):
    assert to_yaml(parse(compose_config())) == (ROOT / "params.yaml").read_text()


def test_no_key_has_a_name_that_dvc_ignores():
    keys = {key.rpartition(".")[2] for key in leaves(yaml.safe_load((ROOT / "params.yaml").read_text()))}
    assert not keys & {"size", "nfiles"}


@pytest.mark.parametrize("group", GROUPS)
def test_every_alternative_is_valid_alone(compose_config, group):
    name, _, option = group.partition("/")
    parse(compose_config(f"{name}={option}", *REQUIRED.get(group, [])))


def combinations() -> list[tuple[str, ...]]:
    """Every experiment with every model, and with these the other groups in turn."""
    others = itertools.cycle(itertools.product(["adam", "adamw", "sgd"], ["cifar10", "shapes", "folder"]))
    experiments, models = ["demo", "assignment", "full", "paper"], ["unet", "ddpm", "ddpm_paper", "ddpm_small"]
    pairs = itertools.product(experiments, models)
    return [(experiment, model, *next(others)) for experiment, model in pairs]


@pytest.mark.parametrize(("experiment", "model", "optimizer", "dataset"), combinations())
def test_alternatives_combine_freely(compose_config, experiment, model, optimizer, dataset):
    choices = f"model={model}", f"optimizer={optimizer}", f"experiment={experiment}", f"dataset={dataset}"
    config = parse(compose_config(*choices, *REQUIRED.get(f"dataset/{dataset}", [])))
    assert (config.model.name, config.optimizer.name, config.dataset.name) == (
        model.partition("_")[0],
        optimizer,
        dataset,
    )


def test_switching_back_leaves_nothing_behind(compose_config):
    """A key that the chosen name does not have is null."""
    sgd = parse(compose_config("optimizer=sgd"))
    assert sgd.optimizer.momentum == 0.9
    config = parse(compose_config("experiment=full", "model=unet", "optimizer=adamw"))
    assert config.model.multipliers is None
    assert config.optimizer.momentum is None
    assert config.train.num_epochs == 100  # what does not depend on the choice keeps the experiment's value


def test_the_assignments_setting(compose_config):
    config = parse(compose_config("experiment=assignment"))
    assert (config.model.name, config.model.hidden_size) == ("unet", 128)
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.lr_schedule) == ("adam", 1e-5, "constant")
    assert (config.train.batch_size, config.train.num_epochs, config.train.random_flip) == (128, 100, False)


def test_the_documented_command_line_does_what_it_says(compose_config):
    config = parse(
        compose_config(
            "optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.9", "train.batch_size=64", "train.num_epochs=2",
            "runtime.num_workers=2", "train.random_flip=false",
        )
    )  # fmt: skip
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.momentum) == ("sgd", 0.1, 0.9)
    assert (config.train.batch_size, config.train.num_epochs, config.train.random_flip) == (64, 2, False)
    assert config.runtime.num_workers == 2


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["+train.num_epoch=1"], ["train.num_epoch: unknown key; the nearest known one is train.num_epochs"]),
        (["+optimiser.lr=1"], ["optimiser: unknown key; the nearest known one is optimizer.lr"]),
        (["~train.batch_size"], ["train.batch_size: missing"]),
        (["optimizer.lr=fast"], ["optimizer.lr=fast: input should be a valid number"]),
        (["train.batch_size=1.5"], ["train.batch_size=1.5: input should be a valid integer"]),
        (["train.random_flip=3"], ["train.random_flip=3: input should be a valid boolean"]),
        (["optimizer.lr=-1"], ["optimizer.lr=-1: input should be greater than or equal to 0"]),
        (["optimizer.lr=nan"], ["optimizer.lr=nan: input should be a finite number"]),
        (["diffusion.num_timesteps=0"], ["diffusion.num_timesteps=0: input should be greater than 0"]),
        (["model.hidden_size=12"], ["model.hidden_size=12: input should be a multiple of 8"]),
        (["model.name=huge"], ["model.name=huge: input should be 'unet' or 'ddpm'"]),
        (
            ["diffusion.betas=[0.02,0.0001]"],
            ["diffusion: betas must satisfy 0 < beta_1 < beta_T < 1, got [0.02, 0.0001]"],
        ),
        (["optimizer.momentum=0.9"], ["optimizer: momentum must be null with optimizer.name=adam, got 0.9"]),
        (["optimizer.name=sgd"], ["optimizer: momentum needs a value with optimizer.name=sgd"]),
        (["model.name=unet"], ["model: multipliers must be null with model.name=unet, got [1, 2, 2]"]),
        (["model.multipliers=null"], ["model: multipliers needs a value with model.name=ddpm"]),
        (
            ["model.attention_resolutions=[7]"],
            ["model: attention_resolutions must be among [32, 16, 8], got [7]"],
        ),
        (["dataset.name=shapes"], ["dataset: seed needs a value with dataset.name=shapes"]),
        (["dataset=folder"], ["dataset: pictures needs a value with dataset.name=folder"]),
        (["dataset.pictures=p"], ["dataset: pictures must be null with dataset.name=cifar10, got p"]),
        (
            ["dataset=folder", "dataset.pictures=p", "dataset.seed=1"],
            ["dataset: seed must be null with dataset.name=folder, got 1"],
        ),
        (
            ["dataset=folder", "dataset.pictures=p", "dataset.num_images=32"],
            ["train.batch_size=64 is larger than the data, 32 images"],
        ),
        (["dataset.num_images=60000"], ["dataset: num_images must be at most 50000 with dataset.name=cifar10"]),
        (
            ["dataset=shapes", "dataset.num_images=32"],
            ["train.batch_size=64 is larger than the data, 32 images"],
        ),
        (
            ["optimizer.lr=x", "train.log_every=0"],
            ["optimizer.lr=x: input should be a valid number", "train.log_every=0: input should be greater than 0"],
        ),
    ],
)  # fmt: skip
@pytest.mark.fault("wrong input")
def test_a_wrong_value_is_one_line_with_key_value_and_expectation(compose_config, overrides, lines):
    with pytest.raises(ConfigError) as caught:
        parse(compose_config(*overrides))
    found = str(caught.value).splitlines()
    assert len(found) == len(lines)
    for line, expected in zip(found, lines, strict=True):
        assert line.startswith(expected)


def test_a_missing_required_value_is_named(compose_config):
    with pytest.raises(ConfigError, match="checkpoint"):
        parse(compose_config(name="sample"), SampleConfig)


def test_every_leaf_of_the_schema_is_in_params_yaml_and_the_other_way_round():
    params = set(leaves(yaml.safe_load((ROOT / "params.yaml").read_text())))
    schema = {
        f"{section}.{key}" if hasattr(field.annotation, "model_fields") else section
        for section, field in Config.model_fields.items()
        for key in getattr(field.annotation, "model_fields", [""])
    }
    assert params == schema


NO_EFFECT_ON_THE_NAME = {
    "dataset.root", "dataset.archive", "dataset.urls", "dataset.pictures", "train.num_epochs", "train.max_steps",
    "train.checkpoint_every", "runtime.keep_freed_memory", "runtime.num_workers", "runtime.output_dir",
    "runtime.resume", "runtime.max_seconds", "runtime.checkpoint_seconds", "runtime.keep_checkpoints", "wandb.mode",
    "wandb.project", "wandb.name",
}  # fmt: skip


def name_of(config: Config, num_steps=1000, data="data", code="code", origin=None) -> str:
    return run_name(identify(config, num_steps, data, code, origin))


@pytest.mark.parametrize("key", sorted(leaves(yaml.safe_load((ROOT / "params.yaml").read_text()))))
def test_a_run_is_named_by_what_can_change_its_result(compose_config, key):
    values = OmegaConf.to_container(compose_config())
    before = Config.model_validate(values)
    *sections, leaf = key.split(".")
    section = values
    for name in sections:
        section = section[name]
    section[leaf] = changed(section[leaf])
    after = construct(Config, values)
    is_same = name_of(before) == name_of(after)
    assert is_same == (key in NO_EFFECT_ON_THE_NAME)


def construct(schema, values):
    """The schema's object with these values, unchecked: a changed leaf need not be valid."""
    fields = {
        name: construct(field.annotation, values[name]) if isinstance(values[name], dict) else values[name]
        for name, field in schema.model_fields.items()
    }
    return schema.model_construct(**fields)


def test_the_length_of_a_run_counts_where_the_learning_rate_depends_on_it(compose_config):
    cosine, constant = (parse(compose_config(f"optimizer.lr_schedule={name}")) for name in ("cosine", "constant"))
    assert name_of(cosine, 1000) != name_of(cosine, 2000)
    assert name_of(constant, 1000) == name_of(constant, 2000)
    assert name_of(constant, 1000) != name_of(constant, 50)  # there warm-up is cut


def test_data_code_and_the_checkpoint_it_started_from_belong_to_a_runs_name(compose_config):
    config = parse(compose_config())
    names = [name_of(config), name_of(config, data="d"), name_of(config, code="c"), name_of(config, origin="run@7")]
    assert len(set(names)) == 4


def test_differences_are_told_key_by_key():
    found = {"seed": 1, "model": {"name": "unet", "hidden_size": 8}, "data": "a"}
    wanted = {"seed": 1, "model": {"name": "ddpm", "hidden_size": 8}, "code": "b"}
    assert describe_differences(found, wanted) == (
        'code: null there, "b" here; data: "a" there, null here; model.name: "unet" there, "ddpm" here'
    )


def test_data_that_is_not_prepared_names_the_command(compose_config, tmp_path, tiny_data):
    config = parse(compose_config("dataset=shapes", "dataset.num_images=256", f"dataset.root={tmp_path}"))
    command = f"python prepare_data.py dataset=shapes dataset.root={tmp_path} dataset.num_images=256 dataset.seed=0"
    with pytest.raises(ConfigError, match=f"holds no prepared data: run `{command}`"):
        read_manifest(config.dataset)
    config = parse(compose_config("dataset=shapes", "dataset.num_images=256", f"dataset.root={tiny_data}"))
    with pytest.raises(ConfigError, match=r"was prepared with .*64.* not with .*256.*: run `python prepare_data.py"):
        read_manifest(config.dataset)


@pytest.mark.parametrize("pictures", ["/a/b-1.0", "/a/my pictures", "it's (2), $x", "été/~a=b", '"'])
def test_the_command_that_an_error_names_sets_the_very_value(compose_config, tmp_path, pictures):
    dataset = Dataset(
        name="folder", root=str(tmp_path), archive=None, urls=None, pictures=pictures, num_images=3, seed=None
    )
    with pytest.raises(ConfigError) as caught:
        read_manifest(dataset)
    _, script, *overrides = shlex.split(str(caught.value).partition("`")[2].removesuffix("`"))
    assert script == "prepare_data.py"
    assert parse(compose_config(*overrides, "train.batch_size=1")).dataset == dataset


def test_a_folder_of_unknown_count_may_be_larger_than_any_batch(compose_config):
    parse(compose_config("dataset=folder", "dataset.pictures=p", "train.batch_size=60000"))


def test_inside_a_dvc_stage_only_params_yaml_runs(compose_config, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DVC_STAGE", "train")
    parse_stage(compose_config())
    with pytest.raises(ConfigError, match=r"must be those of params\.yaml"):
        parse_stage(compose_config("optimizer.lr=0.5"))


def test_a_recorded_stage_starts_from_no_file(compose_config, monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_STAGE", "train")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("resume: auto", "resume: a.pt"))
    with pytest.raises(ConfigError, match="runtime.resume=a.pt: a recorded stage cannot start from a file"):
        parse_stage(compose_config("runtime.resume=a.pt"))


KEYS = ["0123456789abcdef" * 2 + "01234567", "wandb_v1_" + "Ab3" * 20, "hf_" + "aB1" * 12, "ghp_" + "aB1" * 12]


@pytest.mark.parametrize("secret", KEYS)
@pytest.mark.parametrize(
    "override", ["wandb.name={}", "wandb.project=x-{}", "+wandb.api_key={}", "dataset.urls=[http://{}@host/a]"]
)
@pytest.mark.fault("API key")
def test_an_api_key_anywhere_is_refused_and_not_repeated(compose_config, secret, override):
    with pytest.raises(ConfigError, match="looks like an API key") as caught:
        parse(compose_config(override.format(secret)))
    assert secret not in str(caught.value)


@pytest.mark.fault("API key")
def test_the_key_in_the_environment_is_refused_whatever_it_looks_like(compose_config, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "local-short-key")
    with pytest.raises(ConfigError, match=r"wandb\.name: looks like an API key"):
        parse(compose_config("wandb.name=${oc.env:WANDB_API_KEY}"))


def test_ordinary_values_are_no_keys(compose_config):
    parse(compose_config("wandb.name=run-2026-11-20", "dataset.urls=[https://host/" + "a" * 80 + "]"))


def test_archive_and_pictures_lie_in_the_original_repository_even_in_dvcs_copy(compose_config, monkeypatch):
    dataset = parse(compose_config()).dataset
    assert archive_path(dataset) == Path("downloads/cifar-10-python.tar.gz")
    assert repository() == Path()
    monkeypatch.setenv("DVC_ROOT", "/original")
    assert archive_path(dataset) == Path("/original/downloads/cifar-10-python.tar.gz")
    assert repository() == Path("/original")
    assert archive_path(parse(compose_config("dataset=shapes")).dataset) is None


def test_a_config_is_frozen(compose_config):
    with pytest.raises(ValueError, match="frozen"):
        parse(compose_config()).train.batch_size = 3
