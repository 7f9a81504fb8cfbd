"""The machine a run uses: device, precision, threads, memory layout and allocator."""

import contextlib
import ctypes
import os
import platform
import resource
import sys
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from modeling.system.errors import UserError

ModuleType = TypeVar("ModuleType", bound=nn.Module)
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device for `runtime.device`: auto takes cuda, then mps, then the CPU.

    Raises:
        UserError: for a device that this machine does not have.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(candidate for candidate, is_there in available.items() if is_there)
    if not available.get(name, False):
        have = [candidate for candidate, is_there in available.items() if is_there]
        raise UserError(f"device={name}: not available here; this machine has {', '.join(have)}")
    return torch.device(name)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def resolve_precision(name: str, device: torch.device) -> str:
    """fp32, bf16 or fp16 for `runtime.precision`: auto takes bf16 where the hardware computes in it."""
    if name == "auto":
        return "bf16" if _has_bf16(device) else "fp32"
    return name


def resolve_micro_batch_size(size: int | None, device: torch.device, batch_size: int, hidden_size: int) -> int:
    """Images that go through the network at a time, for `runtime.micro_batch_size`.

    By default 64 on a CPU at width 128, more or fewer at others, so that they take the same memory: larger parts are
    hardly faster there (docs/speed.md). Whole batches elsewhere.
    """
    if size is None:
        size = max(1, 64 * 128 // hidden_size) if device.type == "cpu" else batch_size
    return min(size, batch_size)


def autocast(device: torch.device | str, precision: str) -> contextlib.AbstractContextManager:
    """The context in which the network runs: bf16 or fp16 for its matrix products, or nothing for fp32."""
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
    """Moves a module to the device, its convolution weights with the channels last, which the activations then follow.

    So convolutions are faster in bf16, by a third on a CPU with AMX, and no slower in fp32 (docs/speed.md).
    """
    module = module.to(device)
    return module if device.type == "mps" else module.to(memory_format=torch.channels_last)


def available_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may use: those of its affinity mask, or its control group's quota if that is less.

    PyTorch sees the mask only: in a container with a quota of 2 on a machine of 64 it would start 64 threads.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [cgroup / "cpu.max", cgroup / "cpu" / "cpu.cfs_quota_us"]  # versions 2 and 1
    with contextlib.suppress(OSError):
        if quotas[0].exists():
            quota, period = quotas[0].read_text().split()
        else:
            quota, period = quotas[1].read_text().strip(), quotas[1].with_name("cpu.cfs_period_us").read_text()
        if quota not in ("max", "-1"):
            count = min(count, max(1, int(quota) // int(period)))
    return count


def limit_threads() -> None:
    """Lets PyTorch use no more threads than there are CPUs for this process (fewer, if OMP_NUM_THREADS says so)."""
    torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory instead of giving it back to the kernel; True where that was possible.

    Tensors above malloc's mmap threshold would otherwise be mapped, page-faulted in and unmapped in every step, which
    more than halves the speed of training on a CPU. Costs the peak memory until the process ends. Does what another
    allocator in LD_PRELOAD would, without asking the user for one.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(m_mmap_max, 0)) and bool(libc.mallopt(m_trim_threshold, -1))


def use_deterministic_algorithms() -> None:
    """Makes CUDA give the same bits every time; on the CPU it always does.

    Call it before the first CUDA kernel: cuBLAS reads its workspace's size once.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def peak_memory_bytes() -> int:
    """The most memory this process has held so far: of the CUDA device where one is in use, else resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
