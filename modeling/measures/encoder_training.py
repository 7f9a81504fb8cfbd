"""Training of the classifier in `modeling.measures.encoder`."""

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.images import to_model_range
from modeling.measures.encoder import Encoder, images_sha256, save_encoder
from modeling.options import EncoderConfig
from modeling.runtime import autocast, place
from modeling.seeding import Purpose, derive_seed, draw_bits, draw_permutation
from modeling.system.errors import UserError
from modeling.system.progress import progress_bar

_CROP = 2  # pixels by which a training image is shifted at most
_MOMENTUM, _WEIGHT_DECAY, _LABEL_SMOOTHING = 0.9, 5e-4, 0.1
_WARMUP = 0.2  # of all steps


def augment(images: Tensor, seed: int, step: int) -> Tensor:
    """Mirrors half of a batch and shifts each image by up to 2 pixels, the border reflected.

    Args:
        images: (B, C, H, W) uint8; image i's variant is a function of (seed, step, i).
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
        UserError: for a batch_size outside 1..N.
        ValueError: for labels that are not one for each image.
        FloatingPointError: when the loss is not finite.
    """
    if labels.shape != (len(images),):
        raise ValueError(f"labels must have shape ({len(images)},), one for each image, got {tuple(labels.shape)}")
    if not 1 <= batch_size <= len(images):
        raise UserError(f"batch_size must be in 1..{len(images)} (the images), got {batch_size}")
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


def make_encoder(
    options: EncoderConfig,
    images: tuple[Tensor, Tensor],
    labels: tuple[Tensor, Tensor],
    device: torch.device,
    precision: str,
) -> str:
    """Trains, tests and writes the encoder that the options describe.

    Args:
        images, labels: of training and test, as `train_encoder` takes them.

    Returns:
        A line about it, for the terminal.
    """
    start = time.monotonic()
    recipe = options.model_dump(include={"width", "num_epochs", "batch_size", "max_lr", "seed"})
    encoder = train_encoder(images[0], labels[0], **recipe, device=device, precision=precision)
    seconds = time.monotonic() - start
    right = accuracy(encoder, images[1], labels[1])
    train_sha256, test_sha256 = map(images_sha256, images)
    about = {"test_accuracy": right, "train_sha256": train_sha256, "test_sha256": test_sha256}
    sha256 = save_encoder(options.out, encoder, recipe | {"precision": precision} | about)
    speed = options.num_epochs * len(images[0]) / seconds
    return f"{options.out}: {right:.2%} of the test images, {seconds:.0f} s ({speed:.0f} images/s), SHA-256 {sha256}"
