"""Trains the classifier of CIFAR-10 in whose features `evaluate.py` measures distances without Inception.

    python train_encoder.py overwrite=true      # writes encoders/cifar10.safetensors, about 5 minutes on two cores
    python train_encoder.py out=mine.safetensors seed=1 num_epochs=20
    python train_encoder.py controls=true       # trains nothing: distances that must rise, in the features of `out`

Prints the file's SHA-256, which names the feature space, and the accuracy on the test images.
"""

import sys
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

from modeling.config import parse
from modeling.options import EncoderConfig, check_out
from modeling.system.errors import errors_in_one_line
from modeling.system.signals import stopping_on_signals


def train(options: EncoderConfig) -> None:
    """Trains, tests and writes the encoder."""
    import torch

    from modeling.build import build_runtime
    from modeling.datasets.cifar10 import load_cifar10, load_labels
    from modeling.measures.encoder import accuracy, images_sha256, save_encoder, train_encoder

    device, precision = build_runtime(options)
    images = map(torch.from_numpy, load_cifar10(Path(options.archive), options.urls))
    labels = map(torch.from_numpy, load_labels(Path(options.archive)))
    (train_images, test_images), (train_labels, test_labels) = images, labels
    start = time.monotonic()
    recipe = {key: getattr(options, key) for key in ("width", "num_epochs", "batch_size", "max_lr", "seed")}
    encoder = train_encoder(train_images, train_labels, **recipe, device=device, precision=precision)
    seconds = time.monotonic() - start
    right = accuracy(encoder, test_images, test_labels)
    about = recipe | {
        "precision": precision,
        "test_accuracy": right,
        "train_sha256": images_sha256(train_images),
        "test_sha256": images_sha256(test_images),
    }
    sha256 = save_encoder(options.out, encoder, about)
    speed = options.num_epochs * len(train_images) / seconds
    print(f"{options.out}: {right:.2%} of the test images, {seconds:.0f} s ({speed:.0f} images/s), SHA-256 {sha256}")


def print_controls(options: EncoderConfig) -> None:
    """Prints the controls' distances; exits with an error if they do not rise."""
    import torch

    from modeling.build import build_runtime
    from modeling.datasets.cifar10 import load_cifar10
    from modeling.measures.controls import control_distances
    from modeling.measures.features import load_own_encoder

    device, _ = build_runtime(options)
    extractor = load_own_encoder(options.out, device)
    table = control_distances(extractor, *map(torch.from_numpy, load_cifar10(Path(options.archive), options.urls)))
    print(f"encoder/frechet_distance, SHA-256 {extractor.sha256}")
    for name, distance in table.items():
        print(f"  {name:12s} {distance:.4f}")
    distances = list(table.values())
    if distances != sorted(set(distances)):
        sys.exit("the distances do not rise from row to row: these features do not measure what they should")


@hydra.main(version_base="1.3", config_path="conf", config_name="encoder")
def main(values: DictConfig) -> None:
    with errors_in_one_line():
        options = parse(values, EncoderConfig)
        if not options.controls:
            check_out(Path(options.out), options.overwrite)
        with stopping_on_signals():
            (print_controls if options.controls else train)(options)


if __name__ == "__main__":
    main()
