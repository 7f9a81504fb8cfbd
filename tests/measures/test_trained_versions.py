"""A model file of another version is sampled if its network and its diffusion process are whole."""

import pytest

from modeling.checkpoint import export_weights
from modeling.config import parse
from modeling.interchange.pipeline import write_pipeline
from modeling.measures.subject import stored_data
from modeling.measures.trained import load_trained
from modeling.options import SampleConfig
from modeling.system.errors import UserError
from tests.interchange.networks import TINY, network


@pytest.fixture
def stored(compose_config) -> dict:
    """The configuration of a run of another version."""
    keys = ("hidden_size", "multipliers", "num_blocks")
    values = parse(compose_config(*(f"model.{key}={TINY[key]}" for key in keys))).model_dump()
    del values["runtime"]["num_threads"]
    values["train"]["unknown"] = 1
    return values


@pytest.fixture
def load(compose_config, tmp_path):
    def load_file(values: dict):
        export_weights(tmp_path / "old.safetensors", network("tiny"), values)
        options = compose_config(f"checkpoint={tmp_path}/old.safetensors", "device=cpu", name="sample")
        return load_trained(parse(options, SampleConfig))

    return load_file


def test_other_keys_in_sections_that_do_not_matter_are_no_obstacle(load, stored, tmp_path):
    trained, _ = load(stored)
    assert trained.model.num_timesteps == stored["diffusion"]["num_timesteps"]
    write_pipeline(tmp_path / "old.safetensors", tmp_path / "exported")
    assert (tmp_path / "exported" / "model_index.json").exists()
    del stored["optimizer"], stored["dataset"], stored["wandb"]
    load(stored)


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("model", "width", r"old\.safetensors is no .*: model\.width: unknown key"),
        ("diffusion", "schedule", r"old\.safetensors is no .*: diffusion\.schedule: missing"),
    ],
)
def test_a_network_or_process_of_another_version_is_an_error_with_file_and_key(load, stored, section, key, message):
    if stored[section].pop(key, None) is None:
        stored[section][key] = 1
    with pytest.raises(UserError, match=message):
        load(stored)


def test_data_of_another_version_are_named_by_the_user(stored):
    assert stored_data("old.pt", stored).name == "cifar10"
    stored["dataset"]["name"] = "newer"
    with pytest.raises(UserError, match=r"^old\.pt is no .*: dataset\.name=newer: .*as data=FOLDER"):
        stored_data("old.pt", stored)
