"""The schemas of the scripts' own values in `conf/<script>.yaml`, which no stage reads. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from modeling.config import Config, HiddenSize, Machine, PathText, PositiveFloat, PositiveInt, Section, Text
from modeling.system.errors import UserError
from modeling.system.files import check_writable
from modeling.system.overrides import known_keys, nearest

REPOSITORY = Path(__file__).resolve().parents[1]  # where the files that a script takes by default are


def check_out(out: Path, overwrite: bool, *, is_folder: bool = False) -> None:
    """Rejects an output that exists, unless it may be replaced, and one that cannot be written.

    Raises:
        UserError: with the remedy.
        OSError: as `check_writable`.
    """
    if out.exists() and not overwrite:
        raise UserError(f"out={out}: exists already; name another one or set overwrite=true")
    check_writable(out, is_folder=is_folder)


def weights_file(checkpoint: Path, weights: str = "ema") -> Path:
    """The file of a run's folder (or of `outputs/`) that holds these weights; any other path as it is."""
    names = ["checkpoints/last.pt"] if weights == "raw" else ["model.safetensors", "checkpoints/last.pt"]
    return next((checkpoint / name for name in names if (checkpoint / name).is_file()), checkpoint)


class Sampling(Machine):
    """A trained model and how images are drawn from it."""

    checkpoint: PathText  # model.safetensors, a full checkpoint (.pt), or the run's folder
    weights: Literal["ema", "raw"]  # raw: the plain weights, which only a full checkpoint holds
    num_images: PositiveInt
    batch_size: PositiveInt | None  # images at a time; results depend on it by rounding only; null: 64, on CUDA 512
    sampler: Literal["ancestral", "ddim", "dpm_solver"]
    num_steps: PositiveInt | None  # network evaluations; null: every timestep
    variance: Literal["large", "small"] | None  # ancestral; null: small
    eta: Annotated[float, Field(ge=0, le=1)] | None  # ddim; null: 0
    clip_x0: bool
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    overwrite: bool

    @model_validator(mode="after")
    def _fits_sampler(self) -> Self:
        for key, sampler in (("variance", "ancestral"), ("eta", "ddim")):
            if getattr(self, key) is not None and self.sampler != sampler:
                raise ValueError(f"{key} must be null with sampler={self.sampler}, got {getattr(self, key)}")
        return self


class SampleConfig(Sampling):
    """All of `conf/sample.yaml`."""

    out: PathText  # *.png: one picture; *.npz: all images in an array; else a folder with a PNG for each image
    # out=*.png: grid of the images; path: how each forms; interpolation: rows between images 2k and 2k + 1
    picture: Literal["grid", "path", "interpolation"]

    @model_validator(mode="after")
    def _fits_out(self) -> Self:
        if not Path(self.out).name:
            raise ValueError(f"out must name a file or a folder, got {self.out}")
        if (suffix := Path(self.out).suffix) not in ("", ".png", ".npz") and not suffix[1:].isdigit():
            raise ValueError(f"out must end in .png or .npz, or name a folder, which has no suffix, got {self.out}")
        if self.picture != "grid" and not self.out.endswith(".png"):
            raise ValueError(f"picture={self.picture} needs out=*.png, got {self.out}")
        if self.picture != "grid" and self.num_images > 16:
            raise ValueError(
                f"picture={self.picture} has a row for each of at most 16 num_images, got {self.num_images}"
            )
        return self


class EvaluateConfig(Sampling):
    """All of `conf/evaluate.yaml`; `checkpoint` may also be "linear" or "gaussian" (`measures.linear_denoiser`)."""

    out: PathText  # a folder for evaluation.json, the samples and the pictures
    measures: Annotated[list[Literal["bits_per_dim", "heldout_loss", "encoder", "fid"]], Field(min_length=1)]
    samples: PathText | None  # an .npz of sample.py or another project, measured instead of new samples
    # The folder of prepared data; null: the checkpoint's own, or data/cifar10 for linear and gaussian.
    data: PathText | None
    bits_images: PositiveInt  # bits_per_dim: of the test images, at most all of them
    bits_timesteps: PositiveInt | None  # bits_per_dim: drawn for each image; null: all T
    loss_images: PositiveInt  # heldout_loss: of the test images, at most all of them
    encoder: PathText | None  # encoder: the file that train_encoder.py wrote; null: the repository's
    inception_weights: PathText | None  # fid: torch-fidelity's file; null: downloaded


class EncoderConfig(Machine):
    """All of `conf/encoder.yaml`."""

    precision: Literal["auto", "fp32", "bf16"]  # fp16 would need a scale of the loss
    out: PathText  # the file of weights; with controls, the one whose features are tried
    archive: PathText  # CIFAR-10's; downloaded there when it is missing
    urls: list[Text]
    controls: bool  # prints the controls' distances instead of training
    width: Annotated[HiddenSize, Field(le=256)]  # the features are 4 times as many
    num_epochs: PositiveInt
    batch_size: PositiveInt
    max_lr: PositiveFloat
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    overwrite: bool


class ConvertConfig(Section):
    """All of `conf/convert.yaml`."""

    # Ours (model.safetensors, .pt or a run's folder): to diffusers; a DDPMPipeline's folder: from diffusers.
    checkpoint: PathText
    out: PathText  # the DDPMPipeline's folder, or our *.safetensors
    overwrite: bool
    config: Config  # from diffusers: what our file says of a run; the folder's model and diffusion process replace its


class Range(Section):
    low: int | float
    high: int | float  # whole numbers are drawn where both ends are whole
    log: bool = False  # on a logarithmic scale

    @model_validator(mode="after")
    def _is_range(self) -> Self:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low must be below high, and above 0 with log, got {self.low} and {self.high}")
        return self


class SearchConfig(Section):
    """All of `conf/search.yaml`."""

    out: PathText  # folder: the journal, and a folder for each trial's run
    overrides: str  # of every trial, as on main.py's command line
    space: Annotated[dict[str, Range | list[int | float | str | bool]], Field(min_length=1)]  # a range, or choices
    num_trials: PositiveInt  # draws from the space
    seed: Annotated[int, Field(ge=0)]  # of the draws
    check_steps: list[PositiveInt]  # at which a trial's smoothed training loss is compared with the others'
    keep: Annotated[float, Field(gt=0, le=1)]  # a trial continues while its loss is in this best part of them

    @model_validator(mode="after")
    def _knows_keys(self) -> Self:
        known = list(known_keys(Config))
        for key, values in self.space.items():
            if key not in known:
                raise ValueError(f"space: {key}: unknown key; the nearest known one is {nearest(key, known)}")
            if isinstance(values, list) and not values:
                raise ValueError(f"space: {key}: expected at least one choice")
        return self
