"""Measures a trained model: bits per dimension, held-out loss, distances of its samples from the data, FID.

    python evaluate.py checkpoint=outputs/model.safetensors                       # into evaluation/
    python evaluate.py checkpoint=outputs/model.safetensors bits_images=10000 bits_timesteps=null   # the whole bound
    python evaluate.py checkpoint=model.safetensors measures=[fid] num_images=50000 sampler=ddim num_steps=100
    python evaluate.py checkpoint=linear measures=[bits_per_dim,heldout_loss]     # the best linear denoiser, for scale

Each number is written with its identity (model, data, sampler, n, extractor) to <out>/evaluation.json. A command that
was stopped goes on after the last measure that is there; samples go on where they were.
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig

from modeling.config import ConfigError, parse
from modeling.options import EvaluateConfig
from modeling.signals import stopping_on_signals

RECORD = "evaluation.json"


def _print(name: str, record: dict) -> None:
    for key, value in record["values"].items():
        if name == "bits_per_dim":
            value = (
                f"{value['total']:.3f} +- {value['standard_error']:.3f} "
                f"(rate {value['rate']:.3f}, distortion {value['distortion']:.3f})"
            )
        elif isinstance(value, dict):
            value = ", ".join(f"{part} {number:.4f}" for part, number in value.items())
        else:
            value = f"{value:.4f}"
        print(f"{name:14s}{key:30s}{value}", flush=True)


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(values: DictConfig) -> None:
    try:
        options = parse(values, EvaluateConfig)
    except ConfigError as error:
        sys.exit(str(error))

    with stopping_on_signals():
        from modeling.checkpoint import CheckpointError
        from modeling.files import LockedError, locked, write_atomically
        from modeling.measures import (
            load_data,
            load_extractor,
            measure_bits,
            measure_loss,
            measure_samples,
            num_evaluations,
            seconds_per_evaluation,
        )
        from modeling.trained import LINEAR, fit_linear, load_trained

        out = Path(options.out)
        measures = {"bits_per_dim": measure_bits, "heldout_loss": measure_loss}
        asked = options.model_dump(exclude={"out", "overwrite", "device", "keep_freed_memory", "measures"})
        try:
            if options.checkpoint in LINEAR:
                data = load_data(Path(options.data or "data/cifar10"))
                trained = fit_linear(options, data.train, data.identity["train_sha256"])
            else:
                trained, config = load_trained(options)
                data = load_data(Path(options.data or f"{config.dataset.root}/{config.dataset.name}"))
            with locked(out / "lock"):
                path = out / RECORD
                record = {"options": asked, "identity": trained.identity | data.identity}
                if path.exists() and not options.overwrite:
                    found = json.loads(path.read_text())
                    if {key: found.get(key) for key in record} != record:
                        raise ConfigError(f"out={out}: holds another evaluation; name another folder or overwrite=true")
                    record = found
                missing = [name for name in options.measures if name not in record]
                for name in missing:
                    if name not in measures:  # now, so that missing weights are noticed before any compute
                        extractor = load_extractor(name, options, trained.device)
                        measures[name] = partial(measure_samples, folder=out, extractor=extractor)
                counts = num_evaluations(options, trained, data)
                seconds = seconds_per_evaluation(trained) if missing else 0
                for name, count in counts.items():
                    print(f"{name:14s}{count:,} evaluations of the network, about {count * seconds / 60:.1f} minutes")
                for name in options.measures:
                    if name in missing:
                        record[name] = measures[name](trained, data, options)
                        write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
                    _print(name, record[name])
                shutil.rmtree(out / "samples.npz.partial", ignore_errors=True)
        except (CheckpointError, LockedError, FileNotFoundError, ValueError) as error:
            sys.exit(str(error))
    print(path)


if __name__ == "__main__":
    main()
