"""What both networks share: input checks, and layers that are faster than PyTorch's on a CPU (docs/speed.md)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FAST_GROUP = 16  # channels per group from which PyTorch's channels-last kernels are as fast as the contiguous ones
_FAST_MAP = 32 * 32  # pixels from which the forward kernel is, for any group


class _ChannelsLastGroupNorm(torch.autograd.Function):
    """The function of `F.group_norm`, computed on contiguous copies where that is faster.

    In channels-last memory, PyTorch's CPU kernels read the channels of one group at a time. With 4 or 8 channels per
    group they are 7 to 13 times slower than the contiguous kernel, and the two copies cost less than that.
    Convolutions are faster with the channels last, so the whole network cannot be contiguous.
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
    """`nn.GroupNorm`, with the same function and the same state, but faster."""

    def forward(self, x: Tensor) -> Tensor:
        """x and the result are (B, C, H, W) in one memory layout."""
        is_slow = (
            x.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and self.num_channels // self.num_groups < _FAST_GROUP
            and not x.is_contiguous()
            and x.is_contiguous(memory_format=torch.channels_last)
        )
        if is_slow:
            return _ChannelsLastGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        if x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16):
            # Autocast would compute in float32 and pass that on to layers that only move memory. The kernel's
            # statistics are in float32 in any case.
            with torch.autocast("cuda", enabled=False):
                return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class _IntegerReLU(torch.autograd.Function):
    """ReLU of bfloat16 in place, computed on its bits.

    PyTorch widens every element to float32 and narrows it again; comparing 16-bit integers is 3 to 4 times faster. An
    element is negative if its bits, read as an integer, are. From -128 down these are numbers or -inf, which become 0.
    The integers above are NaNs with a sign, which stay (their gradient is 0; PyTorch passes it on).
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        torch.threshold_(x.view(torch.int16), -128, 0)
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
    """`nn.ReLU` in place, but faster."""

    def __init__(self):
        super().__init__(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Overwrites x, of any shape and layout: the layer that made x must not need it for its gradient."""
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
            return _IntegerReLU.apply(x)
        return super().forward(x)


class _HalfCopies(torch.autograd.Function):
    """Copies of float32 tensors in half precision, and their gradients in float32: each by a few kernels for all."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(copies, list(tensors))
        return tuple(copies)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple:
        copies = [torch.empty_like(grad, dtype=torch.float32) for grad in grads]
        torch._foreach_copy_(copies, list(grads))
        return None, *copies


def half_copies(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the parameters that autocast would copy one by one where they are used, for `functional_call`.

    Each copy and each gradient's way back is a kernel, a third of all in a training step, which on a GPU wait for the
    CPU to launch them (docs/speed.md).

    Returns:
        Name -> copy. Layers of other types compute in float32.
    """
    found = {
        f"{prefix}.{name}": parameter
        for prefix, layer in module.named_modules()
        if type(layer) in (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, GroupNorm)
        for name, parameter in layer.named_parameters(recurse=False)
    }
    return dict(zip(found, _HalfCopies.apply(dtype, *found.values()), strict=True))


def check_model_input(x: Tensor, t: Tensor, channels: int, multiple: int) -> tuple[Tensor, Tensor]:
    """Checks the input of a UNet.

    Args:
        x: (B, C, H, W), C equal to `channels`, H and W positive multiples of `multiple`.
        t: (B,) or (B, 1), in (0, 1].

    Returns:
        x, and t with shape (B,).

    Raises:
        ValueError: with what was expected and what was given. The range of t is only checked on the CPU and outside
            compilation: on CUDA the check would cost a synchronisation in each step.
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
