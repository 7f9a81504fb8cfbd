"""A small classifier of CIFAR-10, whose pooled features are a space to measure distances between images in.

It takes the place of Inception where that cannot be had. Distances in its features are not FID and are not called so.
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling import IMAGE_SIZE
from modeling.checkpoint import CheckpointError, export_weights, load_fitting, load_weights
from modeling.images import to_model_range
from modeling.runtime import autocast, place
from modeling.seeding import Purpose, derive_seed, draw_bits, draw_permutation
from modeling.system.files import sha256_of
from modeling.system.progress import progress_bar

_MAX_WIDTH = 256
_CROP = 2  # pixels by which a training image is shifted at most
_MOMENTUM, _WEIGHT_DECAY, _LABEL_SMOOTHING = 0.9, 5e-4, 0.1
_WARMUP = 0.2  # of all steps


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

    Batch normalisation trains fastest in few epochs, and in eval mode it makes of each image a function of that image.

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
            ValueError: for another shape.
        """
        if x.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"the encoder takes images (N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), got {tuple(x.shape)}")
        return self.body(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        return self.head(self.features(x))


def augment(images: Tensor, seed: int, step: int) -> Tensor:
    """Mirrors half of a batch and shifts each image by up to 2 pixels, the border reflected.

    Args:
        images: (B, C, H, W) uint8; what happens to image i is a function of (seed, step, i).
    """
    words = draw_bits(seed, Purpose.FLIP, step, torch.arange(len(images)), 3) >> 32 & 0xFFFFFFFF
    is_flipped, (dy, dx) = words[:, 0] >> 31 == 1, (words[:, 1:] * (2 * _CROP + 1) >> 32).T
    images = torch.where(is_flipped[:, None, None, None], images.flip(-1), images)
    height, width = images.shape[2:]
    padded = F.pad(images, (_CROP,) * 4, mode="reflect")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (B, C, 5, 5, H, W)
    return windows[torch.arange(len(images)), :, dy, dx]


def _learning_rate(step: int, num_steps: int, max_lr: float) -> float:
    """One cycle: up to `max_lr` in a fifth of the steps, then down to zero, both linearly."""
    warmup = _WARMUP * num_steps
    return max_lr * min(1, (step + 1) / warmup, (num_steps - step) / (num_steps - warmup))


def train_encoder(
    images: Tensor,
    labels: Tensor,
    *,
    width: int = 32,
    num_epochs: int = 8,
    batch_size: int = 256,
    max_lr: float = 0.3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> Encoder:
    """Trains a classifier: SGD with Nesterov momentum and one cycle of the learning rate.

    Args:
        images: (N, 3, 32, 32) uint8.
        labels: (N,) int64, classes from 0.
        batch_size: at most N; the images of an epoch that do not fill a batch are left out.
        max_lr: the highest learning rate.

    Returns:
        The encoder in eval mode, a function of the arguments and (by rounding) of the machine.

    Raises:
        ValueError: for labels that are not one for each image, or a batch_size outside 1..N.
        FloatingPointError: when the loss is not finite.
    """
    if labels.shape != (len(images),):
        raise ValueError(f"labels must have shape ({len(images)},), one for each image, got {tuple(labels.shape)}")
    if not 1 <= batch_size <= len(images):
        raise ValueError(f"batch_size must be in 1..{len(images)} (the images), got {batch_size}")
    torch.manual_seed(derive_seed(seed, Purpose.WEIGHTS))
    encoder = place(Encoder(width, int(labels.max()) + 1), torch.device(device)).train()
    options = {"momentum": _MOMENTUM, "nesterov": True, "weight_decay": _WEIGHT_DECAY}
    optimizer = torch.optim.SGD(encoder.parameters(), lr=max_lr, **options)
    per_epoch = len(images) // batch_size
    num_steps = num_epochs * per_epoch
    bar = progress_bar(range(num_steps), desc="training the encoder", unit="step")
    for step in bar:
        epoch, position = divmod(step, per_epoch)
        if position == 0:
            order = draw_permutation(seed, epoch, len(images))
        chosen = order[position * batch_size : (position + 1) * batch_size]
        inputs = to_model_range(augment(images[chosen], seed, step).to(device))
        with autocast(device, precision):
            logits = encoder(inputs.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels[chosen].to(device), label_smoothing=_LABEL_SMOOTHING)
        optimizer.param_groups[0]["lr"] = _learning_rate(step, num_steps, max_lr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0 or step == num_steps - 1:  # each look is a CPU-GPU sync
            if not loss.isfinite():
                raise FloatingPointError(f"the loss is {loss.item()} at step {step}: max_lr={max_lr} is too high")
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return encoder.eval()


@torch.no_grad()
def accuracy(encoder: Encoder, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """The fraction of images (N, 3, 32, 32) uint8 whose label (N,) has the largest logit; in float32."""
    device = encoder.head.weight.device
    num_right = 0
    for start in progress_bar(range(0, len(images), batch_size), desc="testing the encoder"):
        logits = encoder(to_model_range(images[start : start + batch_size].to(device)))
        num_right += (logits.argmax(dim=1).cpu() == labels[start : start + batch_size]).sum().item()
    return num_right / len(images)


def images_sha256(images: Tensor) -> str:
    """Of shape and bytes of uint8 images (N, C, H, W)."""
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
