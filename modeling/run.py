"""One run, from a configuration to its folder: builds the objects, trains, samples, measures, records.

The folder holds config.yaml, metrics.jsonl, metrics.json, samples/, checkpoints/last.pt (the full state), and
model.safetensors (averaged weights). metrics.json is written last: where it stands, the run is finished.
"""

import json
import shutil
from pathlib import Path

import torch

from modeling import build
from modeling.checkpoint import CheckpointError, export_weights, load_checkpoint, save_checkpoint
from modeling.config import Config, to_yaml
from modeling.data import load_images
from modeling.ema import Ema
from modeling.evaluation import denoising_loss
from modeling.files import code_sha256, write_atomically
from modeling.images import save_grid
from modeling.progress import progress_bar
from modeling.runtime import autocast, keep_freed_memory, peak_memory_bytes
from modeling.samplers import sample_respaced
from modeling.seeding import image_noise
from modeling.stage import run_name
from modeling.tracking import Tracker, write_csv
from modeling.training import RunStep, TrainState, fit, generate_samples

ARTEFACTS = ("config.yaml", "metrics.json", "metrics.jsonl", "loss.csv", "heldout.csv", "samples", "model.safetensors")


class RunError(Exception):
    """A run that cannot be started; the message says what stands in its way."""


class Run:
    """The objects of a run, and what happens to them between training steps.

    Args:
        config: the validated configuration.
        manifest: of the prepared data.

    Raises:
        RunError: for a device that is not here, or data that is not what was prepared.
    """

    def __init__(self, config: Config, manifest: dict):
        self.config = config
        self.data_sha256, self.code_sha256 = manifest["files"]["train.npy"]["sha256"], code_sha256()
        try:
            self.device, self.precision = build.build_runtime(config.runtime)
            data = Path(config.dataset.root) / config.dataset.name
            self.images = {split: load_images(data, split, manifest) for split in ("train", "test")}
            self.batches = build.build_batches(config, self.images["train"])
        except ValueError as error:
            raise RunError(str(error)) from error
        if self.device.type == "cpu":
            keep_freed_memory()
        self.last_step = self.batches.steps_per_epoch * config.train.num_epochs
        if config.train.max_steps is not None:
            self.last_step = min(self.last_step, config.train.max_steps)
        self.name = run_name(config, self.last_step, self.data_sha256, self.code_sha256)
        self.folder = Path(config.runtime.output_dir or f"runs/{self.name}")

        self.model = build.build_model(config)
        self.ema = Ema(self.model.eps_model, config.train.ema_decay)
        self.ema_model = build.build_diffusion(config, self.ema.module).to(self.device)
        self.model.to(self.device)
        self.optimizer = build.build_optimizer(config.optimizer, self.model)
        if config.runtime.compile:
            self.model.eps_model.compile()
        self.state = TrainState()

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoints" / "last.pt"

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.json"

    @property
    def is_finished(self) -> bool:
        return self.metrics_path.exists() and json.loads(self.metrics_path.read_text())["steps"] == self.last_step

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def describe(self) -> str:
        """What will run, for the terminal."""
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        at = f", from step {self.state.step:,}" if self.state.step else ""
        return (
            f"{to_yaml(self.config)}\n"
            f"model       {self.config.model.name}, {self.num_parameters:,} parameters\n"
            f"device      {self.device}{threads}, {self.precision}\n"
            f"training    {self.last_step:,} steps of {self.batches.batch_size} images, "
            f"{self.batches.steps_per_epoch:,} steps an epoch{at}\n"
            f"run folder  {self.folder}/\n"
        )

    def claim_folder(self) -> None:
        """Makes the folder this run's own; raises RunError where it holds another run or any other files."""
        marker = self.folder / "run.json"
        found = json.loads(marker.read_text())["run"] if marker.exists() else None
        if found != self.name and self.folder.exists() and any(self.folder.iterdir()):
            holder = f"the run {found}" if found else "other files"
            raise RunError(f"{self.folder} holds {holder}, not {self.name}: set runtime.output_dir to another folder")
        write_atomically(marker, (json.dumps({"run": self.name}) + "\n").encode())
        write_atomically(self.folder / "config.yaml", to_yaml(self.config).encode())

    def load(self) -> None:
        """Takes up the folder's checkpoint, if it has one."""
        if not self.checkpoint_path.exists():
            return
        try:
            content = load_checkpoint(self.checkpoint_path)
        except CheckpointError as error:
            raise RunError(f"{error}; delete {self.folder} to start anew") from error
        self.state = TrainState(**content["state"])
        self.model.eps_model.load_state_dict(content["model"])
        self.ema.module.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])

    def save(self, state: TrainState) -> None:
        """Writes the checkpoint."""
        save_checkpoint(
            self.checkpoint_path,
            config=self.config.model_dump(),
            state=state,
            model=self.model.eps_model,
            ema=self.ema.module,
            optimizer=self.optimizer,
        )

    def sample(self, step: int, tracker: Tracker) -> None:
        """Grids from raw and averaged weights, with the same noise every time."""
        count, size = self.config.train.num_samples, tuple(self.images["train"].shape[1:])
        noise = image_noise(self.config.seed, torch.arange(count, device=self.device), size)
        for kind, model in (("raw", self.model), ("ema", self.ema_model)):
            with autocast(self.device, self.precision):
                grid = generate_samples(
                    model,
                    self.device,
                    self.folder / "samples" / kind / f"{step}.png",
                    num_samples=count,
                    size=size,
                    sampler=sample_respaced,
                    num_steps=min(self.config.train.sample_steps, model.num_timesteps),
                    noise=noise(0),
                    step_noise=noise,
                    bar=lambda steps, kind=kind: progress_bar(steps, desc=f"sampling ({kind})", leave=False),
                )
            tracker.image(step, f"samples/{kind}", grid)

    def measure(self, tracker: Tracker) -> None:
        """Measures the trained model; writes metrics.json and the tables that DVC plots."""
        losses, bins = {}, {}
        for split, label in (("train", "train"), ("test", "heldout")):
            images = self.images[split][: self.config.train.num_eval_images]
            for kind, model in (("raw", self.model), ("ema", self.ema_model)):
                name = f"eval/{label}_{kind}"
                losses[name], bins[name] = denoising_loss(
                    model, images, self.device, precision=self.precision, desc=f"loss ({label}, {kind})"
                )
        tracker.log(self.state.step, losses)
        write_csv(
            self.folder / "loss.csv", tracker.lines.rows(), ["step", "train/loss", "train/loss_smoothed", "train/lr"]
        )
        by_bin = [
            {"timesteps": name, "raw": raw, "ema": bins["eval/heldout_ema"][name]}
            for name, raw in bins["eval/heldout_raw"].items()
        ]
        write_csv(self.folder / "heldout.csv", by_bin, ["timesteps", "raw", "ema"])
        num_images = self.state.step * self.batches.batch_size
        metrics = losses | {
            "train/loss_smoothed": self.state.loss_smoothed,
            "bins": bins,
            "steps": self.state.step,
            "images": num_images,
            "parameters": self.num_parameters,
            "seconds": self.state.seconds,
            "images_per_second": num_images / self.state.seconds,
            "memory_bytes": peak_memory_bytes(),
            "seed": self.config.seed,
            "data_sha256": self.data_sha256,
            "code_sha256": self.code_sha256,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type,
            "precision": self.precision,
        }
        write_atomically(self.metrics_path, (json.dumps(metrics, indent=2) + "\n").encode())


def train(config: Config, manifest: dict, *, replace: bool = False) -> Path:
    """Trains, samples and measures; goes on from the folder's checkpoint if there is one.

    Args:
        config: the validated configuration.
        manifest: of the prepared data.
        replace: where the folder's run is longer than the one asked for, starts anew instead of refusing.

    Returns:
        The run's folder.

    Raises:
        RunError: when the run cannot be started, before any compute.
        FloatingPointError: for a loss that is not finite, naming the step.
    """
    run = Run(config, manifest)
    run.claim_folder()
    run.load()
    if run.state.step > run.last_step:
        longer = f"{run.folder} holds this run with {run.state.step} steps, more than the {run.last_step} asked for"
        if not replace:
            raise RunError(f"{longer}: set runtime.output_dir to another folder")
        print(f"{longer}: starting anew")
        shutil.rmtree(run.folder)
        return train(config, manifest)
    if run.is_finished:
        print(f"{run.folder}: this run is finished, nothing to do")
        return run.folder
    print(run.describe(), flush=True)

    tracker = build.build_tracker(config, run.folder, run.state.step)
    tracker.artifact(run.folder / "config.yaml", "config", "config")
    inputs = save_grid(run.batches[0][: config.train.num_samples], run.folder / "samples" / "inputs.png")
    tracker.image(0, "inputs", inputs)
    with progress_bar(total=run.last_step, initial=run.state.step, unit="step", desc="training") as bar:

        def log(step: int, metrics: dict[str, float]) -> None:
            tracker.log(step, metrics)
            bar.set_postfix_str(
                f"epoch {metrics['epoch']}, loss {metrics['train/loss_smoothed']:.4f}, "
                f"lr {metrics['train/lr']:.1e}, {metrics['images_per_second']:.0f} images/s",
                refresh=False,
            )

        step = RunStep(
            state=run.state,
            ema=run.ema,
            learning_rate=build.build_learning_rate(config.optimizer, run.last_step),
            seed=config.seed,
            steps_per_epoch=run.batches.steps_per_epoch,
            log=log,
            log_every=config.train.log_every,
            save=run.save,
            checkpoint_every=config.train.checkpoint_every,
            last_step=run.last_step,
            precision=run.precision,
            max_grad_norm=config.optimizer.max_grad_norm,
        )
        fit(
            run.model,
            run.batches,
            run.optimizer,
            run.device,
            step=step,
            sample=lambda step: run.sample(step, tracker),
            sample_every=config.train.sample_every,
            num_workers=config.runtime.num_workers,
            bar=bar,
        )
    if not (run.folder / "samples" / "ema" / f"{run.last_step}.png").exists():
        run.sample(run.last_step, tracker)  # a run that was stopped between its last step and its last grid
    export_weights(run.folder / "model.safetensors", run.ema.module, config.model_dump())
    run.measure(tracker)
    tracker.finish()
    print(f"samples     {run.folder}/samples/ema/{run.last_step}.png\nmetrics     {run.metrics_path}")
    return run.folder


def publish(folder: Path, target: Path) -> None:
    """Copies a finished run's artefacts to `target`, each in the place of its predecessor."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ARTEFACTS:
        if (folder / name).is_dir():
            shutil.rmtree(target / name, ignore_errors=True)
            shutil.copytree(folder / name, target / name)
        else:
            shutil.copyfile(folder / name, target / name)
