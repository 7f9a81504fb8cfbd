"""Lets Hydra read the repository's params.yaml where it is. The scripts and DVC import this folder, as Hydra's plugins.

In conf/ its name is `values_of_params_yaml`, so that a copy or a link conf/params.yaml can never come before it.
"""

from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from yaml import YAMLError

from modeling.system.errors import UserError

# The one beside this folder: DVC also runs in copies of the repository.
_PATH = Path(__file__).resolve().parents[1] / "params.yaml"


def _read() -> object:
    try:
        values = OmegaConf.load(_PATH)
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{_PATH} cannot be read: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(values):
        raise UserError(f"{_PATH}: expected keys and values, got a list")
    return values


ConfigStore.instance().store("values_of_params_yaml", _read())
