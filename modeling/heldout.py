"""The loss at the end of a run, on held-out or training images, with fixed noise so that runs can be compared."""

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

    Image i always has the same timestep and the same noise, so chance plays no part in a difference between models.

    Args:
        images: (N, C, H, W) uint8.
        batch_size: images at a time; the result depends on it by rounding only.
        desc: what is measured, for the progress bar and the error.
        processes: that share the batches; the result does not depend on their number, and each gets it.

    Returns:
        The mean loss, and the mean loss of each bin of timesteps by its bounds, for example "101-200"; bins without
        images are left out.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    total = model.num_timesteps
    timesteps = torch.arange(len(images)) * total // len(images) + 1  # (N,), 1..T
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
    num_bins = min(_MAX_BINS, total)
    bins = {}
    for number in range(num_bins):
        low, high = number * total // num_bins + 1, (number + 1) * total // num_bins
        inside = loss[(timesteps >= low) & (timesteps <= high)]
        if len(inside):
            bins[f"{low}-{high}"] = inside.mean().item()
    return loss.mean().item(), bins
