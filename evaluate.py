"""Measures a trained model: bits per dimension, held-out loss, distances of its samples from the data, FID.

    python evaluate.py checkpoint=outputs/model.safetensors                       # into evaluation/
    python evaluate.py checkpoint=outputs/model.safetensors bits_images=10000 bits_timesteps=null out=evaluation/whole
    python evaluate.py checkpoint=model.safetensors 'measures=[fid]' num_images=50000 out=evaluation/fid
    python evaluate.py checkpoint=linear 'measures=[bits_per_dim,heldout_loss]' out=evaluation/linear

The last one is the best linear denoiser of the training images, for scale ("gaussian": of one mean and variance). Each
number is written with its identity (model, data, sampler, n, extractor) to <out>/evaluation.json. A command that was
stopped goes on where it was; what is measured already is not measured again.
"""

import json
import shutil
from pathlib import Path

import hydra
from omegaconf import DictConfig

from modeling.config import ConfigError, parse
from modeling.options import EvaluateConfig
from modeling.system.errors import errors_in_one_line
from modeling.system.signals import stopping_on_signals

RECORD = "evaluation.json"


def _print(name: str, record: dict) -> None:
    for key, value in record["values"].items():
        if name == "bits_per_dim":
            error = "?" if value["standard_error"] is None else f"{value['standard_error']:.3f}"
            value = f"{value['total']:.3f} +- {error} (rate {value['rate']:.3f}, distortion {value['distortion']:.3f})"
        elif isinstance(value, dict):
            value = ", ".join(f"{part} {number:.4f}" for part, number in value.items())
        else:
            value = f"{value:.4f}"
        print(f"{name:14s}{key:30s}{value}", flush=True)


def _read_record(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): delete it, or name another folder with out=") from error


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(values: DictConfig) -> None:
    with errors_in_one_line(), stopping_on_signals():
        options = parse(values, EvaluateConfig)

        from modeling.measures.plan import Evaluation, environment, load_data
        from modeling.measures.trained import LINEAR, fit_linear, load_trained
        from modeling.system.files import locked, write_atomically

        out = Path(options.out)
        path = out / RECORD
        if options.checkpoint in LINEAR:
            data = load_data(Path(options.data or "data/cifar10"))
            trained = fit_linear(options, data.train, data.identity["train_sha256"])
        else:
            trained, config = load_trained(options)
            data = load_data(Path(options.data or f"{config.dataset.root}/{config.dataset.name}"))
        measures = Evaluation(trained, data, options, out).measures
        with locked(out / "lock"):
            record = _read_record(path)
            done = [name for name in measures if name in record and measures[name].is_of(record[name])]
            other = [name for name in measures if name in record and name not in done]
            if other and not options.overwrite:
                raise ConfigError(
                    f"out={out}: holds {', '.join(other)} of another model or with other options; name another "
                    "folder or set overwrite=true, which replaces these and keeps the rest"
                )
            for name, measure in measures.items():
                if name not in done:
                    print(f"{name:14s}about {measure.seconds / 60:.1f} minutes", flush=True)
            for name, measure in measures.items():
                if name not in done:
                    found = measure.take()
                    identity = measure.identity | found.get("identity", {}) | environment(trained)
                    record[name] = {"values": found["values"], "identity": identity}
                    write_atomically(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
                    shutil.rmtree(out / f"{name}.partial", ignore_errors=True)
                _print(name, record[name])
        print(path)


if __name__ == "__main__":
    main()
