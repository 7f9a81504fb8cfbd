"""The training images nearest to a sample: has the model learned, or memorised?"""

import torch
from torch import Tensor

from modeling.images import enlarge, make_grid
from modeling.measures.captions import Row, draw_rows
from modeling.system.errors import UserError
from modeling.system.progress import progress_bar

_QUERIES, _REFERENCES = 1024, 4096  # of which distances are computed at a time: 160 MB for 32x32 images


def nearest_neighbours(
    queries: Tensor, references: Tensor, k: int = 1, *, desc: str = "nearest neighbours"
) -> tuple[Tensor, Tensor]:
    """The exactly nearest references of each query, by Euclidean distance.

    In float64, where the products and sums of 8-bit pixels are exact; those of features have 16 digits. Among equally
    near references any may be returned. Memory beyond the arguments does not grow with their number.

    Args:
        queries: (N, ...) images (pixels 0..255 as they are) or features, any dtype.
        references: (M, ...), of the same further shape and on the same device.
        k: neighbours, 1..M.

    Returns:
        Distances (N, k) float64, rising, and the references' indices (N, k) int64.

    Raises:
        ValueError: for shapes that do not fit, a k outside 1..M, or numbers that are not finite.
    """
    if queries.ndim < 2 or queries.shape[1:] != references.shape[1:]:
        raise ValueError(
            f"queries and references must be (N, ...) and (M, ...) of one further shape, "
            f"got {tuple(queries.shape)} and {tuple(references.shape)}"
        )
    if not 1 <= k <= len(references):
        raise ValueError(f"k must be in 1..{len(references)} (the references), got {k}")
    for name, rows in (("queries", queries), ("references", references)):
        if rows.is_floating_point() and not rows.isfinite().all():
            raise ValueError(f"{name} must be finite")
    queries, references = queries.flatten(1), references.flatten(1)
    distances, indices = [], []
    for part in progress_bar(queries.split(_QUERIES), desc=desc):
        part = part.double()
        nearest = part.new_empty(len(part), 0)
        found = torch.empty(len(part), 0, dtype=torch.int64, device=part.device)
        for start in range(0, len(references), _REFERENCES):
            rows = references[start : start + _REFERENCES].double()
            # ||q - r||^2 less ||q||^2, which changes no order
            squares = torch.addmm(rows.square().sum(dim=1), part, rows.T, alpha=-2)
            best = squares.topk(min(k, len(rows)), largest=False)
            nearest = torch.cat([nearest, best.values], dim=1)
            found = torch.cat([found, best.indices + start], dim=1)
            kept = nearest.topk(min(k, nearest.shape[1]), largest=False).indices
            nearest, found = nearest.gather(1, kept), found.gather(1, kept)
        # Again, from the differences: the sum above would leave a remainder between equal rows.
        exact = torch.stack([(part - references[column].double()).norm(dim=1) for column in found.T], dim=1)
        exact, order = exact.sort(dim=1)
        distances.append(exact)
        indices.append(found.gather(1, order))
    return torch.cat(distances), torch.cat(indices)


def memorisation_ratio(samples: Tensor, train: Tensor, held_out: Tensor) -> float:
    """How near samples are to the training images, in units of how near other real images are.

    The median distance of a sample to its nearest training image, divided by that of as many held-out images: 0 for
    copies of training images, 1 for images as new as the held-out ones.

    Args:
        samples: (N, ...) images or features.
        train: (M, ...).
        held_out: (at least N, ...), of which the first N are taken.

    Raises:
        ValueError: for fewer held-out images than samples.
        UserError: for held-out images half of which are training images.
    """
    if len(held_out) < len(samples):
        raise ValueError(f"held_out must have at least as many images as samples ({len(samples)}), got {len(held_out)}")
    sets = {"samples": samples, "held-out images": held_out[: len(samples)]}
    medians = [
        nearest_neighbours(images, train, desc=f"nearest to {name}")[0].quantile(0.5).item()
        for name, images in sets.items()
    ]
    if medians[1] == 0:
        raise UserError("held_out must not be training images: half of them are equal to one")
    return medians[0] / medians[1]


def draw_neighbours(samples: Tensor, neighbours: Tensor, distances: Tensor) -> Tensor:
    """Draws a row for each sample: the sample, then its nearest training images, each above its distance.

    Args:
        samples: (N, C, H, W) uint8.
        neighbours: (N, k, C, H, W) uint8.
        distances: (N, k).

    Returns:
        (3, height, width) uint8.
    """
    rows: list[Row] = [("", ["sample", *(f"nearest {number}" for number in range(1, distances.shape[1] + 1))])]
    for sample, nearest, distance in zip(samples, neighbours, distances.tolist(), strict=True):
        rows.append(("", enlarge(make_grid(torch.cat([sample[None], nearest]), 1 + len(nearest)))))
        rows.append(("", ["distance", *(f"{value:#.3g}" for value in distance)]))
    return draw_rows(rows)
