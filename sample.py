"""Samples images from a checkpoint; needs nothing but the file.

    python sample.py                                                       # from weights/cifar10.safetensors, in Git
    python sample.py checkpoint=runs/<run>/model.safetensors num_images=64            # a grid, samples.png
    python sample.py checkpoint=model.safetensors num_images=5000 out=samples.npz     # or out=FOLDER: PNG files
    python sample.py checkpoint=model.safetensors sampler=ddim num_steps=50 seed=3 out=ddim.png
    python sample.py checkpoint=model.safetensors picture=path out=path.png    # or interpolation
    python sample.py checkpoint=model.safetensors picture=path out=path.gif    # it moves; or path.webp
    python sample.py checkpoint=model.safetensors picture=inpaint image=cat.png mask=hole.png out=filled.png
    python sample.py checkpoint=model.safetensors picture=variations image=cat.png strength=0.5 out=variations.png
    torchrun --nproc-per-node=8 sample.py checkpoint=model.safetensors num_images=50000 out=samples.npz

Image i is a function of the checkpoint, the sampler, the seed and i: the same whatever the batch size, up to rounding.
The same command resumes after a stop, with any number of processes (torchrun).
"""

import shutil
from functools import partial
from pathlib import Path

from modeling.config import parse
from modeling.options import EDITING, SampleConfig, check_out
from modeling.system.command_line import script
from modeling.system.errors import UserError
from modeling.system.files import check_writable, write_atomically
from modeling.system.signals import stopping_on_signals


@script("sample", SampleConfig, parse)
def main(options: SampleConfig) -> None:
    out = Path(options.out)
    check_out(out, options.overwrite, is_folder=options.is_folder)
    parts = out.with_name(f"{out.name}.partial")
    check_writable(parts, is_folder=True)
    if out.is_dir() and not (out / "identity.json").exists():
        raise UserError(f"out={out}: this folder does not hold samples, so it is not replaced")
    with stopping_on_signals():
        from modeling.distributed.launcher import joined
        from modeling.images import encode_png, save_grid
        from modeling.measures import edit, explain
        from modeling.measures.sample_files import write_samples
        from modeling.measures.trained import load_trained
        from modeling.system.progress import progress_bar

        with joined() as processes:
            trained, _ = load_trained(options, processes)
            edited = {key: value for key in EDITING if (value := getattr(options, key)) is not None}
            about = trained.samples_identity | {"checkpoint": options.checkpoint} | edited
            num_images = options.num_images or (64 if options.picture == "grid" else 4)
            model = (trained.model, num_images, trained.image_shape, trained.device, trained.sampler)
            bar = partial(progress_bar, desc="sampling")
            if options.picture == "grid":
                images = trained.draw(parts, num_images)
            if processes.rank:
                return  # process 0 writes, and draws the other kinds of pictures alone
            if options.picture == "grid":
                if out.suffix == ".png":
                    save_grid(images, out, scale=options.scale, about=about)
                else:
                    write_samples(images, trained.samples_identity, out)
                shutil.rmtree(parts)
            elif options.picture == "interpolation":
                images = explain.interpolation(*model, seed=options.seed, precision=trained.precision, bar=bar)
                save_grid(images, out, explain.COLUMNS, scale=options.scale, about=about)
            elif options.picture in ("inpaint", "variations"):
                images = edit.draw_edited(trained, options, num_images, bar)
                save_grid(images, out, len(images), scale=options.scale, about=about)
            else:
                is_still = out.suffix == ".png"
                moments = explain.denoising_path(
                    *model, seed=options.seed, precision=trained.precision, bar=bar,
                    num_moments=explain.COLUMNS if is_still else explain.FRAMES,
                )  # fmt: skip
                if is_still:
                    content = encode_png(explain.draw_path(moments, options.scale), about)
                else:
                    frames = [explain.draw_moment(moment, options.scale) for moment in moments]
                    content = explain.encode_animation(frames, out.suffix, about)
                write_atomically(out, content)
    print(out)


if __name__ == "__main__":
    main()
