"""One process's work on a run: identifies it, claims its folder, goes on from where it stands to its last file.

The folder holds config.yaml, metrics.jsonl, metrics.json, samples/, checkpoints/ (the full state), and
model.safetensors (averaged weights). metrics.json is written last: where it stands, the run is finished.
"""

import shutil
from pathlib import Path

from modeling import build
from modeling.checkpoint import CheckpointError, export_weights, load_checkpoint
from modeling.config import Config, to_yaml
from modeling.files import code_sha256, sync, write_atomically
from modeling.images import save_grid
from modeling.progress import progress_bar
from modeling.run import Run
from modeling.run_folder import RunError, RunFolder, describe_state
from modeling.run_step import TrainState
from modeling.signals import Stopped
from modeling.stage import describe_changes, describe_differences, differences, identify, run_length, run_name

ARTEFACTS = ("config.yaml", "metrics.json", "metrics.jsonl", "loss.csv", "heldout.csv", "samples", "model.safetensors")

# What a checkpoint given by `runtime.resume=PATH` must share with the run that starts from it (dotted prefixes).
MUST_MATCH = ("seed", "data", "dataset", "model", "diffusion", "optimizer.name", "train.batch_size")


def _identify(config: Config, manifest: dict) -> tuple[dict, dict | None]:
    """The run's identity, and the checkpoint that `runtime.resume` names, if it names one.

    Raises:
        RunError: for a checkpoint that is none, or of another architecture, data set or seed.
    """
    facts = config, run_length(config, manifest), manifest["files"]["train.npy"]["sha256"], code_sha256()
    identity, resume = identify(*facts), config.runtime.resume
    if resume in ("auto", "never"):
        return identity, None
    try:
        origin = load_checkpoint(resume)
        origin_identity, origin_name = origin["about"]["identity"], describe_state(origin)
    except (CheckpointError, OSError, KeyError) as error:
        raise RunError(f"runtime.resume={resume}: {error}") from error
    changed = differences(origin_identity, identity)
    refused = [key for key in changed if any(key == name or key.startswith(f"{name}.") for name in MUST_MATCH)]
    if refused:
        how = describe_changes({key: changed[key] for key in refused})
        raise RunError(f"runtime.resume={resume}: another run's state cannot be taken up ({how})")
    if changed:  # else it is this very run, and its result that of one uninterrupted run
        identity = identify(*facts, origin=origin_name)
        print(f"starting from {resume} ({origin_name}) with {describe_differences(origin_identity, identity)}")
    return identity, origin


def train(config: Config, manifest: dict, *, replace: bool = False) -> Path:
    """Trains, samples and measures; goes on from the folder's newest checkpoint if there is one.

    Args:
        config: the validated configuration.
        manifest: of the prepared data.
        replace: where the folder's run is longer than the one asked for, starts anew instead of refusing.

    Returns:
        The run's folder.

    Raises:
        RunError: when the run cannot be started, before any compute.
        FloatingPointError: for too many steps in a row whose loss or gradient is not finite.
        OSError: when the disk refuses, naming the file; the last checkpoint stays as it was.
        Stopped: when the process is asked to end; the state is saved.
    """
    try:
        machine = build.build_runtime(config.runtime)
    except ValueError as error:
        raise RunError(str(error)) from error
    identity, origin = _identify(config, manifest)
    path = Path(config.runtime.output_dir or f"runs/{run_name(identity)}")
    folder = RunFolder(path, identity, config.runtime.keep_checkpoints)
    with folder.claimed():
        if folder.num_finished_steps() == run_length(config, manifest):
            print(f"{path}: this run is finished, nothing to do")
            return path
        run = Run(config, manifest, folder, *machine)
        run.load(origin)
        if config.runtime.resume == "never" and run.state.step:
            raise RunError(
                f"runtime.resume=never: {path} holds this run up to step {run.state.step}: delete it, or set "
                "runtime.output_dir to another folder"
            )
        if run.state.step > run.last_step:
            longer = f"{path} holds this run with {run.state.step} steps, more than the {run.last_step} asked for"
            if not replace:
                raise RunError(f"{longer}: set runtime.output_dir to another folder")
            print(f"{longer}: starting anew")
            folder.clear()
            run = Run(config, manifest, folder, *machine)
        if run.state.step == 0 and (similar := folder.similar_run()) is not None:
            print(similar)
        print(run.describe(), flush=True)
        _carry_out(run)
    return path


def _carry_out(run: Run) -> None:
    """Everything from the run's present state to its last file."""
    config, folder = run.config, run.folder.path
    write_atomically(folder / "config.yaml", to_yaml(config).encode())
    tracker = build.build_tracker(config, folder, run.state.step, run.folder.wandb_id)

    def log(step: int, metrics: dict[str, float]) -> None:
        tracker.log(step, metrics)
        bar.set_postfix_str(
            f"epoch {metrics['epoch']}, loss {metrics['train/loss_smoothed']:.4f}, "
            f"lr {metrics['train/lr']:.1e}, {metrics['images_per_second']:.0f} images/s"
            + (f", {metrics['train/skipped']} skipped" if metrics["train/skipped"] else ""),
            refresh=False,
        )

    def save(state: TrainState) -> None:
        if tracker.lines.path.exists():
            sync(tracker.lines.path)  # the lines of the steps that the checkpoint covers
        run.save(state)

    step = run.step(log, save)
    try:
        tracker.artifact(folder / "config.yaml", "config", "config")
        inputs = save_grid(run.batches[0][: config.train.num_samples], folder / "samples" / "inputs.png")
        tracker.image(0, "inputs", inputs)
        with progress_bar(total=run.last_step, initial=run.state.step, unit="step", desc="training") as bar:
            run.fit(step, lambda step: run.sample(step, tracker), bar)
        values = config.model_dump()
        values["runtime"]["output_dir"] = values["wandb"]["name"] = None  # equal runs in two folders: equal files
        export_weights(folder / "model.safetensors", run.ema.module, values)
        run.measure(tracker)
    except Stopped as stopped:
        if run.state.step:
            step.checkpoint()
            at = f"saved at step {run.state.step:,} of {run.last_step:,} in {run.folder.last_checkpoint}"
        else:
            at = "no step was done yet"
        print(f"stopped by {stopped.reason}: {at}; the same command goes on from there", flush=True)
        raise
    finally:
        tracker.finish(is_complete=run.folder.num_finished_steps() == run.last_step)
    print(f"samples     {folder}/samples/ema/{run.last_step}.png\nmetrics     {run.folder.metrics_path}")


def publish(folder: Path, target: Path) -> None:
    """Copies a finished run's artefacts to `target`, each in the place of its predecessor."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ARTEFACTS:
        if (folder / name).is_dir():
            shutil.rmtree(target / name, ignore_errors=True)
            shutil.copytree(folder / name, target / name)
        else:
            shutil.copyfile(folder / name, target / name)
