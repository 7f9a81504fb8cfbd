"""Stage 2: trains a model, samples from it and measures it.

    python main.py                                          # what params.yaml says
    python main.py experiment=demo                          # a named alternative (conf/)
    python main.py optimizer=sgd optimizer.lr=0.1 train.num_epochs=5
    dvc repro                                               # the same as a recorded stage

The same command again goes on from the last checkpoint; a finished run is left as it is.
"""

import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from modeling.config import ConfigError
from modeling.stage import parse_stage, read_manifest


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(values: DictConfig) -> None:
    try:
        config = parse_stage(values)
        manifest = read_manifest(config.dataset)
    except ConfigError as error:
        sys.exit(str(error))

    # Not above: torch takes seconds to import, and a wrong configuration should not have to wait for it.
    from modeling.run import RunError, publish, train

    is_stage = "DVC_STAGE" in os.environ
    try:
        folder = train(config, manifest, replace=is_stage)
    except (RunError, FloatingPointError) as error:
        sys.exit(str(error))
    if is_stage:
        publish(folder, Path("outputs"))
        print(f"artefacts   outputs/, from {folder}/")


if __name__ == "__main__":
    main()
