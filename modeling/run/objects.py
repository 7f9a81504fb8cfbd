"""The objects of a run, and what is done with them outside training steps: loading, saving, sampling."""

import json
import math
import platform
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from modeling import build
from modeling.checkpoint import Checkpoint, CheckpointError, load_fitting
from modeling.config import Config
from modeling.data import load_images
from modeling.distributed.processes import ALONE, Processes
from modeling.ema import Ema
from modeling.images import save_grid
from modeling.run.bookkeeping import Bookkeeping, TrainState
from modeling.run.folder import RunFolder, describe_state
from modeling.run.identity import ROOT, describe_differences, differences
from modeling.run.records import Tracker
from modeling.run.step import Step
from modeling.runtime import evaluation_batch_size, place, resolve_micro_batch_size
from modeling.samplers import Sampler, sample_images
from modeling.stage import Manifest
from modeling.system.errors import UserError
from modeling.system.progress import progress_bar
from modeling.system.reading import read_yaml


class Run:
    """The objects that a configuration describes.

    Args:
        config: the validated configuration.
        manifest: of the prepared data.
        last_step: the length of the run in steps.
        folder: the run's own.
        device, precision: as `build_runtime` found them.
        processes, weights: that share each batch; that the network starts from, None for random ones.

    Raises:
        UserError: if the data is not what was prepared, or has fewer images than a batch, or a batch fewer images than
            there are processes.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        last_step: int,
        folder: RunFolder,
        device: torch.device,
        precision: str,
        processes: Processes = ALONE,
        weights: dict[str, Tensor] | None = None,
    ):
        self.config, self.last_step, self.folder, self.processes = config, last_step, folder, processes
        self.device, self.precision = device, precision
        _, height, width = config.dataset.image_shape
        self.micro_batch_size = resolve_micro_batch_size(
            config.runtime.micro_batch_size, device, config.train.batch_size, config.model.hidden_size, height * width
        )
        self.images_at_a_time = evaluation_batch_size(config.runtime.micro_batch_size, height * width)
        share = processes.share(config.train.batch_size, self.micro_batch_size)
        data = config.dataset.folder
        self.images = {split: load_images(data, split, manifest) for split in ("train", "test")}
        self.batches = build.build_batches(config, self.images["train"], self.device, share.rows)
        self.model = place(build.build_model(config, weights), self.device)
        self.ema = Ema(self.model.eps_model, config.train.ema_decay)
        self.ema_model = build.build_diffusion(config.diffusion, self.ema.module).to(self.device)
        self.optimizer = build.build_optimizer(config.optimizer, self.model)
        if config.runtime.compile:
            self.model.compile()  # its loss, which only training computes: grids and measures need no graph
        self.state = TrainState()

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def describe(self) -> str:
        """What will run, for the terminal: what differs from params.yaml, then the rest."""
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        threads += f", {self.processes.count} processes" if self.processes.count > 1 else ""
        at = f", from step {self.state.step:,}" if self.state.step else ""
        changed = differences(read_yaml(ROOT / "params.yaml", dict[str, Any]), self.config.model_dump())
        lines = [f"  {key:<32}{json.dumps(a)} -> {json.dumps(b)}\n" for key, (a, b) in changed.items()]
        return (
            f"params.yaml{', with' if lines else ''} (all values: config.yaml)\n{''.join(lines)}\n"
            f"model       {self.config.model.name}, {self.num_parameters:,} parameters\n"
            f"device      {self.device}{threads}, {self.precision}, {self.micro_batch_size} images at a time\n"
            f"training    {self.last_step:,} steps of {self.batches.batch_size} images, "
            f"{self.batches.steps_per_epoch:,} steps an epoch{at}\n"
            f"run folder  {self.folder.path}/"
        )

    @property
    def environment(self) -> dict[str, str | int]:
        """What the last bits of the result depend on, in addition to the identity."""
        return {
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine(),
            "precision": self.precision,
            "micro_batch_size": self.micro_batch_size,
            "threads": torch.get_num_threads(),
            "processes": self.processes.count,
        }

    def load(self, origin: Checkpoint | None) -> None:
        """Loads the folder's newest valid checkpoint, or else `origin`, if there is one.

        Args:
            origin: the checkpoint named by `runtime.resume`, if one is.

        Raises:
            UserError: if none of the folder's checkpoints is valid, or one does not fit.
        """
        content = self.folder.load_newest() or origin
        if content is None:
            return
        name = self.folder.started_from = describe_state(content)
        try:
            self.state = TrainState(**content["state"])
            load_fitting(self.model.eps_model, content["model"], name)
            load_fitting(self.ema.module, content["ema"], name)
            load_fitting(self.optimizer, content["optimizer"], name)
        except (CheckpointError, TypeError) as error:
            raise UserError(f"the checkpoint cannot be resumed: {error}") from error
        saved = {"processes": 1} | content["about"].get("environment", {})  # older checkpoints do not name it
        if changed := differences(saved, self.environment):
            how = describe_differences(changed, "checkpoint")
            print(
                f"warning: the result may differ in the last bits from that of an uninterrupted run ({how})",
                file=sys.stderr,
            )

    def make_step(self) -> Step:
        """The training step, which continues from the present state."""
        return Step(
            self.model,
            self.ema,
            self.optimizer,
            self.state,
            self.config.seed,
            build.build_learning_rate(self.config.optimizer, self.last_step),
            precision=self.precision,
            micro_batch_size=self.micro_batch_size,
            max_grad_norm=self.config.optimizer.max_grad_norm,
            processes=self.processes,
            batch_size=self.batches.batch_size,
        )

    def make_books(self) -> Bookkeeping:
        """The bookkeeping, which continues from the present state."""
        train = self.config.train
        return Bookkeeping(
            self.state,
            steps_per_epoch=self.batches.steps_per_epoch,
            last_step=self.last_step,
            log_every=train.log_every,
            checkpoint_every=train.checkpoint_every,
            sample_every=train.sample_every,
            checkpoint_seconds=self.config.runtime.checkpoint_seconds or math.inf,
            max_skipped_in_row=train.max_skipped_in_row,
            precision=self.precision,
            max_grad_norm=self.config.optimizer.max_grad_norm,
        )

    def save(self) -> None:
        """Writes the checkpoint."""
        self.folder.save(
            about={"images": self.state.step * self.batches.batch_size, "environment": self.environment},
            config=self.config.model_dump(),
            state=self.state,
            model=self.model.eps_model,
            ema=self.ema.module,
            optimizer=self.optimizer,
        )

    def sample(self, tracker: Tracker | None) -> None:
        """Grids from raw and averaged weights, with the same noise every time; whoever has a tracker writes them."""
        models = {"raw": self.model, "ema": self.ema_model}
        sampler = Sampler(num_steps=min(self.config.train.sample_steps, self.model.num_timesteps))

        def draw(kind: str) -> Tensor:
            bar = partial(progress_bar, desc=f"sampling ({kind})", leave=False)
            shape, total, most = self.config.dataset.image_shape, self.config.train.num_samples, self.images_at_a_time
            parts = [
                sample_images(
                    models[kind], min(most, total - start), shape, self.device, sampler,
                    seed=self.config.seed, first_image=start, precision=self.precision, bar=bar,
                ).cpu()
                for start in range(0, total, most)
            ]  # fmt: skip
            return torch.cat(parts)

        for kind, images in zip(models, self.processes.map(draw, list(models)), strict=True):
            if tracker is not None:
                path = self.folder.path / "samples" / kind / f"{self.state.step}.png"
                about = {"step": self.state.step, "weights": kind, "sampler": sampler.name}
                about |= {"num_steps": sampler.num_steps, "seed": self.config.seed}
                tracker.image(self.state.step, f"samples/{kind}", save_grid(images, path, about=about))
