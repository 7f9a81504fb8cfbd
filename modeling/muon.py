"""The optimizer Muon: momentum made orthogonal, for weights that are matrices; Adam for the others."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from modeling.training import gradients_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial that brings singular values near 1
NUM_ITERATIONS = 5
SMALLEST_NORM = 1e-15  # that is brought to 1; far below it squares are no float32 numbers
ADAM_RMS = 0.2  # of an update of Adam over its learning rate, about (Liu et al. 2025)


def orthogonalise(matrices: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T, nearly: Newton-Schulz iterations bring its singular values to 0.7..1.2.

    Those below 0.0015 of the matrix's norm stay smaller (Jordan et al. 2024), and so do matrices of a norm below 1e-15.

    Args:
        matrices: (N, rows, columns), float32.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)
    first, second, third = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=second, alpha=third), x, beta=first)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), with Adam for biases and norms.

    A weight of two or more dimensions is a matrix of its first one by all others. Its update is the Nesterov momentum,
    made orthogonal and as long as Adam's would be, so one learning rate serves both (Liu et al. 2025, arXiv
    2502.16982).

    Args:
        parameters: all on one device.
        lr: learning rate.
        momentum: decay of the running mean of the gradients; Adam has its usual ones, 0.9 and 0.999.
        fused: Adam in one kernel, which torch has for CPUs and CUDA. As with torch's own fused optimizers, a step then
            changes nothing where the attribute `found_inf`, a scalar on the device, is 1.
    """

    found_inf: Tensor | None = None

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, *, fused: bool = False):
        parameters = list(parameters)
        groups = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
        # With "fused" among the values, torch loads step counts onto the device, where the kernel reads them.
        values = {"lr": lr, "momentum": momentum, "fused": fused}
        super().__init__([{"params": group} for group in groups], values)
        for parameter in groups[0]:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        for parameter in groups[1]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = moments | {"step": torch.zeros((), device=parameter.device if fused else "cpu")}

    @torch.no_grad()
    def step(self) -> None:
        """Moves every parameter that has a gradient."""
        matrices, vectors = self.param_groups
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
        for parameter in matrices["params"]:
            if parameter.grad is not None:
                by_shape.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
        for shape, parameters in by_shape.items():
            self._move_matrices(shape, parameters, matrices["lr"], matrices["momentum"])
        self._move_vectors([parameter for parameter in vectors["params"] if parameter.grad is not None], vectors["lr"])

    def _move_matrices(
        self, shape: tuple[int, int], parameters: list[nn.Parameter], lr: float, momentum: float
    ) -> None:
        """Moves the parameters that are matrices of this shape."""
        gradients = torch.stack([gradient.flatten(1) for gradient in gradients_of(parameters)])
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        before = torch.stack([buffer.flatten(1) for buffer in buffers])
        after = before.lerp(gradients, 1 - momentum)
        updates = orthogonalise(gradients.lerp(after, momentum)) * (-ADAM_RMS * lr * max(shape) ** 0.5)
        if self.found_inf is not None:
            is_skipped = self.found_inf.bool()
            after, updates = torch.where(is_skipped, before, after), torch.where(is_skipped, 0.0, updates)
        for parameter, buffer, value, update in zip(parameters, buffers, after, updates, strict=True):
            buffer.copy_(value.view(buffer.shape))
            parameter.add_(update.view(parameter.shape))

    def _move_vectors(self, parameters: list[nn.Parameter], lr: float) -> None:
        states = [self.state[parameter] for parameter in parameters]
        means, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        adam(
            list(parameters), gradients_of(parameters), means, squares, [], steps,
            fused=self.defaults["fused"], found_inf=self.found_inf, lr=lr, beta1=0.9, beta2=0.999, eps=1e-8,
            weight_decay=0.0, amsgrad=False, maximize=False,
        )  # fmt: skip
