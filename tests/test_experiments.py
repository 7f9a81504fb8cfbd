"""Experiments mean the same whatever params.yaml holds; an optimizer brings its learning rate."""

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from modeling.config import parse
from tests.helpers import ROOT, changed

EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))

# The rule: an experiment sets every key that defines it. Left to the user are the seed, the machine, the tracking and
# where the data is.
DEFINED = ("dataset", "model", "diffusion", "optimizer", "train")
LEFT_TO_THE_USER = ("seed", "runtime", "wandb", "dataset.root")

LEFTOVERS = {
    "the assignment's network with SGD": ["model=unet", "optimizer=sgd", "optimizer.momentum=0.5"],
    "another optimizer": ["optimizer=adamw", "optimizer.lr=1.0", "optimizer.weight_decay=0.5"],
    "other rates": ["optimizer.lr_schedule=constant", "optimizer.warmup_steps=7", "optimizer.max_grad_norm=null"],
    "another process": ["diffusion=cosine", "diffusion.num_timesteps=10", "diffusion.weighting=min_snr_5"],
    "another prediction": ["diffusion.prediction=x_0", "diffusion.betas=[0.001,0.2]"],
    "few images": ["dataset.num_images=200", "train.max_steps=4", "train.batch_size=8"],
    "other grids": ["train.sample_steps=5", "train.num_samples=4", "train.sample_every=3", "train.num_eval_images=50"],
    "own pictures": ["dataset=folder", "dataset.pictures=p", "dataset.skip_unusable=true", "dataset.num_images=500"],
    "other shapes elsewhere": ["dataset=shapes", "dataset.seed=5", "dataset.root=/elsewhere", "seed=3"],
    "an experiment with changes": ["experiment=paper", "model.dropout=0.5", "train.ema_decay=0.5", "wandb.name=a"],
}


@pytest.fixture(scope="module")
def leftovers(compose_config):
    """What params.yaml may hold."""
    every_key = compose_config()
    for section in (*DEFINED, "runtime", "wandb"):
        every_key[section] = {key: changed(value) for key, value in every_key[section].items()}
    return {name: compose_config(*overrides) for name, overrides in LEFTOVERS.items()} | {"every key": every_key}


@pytest.fixture
def compose_over(compose_config):
    """Composes over other values in params.yaml."""
    compose_config()  # by which Hydra reads params.yaml
    store = ConfigStore.instance()
    params = store.load("values_of_params_yaml.yaml").node
    yield lambda values, *overrides: store.store("values_of_params_yaml", values) or compose_config(*overrides)
    store.store("values_of_params_yaml", params)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_means_the_same_whatever_params_yaml_holds(compose_config, compose_over, leftovers, experiment):
    expected = compose_config(f"experiment={experiment}")
    for name, left in leftovers.items():
        found = compose_over(left, f"experiment={experiment}")
        for key in LEFT_TO_THE_USER:
            assert OmegaConf.select(found, key) == OmegaConf.select(left, key), name
        found.dataset.root = expected.dataset.root
        assert {key: found[key] for key in DEFINED} == {key: expected[key] for key in DEFINED}, name


@pytest.mark.parametrize(
    ("overrides", "lr"),
    [
        (["optimizer=sgd"], 0.1),
        (["optimizer=adam"], 0.004),
        (["optimizer=adamw"], 0.004),
        (["optimizer=muon"], 0.004),
        (["optimizer.lr=0.2", "optimizer=sgd"], 0.2),  # in any order
        (["experiment=demo"], 0.004),
        (["experiment=demo", "optimizer.lr=0.2", "optimizer=sgd"], 0.2),
    ],
)
def test_an_optimizer_brings_its_learning_rate_which_an_experiment_or_the_user_replaces(
    compose_config, compose_over, overrides, lr
):
    left = compose_config("optimizer=sgd", "optimizer.lr=3.0")
    assert parse(compose_over(left, *overrides)).optimizer.lr == lr


def test_the_learning_rate_of_params_yaml_is_its_optimizers_own(compose_config):
    assert compose_config("optimizer=muon") == compose_config()


def test_a_data_set_is_used_whole_unless_asked(compose_config, compose_over):
    left = compose_config("dataset=shapes", "dataset.num_images=200")
    assert compose_over(left, "dataset=cifar10").dataset.num_images is None
    assert compose_over(left, "dataset=cifar10", "dataset.num_images=300").dataset.num_images == 300
