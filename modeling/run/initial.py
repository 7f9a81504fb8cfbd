"""Weights of another run that a new one starts from, instead of random ones."""

from pathlib import Path

from torch import Tensor

from modeling.checkpoint import load_weights
from modeling.config import Config, Trained, parse
from modeling.run.identity import describe_differences, differences
from modeling.system.errors import UserError
from modeling.system.files import sha256_of
from modeling.system.reading import reading


def load_initial_weights(config: Config) -> tuple[dict[str, Tensor], str]:
    """The averaged weights that `train.init` names, and what a run's identity says of them.

    Raises:
        UserError: for a file that is damaged, or of another network or kind of prediction, naming what differs. Data,
            image size, noise schedule and dropout may differ.
        OSError: for a file that cannot be read.
    """
    assert config.train.init is not None
    given = f"train.init={config.train.init}"
    if config.runtime.resume not in ("auto", "never"):
        raise UserError(f"{given}: a run starts from weights or from runtime.resume={config.runtime.resume}, not both")
    path = Path(config.train.init)
    if (path / "model_index.json").is_file():
        raise UserError(f"{given}: is a pipeline of diffusers; `python convert.py checkpoint={path} out=FILE` first")
    if path.is_dir():
        path /= "model.safetensors"
    sha256 = sha256_of(path)
    stored, weights = load_weights(path)
    with reading(path, "trained model of this project"):
        trained = parse(stored, Trained)
    theirs, ours = (
        {"model": of.model.model_dump(exclude={"dropout", "attention_resolutions"})}
        | {"diffusion": of.diffusion.model_dump(include={"prediction"})}
        for of in (trained, config)
    )
    if changed := differences(theirs, ours):
        raise UserError(f"{given}: is of another network ({describe_differences(changed, 'weights')})")
    return weights, f"weights {sha256}"
