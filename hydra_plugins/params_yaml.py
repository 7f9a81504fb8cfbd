"""Lets Hydra read the repository's params.yaml where it is. The scripts and DVC import this folder, as Hydra's plugins.

In conf/ its name is `values_of_params_yaml`, so that a copy or a link conf/params.yaml can never come before it.
"""

from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from modeling.system.reading import read_yaml

# The one beside this folder: DVC also runs in copies of the repository.
PATH = Path(__file__).resolve().parents[1] / "params.yaml"

VALUES = read_yaml(PATH, dict[str, Any], "mend it, or restore it")
ConfigStore.instance().store("values_of_params_yaml", OmegaConf.create(VALUES))
