"""Layers whose kernels for the CPU are slow in PyTorch: the same functions, sooner (measurements: docs/speed.md)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FAST_GROUP = 16  # channels a group from which PyTorch's channels-last kernels are as fast as the contiguous ones
_FAST_MAP = 32 * 32  # pixels from which the forward one is, for any group


class _ChannelsLastGroupNorm(torch.autograd.Function):
    """The function of `F.group_norm`, on contiguous copies where that is faster.

    With the channels last, PyTorch's kernels for the CPU walk over the channels of one group at a time. With 4 or 8 of
    them that is 7 to 13 times slower than a contiguous kernel, and copying there and back takes less than what it
    saves. Convolutions want the channels last, so the whole network cannot be contiguous.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        batch, channels, height, width = x.shape
        ctx.sizes = batch, channels, height * width, num_groups
        source = x if height * width >= _FAST_MAP else x.contiguous()
        y, mean, rstd = torch.native_group_norm(source, weight, bias, *ctx.sizes, eps)
        ctx.save_for_backward(source, mean, rstd, weight)
        return y.contiguous(memory_format=torch.channels_last)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        x, mean, rstd, weight = ctx.saved_tensors
        grads = torch.ops.aten.native_group_norm_backward(
            grad.contiguous(), x.contiguous(), mean, rstd, weight, *ctx.sizes, list(ctx.needs_input_grad[:3])
        )
        x_grad = None if grads[0] is None else grads[0].contiguous(memory_format=torch.channels_last)
        return x_grad, *grads[1:], None, None


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`: the same function and the same state, only sooner."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in the layout of x."""
        is_slow = (
            x.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and self.num_channels // self.num_groups < _FAST_GROUP
            and not x.is_contiguous()
            and x.is_contiguous(memory_format=torch.channels_last)
        )
        if is_slow:
            return _ChannelsLastGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        if x.device.type == "cuda" and x.dtype != self.weight.dtype:
            # Autocast would compute in float32 and hand that on, to layers that only move memory. The kernel has its
            # statistics in float32 all the same.
            with torch.autocast("cuda", enabled=False):
                return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class _IntegerReLU(torch.autograd.Function):
    """ReLU of bfloat16 in place, computed on its bits.

    PyTorch widens every element to float32 and narrows it again; comparing 16-bit integers is 3 to 4 times faster. An
    element is negative if its integer is. From -128 down that is a number or -inf and becomes 0; above are the NaNs
    with a sign, which stay (their gradient is 0, where PyTorch's passes).
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        F.threshold_(x.view(torch.int16), -128, 0)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad.view(torch.int16), y.view(torch.int16), 0)
        return grad.view(torch.bfloat16)


class ReLU(nn.ReLU):
    """`nn.ReLU`, in place, sooner."""

    def __init__(self):
        super().__init__(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape and layout; x itself is replaced, so whatever made it must not need it any more."""
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
            return _IntegerReLU.apply(x)
        return super().forward(x)
