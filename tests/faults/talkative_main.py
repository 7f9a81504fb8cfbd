"""main.py whose short bars show in a log, too, so that a test can wait for any phase of a run."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import main  # noqa: E402
from modeling.system import progress  # noqa: E402

progress.LOG_INTERVAL_SECONDS = 0
main.main()
