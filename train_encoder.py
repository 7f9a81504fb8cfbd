"""Trains the classifier of CIFAR-10 in whose features `evaluate.py` measures distances without Inception.

    python train_encoder.py overwrite=true      # writes encoders/cifar10.safetensors, about 5 minutes on two cores
    python train_encoder.py out=mine.safetensors seed=1 num_epochs=20
    python train_encoder.py controls=true       # trains nothing: distances that must rise, in the features of `out`

Prints the file's SHA-256, which names the feature space, and the accuracy on the test images.
"""

from pathlib import Path

from modeling.config import parse
from modeling.options import EncoderConfig, check_out
from modeling.system.command_line import script
from modeling.system.signals import stopping_on_signals


def print_controls(options: EncoderConfig) -> None:
    """Prints the controls' distances; ends with an error if they do not rise."""
    from torch import from_numpy

    from modeling.build import build_runtime
    from modeling.datasets.cifar10 import load_cifar10
    from modeling.measures.controls import check_rising, control_distances
    from modeling.measures.extractors import load_own_encoder

    device, _ = build_runtime(options)
    extractor = load_own_encoder(options.out, device)
    images, _ = load_cifar10(Path(options.archive), options.urls)
    distances = control_distances(extractor, *map(from_numpy, images))
    print(f"encoder/frechet_distance, SHA-256 {extractor.sha256}")
    for name, distance in distances.items():
        print(f"  {name:12s} {distance:.4f}")
    check_rising(distances)


@script("encoder", EncoderConfig, parse)
def main(options: EncoderConfig) -> None:
    with stopping_on_signals():
        if options.controls:
            print_controls(options)
            return
        check_out(Path(options.out), options.overwrite)

        from torch import from_numpy

        from modeling.build import build_runtime
        from modeling.datasets.cifar10 import load_cifar10
        from modeling.measures.encoder_training import make_encoder

        device, precision = build_runtime(options)
        images, labels = load_cifar10(Path(options.archive), options.urls)
        train_images, test_images = map(from_numpy, images)
        train_labels, test_labels = map(from_numpy, labels)
        print(make_encoder(options, (train_images, test_images), (train_labels, test_labels), device, precision))


if __name__ == "__main__":
    main()
