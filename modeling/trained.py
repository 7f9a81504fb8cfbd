"""A trained model as the scripts use it: from a file and the options of `sample.py` or `evaluate.py` to images."""

from pathlib import Path

from torch import Tensor

from modeling import build
from modeling.checkpoint import load_weights
from modeling.config import Config, ConfigError, parse
from modeling.diffusion import DiffusionModel
from modeling.files import sha256_of
from modeling.images import to_model_range
from modeling.linear_denoiser import fit_linear_denoiser
from modeling.options import Sampling
from modeling.runtime import place
from modeling.sampling import draw_samples
from modeling.schedules import linear_betas, schedule_tables

SIZE = (build.IMAGE_CHANNELS, build.IMAGE_SIZE, build.IMAGE_SIZE)
LINEAR = {"linear": False, "gaussian": True}  # names in the place of a checkpoint -> whether isotropic
LINEAR_BETAS, LINEAR_TIMESTEPS = (1e-4, 0.02), 1000  # the paper's process


class TrainedModel:
    """A diffusion model on this machine's device, ready to be sampled and measured.

    Args:
        options: how images are drawn from it, and on which machine.
        model: on the CPU.
        identity: of its weights, plain values.

    Raises:
        ConfigError: for options that the machine or the model does not have.
    """

    def __init__(self, options: Sampling, model: DiffusionModel, identity: dict):
        try:
            self.device, self.precision = build.build_runtime(options)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.options = options
        self.num_steps = options.num_steps or model.num_timesteps
        if self.num_steps > model.num_timesteps:
            raise ConfigError(f"num_steps must be at most {model.num_timesteps}, got {options.num_steps}")
        self.model = place(model, self.device)
        self.batch_size = options.batch_size or (512 if self.device.type == "cuda" else 64)
        self.identity = identity | {"precision": self.precision}

    @property
    def sampler(self) -> dict:
        """The options of `samplers.sample_images`, with what is null replaced by its meaning."""
        options = {"sampler": self.options.sampler, "num_steps": self.num_steps, "clip_x0": self.options.clip_x0}
        if self.options.sampler == "ancestral":
            options["variance"] = self.options.variance or "small"
        elif self.options.sampler == "ddim":
            options["eta"] = self.options.eta or 0.0
        return options | {"seed": self.options.seed}

    @property
    def samples_identity(self) -> dict:
        """Everything that image i depends on beside i."""
        return self.identity | self.sampler

    def draw(self, folder: Path) -> Tensor:
        """The images that the options ask for, (N, 3, H, W) uint8, through parts in `folder` (see `draw_in_parts`)."""
        return draw_samples(
            self.model, self.options.num_images, SIZE, self.device, folder, self.samples_identity,
            batch_size=self.batch_size, precision=self.precision, replace=self.options.overwrite, **self.sampler,
        )  # fmt: skip


def load_trained(options: Sampling) -> tuple[TrainedModel, Config]:
    """The model of a checkpoint, and the configuration it was trained with.

    Raises:
        CheckpointError: for a file that is damaged or no checkpoint.
        FileNotFoundError: for a missing one.
        ValueError: for weights that do not fit their configuration, or options that do not fit machine or model.
    """
    path = Path(options.checkpoint)
    digest = sha256_of(path) if path.is_file() else None
    stored, weights = load_weights(path, options.weights)
    if sha256_of(path) != digest:
        raise ConfigError(f"checkpoint={path}: was replaced while it was read, by a run that is at work: try again")
    config = parse(stored, Config)
    identity = {"checkpoint": path.name, "checkpoint_sha256": digest, "weights": options.weights}
    return TrainedModel(options, build.build_trained_model(config, weights), identity), config


def fit_linear(options: Sampling, images: Tensor, images_sha256: str) -> TrainedModel:
    """What `options.checkpoint` = "linear" or "gaussian" names: the best linear denoiser of training images (uint8)."""
    abar = schedule_tables(linear_betas(*LINEAR_BETAS, LINEAR_TIMESTEPS))["alphas_cumprod"]
    denoiser = fit_linear_denoiser(to_model_range(images), abar, is_isotropic=LINEAR[options.checkpoint])
    model = DiffusionModel(denoiser, LINEAR_BETAS, LINEAR_TIMESTEPS)
    return TrainedModel(options, model, {"checkpoint": options.checkpoint, "fitted_to_sha256": images_sha256})
