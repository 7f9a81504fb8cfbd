"""Samples images from a checkpoint; needs nothing but the file.

    python sample.py checkpoint=runs/<run>/model.safetensors num_images=64            # a grid, samples.png
    python sample.py checkpoint=model.safetensors num_images=5000 out=samples.npz     # or out=FOLDER: PNG files
    python sample.py checkpoint=model.safetensors sampler=ddim num_steps=50 seed=3 out=ddim.png
    python sample.py checkpoint=model.safetensors picture=path out=path.png num_images=4   # or interpolation

Image i is a function of the checkpoint, the sampler, the seed and i: the same whatever the batch size, up to rounding.
A command that was stopped goes on where it was.
"""

import shutil
import sys
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig

from modeling.config import ConfigError, parse
from modeling.options import SampleConfig
from modeling.signals import stopping_on_signals


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise ConfigError(f"out={out}: exists already; name another file or set overwrite=true")
    if out.is_dir() and not (out / "identity.json").exists():
        raise ConfigError(f"out={out}: this folder does not hold samples, so it is not replaced")


@hydra.main(version_base="1.3", config_path="conf", config_name="sample")
def main(values: DictConfig) -> None:
    try:
        options = parse(values, SampleConfig)
        out = Path(options.out)
        _check_out(out, options.overwrite)
    except ConfigError as error:
        sys.exit(str(error))

    with stopping_on_signals():
        from modeling.checkpoint import CheckpointError
        from modeling.files import LockedError
        from modeling.images import save_grid
        from modeling.progress import progress_bar
        from modeling.sampling import denoising_path, interpolation, write_samples
        from modeling.trained import SIZE, load_trained

        try:
            trained, _ = load_trained(options)
            if options.picture == "grid":
                parts = out.with_name(f"{out.name}.partial")
                write_samples(trained.draw(parts), trained.samples_identity, out)
                shutil.rmtree(parts)
            else:
                show = {"path": denoising_path, "interpolation": interpolation}[options.picture]
                images = show(
                    trained.model, options.num_images, SIZE, trained.device, precision=trained.precision,
                    bar=partial(progress_bar, desc="sampling"), **trained.sampler,
                )  # fmt: skip
                save_grid(images, out, num_columns=10)
        except (CheckpointError, LockedError, FileNotFoundError, FloatingPointError, ValueError) as error:
            sys.exit(str(error))
    print(out)


if __name__ == "__main__":
    main()
