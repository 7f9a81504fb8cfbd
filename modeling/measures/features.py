"""Distances between sets of images in the features of a network, each number with its identity.

The network is Inception, for FID and what comes with it, or the project's own encoder. Statistics and metrics are
torch-fidelity's. A distance in any other features than those of TensorFlow's Inception-2015 is never called FID.
"""

import hashlib
import http.client
import io
import json
import socket
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modeling.checkpoint import CheckpointError, reading
from modeling.images import to_model_range
from modeling.measures.encoder import images_sha256, load_encoder
from modeling.system.errors import UserError
from modeling.system.files import sha256_of, write_atomically
from modeling.system.progress import progress_bar

OFFICIAL_SHA256 = "6726825d"  # the first digits, from the name of torch-fidelity's weights
MIN_IMAGES = 10  # the Inception score's splits
_KERNEL_SUBSETS, _KERNEL_SUBSET_SIZE, _NEIGHBOURHOOD = 100, 1000, 3  # torch-fidelity's defaults
_DISTANCE_ROWS = 2000  # of a matrix of distances at a time: 400 MB against 50,000 images
_TIMEOUT_SECONDS = 10
_PUBLISHED = {"frechet_distance": "fid", "kernel_distance": "kid", "kernel_distance_std": "kid_std"}
_PUBLISHED_NUM_IMAGES = 50_000  # of samples and of the reference


class WeightsError(UserError):
    """The extractor's weights cannot be had or are not to be trusted; the message names the remedy."""


@dataclass(frozen=True)
class Extractor:
    """A network that makes features of images."""

    name: str  # "inception-2015": the network of FID; "inception": with other weights; "encoder"
    sha256: str  # of the file of weights
    device: torch.device
    function: Callable[[Tensor], tuple[Tensor, Tensor | None]]  # (B, 3, H, W) uint8 -> (B, D), logits (B, K); float32


@dataclass(frozen=True)
class Features:
    """Of a set of images."""

    values: Tensor  # (N, D) float32 on the CPU
    logits: Tensor | None  # (N, K)
    identity: dict  # what they are features of, and whose


# ---- extractors


def _download_inception(url: str) -> Path:
    """torch-fidelity's weights, where torch-fidelity itself would keep them."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    remedy = "set inception_weights to the path of a copy from elsewhere, or measure in the encoder's features"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(_TIMEOUT_SECONDS)  # torch.hub has no parameter for it and would wait for ever
        try:
            torch.hub.download_url_to_file(url, str(path), OFFICIAL_SHA256)
        except (OSError, http.client.HTTPException, RuntimeError) as error:  # the last for another hash
            raise WeightsError(f"inception_weights=null, and {url} cannot be downloaded ({error}): {remedy}") from error
        finally:
            socket.setdefaulttimeout(timeout)
    if not sha256_of(path).startswith(OFFICIAL_SHA256):
        raise WeightsError(f"{path} is not {url}, which it was taken for: delete it, or {remedy}")
    return path


def load_inception(inception_weights: str | Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """torch-fidelity's port of TensorFlow's Inception-2015; the features are those of pool3 (2048).

    Args:
        inception_weights: a file; None: torch-fidelity's own, downloaded (95 MB) unless it is in torch.hub's folder.

    Raises:
        WeightsError: for weights that cannot be had, hold more than tensors, or are another network's.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    path = _download_inception(URL_INCEPTION_V3) if inception_weights is None else Path(inception_weights)
    if not path.is_file():
        raise WeightsError(f"inception_weights={path}: there is no such file; null downloads {URL_INCEPTION_V3}")
    content = path.read_bytes()  # once: what is hashed is what is loaded
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        with reading(path, "file of weights"):
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (CheckpointError, OSError) as error:
        raise WeightsError(f"inception_weights={error}") from error
    # torch-fidelity would unpickle the file without restraint: it gets a copy that we made of the tensors.
    trusted = io.BytesIO()
    try:
        torch.save({str(name): tensor.detach() for name, tensor in state.items()}, trusted)
        trusted.seek(0)
        layers = ["2048", "logits_unbiased"]
        network = FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=trusted)
    except (RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]  # of hundreds of missing weights
        raise WeightsError(f"inception_weights={path}: not torch-fidelity's Inception ({reason})") from error
    name = "inception-2015" if sha256.startswith(OFFICIAL_SHA256) else "inception"
    device = torch.device(device)
    return Extractor(name, sha256, device, network.to(device))


def load_own_encoder(path: str | Path, device: torch.device | str = "cpu") -> Extractor:
    """The classifier that `train_encoder.py` wrote, in float32, as an extractor for images (N, 3, 32, 32).

    Raises:
        FileNotFoundError, CheckpointError: as `modeling.measures.encoder.load_encoder`.
    """
    encoder, _ = load_encoder(path, device)
    function = lambda images: (encoder.features(to_model_range(images)), None)  # noqa: E731
    return Extractor("encoder", sha256_of(Path(path)), torch.device(device), function)


# ---- features


def extract_features(
    extractor: Extractor,
    images: Tensor,
    *,
    batch_size: int = 250,
    cache: str | Path | None = None,
    desc: str = "extracting features",
) -> Features:
    """The features of a set of images.

    Args:
        images: (N, 3, H, W) uint8, at least 10.
        batch_size: images at a time; the result depends on it by rounding only.
        cache: a folder where features are kept for the next time, without logits (410 MB for Inception's of 50,000
            images); the file's name is made of the hashes of extractor and images.

    Raises:
        ValueError: for other images, features that are not finite, or a damaged file in the cache.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) < MIN_IMAGES:
        raise ValueError(
            f"images must be uint8 of shape (N, 3, H, W) with N at least {MIN_IMAGES}, "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    identity = {
        "num_images": len(images),
        "images_sha256": images_sha256(images),
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "torch_fidelity": version("torch-fidelity"),
    }
    path = None
    if cache is not None:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        path = Path(cache) / f"{extractor.name}-{len(images)}-{key[:16]}.npz"
        if path.is_file():
            return Features(_read_values(path), None, identity)
    values, logits = [], []
    with torch.no_grad():
        for start in progress_bar(range(0, len(images), batch_size), desc=desc):
            value, logit = extractor.function(images[start : start + batch_size].to(extractor.device))
            values.append(value.cpu())
            logits += [] if logit is None or path else [logit.cpu()]
    values = torch.cat(values)
    if not values.isfinite().all():
        raise ValueError(
            f"the features of {extractor.name} are not finite: its weights ({extractor.sha256}) are broken"
        )
    if path is not None:
        buffer = io.BytesIO()
        np.savez(buffer, values=values.numpy())  # in a zip archive, which has checksums
        write_atomically(path, buffer.getbuffer())
    return Features(values, torch.cat(logits) if logits else None, identity)


def _read_values(path: Path) -> Tensor:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return torch.from_numpy(archive["values"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and it is made again") from error


# ---- distances


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Between the Gaussians with the mean and covariance of features (N, D) and (M, D), float on the CPU:
    ||mu_1 - mu_2||^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(features) for features in (first, second)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def measure_distances(generated: Features, reference: Features) -> dict:
    """All distances of generated images from a reference, in the same features.

    Returns:
        {"values": name -> number, "identity": what they are numbers of}. The names are `fid`, `kid`, `kid_std`,
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
