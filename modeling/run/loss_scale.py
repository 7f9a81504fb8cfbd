"""Dynamic loss scaling, without which the small gradients of fp16 would round to zero."""

import torch
from torch import Tensor

INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000  # steps in a row that must be finite before a larger scale is tried


class LossScale:
    """The factor of the loss: halved after a step that overflows, doubled after 2,000 in a row that do not.

    Scaling: Micikevicius et al. 2018 (arXiv 1710.03740, section 3.2); the numbers are those of `torch.amp.GradScaler`,
    which would also decide by itself which steps count. All scales are powers of two, so scaling rounds nothing.

    Args:
        scale: the present one.
        num_finite: steps in a row that were finite at this scale.
        device: that of the training, which decides everything without a CPU-GPU sync.
    """

    def __init__(self, scale: float, num_finite: int, device: torch.device | str):
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device)
        self.num_finite = torch.tensor(num_finite, device=device)

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divides the gradients of the scaled loss by the scale, in place."""
        torch._foreach_mul_(gradients, 1 / self.scale)

    def update(self, is_skipped: Tensor) -> None:
        """To be called after each step; is_skipped is a scalar bool, True if loss or gradient was not finite."""
        num_finite = self.num_finite + 1
        is_due = ~is_skipped & (num_finite == GROWTH_INTERVAL)
        self.scale = self.scale * torch.where(is_skipped, 0.5, torch.where(is_due, 2.0, 1.0))
        self.num_finite = torch.where(is_skipped | is_due, 0, num_finite)
