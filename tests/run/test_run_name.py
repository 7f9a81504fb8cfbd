"""What a run is named by: everything that can change its result, and nothing else."""

import pytest
import yaml
from omegaconf import OmegaConf

from modeling.config import Config, parse
from modeling.run.identity import Identity, data_sha256, folder_name, identify, run_name
from modeling.system.errors import UserError
from tests.helpers import ROOT, changed, leaves

NO_EFFECT_ON_THE_NAME = {
    "dataset.root", "dataset.archive", "dataset.urls", "dataset.pictures", "dataset.skip_unusable",
    "train.init",  # the file's hash has
    "train.num_epochs", "train.max_steps", "train.checkpoint_every", "runtime.keep_freed_memory", "runtime.num_threads",
    "runtime.num_workers", "runtime.processes", "runtime.name", "runtime.output_dir", "runtime.resume",
    "runtime.max_seconds", "runtime.checkpoint_seconds", "runtime.keep_checkpoints", "wandb.mode", "wandb.project",
    "wandb.name", "wandb.entity", "wandb.group", "wandb.tags", "wandb.notes",
}  # fmt: skip


def name_of(config: Config, last_step=1000, data="data", code="code", origin=None) -> str:
    return run_name(Identity(**{**identify(config, last_step, data, code), "origin": origin}))


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


def test_data_code_and_first_checkpoint_belong_to_a_runs_name(compose_config):
    config = parse(compose_config())
    names = [name_of(config), name_of(config, data="d"), name_of(config, code="c"), name_of(config, origin="run@7")]
    assert len(set(names)) == 4


def test_a_run_with_a_name_of_its_own_has_it_before_the_hash_in_its_folder(compose_config):
    identity = identify(parse(compose_config()), 1000, "data", "code")
    assert folder_name(None, identity) == run_name(identity) == f"cifar10-ddpm32-muon-{run_name(identity)[-10:]}"
    assert folder_name("big-lr", identity) == f"big-lr-{run_name(identity)[-10:]}"


@pytest.mark.parametrize("name", ["big lr", "a/b", "..", "-x", ""])
def test_a_name_that_is_no_word_is_rejected(compose_config, name):
    values = compose_config()
    values.runtime.name = name
    with pytest.raises(UserError, match="runtime.name="):
        parse(values)


def test_the_training_and_the_held_out_images_belong_to_the_data():
    def digest(train: str, test: str) -> str:
        facts = {"count": 1, "shape": [1], "dtype": "uint8"}
        files = {"train.npy": {"sha256": train, **facts}, "test.npy": {"sha256": test, **facts}}
        return data_sha256({"dataset": {}, "source": "", "files": files})

    assert len({digest("a", "b"), digest("c", "b"), digest("a", "c"), digest("b", "a")}) == 4
