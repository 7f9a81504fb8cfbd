"""Networks that diffusers has, too."""

import functools

import torch
from torch import nn

from modeling.ddpm_unet import DdpmUnet


def arguments(*values) -> dict:
    """All arguments of a DdpmUnet for images of 32x32."""
    names = ("hidden_size", "multipliers", "num_blocks", "attention_resolutions", "dropout")
    return {"in_channels": 3, "out_channels": 3, **dict(zip(names, values, strict=True)), "image_size": 32}


PAPER = arguments(128, [1, 2, 2, 2], 2, [16], 0.1)


TINY = arguments(128, [1], 1, [], 0.0)


NETWORKS = {
    "paper": PAPER,
    "tiny": TINY,
    "attention at both ends": arguments(128, [1, 1, 2], 1, [32, 8], 0.25),
    "uneven": arguments(128, [1, 3, 2], 1, [16, 8], 0.0),
    "wide": arguments(256, [1], 1, [32], 0.0),
}


@functools.cache
def network(name: str) -> DdpmUnet:
    """With no weight at its initial value, and outputs of about 1."""
    torch.manual_seed(1)
    model = DdpmUnet(**NETWORKS[name]).eval().requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=0.7 * layer.weight[0].numel() ** -0.5)
            nn.init.normal_(layer.bias, std=0.2)
        elif isinstance(layer, nn.GroupNorm):
            nn.init.normal_(layer.weight, mean=1, std=0.2)
            nn.init.normal_(layer.bias, std=0.2)
    return model
