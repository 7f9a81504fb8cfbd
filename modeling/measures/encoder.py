"""A small classifier of CIFAR-10, whose pooled features are a space to measure distances between images in.

It is used instead of Inception where that is not available. Distances in its features are never called FID.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from modeling import IMAGE_SHAPE
from modeling.checkpoint import CheckpointError, export_weights, load_fitting, load_weights
from modeling.runtime import place
from modeling.system.errors import UserError
from modeling.system.files import sha256_of

_MAX_WIDTH = 256


def _conv_norm_relu(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(_conv_norm_relu(channels, channels), _conv_norm_relu(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Encoder(nn.Module):
    """Two residual blocks, at 16x16 and 8x8, between convolutions; 0.46M parameters at width 32.

    Batch normalisation trains fastest in few epochs; in eval mode an image's features depend on that image alone.

    Args:
        width: a multiple of 8; the features are 4 times as many.
        num_classes: of the labels.
    """

    def __init__(self, width: int = 32, num_classes: int = 10):
        super().__init__()
        if not isinstance(width, int) or not 8 <= width <= _MAX_WIDTH or width % 8:
            raise ValueError(f"width must be a multiple of 8 in 8..{_MAX_WIDTH}, got {width}")
        self.width = width
        self.num_features = 4 * width
        self.body = nn.Sequential(
            _conv_norm_relu(3, width // 2),  # few: at 32x32 memory, not arithmetic, takes the time
            _conv_norm_relu(width // 2, 2 * width, stride=2),  # 16x16
            _ResidualBlock(2 * width),
            _conv_norm_relu(2 * width, 4 * width, stride=2),  # 8x8
            _ResidualBlock(4 * width),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, 4 width) from x (B, 3, 32, 32) in [-1, 1]: the last feature map, averaged over its pixels.

        Raises:
            UserError: for another shape.
        """
        if x.shape[1:] != IMAGE_SHAPE:
            raise UserError(f"the encoder takes images (N, {', '.join(map(str, IMAGE_SHAPE))}), got {tuple(x.shape)}")
        return self.body(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        return self.head(self.features(x))


def images_sha256(images: Tensor) -> str:
    """The SHA-256 of the shape and bytes of uint8 images (N, C, H, W), in hex."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    digest.update(images.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def save_encoder(path: str | Path, encoder: Encoder, about: dict) -> str:
    """Writes the weights (float32), with `about` (plain values) in the header; returns the file's SHA-256."""
    export_weights(path, encoder, {"encoder": about})
    return sha256_of(Path(path))


def load_encoder(path: str | Path, device: torch.device | str = "cpu") -> tuple[Encoder, dict]:
    """What `save_encoder` wrote: the encoder in eval mode, and its `about`.

    Raises:
        FileNotFoundError: for a missing file.
        CheckpointError: for a file that holds no encoder.
    """
    config, weights = load_weights(path)
    try:
        about = config["encoder"]
        num_classes, num_features = weights["head.weight"].shape
        encoder = Encoder(num_features // 4, num_classes)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no encoder of this project: {error}") from error
    load_fitting(encoder, weights, path)
    return place(encoder, torch.device(device)).eval().requires_grad_(False), about
