"""The sections of `params.yaml`: every key, its type, range and meaning. Imports no torch."""

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from modeling import IMAGE_CHANNELS, IMAGE_SIZE
from modeling.system.values import PathText, PositiveInt, Seconds, Section, Text

HiddenSize = Annotated[int, Field(gt=0, le=4096, multiple_of=8)]
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


def _check_image_size(value: object) -> object:
    numbers = value if isinstance(value, list) and len(value) == 2 else [value]
    if value is not None and not all(type(number) is int and 4 <= number <= 1024 for number in numbers):
        raise ValueError("must be a whole number of pixels or [height, width], each 4 to 1024")
    return value


ImageSize = Annotated[int | list[int] | None, BeforeValidator(_check_image_size)]
Channels = Literal[1, 3] | None
_MOST_DECAY = 80  # -log abar_T: exp(-87) is float32's smallest normal number


def shape_of_images(image_size: int | list[int] | None, channels: int | None) -> tuple[int, int, int]:
    """(C, H, W) by the keys image_size and channels of a data set."""
    size = IMAGE_SIZE if image_size is None else image_size
    height, width = (size, size) if isinstance(size, int) else size
    return IMAGE_CHANNELS if channels is None else channels, height, width


class Dataset(Section):
    name: Literal["cifar10", "shapes", "folder"]
    """The training images: CIFAR-10's photographs, drawn shapes, or the pictures of a folder."""
    root: PathText
    """The prepared data is in <root>/<name>/."""
    archive: PathText | None
    """cifar10: the archive, or its unpacked folder; a missing one is downloaded to this place."""
    urls: list[Text] | None
    """cifar10: addresses of the archive, tried in turn."""
    pictures: PathText | None
    """folder: the pictures, at any depth of this folder."""
    skip_unusable: bool | None = None  # which older files lack
    """folder: go on without pictures that cannot be used, instead of an error."""
    num_images: PositiveInt | None
    """Number of training images; null: all 50,000 of cifar10, all pictures of folder, 20,000 shapes."""
    seed: Annotated[int, Field(ge=0)] | None
    """shapes: which ones are drawn."""
    image_size: ImageSize = None  # which older files lack, as the next one
    """folder, shapes: height and width of the images in pixels, or [height, width]; null: 32."""
    channels: Channels = None
    """folder, shapes: 3 for colours, 1 for grey; null: 3."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return shape_of_images(self.image_size, self.channels)

    @property
    def folder(self) -> Path:
        """Where the prepared data is: train.npy, test.npy and manifest.json."""
        return Path(self.root) / self.name

    @model_validator(mode="after")
    def _fits_name(self) -> Self:
        needs = {"cifar10": ("archive", "urls"), "shapes": ("seed",), "folder": ("pictures",)}[self.name]
        keys = "archive", "urls", "pictures", "seed"
        keys += () if self.name == "folder" else ("skip_unusable",)
        keys += ("image_size", "channels") if self.name == "cifar10" else ()
        self._require(f"dataset.name={self.name}", keys, needs)
        if self.name == "cifar10" and self.num_images is not None and self.num_images > 50_000:
            raise ValueError(f"num_images must be at most 50000 with dataset.name=cifar10, got {self.num_images}")
        return self


class Model(Section):
    name: Literal["unet", "ddpm"]
    """The network: the course assignment's, or the design of Ho et al. 2020."""
    hidden_size: HiddenSize
    """Base width, in channels."""
    multipliers: list[Annotated[int, Field(gt=0, le=64)]] | None
    """ddpm: width of each level in units of hidden_size; 1 to 6 levels, each half as high as the one before."""
    num_blocks: Annotated[int, Field(gt=0, le=100)] | None
    """ddpm: residual blocks a level."""
    attention_resolutions: list[PositiveInt] | None
    """ddpm: heights with attention, in pixels (the images', half of it, a quarter, ...); the middle always has it."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None
    """ddpm: probability with which a value is set to 0 in training."""

    @model_validator(mode="after")
    def _fits_name(self) -> Self:
        keys = ("multipliers", "num_blocks", "attention_resolutions", "dropout")
        self._require(f"model.name={self.name}", keys, keys if self.name == "ddpm" else ())
        if self.multipliers is not None and not 1 <= len(self.multipliers) <= 6:
            raise ValueError(f"multipliers must have 1 to 6 entries, got {self.multipliers}")
        return self

    def check_images(self, image_shape: tuple[int, int, int]) -> None:
        """Raises ValueError unless the network takes images (C, H, W), and has levels of the heights with attention."""
        _, height, width = image_shape
        levels = 6 if self.multipliers is None else len(self.multipliers)
        multiple = 2 ** (levels - 1)
        if height % multiple or width % multiple:
            why = f"model.name={self.name}" if self.multipliers is None else f"model.multipliers={self.multipliers}"
            expected = f"height and width must be multiples of {multiple} with {why}"
            raise ValueError(f"dataset.image_size: {expected}, got {height} and {width}")
        heights = [height // 2**level for level in range(levels)]
        if not set(self.attention_resolutions or []) <= set(heights):
            raise ValueError(f"model.attention_resolutions must be among {heights}, got {self.attention_resolutions}")


class Diffusion(Section):
    num_timesteps: PositiveInt
    """T, the length of the chain. With fewer than 1000, scale betas by 1000/T."""
    schedule: Literal["linear", "cosine"]
    """How beta grows with the timestep: as in Ho et al. 2020, or in Nichol & Dhariwal 2021."""
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    """linear: beta_1 and beta_T, where 0 < beta_1 < beta_T < 1."""
    prediction: Literal["eps", "x_0", "v"]
    """What the network predicts: the noise, the clean image, or a mixture of both."""
    weighting: Literal["uniform", "min_snr_5"]
    """Of the loss at each timestep: all the same, or by the signal-to-noise ratio, cut at 5."""

    @model_validator(mode="after")
    def _fits_schedule(self) -> Self:
        self._require(
            f"diffusion.schedule={self.schedule}", ("betas",), ("betas",) if self.schedule == "linear" else ()
        )
        if self.betas is not None and not 0 < self.betas[0] < self.betas[1] < 1:
            raise ValueError(f"betas must satisfy 0 < beta_1 < beta_T < 1, got {self.betas}")
        if self.betas is not None:
            # -log abar_T, nearly: the mean of -log(1 - beta) over all beta between the two, T times
            low, high = ((1 - beta) * math.log1p(-beta) + beta for beta in self.betas)
            decay = self.num_timesteps * (high - low) / (self.betas[1] - self.betas[0])
            if decay > _MOST_DECAY:
                raise ValueError(
                    f"betas are too large for num_timesteps={self.num_timesteps}: x_T would hold exp(-{decay:.0f}) of "
                    f"the image's variance, expected at least exp(-{_MOST_DECAY}), such as with betas scaled by 1000/T"
                )
        return self


class Optimizer(Section):
    name: Literal["adam", "adamw", "muon", "sgd"]
    """Algorithm that updates the weights."""
    lr: Annotated[float, Field(ge=0)]
    """Learning rate, after the warm-up."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None
    """muon: decay of the running mean of the gradients; sgd: share of the last update that is kept."""
    weight_decay: Annotated[float, Field(ge=0)] | None
    """adamw: strength of the decay of weights."""
    lr_schedule: Literal["constant", "cosine"]
    """The learning rate after the warm-up; cosine: down to 0 at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)]
    """Steps in which the learning rate grows linearly from 0; cut to the run."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None
    """A longer gradient is scaled to this norm; null: no clipping."""

    @model_validator(mode="after")
    def _fits_name(self) -> Self:
        needs = {"adam": (), "adamw": ("weight_decay",), "muon": ("momentum",), "sgd": ("momentum",)}[self.name]
        self._require(f"optimizer.name={self.name}", ("momentum", "weight_decay"), needs)
        return self


class Train(Section):
    init: PathText | None = None  # older files lack the key
    """Weights to start from, of the same network: model.safetensors, a checkpoint or a run's folder; null: random."""
    num_epochs: Annotated[float, Field(gt=0, le=1e9)]
    """Length of the training, in passes over the training images; the last one may be a part, to the nearest step."""
    max_steps: PositiveInt | None
    """Length in steps; training ends at the earlier of the two. null: num_epochs alone counts."""
    batch_size: PositiveInt
    """Images a step; at most as many as there are training images."""
    random_flip: bool
    """Mirror each training image with probability 1/2."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    """Of the averaged weights, a step: nearer to 1 is a longer average."""
    log_every: PositiveInt
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: PositiveInt
    """Steps between two checkpoints."""
    max_skipped_in_row: PositiveInt
    """Steps in a row whose loss or gradient is not finite, before the run ends with an error."""
    sample_every: PositiveInt
    """Epochs between two grids of samples."""
    num_samples: PositiveInt
    """Images in a grid."""
    sample_steps: PositiveInt
    """Steps of a grid's sampler (cut to num_timesteps): ancestral, small variance, x_0 clipped."""
    num_eval_images: PositiveInt
    """Images of each split for the losses at the end (cut to what there is)."""


class Machine(Section):
    device: Literal["auto", "cpu", "cuda", "mps"]
    """What computes; auto: cuda if available, else mps, else cpu."""
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    """Of the network; auto: bf16 where the hardware computes in it, else fp32."""
    deterministic: bool
    """CUDA: the same bits every time, at some cost; the CPU always gives the same."""
    num_threads: PositiveInt | None
    """CPU: threads; null: one for each available CPU; 1 is best beside other work (docs/speed.md)."""
    keep_freed_memory: bool
    """CPU, Linux: the allocator gives nothing back to the system, which is much faster."""


class Runtime(Machine):
    name: RunName | None = None  # older files lack the key
    """The run's own name, in its folder, in tables and in W&B; null: made of what the run is."""
    compile: bool
    """Compile the network with torch.compile: a slow start, then faster steps."""
    micro_batch_size: PositiveInt | None
    """At most so many images go through the network at a time; null: chosen by the device."""
    num_workers: Annotated[int, Field(ge=0, le=64)]
    """Processes that make batches; 0: the training process does. No result depends on it."""
    processes: PositiveInt | None = None  # older files lack the key
    """So many processes share each batch: on GPUs one for each, on CPUs with their share of the threads; null: 1."""
    output_dir: PathText | None
    """The run's folder; null: runs/<runtime.name, or what the run is>-<hash>."""
    resume: PathText
    """auto: from the folder's newest checkpoint; never: from scratch; or a checkpoint or run's folder to start from."""
    max_seconds: Seconds | None
    """Seconds after which the run saves its state and ends; the same command resumes it. null: no limit."""
    checkpoint_seconds: Seconds | None
    """Seconds after which it saves even if checkpoint_every is not reached; null: not by time."""
    keep_checkpoints: PositiveInt
    """How many checkpoints are kept, the newest ones."""


class Wandb(Section):
    mode: Literal["offline", "online", "disabled"]
    """Weights & Biases: log into the run's folder, to the server (after `wandb login`), or not at all."""
    project: Text
    """Name of the project there."""
    name: Text | None
    """Name of the run there; null: runtime.name, or else the run folder's."""
    entity: Text | None = None  # older files lack this key and those below
    """User or team there; null: your default."""
    group: Text | None = None
    """Runs of one group are shown together there, such as a sweep."""
    tags: list[Text] = Field(default_factory=list)
    """Words to filter runs by there, such as [sweep,"lr 1e-3"]."""
    notes: Text | None = None
    """What you want to remember of the run, shown there."""
