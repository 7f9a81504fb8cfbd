"""Measures of what the network predicts: bounds in bits per dimension, the loss on held-out or training images."""

import math
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from modeling.evaluation import BitsPerDim, measure_errors, optimal_variances, summarise
from modeling.heldout import denoising_loss
from modeling.measures.evaluation_file import Record
from modeling.measures.resumable import advancing, draw_in_parts
from modeling.measures.subject import Subject
from modeling.runtime import check_finite, evaluation_batch_size
from modeling.system.progress import progress_bar

_NUM_TERMS = 10  # of the rate, in a record
_VARIANCE_IMAGES = 64  # training images from which optimal variances are computed


class BitsMeasure:
    """The bound with both variances, x_0 raw and clipped."""

    def __init__(self, subject: Subject):
        self.trained, self.folder, options = subject.trained, subject.folder, subject.options
        self.replace, most = options.overwrite, self.trained.model.num_timesteps - 1
        self.columns = most if options.bits_timesteps is None else min(options.bits_timesteps, most)
        self.images = subject.data.test[: options.bits_images]
        self.identity = self.trained.identity | subject.data.identity
        self.identity |= {
            "split": "test",
            "num_images": len(self.images),
            "num_timesteps": most + 1,
            "timesteps_per_image": self.columns,
        }

    def take(self) -> Record:
        """Raises FloatingPointError for a network that predicts numbers which are not finite."""
        errors = self.measure_errors("bits_per_dim.partial", self.images, self.columns)
        values: dict[str, Any] = {
            f"{variance}, {'clipped' if clip_x0 else 'raw'}": _plain(
                summarise(self.trained.model, errors, variance, clip_x0=clip_x0)
            )
            for variance in ("large", "small")
            for clip_x0 in (False, True)
        }
        return {"values": values, "identity": self.identity | self.trained.environment}

    def measure_errors(
        self, folder: str, images: Tensor, timesteps_per_image: int, decoder_variance: float | None = None
    ) -> Tensor:
        """Batch by batch, each kept: a stopped process leaves them for the next one."""
        trained, num_evaluations = self.trained, timesteps_per_image + 1
        with progress_bar(total=len(images) * num_evaluations, desc="bits/dim", unit="evaluation") as bar:

            def draw(start: int, count: int) -> Tensor:
                return measure_errors(
                    trained.model,
                    images[start : start + count],
                    first_image=start,
                    timesteps_per_image=timesteps_per_image,
                    decoder_variance=decoder_variance,
                    batch_size=trained.batch_size,
                    precision=trained.precision,
                    bar=advancing(bar, start * num_evaluations, count * trained.processes.count),
                )

            errors = draw_in_parts(
                self.folder / folder,
                self.identity,
                len(images),
                trained.batch_size,
                draw,
                replace=self.replace,
                processes=trained.processes,
            )
        check_finite(errors, "the bound", trained.precision)
        return errors


class OptimalBitsMeasure(BitsMeasure):
    """The bound with x_0 clipped, and at each timestep the variance that is best for training images."""

    def __init__(self, subject: Subject):
        super().__init__(subject)
        self.training_images = subject.data.train[:_VARIANCE_IMAGES]
        self.identity |= {"variance_images": len(self.training_images)}

    def take(self) -> Record:
        """Raises FloatingPointError for a network that predicts numbers which are not finite."""
        model, folder = self.trained.model, "bits_optimal.partial"
        errors = self.measure_errors(f"{folder}/train", self.training_images, model.num_timesteps - 1)
        variances = optimal_variances(model, errors, clip_x0=True)
        errors = self.measure_errors(f"{folder}/test", self.images, self.columns, variances[0].item())
        values: dict[str, Any] = {"optimal, clipped": _plain(summarise(model, errors, variances, clip_x0=True))}
        return {"values": values, "identity": self.identity | self.trained.environment}


def _plain(bound: BitsPerDim) -> dict[str, Any]:
    """As plain values, the terms of the rate in at most ten parts."""
    found = asdict(bound)
    bounds, terms = found.pop("bounds").tolist(), found.pop("terms").tolist()
    if math.isnan(bound.standard_error):
        found["standard_error"] = None
    found["rate_by_timestep"] = {
        f"{bounds[part[0]]}-{bounds[part[-1] + 1] - 1}": sum(terms[i] for i in part)
        for part in torch.arange(len(terms)).tensor_split(_NUM_TERMS)
        if len(part)
    }
    return found


class LossMeasure:
    """The loss on held-out or training images (`modeling.heldout`)."""

    def __init__(self, subject: Subject, split: Literal["test", "train"] = "test"):
        self.trained, self.images = subject.trained, getattr(subject.data, split)[: subject.options.loss_images]
        self.identity = self.trained.identity | subject.data.identity
        self.identity |= {"split": split, "num_images": len(self.images)}

    def take(self) -> Record:
        """Raises FloatingPointError for a loss that is not finite."""
        trained, desc = self.trained, f"loss ({self.identity['split']} images)"
        total, bins = denoising_loss(
            trained.model, self.images, trained.device, precision=trained.precision, desc=desc,
            batch_size=evaluation_batch_size(trained.options.batch_size, math.prod(self.images.shape[2:])),
            processes=trained.processes,
        )  # fmt: skip
        abars = trained.model.schedules_float64["alphas_cumprod"]  # the loss is comparable for one process only
        process = {"num_timesteps": trained.model.num_timesteps, "alphas_cumprod": [abars[1].item(), abars[-1].item()]}
        identity = self.identity | process | trained.environment
        return {"values": {"total": total, "bins": bins}, "identity": identity}
