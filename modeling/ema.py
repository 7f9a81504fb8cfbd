"""Exponential moving average (EMA) of the weights: in long runs at a constant learning rate it samples far better."""

import copy

import torch
from torch import Tensor, nn


class Ema:
    """A float32 average of a module's parameters, with a warm-up so that it does not lag early in a run.

    Update k (from 0) has the decay min(decay, (1 + k) / (10 + k)). So the average covers a fixed share of the run until
    that share is longer than 1 / (1 - decay) steps.

    Args:
        module: the module to average; it is copied, so the average starts at its present weights.
        decay: in [0, 1).

    Raises:
        ValueError: for a decay outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.module = copy.deepcopy(module).requires_grad_(False).eval()

    def decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, module: nn.Module, step: int, unless: Tensor | None = None) -> None:
        """Moves the average towards the module's weights, after training step `step` (from 0).

        Args:
            unless: scalar bool on the device; if it is true, the average does not change (no CPU-GPU sync).
        """
        ours, theirs = dict(self.module.named_parameters()), dict(module.named_parameters())
        assert ours.keys() == theirs.keys()
        weight = 1 - self.decay_at(step)
        if unless is None:
            torch._foreach_lerp_(list(ours.values()), list(theirs.values()), weight)
            return
        changes = torch._foreach_sub(list(theirs.values()), list(ours.values()))
        torch._foreach_mul_(changes, torch.where(unless, 0.0, weight))
        torch._foreach_add_(list(ours.values()), changes)
