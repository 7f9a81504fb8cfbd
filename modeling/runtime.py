"""The machine a run uses: device, precision, memory allocator."""

import contextlib
import ctypes
import os
import platform
import resource
import sys

import torch

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def resolve_device(name: str) -> torch.device:
    """The device for `runtime.device`: auto takes cuda, then mps, then the CPU.

    Raises:
        ValueError: for a device that this machine does not have.
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
        raise ValueError(f"device={name}: not available here; this machine has {', '.join(have)}")
    return torch.device(name)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def resolve_precision(name: str, device: torch.device) -> str:
    """fp32 or bf16 for `runtime.precision`: auto takes bf16 where the hardware computes in it."""
    if name == "auto":
        return "bf16" if _has_bf16(device) else "fp32"
    return name


def autocast(device: torch.device | str, precision: str) -> contextlib.AbstractContextManager:
    """The context in which the network runs: bf16 for its matrix products, or nothing for fp32."""
    dtype = DTYPES[precision]
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=dtype)


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory instead of giving it back to the kernel; True where that was possible.

    Tensors above malloc's mmap threshold would otherwise be mapped, page-faulted in and unmapped in every step, which
    more than halves the speed of training on a CPU. Costs the peak memory until the process ends.
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
