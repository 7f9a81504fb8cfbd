"""Samples images from a checkpoint; needs nothing but the file.

    python sample.py checkpoint=runs/<run>/model.safetensors num_images=64            # a grid, samples.png
    python sample.py checkpoint=model.safetensors num_images=5000 out=samples.npz     # or out=FOLDER: PNG files
    python sample.py checkpoint=model.safetensors sampler=ddim num_steps=50 seed=3 out=ddim.png
    python sample.py checkpoint=model.safetensors picture=path out=path.png num_images=4   # or interpolation

Image i is a function of the checkpoint, the sampler, the seed and i: the same whatever the batch size, up to rounding.
The same command resumes after a stop.
"""

import shutil
from functools import partial
from pathlib import Path

from modeling.config import parse
from modeling.options import SampleConfig, check_out
from modeling.system.command_line import script
from modeling.system.errors import UserError
from modeling.system.files import check_writable
from modeling.system.signals import stopping_on_signals


@script("sample", SampleConfig, parse)
def main(options: SampleConfig) -> None:
    out = Path(options.out)
    check_out(out, options.overwrite, is_folder=out.suffix not in (".png", ".npz"))
    parts = out.with_name(f"{out.name}.partial")
    check_writable(parts, is_folder=True)
    if out.is_dir() and not (out / "identity.json").exists():
        raise UserError(f"out={out}: this folder does not hold samples, so it is not replaced")
    with stopping_on_signals():
        from modeling.images import save_grid
        from modeling.measures.explain import COLUMNS, denoising_path, interpolation
        from modeling.measures.sample_files import write_samples
        from modeling.measures.trained import SIZE, load_trained
        from modeling.system.progress import progress_bar

        trained, _ = load_trained(options)
        if options.picture == "grid":
            write_samples(trained.draw(parts), trained.samples_identity, out)
            shutil.rmtree(parts)
        else:
            show = denoising_path if options.picture == "path" else interpolation
            images = show(
                trained.model, options.num_images, SIZE, trained.device, trained.sampler, seed=options.seed,
                precision=trained.precision, bar=partial(progress_bar, desc="sampling"),
            )  # fmt: skip
            save_grid(images, out, num_columns=COLUMNS)
    print(out)


if __name__ == "__main__":
    main()
