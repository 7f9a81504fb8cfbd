"""What a process does for a run: it identifies the run, claims its folder, resumes it and writes its files.

Of several processes the first does that; the others share its training steps, grids and losses.

The folder holds config.yaml, metrics.jsonl, samples/, checkpoints/ (the full state), model.safetensors (averaged
weights), details.json and metrics.json, which is written last: a run is finished exactly if it exists.
"""

import contextlib
import functools
import shutil
from pathlib import Path

from modeling import build
from modeling.checkpoint import Checkpoint, CheckpointError, export_weights, load_checkpoint
from modeling.config import Config, to_yaml
from modeling.distributed.launcher import joined
from modeling.distributed.processes import Processes
from modeling.images import save_grid
from modeling.run.folder import RunFolder, describe_state
from modeling.run.identity import (
    Identity,
    code_sha256,
    data_sha256,
    describe_differences,
    differences,
    folder_name,
    identify,
    run_length,
)
from modeling.run.initial import load_initial_weights
from modeling.run.loop import Training
from modeling.run.objects import Run
from modeling.run.records import build_tracker
from modeling.run.results import measure
from modeling.stage import Manifest, repository
from modeling.system.errors import UserError
from modeling.system.files import write_atomically

ARTEFACTS = (
    "config.yaml", "details.json", "metrics.json", "metrics.jsonl", "loss.csv", "heldout.csv", "samples",
    "model.safetensors",
)  # fmt: skip

# What a checkpoint given by `runtime.resume=PATH` must share with the run that starts from it (dotted prefixes).
MUST_MATCH = ("seed", "data", "dataset", "model", "diffusion", "optimizer.name", "train.batch_size")


def _identify(config: Config, last_step: int, manifest: Manifest) -> tuple[Identity, Checkpoint | None, str]:
    """The run's identity, the checkpoint that `runtime.resume` names, if it names one, and what differs in that.

    Raises:
        UserError: for a file that is no checkpoint, one that does not share MUST_MATCH, or of a later step.
    """
    identity = identify(config, last_step, data_sha256(manifest), code_sha256())
    resume = config.runtime.resume
    if resume in ("auto", "never"):
        return identity, None, ""
    if Path(resume).is_dir():  # a run's folder
        resume = str(Path(resume) / "checkpoints" / "last.pt")
    try:
        origin = load_checkpoint(resume)
        origin_identity, origin_name = origin["about"]["identity"], describe_state(origin)
    except OSError as error:
        raise UserError(f"runtime.resume={resume}: {error.strerror}") from error
    except (CheckpointError, KeyError) as error:
        raise UserError(f"runtime.resume={resume}: {error}") from error
    if origin_identity.get("data") == manifest["files"]["train.npy"]["sha256"]:
        # An older checkpoint, whose identity has the training images alone. They are these, and only they trained it.
        origin_identity = {**origin_identity, "data": identity["data"]}
    changed = differences(origin_identity, identity)
    must_match = tuple(f"{name}." for name in MUST_MATCH)
    rejected = {key: pair for key, pair in changed.items() if f"{key}.".startswith(must_match)}
    if rejected:
        raise UserError(
            f"runtime.resume={resume}: this checkpoint belongs to another run and cannot be resumed "
            f"({describe_differences(rejected, 'checkpoint')})"
        )
    if origin["state"]["step"] > last_step:
        raise UserError(
            f"runtime.resume={resume}: this checkpoint is at step {origin['state']['step']:,}, after the end of the "
            f"run ({last_step:,} steps)"
        )
    if not changed:  # it is this run itself, with the result of an uninterrupted one
        return identity, origin, ""
    identity["origin"] = origin_name
    how = describe_differences(changed, "checkpoint")
    return identity, origin, f"starting from {resume} ({origin_name}) with {how}"


def train(config: Config, manifest: Manifest, *, outputs: Path | None = None) -> Path:
    """Trains, samples and measures; resumes from the folder's newest checkpoint if it has one.

    Args:
        config: the validated configuration.
        manifest: of the prepared data.
        outputs: where a DVC stage wants the artefacts, too; a longer run in the folder is then replaced instead of
            rejected.

    Returns:
        The run's folder.

    Raises:
        UserError: when the run cannot be started, before any compute.
        FloatingPointError: for too many steps in a row whose loss or gradient is not finite.
        OSError: when the disk fails, naming the file; the last checkpoint is untouched.
        Stopped: when the process is asked to end; the state is saved.
    """
    work = functools.partial(train, config, manifest, outputs=outputs)  # of the processes that are started here
    with joined(config.runtime.processes, config.runtime.num_threads, work) as processes:
        folder = _train(config, manifest, processes, replace=outputs is not None)
        if outputs is not None and processes.rank == 0:
            _publish(folder, outputs)
            print(f"artefacts   {outputs}/, from {folder}/")
    return folder


def _train(config: Config, manifest: Manifest, processes: Processes, *, replace: bool) -> Path:
    """This process's part of the run, in its folder."""
    device, precision = build.build_runtime(config.runtime)
    processes.use(device)
    weights, initial = load_initial_weights(config) if config.train.init else (None, None)
    images, length = manifest["files"]["train.npy"], config.train
    last_step = run_length(images["count"], length.batch_size, length.num_epochs, length.max_steps)
    identity, origin, note = _identify(config, last_step, manifest)
    identity["origin"] = identity["origin"] or initial
    name = folder_name(config.runtime.name, identity)
    processes.check_same("the run", name)
    path = repository() / (config.runtime.output_dir or f"runs/{name}")
    folder = RunFolder(path, identity, config.runtime.keep_checkpoints)
    objects = config, manifest, last_step, folder, device, precision, processes, weights
    with folder.claimed() if processes.rank == 0 else contextlib.nullcontext():
        with processes.first():  # the others then find what process 0 has left in the folder
            finished_at = folder.finished_at()
            if config.runtime.resume == "never" and finished_at is not None:
                raise UserError(
                    f"runtime.resume=never: {path} holds this run, finished: delete it, or set runtime.output_dir "
                    "to another folder"
                )
            if finished_at == last_step:
                print(f"{path}: this run is finished, nothing to do")
                return path
            run = Run(*objects)
            run.load(origin)
            if config.runtime.resume == "never" and run.state.step:
                raise UserError(
                    f"runtime.resume=never: {path} holds this run up to step {run.state.step}: delete it, or set "
                    "runtime.output_dir to another folder"
                )
            if run.state.step > last_step:
                longer = f"{path} holds this run with {run.state.step} steps, more than the {last_step} asked for"
                if not replace:
                    raise UserError(f"{longer}: set runtime.output_dir to another folder")
                print(f"{longer}: starting from scratch")
                folder.clear()
                run = Run(*objects)
            if run.state.step == 0 and not note:
                note = folder.similar_run() or ""
            print("\n".join([run.describe(), *([note] if note else []), ""]), flush=True)
        processes.check_same("the state", [run.state.step, folder.started_from])
        if processes.rank == 0:
            _carry_out(run)
        else:
            Training(run, None).fit()
            measure(run, None)
    return path


def _carry_out(run: Run) -> None:
    """Trains, samples and measures, from the run's present state to its last file."""
    config, folder = run.config, run.folder.path
    for path in (folder / "error.txt", run.folder.metrics_path):  # of a run that failed, or was shorter
        path.unlink(missing_ok=True)
    write_atomically(folder / "config.yaml", to_yaml(config).encode())
    tracker = build_tracker(config, folder, run.state.step, run.folder.wandb_id)
    training = Training(run, tracker)
    try:
        with training.saved_when_stopped():
            tracker.artifact(folder / "config.yaml", "config", "config")
            images = run.batches.take(0, range(min(config.train.num_samples, config.train.batch_size)))
            inputs = save_grid(images, folder / "samples" / "inputs.png")
            tracker.image(0, "inputs", inputs)
            training.fit()
            # Equal runs in two folders give equal files, and a user's notes do not travel with the weights.
            values = config.model_dump(exclude={"wandb": True, "runtime": {"name", "output_dir"}})
            export_weights(folder / "model.safetensors", run.ema.module, values)
            measure(run, tracker)
    except FloatingPointError as error:
        write_atomically(folder / "error.txt", f"{error}\n".encode())  # else the run would look as if it was stopped
        raise
    finally:
        tracker.finish(is_complete=run.folder.finished_at() == run.last_step)
    print(f"samples     {folder}/samples/ema/{run.last_step}.png\nmetrics     {run.folder.metrics_path}")


def _publish(folder: Path, target: Path) -> None:
    """Copies a finished run's artefacts to `target`, replacing the ones there."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ARTEFACTS:
        if (folder / name).is_dir():
            shutil.rmtree(target / name, ignore_errors=True)
            shutil.copytree(folder / name, target / name)
        else:
            shutil.copyfile(folder / name, target / name)
