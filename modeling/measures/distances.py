"""Distances between two sets of images in the features of a network, each number with its identity.

Statistics and metrics are torch-fidelity's. A distance in any other features than those of TensorFlow's Inception-2015
is never called FID.
"""

from torch import Tensor

from modeling.measures.evaluation_file import Record
from modeling.measures.features import Features

_KERNEL_SUBSETS, _KERNEL_SUBSET_SIZE, _NEIGHBOURHOOD = 100, 1000, 3  # torch-fidelity's defaults
_DISTANCE_ROWS = 2000  # of a matrix of distances at a time: 400 MB against 50,000 images
_PUBLISHED = {"frechet_distance": "fid", "kernel_distance": "kid", "kernel_distance_std": "kid_std"}
_PUBLISHED_NUM_IMAGES = 50_000  # of samples and of the reference


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Between the Gaussians with the means and covariances of two sets of features, whose formula is
    ||mu_1 - mu_2||^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)).

    Args:
        first, second: (N, D) and (M, D), float on the CPU.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(features) for features in (first, second)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def measure_distances(generated: Features, reference: Features) -> Record:
    """All distances of generated images from a reference, in the same features.

    Returns:
        Name -> number, and what they depend on. The names are `fid`, `kid`, `kid_std`,
        `precision`, `recall`, `inception_score`, `inception_score_std` for 50,000 images of either kind in the features
        of the extractor "inception-2015"; for anything else `<extractor>/frechet_distance`,
        `<extractor>/kernel_distance` and so on. Without logits of the generated images there is no inception score.

    Raises:
        ValueError: for features of two extractors.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    for key in ("extractor", "extractor_sha256"):
        if generated.identity[key] != reference.identity[key]:
            raise ValueError(f"{key} must be one for both, got {generated.identity[key]} and {reference.identity[key]}")
    pair, extractor = (generated.values, reference.values), generated.identity["extractor"]
    kernel = {"kid_subsets": _KERNEL_SUBSETS, "kid_subset_size": min(_KERNEL_SUBSET_SIZE, *map(len, pair))}
    nearest = {"prc_neighborhood": _NEIGHBOURHOOD}
    kid = kid_features_to_metric(*pair, verbose=False, **kernel)
    prc = prc_features_to_metric(*pair, verbose=False, save_cpu_ram=True, prc_batch_size=_DISTANCE_ROWS, **nearest)
    values = {
        "frechet_distance": frechet_distance(*pair),
        "kernel_distance": kid[KEY_METRIC_KID_MEAN],
        "kernel_distance_std": kid[KEY_METRIC_KID_STD],
        "precision": prc[KEY_METRIC_PRECISION],
        "recall": prc[KEY_METRIC_RECALL],
    }
    if generated.logits is not None:
        score = isc_features_to_metric(generated.logits)
        values |= {"inception_score": score[KEY_METRIC_ISC_MEAN], "inception_score_std": score[KEY_METRIC_ISC_STD]}
    identity = generated.identity | {
        "reference_num_images": reference.identity["num_images"],
        "reference_sha256": reference.identity["images_sha256"],
        **kernel,
        **nearest,
    }
    return {"values": name_values(values, extractor, *map(len, pair)), "identity": identity}


def name_values(values: dict, extractor: str, num_images: int, reference_num_images: int) -> dict:
    """The numbers under their published names, where they are what is published: see `measure_distances`."""
    if extractor == "inception-2015" and num_images == reference_num_images == _PUBLISHED_NUM_IMAGES:
        return {_PUBLISHED.get(name, name): value for name, value in values.items()}
    return {f"{extractor}/{name}": value for name, value in values.items()}
