"""The schema: which alternatives there are, what is rejected, and in which words."""

import itertools

import pytest
import yaml
from omegaconf import OmegaConf

from modeling.config import Config, parse, to_yaml
from modeling.options import ConvertConfig, EncoderConfig, EvaluateConfig, SampleConfig
from modeling.system.errors import UserError
from tests.helpers import ROOT, leaves

GROUPS = sorted(str(path.relative_to(ROOT / "conf").with_suffix("")) for path in (ROOT / "conf").glob("*/*.yaml"))
REQUIRED = {"dataset/folder": ["dataset.pictures=pictures"]}  # what an alternative leaves to the user


def test_dvc_and_hydra_read_the_same_in_params_yaml():
    text = (ROOT / "params.yaml").read_text()
    assert yaml.safe_load(text) == OmegaConf.to_container(OmegaConf.create(text))


def test_params_yaml_is_what_runs_without_overrides(compose_config):
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
    others = itertools.cycle(itertools.product(["adam", "adamw", "muon", "sgd"], ["cifar10", "shapes", "folder"]))
    experiments, models = (sorted(path.stem for path in (ROOT / "conf" / x).iterdir()) for x in ("experiment", "model"))
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


@pytest.mark.parametrize("name", ["cifar10", "folder"])
def test_the_configuration_in_an_older_file_is_valid(compose_config, name):
    values = compose_config(f"dataset={name}", *REQUIRED.get(f"dataset/{name}", []))
    del values.dataset.skip_unusable
    assert not parse(values).dataset.skip_unusable


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
        (["optimizer.lr=fast"], ["optimizer.lr=fast: input should be a valid number"]),
        (["train.num_epochs=x"], ["train.num_epochs=x: input should be a valid number"]),
        (["train.num_epochs=0"], ["train.num_epochs=0: input should be greater than 0"]),
        (["train.num_epochs=1e308"], ["train.num_epochs=1e+308: input should be less than or equal to 1000000000"]),
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
        (["optimizer.name=adam"], ["optimizer: momentum must be null with optimizer.name=adam, got 0.95"]),
        (["optimizer.momentum=null"], ["optimizer: momentum needs a value with optimizer.name=muon"]),
        (["model.name=unet"], ["model: multipliers must be null with model.name=unet, got [1, 2, 2]"]),
        (["model.multipliers=null"], ["model: multipliers needs a value with model.name=ddpm"]),
        (
            ["model.attention_resolutions=[7]"],
            ["model.attention_resolutions must be among [32, 16, 8], got [7]"],
        ),
        (["dataset.name=shapes"], ["dataset: seed needs a value with dataset.name=shapes"]),
        (["dataset=folder"], ["dataset: pictures needs a value with dataset.name=folder"]),
        (["dataset.pictures=p"], ["dataset: pictures must be null with dataset.name=cifar10, got p"]),
        (["dataset.skip_unusable=true"], ["dataset: skip_unusable must be null with dataset.name=cifar10, got True"]),
        (
            ["dataset=folder", "dataset.pictures=p", "dataset.seed=1"],
            ["dataset: seed must be null with dataset.name=folder, got 1"],
        ),
        (
            ["dataset=folder", "dataset.pictures=p", "dataset.num_images=16"],
            ["train.batch_size=32 is larger than the data, 16 images"],
        ),
        (["dataset.num_images=0"], ["dataset.num_images=0: input should be greater than 0"]),
        (["dataset.num_images=60000"], ["dataset: num_images must be at most 50000 with dataset.name=cifar10"]),
        (
            ["dataset=shapes", "dataset.num_images=16"],
            ["train.batch_size=32 is larger than the data, 16 images"],
        ),
        (
            ["optimizer.lr=x", "train.log_every=0"],
            ["optimizer.lr=x: input should be a valid number", "train.log_every=0: input should be greater than 0"],
        ),
    ],
)  # fmt: skip
@pytest.mark.fault("wrong input")
def test_a_wrong_value_is_one_line_with_key_value_and_expectation(compose_config, overrides, lines):
    with pytest.raises(UserError) as caught:
        parse(compose_config(*overrides))
    found = str(caught.value).splitlines()
    assert len(found) == len(lines)
    for line, expected in zip(found, lines, strict=True):
        assert line.startswith(expected)


@pytest.mark.parametrize(
    ("name", "schema", "keys"),
    [
        ("config", Config, ["dataset.root", "dataset.archive", "runtime.output_dir", "runtime.resume"]),
        ("sample", SampleConfig, ["checkpoint", "out"]),
        ("evaluate", EvaluateConfig, ["checkpoint", "out", "samples", "data", "encoder", "inception_weights"]),
        ("encoder", EncoderConfig, ["out", "archive"]),
        ("convert", ConvertConfig, ["checkpoint", "out"]),
    ],
)
def test_a_tilde_is_the_home_folder_in_every_path(compose_config, monkeypatch, name, schema, keys):
    monkeypatch.setenv("HOME", "/home/me")
    measures = ["measures=[encoder,fid]"] if name == "evaluate" else []
    config = parse(compose_config(*(f"{key}='~/x'" for key in keys), *measures, name=name), schema)
    assert {leaves(config.model_dump())[key] for key in keys} == {"/home/me/x"}


def test_the_schema_and_params_yaml_have_the_same_leaves():
    params = set(leaves(yaml.safe_load((ROOT / "params.yaml").read_text())))
    schema = {
        f"{section}.{key}" if hasattr(field.annotation, "model_fields") else section
        for section, field in Config.model_fields.items()
        for key in getattr(field.annotation, "model_fields", [""])
    }
    assert params == schema


def test_a_folder_of_unknown_count_may_be_larger_than_any_batch(compose_config):
    parse(compose_config("dataset=folder", "dataset.pictures=p", "train.batch_size=60000"))


KEYS = ["0123456789abcdef" * 2 + "01234567", "wandb_v1_" + "Ab3" * 20, "hf_" + "aB1" * 12, "ghp_" + "aB1" * 12]


@pytest.mark.parametrize("secret", KEYS)
@pytest.mark.parametrize(
    "override", ["wandb.name={}", "wandb.project=x-{}", "+wandb.api_key={}", "dataset.urls=[http://{}@host/a]"]
)
@pytest.mark.fault("API key")
def test_an_api_key_anywhere_is_rejected_and_not_repeated(compose_config, secret, override):
    with pytest.raises(UserError, match="looks like an API key") as caught:
        parse(compose_config(override.format(secret)))
    assert secret not in str(caught.value)


@pytest.mark.fault("API key")
def test_the_key_in_the_environment_is_rejected_whatever_it_looks_like(compose_config, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "local-short-key")
    with pytest.raises(UserError, match=r"wandb\.name: looks like an API key"):
        parse(compose_config("wandb.name=${oc.env:WANDB_API_KEY}"))


def test_ordinary_values_are_no_keys(compose_config):
    parse(compose_config("wandb.name=run-2026-11-20", "dataset.urls=[https://host/" + "a" * 80 + "]"))
    parse(compose_config("runtime.output_dir=runs/" + "c0ffee" * 6 + "c0ff", "dataset.archive=a/" + "ab" * 20 + "/b"))


@pytest.mark.parametrize("override", ["diffusion.betas=[0.001,0.99]", "diffusion.num_timesteps=100000"])
def test_a_schedule_that_leaves_nothing_of_the_image_is_rejected(compose_config, override):
    with pytest.raises(UserError, match=r"betas are too large for num_timesteps=.*exp\(-\d+\)"):
        parse(compose_config(override))
    parse(compose_config("diffusion.num_timesteps=5000"))  # exp(-51)


@pytest.mark.parametrize(
    ("override", "measures"), [("encoder=a", "fid"), ("inception_weights=a", "encoder"), ("samples=a", "bits_per_dim")]
)
def test_files_of_measures_that_are_not_taken_are_rejected(compose_config, override, measures):
    with pytest.raises(UserError, match=rf"{override.partition('=')[0]} must be null without"):
        parse(compose_config(override, f"measures=[{measures}]", name="evaluate"), EvaluateConfig)


def test_a_config_is_frozen(compose_config):
    with pytest.raises(ValueError, match="frozen"):
        parse(compose_config()).train.batch_size = 3
