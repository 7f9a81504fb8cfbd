"""What `evaluate.py` measures: each measure knows its identity and its cost before it begins."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from modeling.config import ConfigError
from modeling.data import load_images
from modeling.evaluation import measure_errors, summarise
from modeling.heldout import denoising_loss
from modeling.images import save_grid
from modeling.measures.features import Extractor, extract_features, load_inception, load_own_encoder, measure_distances
from modeling.measures.neighbours import memorisation_ratio, nearest_neighbours, save_neighbours
from modeling.measures.resumable import advancing, draw_in_parts, read_samples, write_samples
from modeling.measures.trained import SIZE, TrainedModel
from modeling.options import EvaluateConfig
from modeling.runtime import autocast
from modeling.system.files import sha256_of
from modeling.system.progress import progress_bar

SAMPLES = "samples.npz"
_SHOWN, _NEIGHBOURS = 10, 5  # samples in the picture of neighbours, and neighbours of each
_NUM_TERMS = 10  # of the rate, in a record


@dataclass(frozen=True)
class Data:
    """Prepared images, (N, 3, H, W) uint8, the SHA-256 of their files, and where features of them are kept."""

    train: Tensor
    test: Tensor
    identity: dict
    cache: Path


def load_data(folder: Path) -> Data:
    """What `prepare_data.py` wrote.

    Raises:
        ConfigError: when it is not there, or not what was written.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        train, test = (load_images(folder, split, manifest) for split in ("train", "test"))
        digests = {f"{split}_sha256": manifest["files"][f"{split}.npy"]["sha256"] for split in ("train", "test")}
        identity = {"data": manifest["dataset"]["name"], **digests}
    except FileNotFoundError as error:
        raise ConfigError(f"data={folder}: no prepared data there: run prepare_data.py") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"data={folder}: {error}") from error
    return Data(train, test, identity, folder.parent / "features")


@dataclass(frozen=True)
class Measure:
    """A measure, ready to be taken.

    Attributes:
        identity: everything that its numbers depend on, as far as it is known before.
        seconds: about what it will take.
        take: returns {"values": ...} and, where there is more to say of what they are of, {"identity": ...}.
    """

    identity: dict
    seconds: float
    take: Callable[[], dict]

    def is_of(self, record: dict) -> bool:
        """Whether a record is this measure's."""
        known = record.get("identity", {})
        return all(known.get(key) == value for key, value in json.loads(json.dumps(self.identity)).items())


class Evaluation:
    """The measures of a model.

    Args:
        trained: the model.
        data: that it is measured on.
        options: of `evaluate.py`.
        folder: where samples and pictures go.

    Raises:
        ValueError: for samples or weights of an extractor that cannot be had; nothing was computed yet.
        FileNotFoundError: likewise.
    """

    def __init__(self, trained: TrainedModel, data: Data, options: EvaluateConfig, folder: Path):
        self.trained, self.data, self.options, self.folder = trained, data, options, folder
        self.samples, self.samples_identity = None, trained.samples_identity
        if options.samples is not None:
            self.samples, about = read_samples(Path(options.samples))
            self.samples_identity = about | {"sha256": sha256_of(Path(options.samples))}
        self.seconds_per_image = self._time(partial(trained.model.predict, timesteps=1), torch.randn)
        plans = {
            "bits_per_dim": self._plan_bits,
            "heldout_loss": self._plan_loss,
            "encoder": self._plan_encoder,
            "fid": self._plan_fid,
        }
        self.measures: dict[str, Measure] = {name: plans[name]() for name in options.measures}

    def _time(self, function: Callable[[Tensor], object], make: Callable[..., Tensor]) -> float:
        """Seconds an image, measured with a batch."""
        images = make(self.trained.batch_size, *SIZE, device=self.trained.device)
        with torch.inference_mode(), autocast(self.trained.device, self.trained.precision):
            for _ in range(2):  # the first one prepares
                started = time.perf_counter()
                function(images)[0].sum().item()
        return (time.perf_counter() - started) / len(images)

    # ---- bits per dimension

    def _plan_bits(self) -> Measure:
        last = self.trained.model.num_timesteps
        columns = min(self.options.bits_timesteps or last - 1, last - 1)
        images = self.data.test[: self.options.bits_images]
        identity = self.trained.identity | self.data.identity
        identity |= {"split": "test", "num_images": len(images), "num_timesteps": last, "timesteps_per_image": columns}
        seconds = len(images) * (columns + 1) * self.seconds_per_image
        return Measure(identity, seconds, lambda: self._take_bits(images, columns, identity))

    def _take_bits(self, images: Tensor, columns: int, identity: dict) -> dict:
        """Both variances, x_0 raw and clipped. Batches of images are parts, which a stopped process leaves behind."""
        model, options = (
            self.trained.model,
            {"batch_size": self.trained.batch_size, "precision": self.trained.precision},
        )
        with progress_bar(total=len(images) * (columns + 1), desc="bits/dim", unit="evaluation") as bar:

            def draw(start: int, count: int) -> Tensor:
                return measure_errors(
                    model, images[start : start + count], first_image=start, timesteps_per_image=columns or None,
                    bar=advancing(bar, start * (columns + 1), count), **options,
                )  # fmt: skip

            parts = self.folder / "bits_per_dim.partial"
            errors = draw_in_parts(
                parts, identity, len(images), self.trained.batch_size, draw, replace=self.options.overwrite
            )
        values = {}
        for variance in ("large", "small"):
            for clip_x0 in (False, True):
                found = asdict(summarise(model, errors, variance, clip_x0=clip_x0))
                bounds, terms = found.pop("bounds").tolist(), found.pop("terms").tolist()
                if math.isnan(found["standard_error"]):
                    found["standard_error"] = None
                found["rate_by_timestep"] = {
                    f"{bounds[part[0]]}-{bounds[part[-1] + 1] - 1}": sum(terms[i] for i in part)
                    for part in torch.arange(len(terms)).tensor_split(_NUM_TERMS)
                    if len(part)
                }
                values[f"{variance}, {'clipped' if clip_x0 else 'raw'}"] = found
        return {"values": values}

    # ---- held-out loss

    def _plan_loss(self) -> Measure:
        images = self.data.test[: self.options.loss_images]
        identity = self.trained.identity | self.data.identity | {"split": "test", "num_images": len(images)}
        return Measure(identity, len(images) * self.seconds_per_image, lambda: self._take_loss(images))

    def _take_loss(self, images: Tensor) -> dict:
        trained = self.trained
        total, bins = denoising_loss(
            trained.model, images, trained.device, precision=trained.precision, desc="held-out loss"
        )
        return {"values": {"total": total, "bins": bins}}

    # ---- distances of samples

    def _plan_encoder(self) -> Measure:
        return self._plan_samples(load_own_encoder(self.options.encoder, self.trained.device))

    def _plan_fid(self) -> Measure:
        return self._plan_samples(load_inception(self.options.inception_weights, self.trained.device))

    def _plan_samples(self, extractor: Extractor) -> Measure:
        if self.samples is None:
            count = self.options.num_images
            seconds = count * self.trained.num_steps * self.seconds_per_image
        else:
            count, seconds = len(self.samples), 0.0
        identity = {"samples": self.samples_identity, "num_images": count, "extractor_sha256": extractor.sha256}
        identity |= self.data.identity
        # The training images' features are kept for the next time, then it is less.
        grey = lambda *shape, device: torch.zeros(shape, dtype=torch.uint8, device=device)  # noqa: E731
        seconds += (count + len(self.data.train)) * self._time(extractor.function, grey)
        return Measure(identity, seconds, lambda: self._take_samples(extractor))

    def _obtain_samples(self) -> Tensor:
        """The samples of a file; or new ones, which are written to the folder, or those that it holds already."""
        if self.samples is not None:
            return self.samples
        path, trained, count = self.folder / SAMPLES, self.trained, self.options.num_images
        if path.exists():
            images, identity = read_samples(path)
            if identity == json.loads(json.dumps(self.samples_identity)) and len(images) >= count:
                return images[:count]
        parts = self.folder / f"{SAMPLES}.partial"
        images = trained.draw(parts)
        write_samples(images, self.samples_identity, path)
        shutil.rmtree(parts)
        save_grid(images[:64], self.folder / "samples.png")
        return images

    def _take_samples(self, extractor: Extractor) -> dict:
        """Distances from the training images; in the encoder's features also the nearest of them."""
        samples, data = self._obtain_samples(), self.data
        extract = partial(extract_features, extractor, batch_size=250 if extractor.name == "encoder" else 50)
        generated = extract(samples, desc="features (samples)")
        train = extract(data.train, cache=data.cache, desc="features (train)")
        record = measure_distances(generated, train)
        if extractor.name == "encoder":
            test = extract(data.test, cache=data.cache, desc="features (test)")
            nearest = nearest_neighbours(generated.values[:_SHOWN], train.values, _NEIGHBOURS)[1]
            save_neighbours(samples[:_SHOWN], data.train, nearest, self.folder / "neighbours.png")
            count = min(len(samples), len(data.test))
            record["identity"]["memorisation_num_images"] = count  # samples and test images
            record["values"] |= {
                "encoder/memorisation_ratio": memorisation_ratio(generated.values[:count], train.values, test.values),
                "pixels/memorisation_ratio": memorisation_ratio(samples[:count], data.train, data.test),
            }
        return record


def environment(trained: TrainedModel) -> dict:
    """What the last bits of a number depend on."""
    return {"device": trained.device.type, "threads": torch.get_num_threads(), "torch": version("torch")}
