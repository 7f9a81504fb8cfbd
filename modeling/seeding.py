"""The random numbers of a run are functions of (seed, purpose, step, index in the global batch).

Timesteps in training depend on the batch's size, too, over which they are spread. Only the first weights and dropout's
masks come from torch's generator, which is seeded with such a function. A number is the hash of that address
(SplitMix64's finaliser, Steele et al. 2014, on 64-bit integers), so no generator has a state to save. A run resumes
from its step number alone, and neither the number of workers nor how a batch is split changes a single draw. The
integers are the same on every device; normals agree to rounding.
"""

import functools
import math
from collections.abc import Callable, Sequence
from enum import IntEnum

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads consecutive counters over all 64 bits
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

Noise = Callable[[int], Tensor]  # timestep -> z of Algorithm 2, (B, *shape); at 0 the starting noise x_T


class Purpose(IntEnum):
    """What a number is drawn for; each purpose has its own stream."""

    WEIGHTS = 0
    ORDER = 1
    FLIP = 2
    TIMESTEP = 3
    NOISE = 4
    DROPOUT = 5
    SAMPLE = 6
    EVALUATION = 7


def _signed(value: int) -> int:
    """The low 64 bits read as two's complement, as an int64 tensor holds them."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift (`>>` on int64 is arithmetic)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit integers; it relies on int64 products that wrap around."""
    z = (z ^ _shift(z, 30)) * _signed(_MULTIPLIERS[0])
    z = (z ^ _shift(z, 27)) * _signed(_MULTIPLIERS[1])
    return z ^ _shift(z, 31)


def derive_seed(seed: int, purpose: Purpose, step: int = 0, index: int = 0) -> int:
    """Returns a 64-bit seed for a generator of torch (weights, dropout)."""
    state = 0
    for word in (seed, int(purpose), step, index):
        state = (state ^ word) + _GOLDEN & _MASK
        state = (state ^ state >> 30) * _MULTIPLIERS[0] & _MASK
        state = (state ^ state >> 27) * _MULTIPLIERS[1] & _MASK
        state ^= state >> 31
    return state


@functools.lru_cache(maxsize=8)
def _columns(num_words: int, device: torch.device) -> Tensor:
    """What tells the words of a row apart, (num_words,): the same in every draw."""
    return _mix(torch.arange(1, num_words + 1, device=device) * _signed(_GOLDEN))


def draw_bits(seed: int, purpose: Purpose, step: int, indices: Tensor, num_words: int) -> Tensor:
    """Draws random 64-bit words, one row for each index.

    Args:
        indices: (B,) int64, positions in the global batch (or image numbers); the result is on their device.
        num_words: words per row.

    Returns:
        (B, num_words) int64, uniform over all 64 bits.
    """
    key = _signed(derive_seed(seed, purpose, step))
    rows = _mix(key + (indices + 1) * _signed(_GOLDEN))
    return _mix(rows[:, None] ^ _columns(num_words, indices.device))


def draw_integers(seed: int, purpose: Purpose, step: int, indices: Tensor, high: int) -> Tensor:
    """(B,) int64, uniform in 0..high-1 (high at most 2^31; the bias is below high / 2^32).

    For few numbers, indices on the CPU are best whatever needs them: a GPU would wait for 40 kernels to be launched.
    """
    word = _shift(draw_bits(seed, purpose, step, indices, 1)[:, 0], 32)
    return (word * high) >> 32


def draw_stratified(seed: int, purpose: Purpose, step: int, indices: Tensor, count: int, high: int) -> Tensor:
    """(B,) int64 in 0..high-1: number i of `count` is the integer part of high (i + u) / count, with one uniform u.

    They are spread evenly, so a mean over them has less variance than over independent numbers (Kingma et al. 2021,
    arXiv 2107.00630, appendix I.1). All integers are equally frequent, up to the 20 bits of u.

    Args:
        indices: (B,) int64, some of 0..count-1; count high is below 2^43.
    """
    u = _shift(draw_bits(seed, purpose, step, indices.new_zeros(1), 1)[0], 44)  # of 2^20
    return ((indices << 20) + u) * high // (count << 20)


def draw_normal(seed: int, purpose: Purpose, step: int, indices: Tensor, shape: Sequence[int]) -> Tensor:
    """Draws standard normal float32 numbers by the Box-Muller transform.

    Args:
        indices: (B,) int64, positions in the global batch (or image numbers).
        shape: shape of one item, for example (3, 32, 32).

    Returns:
        (B, *shape); row i depends on indices[i] only, never on B.
    """
    count = math.prod(shape)
    bits = draw_bits(seed, purpose, step, indices, (count + 1) // 2)
    uniform = (_shift(bits, 32).float() + 0.5) * 2.0**-32  # (0, 1]: never 0, so the logarithm is finite
    angle = (bits & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
    radius = (-2 * uniform.log()).sqrt()
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return normal[:, :count].reshape(len(indices), *shape)


def draw_permutation(seed: int, epoch: int, count: int) -> Tensor:
    """The order of the data in an epoch, (count,) int64 on the CPU."""
    keys = draw_bits(seed, Purpose.ORDER, epoch, torch.arange(count), 1)[:, 0]
    return torch.argsort(keys, stable=True)


def image_noise(seed: int, indices: Tensor, shape: Sequence[int]) -> Noise:
    """The noise for sampling images with these numbers, (B,).

    The noise of an image is then a function of (seed, its number), whatever else is sampled in the same batch.
    """
    return lambda timestep: draw_normal(seed, Purpose.SAMPLE, timestep, indices, shape)


def draw_noise(num_samples: int, size: Sequence[int], device: torch.device | str) -> Noise:
    """Returns noise from torch's default generator."""
    return lambda timestep: torch.randn((num_samples, *size), device=device)


def starting_point(noise: Noise, num_samples: int, size: Sequence[int], device: torch.device | str) -> Tensor:
    """x_T on the device; raises ValueError for noise of another shape than (num_samples, *size)."""
    x = noise(0)
    if x.shape != (num_samples, *size):
        raise ValueError(f"noise must have shape {(num_samples, *size)}, got {tuple(x.shape)}")
    return x.to(device)
