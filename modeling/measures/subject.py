"""What `evaluate.py` measures: a model, the prepared images that it is measured on, and the samples drawn from it."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from modeling.config import TrainedOn, parse
from modeling.data import load_images
from modeling.distributed.processes import ALONE, Processes
from modeling.images import save_grid
from modeling.measures.resumable import as_stored
from modeling.measures.sample_files import read_samples, write_samples
from modeling.measures.trained import COMPUTED, TrainedModel, compute_denoiser, load_trained
from modeling.options import REPOSITORY, EvaluateConfig
from modeling.stage import load_manifest
from modeling.system.errors import UserError
from modeling.system.files import sha256_of
from modeling.system.reading import reading


@dataclass(frozen=True)
class Data:
    """Prepared images, (N, 3, H, W) uint8, the SHA-256 of their files, and where features of them are kept."""

    train: Tensor
    test: Tensor
    identity: dict[str, str]
    cache: Path


def load_data(folder: Path) -> Data:
    """What `prepare_data.py` wrote.

    Raises:
        UserError: when it is missing, or not what was written.
    """
    manifest = load_manifest(folder, "run prepare_data.py")
    train, test = (load_images(folder, split, manifest) for split in ("train", "test"))
    digests = {f"{split}_sha256": manifest["files"][f"{split}.npy"]["sha256"] for split in ("train", "test")}
    return Data(train, test, {"data": manifest["dataset"]["name"], **digests}, folder.parent / "features")


class Samples:
    """The samples that are measured: those of a file, or new ones, drawn when they are first needed.

    Args:
        trained: the model that draws new ones.
        options: of `evaluate.py`.

    Raises:
        UserError: for a file that holds no samples.
        OSError: for one that cannot be read.
    """

    def __init__(self, trained: TrainedModel, options: EvaluateConfig):
        self.trained, self.path = trained, Path(options.out) / "samples.npz"
        self.given, self.identity, self.num_images = None, trained.samples_identity, options.num_images
        if options.samples is not None:
            self.given, about = read_samples(Path(options.samples))
            self.identity = about | {"sha256": sha256_of(Path(options.samples))}
            self.num_images = len(self.given)

    def obtain(self) -> Tensor:
        """The file's samples; or those that the evaluation's folder holds; or new ones, which are written to it.

        Every process gets them.
        """
        if (held := self.held()) is not None:
            return held
        parts = self.path.with_name(f"{self.path.name}.partial")
        images = self.trained.draw(parts, self.num_images)
        if self.trained.processes.rank == 0:
            write_samples(images, self.identity, self.path)
            shutil.rmtree(parts)
            save_grid(images[:64], self.path.with_name("samples.png"), about=self.identity)
        return images

    def held(self) -> Tensor | None:
        """The file's samples, or those that the evaluation's folder holds; None where they are to be drawn.

        Every process gets them.

        Raises:
            UserError: where the folder holds samples of another model or sampler, which may not be replaced.
        """
        return self.trained.processes.once(self._read) if self.given is None else self.given

    def _read(self) -> Tensor | None:
        if not self.path.exists():
            return None
        images, identity = read_samples(self.path, "delete it, and the samples are drawn again")
        if identity != as_stored(self.identity):
            if self.trained.options.overwrite:
                return None
            raise UserError(
                f"{self.path}: holds samples of another model or with other options; name another folder or set "
                "overwrite=true, which replaces them"
            )
        return images[: self.num_images] if len(images) >= self.num_images else None


@dataclass(frozen=True)
class Subject:
    """What is measured, and how."""

    trained: TrainedModel
    data: Data
    samples: Samples
    options: EvaluateConfig

    @property
    def folder(self) -> Path:
        """Where numbers, samples and pictures are written."""
        return Path(self.options.out)


def default_data(folder: Path) -> Path:
    """A folder that the user did not name: where the user is, or else in the repository."""
    return folder if folder.exists() else REPOSITORY / folder


def stored_data(checkpoint: str, stored: dict[str, Any]) -> Path:
    """The folder of the data that a checkpoint was trained on.

    Raises:
        UserError: if its configuration does not name one.
    """
    with reading(checkpoint, "file that names its data", "name it yourself, as data=FOLDER"):
        return default_data(parse(stored, TrainedOn).dataset.folder)


def load_subject(options: EvaluateConfig, processes: Processes = ALONE) -> Subject:
    """The model, data and samples that the options name, to be measured by these processes.

    Raises:
        UserError: for any that is missing, damaged, or does not fit the options.
        OSError: for a file that cannot be read.
    """
    if options.checkpoint in COMPUTED:
        data = load_data(default_data(Path("data/cifar10")) if options.data is None else Path(options.data))
        trained = compute_denoiser(options, data.train, data.identity["train_sha256"], processes)
    else:
        trained, stored = load_trained(options, processes)
        data = load_data(stored_data(options.checkpoint, stored) if options.data is None else Path(options.data))
    samples, shape = Samples(trained, options), tuple(data.train.shape[1:])
    if trained.image_shape != shape:
        raise UserError(f"the images of {options.checkpoint} have shape {trained.image_shape}, those of data {shape}")
    if samples.given is not None and samples.given.shape[1:] != shape:
        given = tuple(samples.given.shape[1:])
        raise UserError(f"samples={options.samples}: images of shape {given}, expected those of data, {shape}")
    return Subject(trained, data, samples, options)
