"""Measures of samples: their distances from the training images in the features of a network."""

from pathlib import Path

from torch import Tensor

from modeling import IMAGE_SHAPE
from modeling.images import encode_png
from modeling.measures.distances import measure_distances
from modeling.measures.evaluation_file import Record
from modeling.measures.extractors import Extractor, load_inception, load_own_encoder
from modeling.measures.features import MIN_IMAGES, Features, extract_features
from modeling.measures.neighbours import draw_neighbours, memorisation_ratio, nearest_neighbours
from modeling.measures.subject import Subject
from modeling.options import REPOSITORY
from modeling.system.errors import UserError
from modeling.system.files import write_atomically

_SHOWN, _NEIGHBOURS = 10, 5  # samples in the picture of neighbours, and neighbours of each


class DistanceMeasure:
    """Distances of the samples from the training images, in the features of an extractor.

    Args:
        batch_size: images that go through the extractor at a time.

    Raises:
        UserError: for too few images.
    """

    def __init__(self, subject: Subject, extractor: Extractor, batch_size: int):
        self.subject, self.extractor, self.batch_size = subject, extractor, batch_size
        samples = subject.samples
        self._check_number("samples", samples.num_images)
        self._check_number("training images", len(subject.data.train))
        self.identity = {"samples": samples.identity, "num_images": samples.num_images}
        self.identity |= {"extractor_sha256": extractor.sha256} | subject.data.identity

    def _check_number(self, what: str, number: int) -> None:
        if number < MIN_IMAGES:
            raise UserError(f"measures: distances need at least {MIN_IMAGES} {what}, got {number}")

    def take(self) -> Record:
        """The training images' features are kept for the next time.

        Raises:
            UserError: for weights of the extractor that give features which are not finite.
        """
        return self._measure()[0]

    def _measure(self) -> tuple[Record, Tensor, Features, Features]:
        """The record, the samples, and the features of samples and training images."""
        samples, data = self.subject.samples.obtain(), self.subject.data
        generated, train = self._extract(samples, "samples"), self._extract(data.train, "train", data.cache)
        record = measure_distances(generated, train)
        record["identity"] = self.identity | record["identity"] | self.subject.trained.environment
        return record, samples, generated, train

    def _extract(self, images: Tensor, name: str, cache: Path | None = None) -> Features:
        desc = f"features ({name})"
        return extract_features(
            self.extractor, images, batch_size=self.batch_size, cache=cache, desc=desc,
            processes=self.subject.trained.processes,
        )  # fmt: skip


def _check_images(subject: Subject, name: str, fits: str, is_fitting: bool) -> None:
    if not is_fitting:
        rest = ",".join(measure for measure in subject.options.measures if measure != name) or "bits_per_dim"
        shape = subject.trained.image_shape
        raise UserError(f"measures: {name} is for {fits} only, got images of shape {shape}: set measures=[{rest}]")


class InceptionMeasure(DistanceMeasure):
    """FID and what comes with it."""

    def __init__(self, subject: Subject):
        _check_images(subject, "fid", "images in colour", subject.trained.image_shape[0] == 3)
        extractor = load_inception(subject.options.inception_weights, subject.trained.device)
        super().__init__(subject, extractor, batch_size=50)


class EncoderMeasure(DistanceMeasure):
    """Distances in the project's own features; and the nearest training images, in a picture and as a ratio."""

    def __init__(self, subject: Subject):
        _check_images(subject, "encoder", f"images of shape {IMAGE_SHAPE}", subject.trained.image_shape == IMAGE_SHAPE)
        path = subject.options.encoder or REPOSITORY / "encoders" / "cifar10.safetensors"
        extractor = load_own_encoder(path, subject.trained.device)
        super().__init__(subject, extractor, batch_size=250)
        self._check_number("held-out images", len(subject.data.test))

    def take(self) -> Record:
        (record, samples, generated, train), data = self._measure(), self.subject.data
        test = self._extract(data.test, "test", data.cache)
        distances, nearest = nearest_neighbours(generated.values[:_SHOWN], train.values, _NEIGHBOURS)
        if self.subject.trained.processes.rank == 0:
            picture = draw_neighbours(samples[:_SHOWN], data.train[nearest], distances)
            write_atomically(self.subject.folder / "neighbours.png", encode_png(picture, self.identity))
        count = min(len(samples), len(data.test))
        record["identity"]["memorisation_num_images"] = count  # samples and test images
        record["values"] |= {
            "encoder/memorisation_ratio": memorisation_ratio(generated.values[:count], train.values, test.values),
            "pixels/memorisation_ratio": memorisation_ratio(samples[:count], data.train, data.test),
        }
        return record
