"""What both networks share: checks of their input, and layers faster than PyTorch's on a CPU (docs/speed.md)."""

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


def check_model_input(x: Tensor, t: Tensor, channels: int, multiple: int) -> tuple[Tensor, Tensor]:
    """Checks what a UNet is called with; both networks share these rules.

    Args:
        x: (B, C, H, W), C equal to `channels`, H and W positive multiples of `multiple`.
        t: (B,) or (B, 1), in (0, 1].

    Returns:
        x and t of shape (B,), both as given otherwise.

    Raises:
        ValueError: with what was got and what was expected. The range of t is checked on the CPU and outside
            compilation only: on CUDA it would cost a synchronisation each step.
    """
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x must have shape (B, {channels}, H, W), got {tuple(x.shape)}")
    height, width = x.shape[2:]
    if height == 0 or width == 0 or height % multiple or width % multiple:
        raise ValueError(f"x must have a height and width that are multiples of {multiple}, got {height}x{width}")
    if t.shape not in ((len(x),), (len(x), 1)):
        raise ValueError(f"t must have shape ({len(x)},) or ({len(x)}, 1), got {tuple(t.shape)}")
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and not ((t > 0) & (t <= 1)).all():
        raise ValueError(f"t must be in (0, 1], got values from {t.min().item()} to {t.max().item()}")
    return x, t.reshape(-1)


def check_hidden_size(hidden_size: int) -> None:
    """Raises ValueError unless hidden_size is a positive multiple of 8 (GroupNorm has 8 groups)."""
    if hidden_size <= 0 or hidden_size % 8:
        raise ValueError(f"hidden_size must be a positive multiple of 8, got {hidden_size}")
