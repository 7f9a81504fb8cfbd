"""The configuration's schema: every key of `params.yaml`, its type, range and meaning. Imports no torch.

What leaves `parse` is frozen and valid.
"""

import os
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from modeling import IMAGE_SIZE
from modeling.system.credentials import masked
from modeling.system.errors import UserError
from modeling.system.overrides import known_keys, nearest, override

SchemaType = TypeVar("SchemaType", bound=BaseModel)

PositiveInt = Annotated[int, Field(gt=0)]
HiddenSize = Annotated[int, Field(gt=0, le=4096, multiple_of=8)]
PositiveFloat = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]  # 30 years; the system's timers end somewhere above
Text = Annotated[str, Field(min_length=1)]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
PathText = Annotated[Text, AfterValidator(os.path.expanduser)]  # `~` is the home folder

_MISSING = "missing, expected a value"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def _require(self, choice: str, keys: tuple[str, ...], needed: tuple[str, ...]) -> None:
        """Of the keys that depend on a choice, those that it needs must have a value and the others must be null."""
        for key in needed:
            if getattr(self, key) is None:
                raise ValueError(f"{key} needs a value with {choice}")
        for key in keys:
            if key not in needed and (value := getattr(self, key)) is not None:
                raise ValueError(f"{key} must be null with {choice}, got {value}")


class Dataset(Section):
    name: Literal["cifar10", "shapes", "folder"]
    root: PathText  # the prepared data is in <root>/<name>/
    archive: PathText | None  # cifar10: the archive, or its unpacked folder; a missing one is downloaded
    urls: list[Text] | None  # cifar10: addresses of the archive, tried in turn
    pictures: PathText | None  # folder: the pictures, at any depth of this folder
    skip_unusable: bool | None = None  # folder: goes on without pictures that cannot be used; older files lack the key
    num_images: PositiveInt | None  # training images; null: all of the archive or the pictures, or 20,000 shapes
    seed: Annotated[int, Field(ge=0)] | None  # shapes: which ones are drawn

    @property
    def folder(self) -> Path:
        """Where the prepared data is: train.npy, test.npy and manifest.json."""
        return Path(self.root) / self.name

    @model_validator(mode="after")
    def _fits_name(self) -> Self:
        needs = {"cifar10": ("archive", "urls"), "shapes": ("seed",), "folder": ("pictures",)}[self.name]
        keys = ("archive", "urls", "pictures", "seed", *(() if self.name == "folder" else ("skip_unusable",)))
        self._require(f"dataset.name={self.name}", keys, needs)
        if self.name == "cifar10" and self.num_images is not None and self.num_images > 50_000:
            raise ValueError(f"num_images must be at most 50000 with dataset.name=cifar10, got {self.num_images}")
        return self


class Model(Section):
    name: Literal["unet", "ddpm"]  # the assignment's, the paper's
    hidden_size: HiddenSize  # base width
    multipliers: list[Annotated[int, Field(gt=0, le=64)]] | None  # ddpm: width of each level in units of hidden_size
    num_blocks: Annotated[int, Field(gt=0, le=100)] | None  # ddpm: residual blocks a level
    attention_resolutions: list[PositiveInt] | None  # ddpm: heights with attention; the middle always has it
    dropout: Annotated[float, Field(ge=0, lt=1)] | None  # ddpm

    @model_validator(mode="after")
    def _fits_name(self) -> Self:
        keys = ("multipliers", "num_blocks", "attention_resolutions", "dropout")
        self._require(f"model.name={self.name}", keys, keys if self.name == "ddpm" else ())
        if self.multipliers is None or self.attention_resolutions is None:
            return self
        if not 1 <= len(self.multipliers) <= 6:
            raise ValueError(f"multipliers must have 1 to 6 entries (32 = 2^5 pixels), got {self.multipliers}")
        resolutions = [IMAGE_SIZE // 2**level for level in range(len(self.multipliers))]
        if not set(self.attention_resolutions) <= set(resolutions):
            raise ValueError(f"attention_resolutions must be among {resolutions}, got {self.attention_resolutions}")
        return self


class Diffusion(Section):
    num_timesteps: PositiveInt  # T
    schedule: Literal["linear", "cosine"]
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] | None  # linear: beta_1 and beta_T
    prediction: Literal["eps", "x_0", "v"]  # what the network predicts
    weighting: Literal["uniform", "min_snr_5"]  # of the loss at each timestep

    @model_validator(mode="after")
    def _fits_schedule(self) -> Self:
        self._require(
            f"diffusion.schedule={self.schedule}", ("betas",), ("betas",) if self.schedule == "linear" else ()
        )
        if self.betas is not None and not 0 < self.betas[0] < self.betas[1] < 1:
            raise ValueError(f"betas must satisfy 0 < beta_1 < beta_T < 1, got {self.betas}")
        return self


class Optimizer(Section):
    name: Literal["adam", "adamw", "sgd"]
    lr: Annotated[float, Field(ge=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] | None  # sgd
    weight_decay: Annotated[float, Field(ge=0)] | None  # adamw
    lr_schedule: Literal["constant", "cosine"]  # cosine: down to 0 at the last step
    warmup_steps: Annotated[int, Field(ge=0)]  # linear, from 0; cut to the run
    max_grad_norm: Annotated[float, Field(gt=0)] | None  # null: no clipping

    @model_validator(mode="after")
    def _fits_name(self) -> Self:
        needs = {"adam": (), "adamw": ("weight_decay",), "sgd": ("momentum",)}[self.name]
        self._require(f"optimizer.name={self.name}", ("momentum", "weight_decay"), needs)
        return self


class Train(Section):
    num_epochs: PositiveInt
    max_steps: PositiveInt | None  # training ends at the earlier of the two
    batch_size: PositiveInt
    random_flip: bool
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    log_every: PositiveInt  # steps
    checkpoint_every: PositiveInt  # steps
    max_skipped_in_row: PositiveInt  # steps whose loss or gradient is not finite, before the run ends with an error
    sample_every: PositiveInt  # epochs
    num_samples: PositiveInt  # images in a grid
    sample_steps: PositiveInt  # of a grid (cut to num_timesteps), ancestral, small variance, x_0 clipped
    num_eval_images: PositiveInt  # of each split, for the losses at the end (cut to what there is)


class Machine(Section):
    device: Literal["auto", "cpu", "cuda", "mps"]  # auto: cuda, else mps, else cpu
    precision: Literal["auto", "fp32", "bf16", "fp16"]  # auto: bf16 where the hardware computes in it, else fp32
    deterministic: bool  # CUDA: the same bits every time, at some cost; the CPU always is
    num_threads: PositiveInt | None  # CPU; null: one for each available CPU; 1 beside other work (docs/speed.md)
    keep_freed_memory: bool  # CPU, Linux: the allocator gives nothing back to the system, which is much faster


class Runtime(Machine):
    name: RunName | None = None  # the run's own, in its folder, in tables and in W&B; older files lack the key
    compile: bool
    micro_batch_size: PositiveInt | None  # at most so many images go through the network at a time; null: by the device
    num_workers: Annotated[int, Field(ge=0, le=64)]
    output_dir: PathText | None  # the run's folder; null: runs/<name, or what the run is>-<hash>
    resume: PathText  # auto: from the folder's newest checkpoint; never: from zero; or a checkpoint to start from
    max_seconds: Seconds | None  # then the run saves its state and ends, to be continued by the same command
    checkpoint_seconds: Seconds | None  # saves after so long even if checkpoint_every is not reached
    keep_checkpoints: PositiveInt  # the newest ones


class Wandb(Section):
    mode: Literal["offline", "online", "disabled"]
    project: Text
    name: Text | None  # null: runtime.name, or else the run folder's


class Config(Section):
    """All of `params.yaml`."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    dataset: Dataset
    model: Model
    diffusion: Diffusion
    optimizer: Optimizer
    train: Train
    runtime: Runtime
    wandb: Wandb

    @model_validator(mode="after")
    def _batch_fits(self) -> Self:
        of_all = {"cifar10": 50_000, "shapes": 20_000}.get(self.dataset.name)  # a folder is counted when it is prepared
        available = of_all if self.dataset.num_images is None else self.dataset.num_images
        if available is not None and self.train.batch_size > available:
            raise ValueError(f"train.batch_size={self.train.batch_size} is larger than the data, {available} images")
        return self


class Trained(Section):
    """What sampling needs of the configuration in a model file, whose other sections may be another version's."""

    model_config = ConfigDict(extra="ignore")

    model: Model
    diffusion: Diffusion


class TrainedOn(Section):
    """The data of such a configuration."""

    model_config = ConfigDict(extra="ignore")

    dataset: Dataset


def _line(error: ErrorDetails, schema: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; the nearest known one is {nearest(key, [*known_keys(schema)])}"
    if error["type"] == "missing":
        return f"{key}: {_MISSING}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and isinstance(error["input"], (dict, BaseModel)):
        return f"{key}: {message}" if key else message  # a check across keys names the values itself
    line = f"{key}={error['input']}: {message[0].lower()}{message[1:]}"
    is_number = error["type"] == "string_type" and type(error["input"]) in (int, float)
    return f"{line}; as text it is written {override(key, str(error['input']))}" if is_number else line


def _reject_secrets(values: object, key: str = "") -> None:
    """A value is written into files that people share, so none may be an API key; it is not repeated in the error."""
    if isinstance(values, dict):
        for name, value in values.items():
            _reject_secrets(str(name), key)
            _reject_secrets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            _reject_secrets(value, key)
    elif isinstance(values, str) and masked(values) != values:
        raise UserError(f"{key}: looks like an API key, which runs write into their files: use `wandb login`")


def parse(values: DictConfig | ListConfig | dict, schema: type[SchemaType] = Config) -> SchemaType:
    """Checks composed values against the schema.

    Raises:
        UserError: one line for each error, with the key, what was got and what was expected.
    """
    try:
        is_plain = isinstance(values, dict)
        plain = values if is_plain else OmegaConf.to_container(values, resolve=True, throw_on_missing=True)
        _reject_secrets(plain)
        return schema.model_validate(plain)
    except OmegaConfBaseException as error:
        is_missing = isinstance(error, MissingMandatoryValue)
        raise UserError(f"{error.full_key}: {_MISSING if is_missing else str(error).splitlines()[0]}") from error
    except ValidationError as error:
        raise UserError("\n".join(dict.fromkeys(_line(entry, schema) for entry in error.errors()))) from error


def to_yaml(config: BaseModel) -> str:
    """The resolved values, as `params.yaml` writes them."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump()))
