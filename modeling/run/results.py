"""What a run measures at its end, and the tables and files of numbers that it writes."""

from modeling.heldout import denoising_loss, linear_loss
from modeling.run.objects import Run
from modeling.run.records import Tracker, write_csv
from modeling.runtime import peak_memory_bytes
from modeling.system.files import sha256_of, write_json


def measure(run: Run, tracker: Tracker | None) -> None:
    """Measures the model; with a tracker, it writes tables for plots, details.json and, last, metrics.json."""
    losses, bins = {}, {}
    for split, label in (("train", "train"), ("test", "heldout")):
        images = run.images[split][: run.config.train.num_eval_images]
        for kind, model in (("raw", run.model), ("ema", run.ema_model)):
            name = f"eval/{label}_{kind}"
            losses[name], bins[name] = denoising_loss(
                model, images, run.device, batch_size=run.images_at_a_time, precision=run.precision,
                desc=f"loss ({label}, {kind})", processes=run.processes,
            )  # fmt: skip
    if tracker is None:
        return
    heldout = run.images["test"][: run.config.train.num_eval_images]
    abar = run.model.schedules_float64["alphas_cumprod"]
    if (linear := linear_loss(run.images["train"], heldout, abar)) is not None:
        losses["eval/heldout_linear"], bins["eval/heldout_linear"] = linear
    tracker.log(run.state.step, losses)
    columns = ["step", "train/loss", "train/loss_smoothed", "train/lr"]
    write_csv(run.folder.path / "loss.csv", tracker.lines.rows, columns)
    kinds = ("raw", "ema", "linear")
    by_bin = [
        {"timesteps": name} | {kind: bins.get(f"eval/heldout_{kind}", {}).get(name, "") for kind in kinds}
        for name in bins["eval/heldout_raw"]
    ]
    write_csv(run.folder.path / "heldout.csv", by_bin, ["timesteps", *kinds])
    num_images = run.state.step * run.batches.batch_size
    details = {
        "bins": bins,
        "seed": run.config.seed,
        "data_sha256": run.folder.identity["data"],
        "code_sha256": run.folder.identity["code"],
        "weights_sha256": sha256_of(run.folder.path / "model.safetensors"),
        **run.environment,
    }
    write_json(run.folder.path / "details.json", details)
    metrics = {  # `dvc exp show` keeps the order
        "eval/heldout_ema": losses["eval/heldout_ema"],
        "train/loss_smoothed": run.state.loss_smoothed,
        "seconds": run.state.seconds,
        "images_per_second": num_images / run.state.seconds,
        **losses,
        "steps": run.state.step,
        "skipped_steps": run.state.num_skipped,
        "images": num_images,
        "parameters": run.num_parameters,
        "memory_bytes": peak_memory_bytes(),
    }
    write_json(run.folder.metrics_path, metrics)
