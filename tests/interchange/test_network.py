"""The network, to and from diffusers: the same function under other names."""

import inspect
import json
import math

import pytest
import torch

from modeling.ddpm_unet import DdpmUnet
from modeling.interchange.network import FIXED, from_diffusers, image_shape, to_diffusers, unet_config
from modeling.interchange.scheduler import diffusion_arguments
from modeling.system.errors import UserError
from tests.helpers import equal
from tests.interchange.networks import NETWORKS, PAPER, TINY, network

pytestmark = pytest.mark.numeric

# The network's config of google/ddpm-cifar10-32, written by a version of diffusers that had fewer keys.
PUBLISHED = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_output_is_that_of_the_unet2dmodel_one_timestep_lower(diffusers, name):
    config, weights = to_diffusers(NETWORKS[name], network(name).state_dict())
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**config)
    theirs.load_state_dict(weights, assign=True)
    timesteps, x = torch.tensor([1, 2, 508, 1000]), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = theirs.eval()(x, timesteps - 1).sample
        found = network(name)(x, timesteps / 1000)
        another = network(name)(x, (timesteps + 1) / 1000 * 0.99)
    assert 0.2 < expected.std() < 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (another - expected).abs().amax((1, 2, 3)).min() > 1e-3  # the time is heard


@pytest.mark.parametrize("name", NETWORKS)
def test_there_and_back_is_the_same_to_the_bit(name):
    weights = network(name).state_dict()
    config, converted = to_diffusers(NETWORKS[name], weights)
    assert not converted.keys() & {key for key in weights if not key.startswith("conv_")}
    assert from_diffusers(config, converted)[0] == NETWORKS[name]
    assert equal(from_diffusers(config, converted)[1], dict(weights))
    again = json.loads(json.dumps(config))
    assert to_diffusers(*from_diffusers(again, converted))[0] == config


def test_the_papers_network_is_the_published_one():
    config, weights = to_diffusers(PAPER, network("paper").state_dict())
    assert config | PUBLISHED == config | {key: PUBLISHED[key] for key in ("_class_name", "_diffusers_version")}
    assert sum(weight.numel() for weight in weights.values()) == 35_746_307
    assert from_diffusers(PUBLISHED, weights)[0] == PAPER | {"dropout": 0.0}


def test_a_head_as_wide_as_every_attention_is_one_head(diffusers):
    config, weights = to_diffusers(PAPER, network("paper").state_dict())
    wide = config | {"attention_head_dim": 256}
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**wide)
    assert {layer.heads for layer in theirs.modules() if hasattr(layer, "heads")} == {1}
    assert from_diffusers(wide, weights)[0] == PAPER


def test_of_two_sides_the_height_is_what_attention_refers_to():
    config, weights = to_diffusers(PAPER, network("paper").state_dict())
    assert from_diffusers(config | {"sample_size": [32, 48]}, weights)[0] == PAPER
    assert image_shape(config | {"sample_size": [32, 48]}) == (3, 32, 48)


def test_dropout_is_kept(diffusers):
    config, _ = to_diffusers(PAPER, network("paper").state_dict())
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**config)
    assert {layer.dropout.p for layer in theirs.modules() if hasattr(layer, "conv_shortcut")} == {0.1}


def test_attentions_names_in_older_files_are_known():
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    config, weights = to_diffusers(PAPER, network("paper").state_dict())
    renamed = {}
    for name, weight in weights.items():
        for new in old if ".attentions." in name else ():
            name = name.replace(f".{new}.", f".{old[new]}.")
        renamed[name] = weight
    assert sum("proj_attn" in name for name in renamed) == 12
    assert equal(from_diffusers(config, renamed)[1], dict(network("paper").state_dict()))


def test_the_arguments_are_those_of_our_network():
    ours = inspect.signature(DdpmUnet).parameters
    assert list(inspect.signature(unet_config).parameters.values()) == list(ours.values())


def test_a_missing_key_means_what_it_means_to_diffusers(diffusers):
    parameters = inspect.signature(diffusers.UNet2DModel).parameters
    assert {key: parameters[key].default for key in FIXED} == {key: default for key, (_, default) in FIXED.items()}
    assert parameters.keys() == unet_config(3, 3).keys()
    assert parameters["dropout"].default == 0
    for scheduler in (diffusers.DDPMScheduler(), diffusers.DDIMScheduler()):
        assert diffusion_arguments({}) == diffusion_arguments(scheduler.config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size must be a multiple of 128 for diffusers, got 64"),
        ({"multipliers": [2, 2]}, r"multipliers must begin with 1 for diffusers, got \[2, 2\]"),
        ({"multipliers": []}, r"multipliers must begin with 1 for diffusers, got \[\]"),
        ({"image_size": 28}, "image_size must be a multiple of 8, got 28"),
        ({"attention_resolutions": [15]}, r"attention_resolutions must be among \[32, 16, 8, 4\], got \[15\]"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_network_that_diffusers_does_not_have_is_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        to_diffusers(PAPER | changes, {})


@pytest.mark.parametrize("key", FIXED)
def test_every_key_that_changes_the_function_is_rejected(key):
    value = FIXED[key][0]
    with pytest.raises(UserError, match=f"^{key} must be {value!r}, got 'other'"):
        from_diffusers(unet_config(3, 3) | {key: "other"}, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freq_shift": ...}, "freq_shift must be 1, got 0"),
        ({"block_out_channels": [128, 192]}, r"block_out_channels must be 1 to 12 multiples.*got \[128, 192\]"),
        ({"block_out_channels": []}, r"block_out_channels must be 1 to 12 multiples.*got \[\]"),
        ({"block_out_channels": [0, 0]}, r"block_out_channels must be 1 to 12 multiples.*got \[0, 0\]"),
        ({"block_out_channels": 128}, "block_out_channels must be 1 to 12 multiples.*got 128"),
        ({"block_out_channels": [64, 64, 64, 64]}, "hidden_size must be a multiple of 128 for diffusers, got 64"),
        ({"block_out_channels": [128, 256, 256]}, "down_block_types must be .*, got "),
        ({"layers_per_block": 10**9}, "layers_per_block must be an integer from 1 to 100, got 1000000000"),
        ({"layers_per_block": True}, "layers_per_block must be an integer from 1 to 100, got True"),
        ({"sample_size": [32]}, r"sample_size must be an integer .*, got \[32\]"),
        ({"attention_head_dim": 128}, "attention_head_dim must be None, got 128"),
        ({"sample_size": ...}, "sample_size must be an integer .*, got None"),
        ({"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
        ({"dropout": math.nan}, r"dropout must be in \[0, 1\), got nan"),
        ({"down_block_types": ["DownBlock2D"] * 4}, "up_block_types must be .*, got "),
        ({"down_block_types": ["AttnDownBlock2D", *["ResnetDownsampleBlock2D"] * 3]}, "down_block_types must be"),
        ({"down_block_types": None}, "down_block_types must be .*, got None"),
        ({"down_block_types": 4}, "down_block_types must be .*, got 4"),
        ({"novelty": 1}, "novelty=1 is no key of a UNet2DModel"),
    ],
)
def test_a_unet2dmodel_that_we_do_not_have_is_rejected(changes, message):
    config = {key: value for key, value in (PUBLISHED | changes).items() if value is not ...}
    with pytest.raises(UserError, match=message):
        from_diffusers(config, {})


def test_weights_of_another_network_are_rejected():
    weights = dict(network("tiny").state_dict())
    config, converted = to_diffusers(TINY, weights)
    attention = "mid_block.attentions.0.to_q.weight"
    for changes, message in (
        ({attention: converted[attention].flatten()}, rf"{attention} is \(torch.float32, \(16384,\)\), expected"),
        ({attention: converted[attention].double()}, rf"{attention} is \(torch.float64, \(128, 128\)\), expected"),
        ({attention.replace("to_q", "query"): converted[attention]}, "query.weight is .*, expected nothing of that"),
    ):
        with pytest.raises(UserError, match=message):
            from_diffusers(config, converted | changes)
    del converted[attention]
    with pytest.raises(UserError, match=f"{attention} is missing, expected"):
        from_diffusers(config, converted)
    with pytest.raises(UserError, match=r"conv_in.bias is missing, expected \(torch.float32, \(128,\)\)"):
        to_diffusers(TINY, {name: weight for name, weight in weights.items() if name != "conv_in.bias"})
