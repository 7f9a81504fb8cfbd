"""Networks that make features of images: Inception, for FID and what comes with it, or the project's own encoder."""

import hashlib
import http.client
import io
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modeling.checkpoint import CheckpointError, load_tensors
from modeling.images import to_model_range
from modeling.measures.encoder import load_encoder
from modeling.system.errors import UserError
from modeling.system.files import sha256_of

OFFICIAL_SHA256 = "6726825d"  # the first digits, from the name of torch-fidelity's weights
_TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class Extractor:
    """A network that makes features of images."""

    name: str  # "inception-2015": the network of FID; "inception": with other weights; "encoder"
    sha256: str  # of the file of weights
    device: torch.device
    function: Callable[[Tensor], tuple[Tensor, Tensor | None]]  # (B, 3, H, W) uint8 -> (B, D), logits (B, K); float32


def _download_inception(url: str) -> Path:
    """torch-fidelity's weights, where torch-fidelity itself would keep them."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    remedy = "set inception_weights to the path of a copy from elsewhere, or measure in the encoder's features"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(_TIMEOUT_SECONDS)  # torch.hub has no parameter for it and would wait forever
        try:
            torch.hub.download_url_to_file(url, str(path), OFFICIAL_SHA256)
        except (OSError, http.client.HTTPException, RuntimeError) as error:  # the last for another hash
            raise UserError(f"inception_weights=null, and {url} cannot be downloaded ({error}): {remedy}") from error
        finally:
            socket.setdefaulttimeout(timeout)
    if not sha256_of(path).startswith(OFFICIAL_SHA256):
        raise UserError(f"{path} is not {url}, its SHA-256 differs: delete it, or {remedy}")
    return path


def load_inception(inception_weights: str | Path | None = None, device: torch.device | str = "cpu") -> Extractor:
    """torch-fidelity's port of TensorFlow's Inception-2015; the features are those of pool3 (2048).

    Args:
        inception_weights: a file; None: torch-fidelity's own, downloaded (95 MB) unless it is in torch.hub's folder.

    Raises:
        UserError: for weights that are not available, hold more than tensors, or are another network's.
        OSError: for a file that cannot be read.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    path = _download_inception(URL_INCEPTION_V3) if inception_weights is None else Path(inception_weights)
    if not path.is_file():
        raise UserError(f"inception_weights={path}: there is no such file; null downloads {URL_INCEPTION_V3}")
    content = path.read_bytes()  # once: what is hashed is what is loaded
    sha256 = hashlib.sha256(content).hexdigest()
    # torch-fidelity would unpickle the file without restraint: it gets a copy that we made of the tensors.
    trusted = io.BytesIO()
    try:
        torch.save(load_tensors(path, content), trusted)
    except CheckpointError as error:
        raise UserError(f"inception_weights={error}") from error
    trusted.seek(0)
    layers = ["2048", "logits_unbiased"]
    try:
        network = FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=trusted)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]  # of hundreds of missing weights
        raise UserError(f"inception_weights={path}: not torch-fidelity's Inception ({reason})") from error
    name = "inception-2015" if sha256.startswith(OFFICIAL_SHA256) else "inception"
    device = torch.device(device)
    return Extractor(name, sha256, device, network.to(device))


def load_own_encoder(path: str | Path, device: torch.device | str = "cpu") -> Extractor:
    """The classifier that `train_encoder.py` wrote, in float32, as an extractor for images (N, 3, 32, 32).

    Raises:
        FileNotFoundError, CheckpointError: as `modeling.measures.encoder.load_encoder`.
    """
    encoder, _ = load_encoder(path, device)

    def extract(images: Tensor) -> tuple[Tensor, None]:
        return encoder.features(to_model_range(images)), None

    return Extractor("encoder", sha256_of(Path(path)), torch.device(device), extract)
