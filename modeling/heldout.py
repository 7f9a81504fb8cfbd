"""The loss at the end of a run, on held-out or training images, with fixed noise so that runs can be compared."""

from collections.abc import Iterator

import torch
from torch import Tensor

from modeling.diffusion import DiffusionModel, evaluating
from modeling.distributed.processes import ALONE, Processes
from modeling.images import to_model_range
from modeling.runtime import autocast, check_finite
from modeling.seeding import Purpose, draw_normal
from modeling.system.progress import progress_bar

_SEED = 0  # not the run's seed: every run is measured with the same noise
_MAX_BINS = 10  # equal parts of 1..T
# Images that the best linear denoiser is fitted to, and the most numbers in one: 5 s of one core for CIFAR-10.
_LINEAR_IMAGES, _LINEAR_NUMBERS = 20_000, 4096


def denoising_loss(
    model: DiffusionModel,
    images: Tensor,
    device: torch.device | str,
    *,
    batch_size: int = 250,
    precision: str = "fp32",
    desc: str = "evaluating",
    processes: Processes = ALONE,
) -> tuple[float, dict[str, float]]:
    """Measures the squared error of eps (eq. 14), with fixed noise and with timesteps spread evenly over 1..T.

    Image i of N always has the same timestep and the same noise: chance plays no part in a difference between models.

    Args:
        images: (N, C, H, W) uint8.
        batch_size: images at a time; the result depends on it by rounding only.
        precision: "fp32", or "bf16" or "fp16" for the network's matrix products.
        desc: what is measured, for the progress bar and the error.
        processes: that share the batches; the result does not depend on their number, and each gets it.

    Returns:
        The mean loss, and the mean loss of each bin of timesteps by its bounds, for example "101-200"; bins without
        images are left out.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    timesteps = _timesteps(len(images), model.num_timesteps)
    starts = range(0, len(images), batch_size)

    def measure(start: int) -> Tensor:
        """The losses of a batch, (B,) on the CPU."""
        index = torch.arange(start, min(start + batch_size, len(images)), device=device)
        x_0 = to_model_range(images[start : start + batch_size].to(device))
        noise = draw_normal(_SEED, Purpose.EVALUATION, 0, index, images.shape[1:])
        return model.eps_losses(x_0, timesteps[start : start + batch_size].to(device), noise).cpu()

    with evaluating(model), autocast(device, precision):
        losses = progress_bar(processes.map(measure, starts), total=len(starts), desc=desc, leave=False)
        loss = torch.cat(list(losses)).double()
    check_finite(loss, desc, precision)
    return _by_timestep(loss, timesteps, model.num_timesteps)


def _timesteps(num_images: int, num_timesteps: int) -> Tensor:
    """The timestep of each image, (N,) in 1..T."""
    return torch.arange(num_images) * num_timesteps // num_images + 1


def _by_timestep(losses: Tensor, timesteps: Tensor, num_timesteps: int) -> tuple[float, dict[str, float]]:
    """The mean of losses (N,) at timesteps (N,), and the mean of each bin."""
    num_bins = min(_MAX_BINS, num_timesteps)
    bins = {}
    for number in range(num_bins):
        low, high = number * num_timesteps // num_bins + 1, (number + 1) * num_timesteps // num_bins
        inside = losses[(timesteps >= low) & (timesteps <= high)]
        if len(inside):
            bins[f"{low}-{high}"] = inside.mean().item()
    return losses.mean().item(), bins


def linear_loss(train: Tensor, heldout: Tensor, alphas_cumprod: Tensor) -> tuple[float, dict[str, float]] | None:
    """The best linear denoiser's `denoising_loss` on held-out images in closed form, each image at every timestep.

    Fitted to training images of mean m and covariance S, it predicts eps = sqrt(1 - abar) (abar S + (1 - abar) I)^-1 y
    with y = x_t - sqrt(abar) m = sqrt(abar) (x_0 - m) + sqrt(1 - abar) eps. Along an eigenvector of S, of eigenvalue l,
    the error is (abar l eps - sqrt(abar (1 - abar)) (x_0 - m)) / (abar l + 1 - abar). With d, the mean of (x_0 - m)^2
    over the held-out images, the expected square is (abar^2 l^2 + abar (1 - abar) d) / (abar l + 1 - abar)^2. The loss
    is its mean over the eigenvectors; where d = l, as on the training images, it is abar l / (abar l + 1 - abar).

    Args:
        train: (N, C, H, W) uint8; the first 20,000 are used.
        heldout: (M, C, H, W) uint8; M decides how often each timestep counts, as in `denoising_loss`.
        alphas_cumprod: (T + 1,), index 0 is clean data.

    Returns:
        As `denoising_loss`; None for images of more than 4,096 numbers, or fewer training images than twice the
        numbers of one, of which a covariance says little.
    """
    train, heldout = train[:_LINEAR_IMAGES].flatten(1), heldout.flatten(1)
    size = train.shape[1]
    if size > _LINEAR_NUMBERS or len(train) < 2 * size:
        return None
    mean = torch.stack([to_model_range(part).sum(0) for part in train.split(2000)]).sum(0) / len(train)

    def deviations(images: Tensor) -> Iterator[Tensor]:
        """x_0 - m, (B, D), of a part of the images after the other: all at once would be 250 MB."""
        return (to_model_range(part) - mean for part in images.split(2000))

    covariance = torch.zeros(size, size)
    for x in deviations(train):
        covariance.addmm_(x.T, x)
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance.div_(len(train) - 1))
    squares = torch.cat([(x @ eigenvectors).square() for x in deviations(heldout)]).mean(0).double()  # (D,)
    eigenvalues = eigenvalues.double().clamp(min=0)
    losses = [
        ((a * eigenvalues) ** 2 + a * (1 - a) * squares).div((a * eigenvalues + 1 - a) ** 2).mean()
        for a in alphas_cumprod.double()[1:]
    ]
    timesteps = _timesteps(len(heldout), len(losses))
    return _by_timestep(torch.stack(losses)[timesteps - 1], timesteps, len(losses))
