"""Our `DdpmUnet` is a `UNet2DModel` of diffusers under other names. Nothing here needs diffusers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modeling.ddpm_unet import DdpmUnet, Level
from modeling.system.errors import UserError

# The other keys of a UNet2DModel: the value that makes it ours, and the one that diffusers takes for a missing key.
FIXED = {
    "act_fn": ("silu", "silu"),
    "add_attention": (True, True),
    "attention_head_dim": (None, 8),  # null: one head, as the width of every attention is, too
    "attn_norm_num_groups": (None, None),  # null: norm_num_groups
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "downsample_padding": (0, 1),  # 0: below and to the right only
    "downsample_type": ("conv", "conv"),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),
    "mid_block_scale_factor": (1, 1),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "norm_eps": (1e-6, 1e-5),
    "norm_num_groups": (32, 32),
    "num_class_embeds": (None, None),
    "num_train_timesteps": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "time_embedding_dim": (None, None),  # null: four times the first width
    "time_embedding_type": ("positional", "positional"),
    "upsample_type": ("conv", "conv"),
}

# Layers of a block whose name differs: ours -> theirs.
_LAYERS = {
    "time_projection": "time_emb_proj",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
}
# Names that diffusers gave to the layers of attention before version 0.13, as in the published weights -> today's.
_BEFORE_0_13 = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def unet_config(
    in_channels: int,
    out_channels: int,
    hidden_size: int = 128,
    multipliers: Sequence[int] = (1, 2, 2, 2),
    num_blocks: int = 2,
    attention_resolutions: Sequence[int] = (16,),
    dropout: float = 0.0,
    *,
    image_size: int = 32,
) -> dict[str, Any]:
    """The config of the UNet2DModel that is the `DdpmUnet` of these arguments.

    Raises:
        UserError: if there is none, with the argument, its value and what was expected.
    """
    if hidden_size < 1 or hidden_size % 128:  # below, our GroupNorms have fewer than their 32 groups
        raise UserError(f"hidden_size must be a multiple of 128 for diffusers, got {hidden_size}")
    if not multipliers or multipliers[0] != 1:  # their time embedding has the width of the first level
        raise UserError(f"multipliers must begin with 1 for diffusers, got {list(multipliers)}")
    if image_size < 1 or image_size % 2 ** (len(multipliers) - 1):
        raise UserError(f"image_size must be a multiple of {2 ** (len(multipliers) - 1)}, got {image_size}")
    resolutions = [image_size // 2**level for level in range(len(multipliers))]
    prefixes = ["Attn" if resolution in attention_resolutions else "" for resolution in resolutions]
    return {
        "sample_size": image_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": [hidden_size * multiplier for multiplier in multipliers],
        "layers_per_block": num_blocks,
        "down_block_types": [f"{prefix}DownBlock2D" for prefix in prefixes],
        "up_block_types": [f"{prefix}UpBlock2D" for prefix in reversed(prefixes)],
        "dropout": dropout,
        **{key: value for key, (value, _) in FIXED.items()},
    }


def image_shape(config: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Channels, height and width of the images that a UNet2DModel was trained on; a value may be anything in a file."""
    size = config.get("sample_size")
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    return config.get("in_channels"), height, width


def unet_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the `DdpmUnet` that is the UNet2DModel of this config: the inverse of `unet_config`.

    Of a `sample_size` of two numbers it takes the height, to which the resolutions of attention refer.

    Raises:
        UserError: if there is none, with the key, its value and what was expected.
    """

    def integer(key: str, most: int) -> int:
        if type(value := config.get(key)) is not int or not 1 <= value <= most:
            raise UserError(f"{key} must be an integer from 1 to {most}, got {value}")
        return value

    widths = config.get("block_out_channels")
    if (
        not isinstance(widths, list | tuple)
        or not 1 <= len(widths) <= 12
        or not all(type(width) is int and 1 <= width <= 1 << 16 and width % widths[0] == 0 for width in widths)
    ):
        raise UserError(f"block_out_channels must be 1 to 12 multiples of the first, got {widths}")
    dropout = config.get("dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UserError(f"dropout must be in [0, 1), got {dropout}")
    _, height, _ = image_shape(config)
    config = {**config, "sample_size": height}
    integer("sample_size", 1 << 16)
    names = config.get("down_block_types")  # compared below, like their number
    attended = [
        level
        for level, name in zip(range(len(widths)), names if isinstance(names, list | tuple) else (), strict=False)
        if name == "AttnDownBlock2D"
    ]
    if all(widths[level] == config.get("attention_head_dim") for level in (*attended, -1)):  # the middle has it, too
        config["attention_head_dim"] = None
    arguments = {
        "in_channels": integer("in_channels", 1 << 16),
        "out_channels": integer("out_channels", 1 << 16),
        "hidden_size": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "num_blocks": integer("layers_per_block", 100),
        "attention_resolutions": [height // 2**level for level in attended],
        "dropout": float(dropout),
        "image_size": height,
    }
    expected = unet_config(**arguments)
    for key, value in expected.items():
        found = config.get(key, FIXED[key][1] if key in FIXED else 0.0)
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise UserError(f"{key} must be {value!r}, got {found!r}")
    if unknown := sorted(key for key in config.keys() - expected.keys() if not key.startswith("_")):
        raise UserError(f"{unknown[0]}={config[unknown[0]]} is no key of a UNet2DModel")
    return arguments


def _table(arguments: dict[str, Any]) -> dict[str, tuple[str, torch.Size, torch.Size]]:
    """For each weight of the `DdpmUnet` of these arguments: its name in diffusers, our shape and their shape."""
    with torch.device("meta"):
        model = DdpmUnet(**arguments)
    layers = {
        "conv_in": "conv_in",
        "time_mlp.0": "time_embedding.linear_1",
        "time_mlp.2": "time_embedding.linear_2",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }

    def add_level(level: Level, ours: str, theirs: str, number: int) -> None:
        for part, its in (("residual", "resnets"), ("attention", "attentions")):
            for name, _ in level.get_submodule(part).named_children():
                layers[f"{ours}.{part}.{name}"] = f"{theirs}.{its}.{number}.{_LAYERS.get(name, name)}"

    for side, sequence, resampler in (("down", model.down, "downsamplers"), ("up", model.up, "upsamplers")):
        block, number = 0, 0
        for index, layer in enumerate(sequence):
            if isinstance(layer, Level):
                add_level(layer, f"{side}.{index}", f"{side}_blocks.{block}", number)
                number += 1
            else:  # ends a block
                layers[f"{side}.{index}.conv"] = f"{side}_blocks.{block}.{resampler}.0.conv"
                block, number = block + 1, 0
    for number, level in enumerate(model.middle):
        assert isinstance(level, Level)
        add_level(level, f"middle.{number}", "mid_block", number)
    table = {}
    for name, weight in model.state_dict().items():
        layer, _, parameter = name.rpartition(".")
        # Attention's 1x1 convolutions are linear layers in diffusers.
        their_shape = weight.shape[:2] if ".attention." in name else weight.shape
        table[name] = f"{layers[layer]}.{parameter}", weight.shape, their_shape
    return table


def _check_weights(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raises UserError unless these are the weights, float32, of these shapes."""
    for name in sorted(weights.keys() | shapes.keys()):
        found = (weights[name].dtype, tuple(weights[name].shape)) if name in weights else "missing"
        expected = (torch.float32, tuple(shapes[name])) if name in shapes else "nothing of that name"
        if found != expected:
            raise UserError(f"the weights do not fit the configuration: {name} is {found}, expected {expected}")


def to_diffusers(arguments: dict[str, Any], weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A `DdpmUnet` as a UNet2DModel: the same function and the same numbers.

    Args:
        arguments: those of the `DdpmUnet`, by name.
        weights: its state dict, float32.

    Returns:
        The UNet2DModel's config and its state dict, contiguous.

    Raises:
        UserError: if no UNet2DModel is this network, or the weights belong to another one.
    """
    config, table = unet_config(**arguments), _table(arguments)
    _check_weights(weights, {name: shape for name, (_, shape, _) in table.items()})
    return config, {theirs: weights[name].reshape(shape).contiguous() for name, (theirs, _, shape) in table.items()}


def from_diffusers(
    config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse of `to_diffusers`; attention may have the names that it had before diffusers 0.13.

    Weights of half the length (float16, bfloat16) become float32, which changes no number.

    Raises:
        UserError: if no `DdpmUnet` is this UNet2DModel, or the weights belong to another one.
    """
    arguments = unet_arguments(config)
    table = _table(arguments)
    renamed = {}
    for name, weight in weights.items():
        new = re.sub(
            r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda old: f"{old[1]}{_BEFORE_0_13[old[2]]}.", name
        )
        weight = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
        renamed[name if new in weights else new] = weight
    _check_weights(renamed, {theirs: shape for theirs, _, shape in table.values()})
    return arguments, {name: renamed[theirs].reshape(shape) for name, (theirs, shape, _) in table.items()}
