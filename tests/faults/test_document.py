"""docs/faults.md names exactly the faults that tests hold."""

import re

from tests.helpers import ROOT


def test_the_documents_rows_are_those_that_tests_hold():
    lines = (ROOT / "docs" / "faults.md").read_text().splitlines()
    documented = {line.split("|")[1].strip() for line in lines if line.startswith("| ")} - {"fault"}
    held = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        held |= set(re.findall(r'pytest\.mark\.fault\("([^"]+)"\)', path.read_text()))
    assert documented == held
