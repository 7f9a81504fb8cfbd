"""The machine that a run uses: device, precision, threads, memory layout and allocator."""

import contextlib
import ctypes
import os
import platform
import resource
import sys
from typing import TypeVar

import torch
from torch import Tensor, nn

from modeling.system.errors import UserError
from modeling.system.startup import available_cpus

ModuleType = TypeVar("ModuleType", bound=nn.Module)
BUSY_SECONDS = 0.1  # for which the machine is watched before the start
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Returns the device for `runtime.device`; "auto" chooses cuda before mps before the CPU.

    Raises:
        UserError: for a device that is not available.
    """
    is_available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [device for device in is_available if is_available[device]]
    if name == "auto":
        name = available[0]
    if name not in available:
        raise UserError(f"device={name}: not available; this machine has {', '.join(available)}")
    return torch.device(name)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def resolve_precision(name: str, device: torch.device) -> str:
    """Returns fp32, bf16 or fp16 for `runtime.precision`; "auto" chooses bf16 where the hardware computes in it."""
    if name == "auto":
        return "bf16" if _has_bf16(device) else "fp32"
    return name


def resolve_micro_batch_size(
    size: int | None, device: torch.device, batch_size: int, hidden_size: int, num_pixels: int = 32 * 32
) -> int:
    """Returns how many images go through the network at once, for `runtime.micro_batch_size`.

    None chooses, on a CPU, 64 images of 32x32 at width 128, and as many as need the same memory at other widths and
    sizes: more are hardly faster (docs/speed.md). On other devices it chooses the whole batch.
    """
    if size is None:
        size = max(1, 64 * 128 * 32 * 32 // (hidden_size * num_pixels)) if device.type == "cpu" else batch_size
    return min(size, batch_size)


def evaluation_batch_size(size: int | None, num_pixels: int = 32 * 32) -> int:
    """Returns how many images go through the network at once without gradients, `size` or a number for the memory.

    None chooses 250 images of 32x32 or smaller, and of larger ones as many as need the same memory.
    """
    return max(1, 250 * min(num_pixels, 32 * 32) // num_pixels) if size is None else size


def autocast(device: torch.device | str, precision: str) -> contextlib.AbstractContextManager:
    """Returns the context for running the network: bf16 or fp16 for its matrix products; no change for fp32."""
    dtype = DTYPES[precision]
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=dtype)


def check_finite(values: Tensor, what: str, precision: str) -> None:
    """Raises FloatingPointError unless all values are finite (CPU-GPU sync)."""
    if not torch.isfinite(values).all():
        remedy = ": fp16 ends at 65,504, try precision=fp32" if precision == "fp16" else ""
        raise FloatingPointError(f"{what} is not finite in {precision}{remedy}")


def place(module: ModuleType, device: torch.device) -> ModuleType:
    """Moves a module to the device, with the channels last in its convolution weights; activations follow them.

    Convolutions are then faster in bf16, by a third on a CPU with AMX, and no slower in fp32 (docs/speed.md).
    """
    module = module.to(device)
    return module if device.type == "mps" else module.to(memory_format=torch.channels_last)


def limit_threads(num_threads: int | None = None) -> None:
    """Sets PyTorch's threads.

    Args:
        num_threads: how many; None for the CPUs available to this process (or OMP_NUM_THREADS, if that is fewer).

    Raises:
        UserError: for more threads than CPUs.
    """
    available = available_cpus()
    if num_threads is not None and num_threads > available:
        raise UserError(f"num_threads={num_threads}: this process may use {available} CPUs")
    torch.set_num_threads(min(torch.get_num_threads(), available) if num_threads is None else num_threads)


def warn_if_busy() -> None:
    """Warns when other processes need CPUs on which PyTorch would run several threads.

    Threads wait for each other thousands of times a step. Beside one busy process two threads on two CPUs are then many
    times slower than one (docs/speed.md).
    """
    import psutil  # Linux and macOS count busy CPUs differently

    if torch.get_num_threads() == 1:
        return
    num_cpus = os.cpu_count() or 1
    num_busy = num_cpus * psutil.cpu_percent(interval=BUSY_SECONDS) / 100
    if num_busy > num_cpus - torch.get_num_threads() + 0.5:
        free = max(1, int(num_cpus - num_busy))
        print(
            f"warning: other processes keep {num_busy:.1f} of {num_cpus} CPUs busy, and threads wait for each other: "
            f"num_threads={free} may be several times faster than the {torch.get_num_threads()} threads that are used",
            file=sys.stderr,
        )


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory instead of returning it to the kernel; returns whether that was possible.

    Otherwise tensors above malloc's mmap threshold are mapped, page-faulted in and unmapped in every step, which costs
    up to a third of the speed of training on a CPU (docs/speed.md). The price: the process holds its peak memory until
    it ends. Another allocator in LD_PRELOAD would do the same, but the user would have to install it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(m_mmap_max, 0)) and bool(libc.mallopt(m_trim_threshold, -1))


def prepare_cuda(deterministic: bool) -> None:
    """Makes CUDA compute float32 in float32, and where it is asked for the same bits every time, as a CPU always does.

    Call it before the first CUDA kernel: cuBLAS reads the size of its workspace once.
    """
    torch.backends.cudnn.allow_tf32 = False  # else convolutions would round their inputs to 10 bits
    torch.backends.cudnn.benchmark = not deterministic  # batches have one shape, or two when they come in parts
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        # Else all fresh memory would be filled with NaN, by more than one kernel for each that computes.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def peak_memory_bytes() -> int:
    """Returns the most memory that this process has held: on the CUDA device if one is in use, else resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
