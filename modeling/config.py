"""The configuration's schema: all of `params.yaml`, and what a model file must have of it. Imports no torch."""

from typing import Self

from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, model_validator

from modeling.sections import (
    Channels,
    Dataset,
    Diffusion,
    ImageSize,
    Model,
    Optimizer,
    Runtime,
    Train,
    Wandb,
    shape_of_images,
)
from modeling.system.values import SchemaType, Section, Seed, checked


class Config(Section):
    """All of `params.yaml`."""

    seed: Seed
    """Of the weights, the order of the data, flips, timesteps and noise; not of the data set."""
    dataset: Dataset
    model: Model
    diffusion: Diffusion
    optimizer: Optimizer
    train: Train
    runtime: Runtime
    wandb: Wandb

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        of_all = {"cifar10": 50_000, "shapes": 20_000}.get(self.dataset.name)  # a folder is counted when it is prepared
        available = of_all if self.dataset.num_images is None else self.dataset.num_images
        if available is not None and self.train.batch_size > available:
            raise ValueError(f"train.batch_size={self.train.batch_size} is larger than the data, {available} images")
        self.model.check_images(self.dataset.image_shape)
        return self


class TrainedImages(Section):
    """The kind of images, of the section `dataset`; older files lack both keys."""

    model_config = ConfigDict(extra="ignore")

    image_size: ImageSize = None
    channels: Channels = None


class Trained(Section):
    """What sampling needs of the configuration in a model file, whose other sections may be another version's."""

    model_config = ConfigDict(extra="ignore")

    dataset: TrainedImages = TrainedImages()
    model: Model
    diffusion: Diffusion

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return shape_of_images(self.dataset.image_size, self.dataset.channels)

    @model_validator(mode="after")
    def _network_fits(self) -> Self:
        self.model.check_images(self.image_shape)
        return self


class TrainedOn(Section):
    """The data of such a configuration."""

    model_config = ConfigDict(extra="ignore")

    dataset: Dataset


def parse(values: DictConfig | ListConfig | dict, schema: type[SchemaType] = Config) -> SchemaType:
    """Checks composed values against the schema.

    Raises:
        UserError: one line for each error, with the key, what was got and what was expected.
    """
    return checked(values, schema)


def to_yaml(config: BaseModel) -> str:
    """The resolved values, as `params.yaml` writes them."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump()))
