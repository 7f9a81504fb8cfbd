"""Commands of a user in a copy of the repository."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import clean_environment

BIN = Path(sys.executable).parent
MAKE = ("make", "-s", "-o", ".venv/installed", f"BIN={BIN}")


def command(*words: str, cwd: Path) -> str:
    environment = clean_environment(PATH=f"{BIN}:{os.environ['PATH']}")
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{words}:\n{done.stdout}\n{done.stderr}"
    return done.stdout
