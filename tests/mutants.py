"""Puts each classic mistake back in a copy of the repository and runs the tests that must fail.

python -m tests.mutants          # reports "n of n caught"; exit 1 if a mistake survives
python -m tests.mutants write    # writes the table of docs/classic-mistakes.md
"""

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "classic-mistakes.md"
HEADER = "| mistake | what you see | how to find it | tests that fail |\n|---|---|---|---|\n"


@dataclass(frozen=True)
class Mistake:
    name: str
    symptom: str
    check: str
    edits: list[list[str]]  # file, the text that is there exactly once, the mistake
    tests: list[str]  # each must fail

    def put_into(self, root: Path) -> None:
        """Edits the files below root; an AssertionError names a text that is not there exactly once."""
        for name, old, new in self.edits:
            text = (root / name).read_text()
            assert text.count(old) == 1, f"{name} has this text {text.count(old)} times: {old}"
            (root / name).write_text(text.replace(old, new))


def mistakes() -> list[Mistake]:
    content = tomllib.loads((ROOT / "tests" / "classic_mistakes.toml").read_text())
    return [Mistake(**entry) for entry in content["mistake"]]


def table() -> str:
    """The table of the page."""
    rows = []
    for mistake in mistakes():
        tests = "<br>".join(
            f"`{Path(file).stem}::{name}`" for file, name in (test.split("::") for test in mistake.tests)
        )
        rows.append(f"| {mistake.name} | {mistake.symptom} | {mistake.check} | {tests} |\n")
    return HEADER + "".join(rows)


def write_page() -> None:
    before, rest = PAGE.read_text().split(HEADER)
    PAGE.write_text(before + table() + rest[rest.index("\n## ") :])


def passing(mistake: Mistake, copy: Path) -> list[str]:
    """The named tests that do not fail with the mistake in the copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "--tb=no", "-p", "no:cacheprovider", *mistake.tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "1000"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    failed = [line.removeprefix("FAILED ") for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    return [test for test in mistake.tests if not any(name.startswith((f"{test} ", f"{test}[")) for name in failed)]


def main() -> int:
    ignored = shutil.ignore_patterns(".*", "__pycache__", "data", "downloads", "outputs", "runs", "wandb")
    num_caught, found = 0, mistakes()
    with tempfile.TemporaryDirectory() as folder:
        for number, mistake in enumerate(found):
            copy = Path(folder) / str(number)
            shutil.copytree(ROOT, copy, ignore=ignored)
            mistake.put_into(copy)
            survived = passing(mistake, copy)
            num_caught += not survived
            print(f"{'SURVIVED' if survived else 'caught'}: {mistake.name}", *survived, sep="\n    ", flush=True)
    print(f"{num_caught} of {len(found)} caught")
    return int(num_caught < len(found))


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        write_page()
    else:
        sys.exit(main())
