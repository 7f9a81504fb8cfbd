"""What `evaluate.py` measures: functions of a trained model, data and options to plain values that say what they are
numbers of.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from modeling.config import ConfigError
from modeling.data import load_images
from modeling.evaluation import BoundErrors
from modeling.features import Extractor, extract_features, load_inception, load_own_encoder, measure_distances
from modeling.heldout import denoising_loss
from modeling.images import save_grid
from modeling.neighbours import memorisation_ratio, nearest_neighbours, save_neighbours
from modeling.options import EvaluateConfig
from modeling.progress import progress_bar
from modeling.runtime import autocast
from modeling.sampling import read_samples, write_samples
from modeling.trained import SIZE, TrainedModel

SAMPLES = "samples.npz"
_SHOWN = 10  # samples in the picture of neighbours
_NEIGHBOURS = 5
_NUM_TERMS = 10  # of the rate, in a record


@dataclass(frozen=True)
class Data:
    """Prepared images, (N, 3, H, W) uint8, and the SHA-256 of their files."""

    train: Tensor
    test: Tensor
    identity: dict


def load_data(folder: Path) -> Data:
    """What `prepare_data.py` wrote.

    Raises:
        ConfigError: when it is not there, or not what was written.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        train, test = (load_images(folder, split, manifest) for split in ("train", "test"))
    except FileNotFoundError as error:
        raise ConfigError(f"data={folder}: no prepared data there: run prepare_data.py") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"data={folder}: {error}") from error
    digests = {f"{split}_sha256": manifest["files"][f"{split}.npy"]["sha256"] for split in ("train", "test")}
    return Data(train, test, {"data": manifest["dataset"]["name"], **digests})


def num_evaluations(options: EvaluateConfig, trained: TrainedModel, data: Data) -> dict[str, int]:
    """How often each measure evaluates the network, in images."""
    counts = {}
    if "bits_per_dim" in options.measures:
        timesteps = min(options.bits_timesteps or trained.model.num_timesteps - 1, trained.model.num_timesteps - 1)
        counts["bits_per_dim"] = min(options.bits_images, len(data.test)) * (timesteps + 1)
    if "heldout_loss" in options.measures:
        counts["heldout_loss"] = min(options.loss_images, len(data.test))
    if options.samples is None and {"encoder", "fid"} & set(options.measures):
        counts["samples"] = options.num_images * trained.num_steps
    return counts


def seconds_per_evaluation(trained: TrainedModel) -> float:
    """Of one image by the network, measured with a batch of them."""
    x = torch.randn(trained.batch_size, *SIZE, device=trained.device)
    with torch.inference_mode(), autocast(trained.device, trained.precision):
        for _ in range(2):  # the first one prepares
            started = time.perf_counter()
            trained.model.predict(x, 1)[0].sum().item()
    return (time.perf_counter() - started) / len(x)


def measure_bits(trained: TrainedModel, data: Data, options: EvaluateConfig) -> dict:
    """The bound in bits per dimension of the test images: both variances, x_0 raw and clipped."""
    images = data.test[: options.bits_images]
    last = trained.model.num_timesteps - 1
    num_timesteps = None if options.bits_timesteps is None else min(options.bits_timesteps, last)
    with progress_bar(total=len(images) * ((num_timesteps or last) + 1), desc="bits/dim", unit="evaluation") as bar:

        def counted(columns: list) -> list:
            for column in columns:
                yield column
                bar.update(min(trained.batch_size, len(images)))

        errors = BoundErrors(
            trained.model, images, num_timesteps=num_timesteps, batch_size=trained.batch_size,
            precision=trained.precision, bar=counted,
        )  # fmt: skip
    values = {}
    for variance in ("large", "small"):
        for clip_x0 in (False, True):
            found = asdict(errors.bits_per_dim(variance, clip_x0=clip_x0))
            terms = found.pop("terms")
            found["rate_by_timestep"] = [part.sum().item() for part in terms.tensor_split(_NUM_TERMS)]
            values[f"{variance}, {'clipped' if clip_x0 else 'raw'}"] = found
    return {"values": values, "identity": trained.identity | data.identity | {"split": "test"}}


def measure_loss(trained: TrainedModel, data: Data, options: EvaluateConfig) -> dict:
    """The squared error of eps on the test images, by timestep."""
    images = data.test[: options.loss_images]
    total, bins = denoising_loss(
        trained.model, images, trained.device, precision=trained.precision, desc="held-out loss"
    )
    identity = trained.identity | data.identity | {"split": "test", "num_images": len(images)}
    return {"values": {"total": total, "bins": bins}, "identity": identity}


def obtain_samples(trained: TrainedModel, options: EvaluateConfig, folder: Path) -> tuple[Tensor, dict]:
    """The samples to measure, and their identity: those of a file, or new ones, which are written to the folder."""
    if options.samples is not None:
        return read_samples(Path(options.samples))
    path = folder / SAMPLES
    if path.exists():
        images, identity = read_samples(path)
        if identity == trained.samples_identity and len(images) >= options.num_images:
            return images[: options.num_images], identity
    images = trained.draw(folder / f"{SAMPLES}.partial")
    write_samples(images, trained.samples_identity, path)
    save_grid(images[:64], folder / "samples.png")
    return images, trained.samples_identity


def load_extractor(name: str, options: EvaluateConfig, device: torch.device) -> Extractor:
    """The network in whose features samples are compared.

    Raises:
        WeightsError, CheckpointError, FileNotFoundError: when its weights cannot be had.
    """
    if name == "fid":
        return load_inception(options.inception_weights, device)
    return load_own_encoder(options.encoder, device)


def measure_samples(
    trained: TrainedModel, data: Data, options: EvaluateConfig, folder: Path, extractor: Extractor
) -> dict:
    """Distances of samples from the training images; in the encoder's features also their nearest training images."""
    samples, samples_identity = obtain_samples(trained, options, folder)
    cache, batch_size = folder.parent / "features", 250 if extractor.name == "encoder" else 50
    generated = extract_features(extractor, samples, batch_size=batch_size, desc="features (samples)")
    train = extract_features(extractor, data.train, batch_size=batch_size, cache=cache, desc="features (train)")
    record = measure_distances(generated, train)
    record["identity"] |= {"samples": samples_identity} | data.identity
    if extractor.name == "encoder":
        test = extract_features(extractor, data.test, batch_size=batch_size, cache=cache, desc="features (test)")
        nearest = nearest_neighbours(generated.values[:_SHOWN], train.values, _NEIGHBOURS)[1]
        save_neighbours(samples[:_SHOWN], data.train, nearest, folder / "neighbours.png")
        count = min(len(samples), len(data.test))
        record["values"] |= {
            "encoder/memorisation_ratio": memorisation_ratio(generated.values[:count], train.values, test.values),
            "pixels/memorisation_ratio": memorisation_ratio(samples[:count], data.train, data.test),
        }
    return record
