"""The assignment's UNet: blocks of three convolutions, and the time added at two places only.

It is as the course defines it, except that a residual form is divided by sqrt(2) where the course has 1.414. Its time
embedding is weak and it cannot remove the last of the noise; for good samples use `modeling.ddpm_unet`.
"""

import math

import torch
from torch import Tensor, nn

from modeling.layers import GroupNorm, ReLU, check_hidden_size, check_model_input


def _conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
        GroupNorm(8, out_channels),
        ReLU(),  # neither neighbour needs the values that it overwrites
    )


class ConvBlock(nn.Module):
    """Three times (conv3x3, GroupNorm(8), ReLU); the residual form is (first + last two) / sqrt(2)."""

    def __init__(self, in_channels: int, out_channels: int, is_residual: bool = False):
        super().__init__()
        self.is_residual = is_residual
        self.first = _conv_norm_relu(in_channels, out_channels)
        self.last = nn.Sequential(
            _conv_norm_relu(out_channels, out_channels),
            _conv_norm_relu(out_channels, out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        last = self.last(first)
        return (first + last) / math.sqrt(2) if self.is_residual else last


class DownBlock(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(ConvBlock(in_channels, out_channels), nn.MaxPool2d(2))


class UpBlock(nn.Module):
    """Concatenates the skip connection, doubles height and width, then applies two blocks."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2),
            ConvBlock(out_channels, out_channels),
            ConvBlock(out_channels, out_channels),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.layers(torch.cat([x, skip], dim=1))


class Frequencies(nn.Linear):
    """Linear(1, n, no bias), in float32 under autocast, too: bf16 would tell only half of 1,000 timesteps apart."""

    def __init__(self, num_features: int):
        super().__init__(1, num_features, bias=False)

    def forward(self, t: Tensor) -> Tensor:
        return t * self.weight[:, 0]  # (B, 1) -> (B, n)


class TimeEmbedding(nn.Module):
    """Linear(1, n, no bias), sin, Linear(n, n)."""

    def __init__(self, num_features: int):
        super().__init__()
        self.frequencies = Frequencies(num_features)
        self.projection = nn.Linear(num_features, num_features)

    def forward(self, t: Tensor) -> Tensor:
        return self.projection(torch.sin(self.frequencies(t[:, None])))  # (B, n)


class UnetModel(nn.Module):
    """The assignment's UNet, called as an eps model.

    Args:
        in_channels: channels C of x.
        out_channels: channels of the result.
        hidden_size: base width h, a positive multiple of 8. 11.35M parameters at 128, 0.71M at 32.

    Raises:
        ValueError: for a hidden_size that is not a positive multiple of 8.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden_size: int = 256):
        super().__init__()
        check_hidden_size(hidden_size)
        h = hidden_size
        self.in_channels = in_channels
        self.initial = ConvBlock(in_channels, h, is_residual=True)
        self.down1 = DownBlock(h, h)
        self.down2 = DownBlock(h, 2 * h)
        self.down3 = DownBlock(2 * h, 2 * h)
        self.to_vector = nn.Sequential(nn.AvgPool2d(4), nn.ReLU())
        self.time_embedding = TimeEmbedding(2 * h)
        self.from_vector = nn.Sequential(
            nn.ConvTranspose2d(2 * h, 2 * h, kernel_size=4, stride=4), GroupNorm(8, 2 * h), ReLU()
        )
        self.up1 = UpBlock(4 * h, 2 * h)
        self.up2 = UpBlock(4 * h, h)
        self.up3 = UpBlock(2 * h, h)
        self.out = nn.Conv2d(2 * h, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicts the noise.

        Args:
            x: (B, C, H, W), H and W multiples of 32; moved to the model's device if it is elsewhere.
            t: timestep / T in (0, 1], shape (B,) or (B, 1).

        Returns:
            (B, out_channels, H, W).

        Raises:
            ValueError: for a wrong shape or range, with the one it got.
        """
        x, t = check_model_input(x, t, self.in_channels, multiple=32)
        x = x.to(self.out.weight.device)
        t = t.to(x)  # not to the weights' dtype, which may be a half of it
        initial = self.initial(x)  # (B, h, H, W)
        down1 = self.down1(initial)  # (B, h, H/2, W/2)
        down2 = self.down2(down1)  # (B, 2h, H/4, W/4)
        down3 = self.down3(down2)  # (B, 2h, H/8, W/8)
        time = self.time_embedding(t)[:, :, None, None]  # (B, 2h, 1, 1)
        vector = self.to_vector(down3)  # (B, 2h, H/32, W/32)
        up = self.from_vector(vector + time)  # (B, 2h, H/8, W/8)
        up = self.up1(up, down3) + time  # (B, 2h, H/4, W/4)
        up = self.up2(up, down2)  # (B, h, H/2, W/2)
        up = self.up3(up, down1)  # (B, h, H, W)
        return self.out(torch.cat([up, initial], dim=1))
