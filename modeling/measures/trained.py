"""A trained model as the scripts use it: from a file and the options of `sample.py` or `evaluate.py` to images."""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling import IMAGE_SHAPE, build
from modeling.checkpoint import load_weights
from modeling.config import Trained, parse
from modeling.diffusion import DiffusionModel
from modeling.distributed.processes import ALONE, Processes
from modeling.images import to_model_range, to_uint8
from modeling.measures.empirical_denoiser import EmpiricalDenoiser
from modeling.measures.linear_denoiser import fit_linear_denoiser
from modeling.measures.resumable import advancing, draw_in_parts
from modeling.options import EvaluateConfig, Sampling, weights_file
from modeling.runtime import check_finite, limit_threads, place
from modeling.samplers import Sampler, sample_images
from modeling.schedules import linear_betas, schedule_tables
from modeling.system.errors import UserError
from modeling.system.files import sha256_of
from modeling.system.progress import progress_bar
from modeling.system.reading import reading

# Names instead of a checkpoint, of denoisers that are computed from training images, for the paper's process.
COMPUTED = ("linear", "gaussian", "empirical")
COMPUTED_BETAS, COMPUTED_TIMESTEPS = (1e-4, 0.02), 1000


class TrainedModel:
    """A diffusion model on this machine's device, ready to be sampled and measured.

    Args:
        options: how images are drawn from it, and on which machine.
        model: on the CPU.
        identity: of its weights, plain values.
        image_shape: (C, H, W) of its images.
        processes: that share the work.

    Raises:
        UserError: for options that the machine or the model does not have.
    """

    def __init__(
        self,
        options: Sampling,
        model: DiffusionModel,
        identity: dict,
        image_shape: tuple[int, int, int] = IMAGE_SHAPE,
        processes: Processes = ALONE,
    ):
        self.device, self.precision = build.build_runtime(options)
        processes.use(self.device)
        self.options, self.image_shape, self.processes = options, image_shape, processes
        self.num_steps = model.num_timesteps if options.num_steps is None else options.num_steps
        if self.num_steps > model.num_timesteps:
            raise UserError(f"num_steps must be at most {model.num_timesteps}, got {options.num_steps}")
        self.sampler = Sampler(
            options.sampler, self.num_steps, options.clip_x0, options.variance, options.eta, options.spacing
        )
        self.model = place(model, self.device)
        default = 512 if self.device.type == "cuda" else 64
        self.batch_size = default if options.batch_size is None else options.batch_size
        self.identity = identity | {"precision": self.precision}

    @property
    def environment(self) -> dict:
        """What the last bits of a number depend on, beside the size of the batches."""
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type
        return {"device": device, "threads": torch.get_num_threads(), "torch": version("torch")}

    @property
    def samples_identity(self) -> dict:
        """Everything that image i depends on beside i, up to rounding (the batches' size, threads, machine)."""
        values = {key: value for key, value in asdict(self.sampler).items() if value is not None}
        if values["spacing"] == "trailing":
            del values["spacing"]  # no key, as in the files of before there was a choice
        return self.identity | {"sampler": values.pop("name"), **values, "seed": self.options.seed}

    def draw(self, folder: Path, num_images: int) -> Tensor:
        """Images 0 to num_images - 1, as the options say, through parts in `folder` (`draw_in_parts`), with a bar.

        Every process gets all of them.

        Returns:
            (N, C, H, W) uint8.

        Raises:
            FloatingPointError: for a sample that is not finite.
            UserError: as `draw_in_parts`.
        """
        num_steps = self.num_steps
        with progress_bar(total=num_images * num_steps, unit="image", unit_scale=1 / num_steps, desc="sampling") as bar:

            def draw(start: int, count: int) -> Tensor:
                images = sample_images(
                    self.model, count, self.image_shape, self.device, self.sampler, seed=self.options.seed,
                    first_image=start, precision=self.precision,
                    bar=advancing(bar, start * num_steps, count * self.processes.count),
                )  # fmt: skip
                check_finite(images, "a sample", self.precision)
                return to_uint8(images)

            return draw_in_parts(
                folder, self.samples_identity, num_images, self.batch_size, draw, replace=self.options.overwrite,
                processes=self.processes,
            )  # fmt: skip


def load_trained(options: Sampling, processes: Processes = ALONE) -> tuple[TrainedModel, dict[str, Any]]:
    """The model of a checkpoint, and the configuration it was trained with, of which model and diffusion are checked.

    Raises:
        CheckpointError: for a file that is damaged or no checkpoint.
        FileNotFoundError: for a missing one.
        UserError: for weights that do not fit their configuration, or options that do not fit machine or model.
    """
    path = weights_file(Path(options.checkpoint), options.weights)
    if path.is_dir():
        raise UserError(f"checkpoint={path}: expected a file, or a run's folder that holds weights={options.weights}")
    digest = sha256_of(path)
    stored, weights = load_weights(path, options.weights)
    if sha256_of(path) != digest:
        raise UserError(f"checkpoint={path}: was replaced by a run while it was read: try again")
    with reading(path, "trained model of this project"):
        config = parse(stored, Trained)
    identity = {"checkpoint": path.name, "checkpoint_sha256": digest, "weights": options.weights}
    model = build.build_trained_model(config, weights)
    return TrainedModel(options, model, identity, config.image_shape, processes), stored


def compute_denoiser(
    options: EvaluateConfig, images: Tensor, images_sha256: str, processes: Processes = ALONE
) -> TrainedModel:
    """What a name among COMPUTED means, of training images (uint8).

    Raises:
        UserError: for measures that the empirical denoiser does not have.
    """
    is_empirical = options.checkpoint == "empirical"
    if is_empirical and not set(options.measures) <= {"heldout_loss", "train_loss"}:
        raise UserError(
            f"measures=[{','.join(options.measures)}]: checkpoint=empirical has losses only, because its samples are "
            "the training images and every other image is unlikely to it: expected measures=[heldout_loss,train_loss]"
        )
    limit_threads(options.num_threads)
    abar = schedule_tables(linear_betas(*COMPUTED_BETAS, COMPUTED_TIMESTEPS))["alphas_cumprod"]
    if is_empirical:
        denoiser = EmpiricalDenoiser(images, abar)
    else:
        denoiser = fit_linear_denoiser(to_model_range(images), abar, is_isotropic=options.checkpoint == "gaussian")
    model = DiffusionModel(denoiser, COMPUTED_BETAS, COMPUTED_TIMESTEPS)
    identity = {"checkpoint": options.checkpoint, "fitted_to_sha256": images_sha256}
    _, channels, height, width = images.shape
    return TrainedModel(options, model, identity, (channels, height, width), processes)
