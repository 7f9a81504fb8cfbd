"""Stage 2: trains a model, samples from it and measures it.

    python main.py                                          # what params.yaml says
    python main.py experiment=demo                          # a named alternative (conf/)
    python main.py optimizer=sgd optimizer.lr=0.1 train.num_epochs=5
    dvc repro                                               # the same as a recorded stage

The same command again resumes from the last checkpoint; a finished run is left as it is. SIGTERM, SIGINT (Ctrl-C),
SIGHUP, SIGUSR1, SIGUSR2 and runtime.max_seconds save the state and end with 143, 130, 129, 138, 140 and 0.
"""

import os
from pathlib import Path

from modeling.config import Config
from modeling.stage import parse_stage, read_manifest
from modeling.system.command_line import script
from modeling.system.errors import UserError
from modeling.system.files import check_writable
from modeling.system.signals import Stopped, stopping_on_signals


@script("config", Config, parse_stage)
def main(config: Config) -> None:
    manifest = read_manifest(config.dataset)
    with stopping_on_signals(config.runtime.max_seconds):
        # Imported late, because torch takes seconds, and a wrong configuration should not wait for it.
        from modeling.run.session import train

        outputs = Path("outputs") if "DVC_STAGE" in os.environ else None
        if outputs is not None:
            check_writable(outputs / "metrics.json")
        try:
            train(config, manifest, outputs=outputs)
        except Stopped as stopped:
            if outputs is not None and stopped.code == 0:
                raise UserError(f"{stopped.reason} is over before the stage is done: `dvc repro` resumes it") from None
            raise


if __name__ == "__main__":
    main()
