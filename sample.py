"""Samples images from a checkpoint; needs nothing but the file.

    python sample.py checkpoint=runs/<run>/model.safetensors num_images=64
    python sample.py checkpoint=model.safetensors num_steps=null seed=3 out=samples/3.png

Image i is a function of the checkpoint, the seed and i: the same whatever the batch size, up to rounding.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from modeling.config import Config, ConfigError, SampleConfig, parse


@hydra.main(version_base="1.3", config_path="conf", config_name="sample")
def main(values: DictConfig) -> None:
    try:
        options = parse(values, SampleConfig)
        if Path(options.out).exists() and not options.overwrite:
            raise ConfigError(f"out={options.out}: exists already; name another file or set overwrite=true")
    except ConfigError as error:
        sys.exit(str(error))

    import torch

    from modeling import build
    from modeling.checkpoint import CheckpointError, load_weights
    from modeling.images import save_grid
    from modeling.progress import progress_bar
    from modeling.runtime import place
    from modeling.samplers import sample_images

    try:
        device, precision = build.build_runtime(options)
        stored, weights = load_weights(options.checkpoint)
        config = parse(stored, Config)
        if options.num_steps is not None and options.num_steps > config.diffusion.num_timesteps:
            raise ConfigError(f"num_steps must be at most {config.diffusion.num_timesteps}, got {options.num_steps}")
        model = place(build.build_trained_model(config, weights), device)
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        sys.exit(str(error))

    size = (build.IMAGE_CHANNELS, build.IMAGE_SIZE, build.IMAGE_SIZE)
    num_steps = options.num_steps or config.diffusion.num_timesteps
    batch_size = options.batch_size or (512 if device.type == "cuda" else 64)
    batches = []
    for start in range(0, options.num_images, batch_size):
        count = min(batch_size, options.num_images - start)
        label = f"images {start + 1}-{start + count} of {options.num_images}"
        images = sample_images(
            model,
            count,
            size,
            device,
            seed=options.seed,
            first_image=start,
            precision=precision,
            num_steps=num_steps,
            eta=options.eta,
            clip_x0=options.clip_x0,
            bar=lambda steps, label=label: progress_bar(steps, desc=label),
        )
        batches.append(images.cpu())
    save_grid(torch.cat(batches), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
