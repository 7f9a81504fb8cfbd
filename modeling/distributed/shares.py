"""How a batch is cut into parts, shared by processes, and how what they computed is added up again."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """What one process computes of each batch, which is cut into parts of nearly the same size."""

    rows: range  # of the batch
    parts: range  # by their place in the batch


def _start(count: int, num_runs: int, run: int) -> int:
    """Where a run begins if so many things are cut into contiguous runs, as `Tensor.tensor_split` does."""
    return run * (count // num_runs) + min(run, count % num_runs)


def share_of(rank: int, count: int, batch_size: int, micro_batch_size: int | None) -> Share:
    """The share of one of `count` processes; a part has at most `micro_batch_size` images (None: no limit)."""
    num_parts = max(count, -(-batch_size // (micro_batch_size or batch_size)))
    parts = range(_start(num_parts, count, rank), _start(num_parts, count, rank + 1))
    return Share(range(*(_start(batch_size, num_parts, place) for place in (parts.start, parts.stop))), parts)


def first_half(count: int) -> int:
    """How many of these things, two at least, are in the first half of the binary tree: a power of two."""
    return 1 << (count - 1).bit_length() - 1


def sum_as_tree(terms: Sequence[Tensor]) -> Tensor:
    """The sum, as a binary tree over the terms' places: the bits do not depend on who has computed which subtree."""
    if len(terms) == 1:
        return terms[0]
    half = first_half(len(terms))
    return sum_as_tree(terms[:half]) + sum_as_tree(terms[half:])
