"""Training losses that others report for the paper's recipe, beside a run's: points, not a curve recorded here."""

import numpy as np

from modeling.comparison.curves import RunRecord

SOURCE = "tqch/ddpm-torch, README: the paper's network and recipe, of 35.7M parameters"
LOSSES = {46_800: 0.0295, 93_600: 0.0293, 187_200: 0.0291, 421_200: 0.0284, 795_600: 0.0277}  # by step
BATCH_SIZE = 128
PROCESS = {
    "num_timesteps": 1000, "schedule": "linear", "betas": [1e-4, 0.02], "prediction": "eps", "weighting": "uniform",
}  # fmt: skip
SHARE = 0.05  # of the images so far: the run's loss is the mean over the last of them


def describe_literature(run: RunRecord) -> list[str]:
    """The points that the run has reached, and the next one.

    Nothing for another data set, another loss or other first weights; no value where the run did not train.
    """
    diffusion = run.config["diffusion"]  # an older run lacks keys that could have no other value
    is_same_loss = all(diffusion.get(key, value) == value for key, value in PROCESS.items())
    is_from_scratch = run.config["train"].get("init") is None
    if run.config["dataset"]["name"] != "cifar10" or not is_same_loss or not is_from_scratch:
        return []
    lines = [
        f"\nliterature   {SOURCE}",
        "             reported there, not recorded here, and no part of the verdict",
        f"{'training loss':>22} {'run':>10} {'literature':>10}",
    ]
    for step, loss in LOSSES.items():
        images = step * BATCH_SIZE
        is_reached = run.curve.edges[-1] >= images
        (mean,), (count,) = run.curve.average(np.array([(1 - SHARE) * images, images]))
        value = f"{mean:.4g}" if is_reached and count > 0 else ""
        lines.append(f"{f'{images:,} images':>22} {value:>10} {loss:>10.4f}")
        if not is_reached:
            break
    return lines
