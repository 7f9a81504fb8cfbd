"""The schemas of the scripts' own values in `conf/<script>.yaml`, which no stage reads. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from modeling.config import Config
from modeling.sections import HiddenSize, Machine
from modeling.system.errors import UserError
from modeling.system.files import check_writable
from modeling.system.overrides import known_keys, nearest
from modeling.system.values import PathText, PositiveFloat, PositiveInt, Section, Seed, Text

# Keys of sample.py -> the pictures that have them.
EDITING = {"image": ("inpaint", "variations"), "mask": ("inpaint",), "strength": ("variations",)}
EDITING |= {"num_resamplings": ("inpaint",), "jump_length": ("inpaint",)}
REPOSITORY = Path(__file__).resolve().parents[1]  # where the files that a script takes by default are
Measure = Literal["bits_per_dim", "bits_optimal", "heldout_loss", "train_loss", "solver_error", "encoder", "fid"]
PUBLISHED = Path("weights/cifar10.safetensors")  # the default of `checkpoint`


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
    """The file of a run's folder (or `outputs/`) with these weights, any other path, or the published file's place."""
    if checkpoint == PUBLISHED and not checkpoint.exists():
        return REPOSITORY / PUBLISHED
    names = ["checkpoints/last.pt"] if weights == "raw" else ["model.safetensors", "checkpoints/last.pt"]
    return next((checkpoint / name for name in names if (checkpoint / name).is_file()), checkpoint)


class Sampling(Machine):
    """A trained model and how images are drawn from it."""

    checkpoint: PathText
    """model.safetensors, a full checkpoint (.pt), a run's folder; of evaluate.py also linear, gaussian, empirical."""
    weights: Literal["ema", "raw"]
    """The averaged weights, or the plain ones, which only a full checkpoint holds."""
    batch_size: PositiveInt | None
    """Images at a time; changes rounding only. null: 64, on CUDA 512; for losses 250, fewer of large images."""
    sampler: Literal["ancestral", "ddim", "dpm_solver"]
    """How images are drawn: Algorithm 2 of Ho et al. 2020, DDIM, or DPM-Solver++(2M)."""
    num_steps: PositiveInt | None
    """Network evaluations for each image, at most the model's T; null: T."""
    variance: Literal["large", "small"] | None
    """ancestral: sigma^2 is beta (large) or the posterior's (small); null: small."""
    eta: Annotated[float, Field(ge=0, le=1)] | None
    """ddim: share of fresh noise, from none to that of ancestral; null: 0."""
    spacing: Literal["trailing", "linspace", "quadratic", "log_snr"] | None
    """Timesteps: T i/n, even in 1..T, T (i/n)^2, even in log-SNR; null: trailing for ancestral, else quadratic."""
    clip_x0: bool
    """Clip the predicted x_0 to [-1, 1] at each step."""
    seed: Seed
    """Of the noise; image i is a function of checkpoint, sampler, seed and i."""
    overwrite: bool
    """Replace an output that exists."""

    @model_validator(mode="after")
    def _fits_sampler(self) -> Self:
        for key, sampler in (("variance", "ancestral"), ("eta", "ddim")):
            if getattr(self, key) is not None and self.sampler != sampler:
                raise ValueError(f"{key} must be null with sampler={self.sampler}, got {getattr(self, key)}")
        return self


class SampleConfig(Sampling):
    """All of `conf/sample.yaml`."""

    out: PathText
    """*.png: one picture; *.npz: all images in an array; *.gif, *.webp: picture=path, moving; else a folder of PNGs."""
    picture: Literal["grid", "path", "interpolation", "inpaint", "variations"]
    """grid: images; path: how each forms; interpolation: between images; inpaint, variations: `image`, edited."""
    image: PathText | None
    """inpaint, variations: the picture to edit; its centre is reduced to the model's size."""
    mask: PathText | None
    """inpaint: a picture of the size of `image`, white where it is to be drawn, black where it is kept."""
    num_resamplings: PositiveInt | None
    """inpaint: how often each stretch of steps is taken, 1 for no resampling; null: 10."""
    jump_length: PositiveInt | None
    """inpaint: steps of the sampler in a stretch; null: 5."""
    strength: Annotated[float, Field(gt=0, le=1)] | None
    """variations: where the sampler begins, as a part of T; 1 leaves nothing of the image; null: 0.5."""
    num_images: PositiveInt | None
    """How many images are drawn, or rows of the interpolation; null: 64 in a grid, else 4."""
    scale: Annotated[int, Field(ge=1, le=32)] | None
    """Enlarges each pixel of a picture this many times; null: until the picture is 500 pixels wide."""

    @property
    def is_folder(self) -> bool:
        """Whether `out` is a folder of PNG files."""
        return Path(self.out).suffix not in (".npz", ".png", ".gif", ".webp")

    @model_validator(mode="after")
    def _fits_out(self) -> Self:
        if not Path(self.out).name:
            raise ValueError(f"out must name a file or a folder, got {self.out}")
        suffix, kinds = Path(self.out).suffix, (".png", ".gif", ".webp") if self.picture == "path" else (".png",)
        if self.picture == "grid" and suffix not in ("", ".png", ".npz") and not suffix[1:].isdigit():
            raise ValueError(
                "out must end in .png or .npz, or name a folder, which has no suffix "
                f"(.gif and .webp are for picture=path), got {self.out}"
            )
        if self.picture != "grid" and suffix not in kinds:
            wanted = " or ".join(f"*{kind}" for kind in kinds)
            raise ValueError(f"picture={self.picture} needs out={wanted}, got {self.out}")
        if self.picture != "grid" and self.num_images is not None and self.num_images > 16:
            raise ValueError(f"num_images must be at most 16 with picture={self.picture}, got {self.num_images}")
        if self.scale is not None and (suffix == ".npz" or self.is_folder):
            raise ValueError(f"scale must be null with out={self.out}, whose images are not enlarged, got {self.scale}")
        return self

    @model_validator(mode="after")
    def _fits_picture(self) -> Self:
        for key, pictures in EDITING.items():
            value = getattr(self, key)
            if self.picture not in pictures and value is not None:
                raise ValueError(f"{key} must be null with picture={self.picture}, got {value}")
            if self.picture in pictures and key in ("image", "mask") and value is None:
                raise ValueError(f"{key} must be the file of a picture with picture={self.picture}, got null")
        return self


class EvaluateConfig(Sampling):
    """All of `conf/evaluate.yaml`; `checkpoint` may also be one of `measures.trained.COMPUTED`."""

    out: PathText
    """A folder for evaluation.json, the samples and the pictures."""
    measures: Annotated[list[Measure], Field(min_length=1)]
    """What is measured."""
    num_images: PositiveInt
    """How many samples are drawn for encoder and fid."""
    samples: PathText | None
    """An .npz of sample.py or another project, measured instead of new samples."""
    data: PathText | None
    """Folder of prepared data; null: the checkpoint's own, or data/cifar10 where it is only a name (linear, ...)."""
    bits_images: PositiveInt
    """bits_per_dim, bits_optimal: number of test images, at most all of them."""
    bits_timesteps: PositiveInt | None
    """bits_per_dim, bits_optimal: timesteps drawn for each image; null: all T."""
    loss_images: PositiveInt
    """heldout_loss, train_loss: number of test or training images, at most all of them."""
    solver_images: Annotated[int, Field(ge=2)]
    """solver_error: number of images that each of its samplers draws."""
    encoder: PathText | None
    """encoder: the file that train_encoder.py wrote; null: the repository's."""
    inception_weights: PathText | None
    """fid: torch-fidelity's file; null: downloaded."""

    @model_validator(mode="after")
    def _fits_measures(self) -> Self:
        for key, names in (("encoder", ["encoder"]), ("inception_weights", ["fid"]), ("samples", ["encoder", "fid"])):
            if getattr(self, key) is not None and not set(names) & set(self.measures):
                raise ValueError(f"{key} must be null without {' or '.join(names)} in measures, got {self.measures}")
        return self


class EncoderConfig(Machine):
    """All of `conf/encoder.yaml`."""

    precision: Literal["auto", "fp32", "bf16"]  # fp16 would need a scale of the loss
    """Of the network; auto: bf16 where the hardware computes in it, else fp32."""
    out: PathText
    """The file of weights; with controls, the one whose features are tried."""
    archive: PathText
    """CIFAR-10's; downloaded there when it is missing."""
    urls: list[Text]
    """Addresses of the archive, tried in turn."""
    controls: bool
    """Print the controls' distances instead of training."""
    width: Annotated[HiddenSize, Field(le=256)]
    """Of the first level, in channels; the features are 4 times as many."""
    num_epochs: PositiveInt
    """Length of the training, in passes over the training images."""
    batch_size: PositiveInt
    """Images a step."""
    max_lr: PositiveFloat
    """Learning rate at its height."""
    seed: Seed
    """Of the weights and the order of the images."""
    overwrite: bool
    """Replace an output that exists."""


class ConvertConfig(Section):
    """All of `conf/convert.yaml`."""

    checkpoint: PathText
    """Ours (model.safetensors, .pt or a run's folder): to diffusers; a DDPMPipeline's folder: from diffusers."""
    out: PathText
    """The DDPMPipeline's folder, or our *.safetensors."""
    overwrite: bool
    """Replace an output that exists."""
    config: Config
    """From diffusers: what our file says of a run; the folder's network and diffusion process replace its own."""


class Range(Section):
    low: int | float
    """The lowest value."""
    high: int | float
    """The highest value; whole numbers are drawn where both ends are whole."""
    log: bool = False
    """Draw on a logarithmic scale."""

    @model_validator(mode="after")
    def _is_range(self) -> Self:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low must be below high, and above 0 with log, got {self.low} and {self.high}")
        return self


class SearchConfig(Section):
    """All of `conf/search.yaml`."""

    out: PathText
    """A folder for the journal, and a folder for each trial's run."""
    overrides: str
    """Values of every trial, as on main.py's command line."""
    space: Annotated[dict[str, Range | list[int | float | str | bool]], Field(min_length=1)]
    """For each key of main.py a range or the choices."""
    num_trials: PositiveInt
    """Draws from the space."""
    seed: Annotated[int, Field(ge=0)]
    """Of the draws."""
    check_steps: list[PositiveInt]
    """Steps at which a trial's smoothed training loss is compared with the others'."""
    keep: Annotated[float, Field(gt=0, le=1)]
    """A trial continues while its loss is in this best part of them."""

    @model_validator(mode="after")
    def _knows_keys(self) -> Self:
        known = list(known_keys(Config))
        for key, values in self.space.items():
            if key not in known:
                raise ValueError(f"space: {key}: unknown key; the nearest known one is {nearest(key, known)}")
            if isinstance(values, list) and not values:
                raise ValueError(f"space: {key}: expected at least one choice")
        return self
