"""The UNet of Ho et al. 2020 (appendix B) in any size.

The time reaches every residual block through a sinusoidal embedding. The last layer of each block starts at zero, so
in an untrained network a block passes on little more than its input.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.layers import GroupNorm, check_hidden_size, check_model_input

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def embed_time(t: Tensor, num_features: int) -> Tensor:
    """Sinusoidal embedding (Vaswani et al. 2017) of 1000 t - 1, whatever the number of timesteps.

    With 1000 timesteps that is the timestep counted from 0, as in the paper's code and in its published weights.

    Args:
        t: (B,), in (0, 1].
        num_features: even, at least 4.

    Returns:
        (B, num_features): sines, then cosines, of periods from 2 pi to 2 pi 10^4.
    """
    half = num_features // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1)
    angles = (1000 * t[:, None] - 1) * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _group_norm(channels: int) -> GroupNorm:
    """32 groups for multiples of 128 channels, as in the paper; else fewer, of a multiple of 4 channels each."""
    return GroupNorm(math.gcd(channels // 4, 32), channels, eps=1e-6)


def _initialise(layer: Layer, is_last: bool = False) -> Layer:
    """Glorot uniform weights as in the paper's code; zero for the last layer of a block."""
    assert layer.bias is not None
    if is_last:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _conv(in_channels: int, out_channels: int, kernel_size: int = 3, is_last: bool = False) -> nn.Conv2d:
    return _initialise(nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2), is_last)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, add the time, norm, SiLU, dropout, conv, add x."""

    def __init__(self, in_channels: int, out_channels: int, time_features: int, dropout: float):
        super().__init__()
        self.norm1 = _group_norm(in_channels)
        self.conv1 = _conv(in_channels, out_channels)
        self.time_projection = _initialise(nn.Linear(time_features, out_channels))
        self.norm2 = _group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv(out_channels, out_channels, is_last=True)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else _conv(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_projection(time)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """Self-attention with one head over all positions, added to x."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _group_norm(channels)
        self.query = _conv(channels, channels, kernel_size=1)
        self.key = _conv(channels, channels, kernel_size=1)
        self.value = _conv(channels, channels, kernel_size=1)
        self.out = _conv(channels, channels, kernel_size=1, is_last=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        query, key, value = (layer(h).flatten(2).mT[:, None] for layer in (self.query, self.key, self.value))
        h = F.scaled_dot_product_attention(query, key, value)  # (B, 1, H W, C)
        return x + self.out(h[:, 0].mT.reshape(x.shape))


class Level(nn.Module):
    """One residual block and, where asked for, attention."""

    def __init__(self, in_channels: int, out_channels: int, time_features: int, dropout: float, has_attention: bool):
        super().__init__()
        self.residual = ResidualBlock(in_channels, out_channels, time_features, dropout)
        self.attention = AttentionBlock(out_channels) if has_attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.attention(self.residual(x, time))


class Downsample(nn.Module):
    """Halves height and width by a conv3x3 with stride 2, padded at the bottom and right as in the paper's code."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = _initialise(nn.Conv2d(channels, channels, kernel_size=3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, then applies a conv3x3."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DdpmUnet(nn.Module):
    """The paper's UNet, called as an eps model.

    Args:
        in_channels: channels C of x.
        out_channels: channels of the result.
        hidden_size: base width, a positive multiple of 8.
        multipliers: width of each level in units of hidden_size; each level after the first halves the resolution.
        num_blocks: residual blocks per level on the way down (one more on the way up).
        attention_resolutions: heights at which each block has attention; the middle always has it.
        dropout: probability in [0, 1).
        image_size: height of the training images, to which attention_resolutions refer; other sizes work.

    Raises:
        ValueError: for a hidden_size, multipliers, num_blocks, resolutions or dropout outside these ranges.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_size: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        num_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        dropout: float = 0.0,
        *,
        image_size: int = 32,
    ):
        super().__init__()
        check_hidden_size(hidden_size)
        if not multipliers or min(multipliers) < 1:
            raise ValueError(f"multipliers must be one or more positive integers, got {list(multipliers)}")
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        resolutions = [image_size // 2**level for level in range(len(multipliers))]
        if unknown := sorted(set(attention_resolutions) - set(resolutions)):
            raise ValueError(f"attention_resolutions must be among {resolutions}, got {unknown}")
        self.in_channels = in_channels
        self.hidden_size = hidden_size
        self.multiple = 2 ** (len(multipliers) - 1)
        time_features = 4 * hidden_size
        self.time_mlp = nn.Sequential(
            _initialise(nn.Linear(hidden_size, time_features)),
            nn.SiLU(),
            _initialise(nn.Linear(time_features, time_features)),
            nn.SiLU(),  # the paper applies it in every block, which is the same function
        )

        def level(in_width: int, out_width: int, has_attention: bool) -> Level:
            return Level(in_width, out_width, time_features, dropout, has_attention)

        self.conv_in = _conv(in_channels, hidden_size)
        width, skip_widths = hidden_size, [hidden_size]
        self.down = nn.ModuleList()
        for multiplier, resolution in zip(multipliers, resolutions, strict=True):
            if resolution != resolutions[0]:
                self.down.append(Downsample(width))
                skip_widths.append(width)
            for _ in range(num_blocks):
                self.down.append(level(width, hidden_size * multiplier, resolution in attention_resolutions))
                width = hidden_size * multiplier
                skip_widths.append(width)

        self.middle = nn.ModuleList([level(width, width, has_attention=True), level(width, width, False)])

        self.up = nn.ModuleList()
        for multiplier, resolution in reversed(list(zip(multipliers, resolutions, strict=True))):
            for _ in range(num_blocks + 1):
                in_width = width + skip_widths.pop()
                self.up.append(level(in_width, hidden_size * multiplier, resolution in attention_resolutions))
                width = hidden_size * multiplier
            if resolution != resolutions[0]:
                self.up.append(Upsample(width))

        self.norm_out = _group_norm(width)
        self.conv_out = _conv(width, out_channels, is_last=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicts the noise.

        Args:
            x: (B, C, H, W), H and W multiples of 2^(levels - 1); moved to the model's device if it is elsewhere.
            t: timestep / T in (0, 1], shape (B,) or (B, 1).

        Returns:
            (B, out_channels, H, W).

        Raises:
            ValueError: for a wrong shape or range, with the one it got.
        """
        x, t = check_model_input(x, t, self.in_channels, self.multiple)
        x = x.to(self.conv_in.weight.device)
        t = t.to(x)  # not to the weights' dtype, which may be a half of it
        time = self.time_mlp(embed_time(t, self.hidden_size))  # (B, 4 hidden_size)
        h = self.conv_in(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, time) if isinstance(layer, Level) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, time)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), time) if isinstance(layer, Level) else layer(h)
        return self.conv_out(F.silu(self.norm_out(h)))
