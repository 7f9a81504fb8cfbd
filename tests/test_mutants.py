"""The list of classic mistakes fits the code and the page; `python -m tests.mutants` runs it."""

import ast
import shutil

import pytest

from tests.mutants import PAGE, ROOT, Mistake, mistakes, passing, table


@pytest.mark.parametrize("mistake", mistakes(), ids=lambda mistake: mistake.name)
def test_a_mistake_can_be_put_back_and_its_tests_exist(mistake, tmp_path):
    for name, _, _ in mistake.edits:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    mistake.put_into(tmp_path)
    assert all(ast.parse((tmp_path / name).read_text()) for name, _, _ in mistake.edits)
    for test in mistake.tests:
        file, name = test.split("::")
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_page_shows_the_list():
    """Else run `python -m tests.mutants write`."""
    assert table() in PAGE.read_text()


def test_a_test_counts_as_failing_only_where_it_fails(tmp_path):
    """Neither a test that passes nor one that cannot be collected."""
    tests = ["test_a.py::test_fails", "test_a.py::test_passes", "test_b.py::test_cannot_be_imported"]
    (tmp_path / "test_a.py").write_text("def test_fails():\n    assert False\n\ndef test_passes():\n    pass\n")
    (tmp_path / "test_b.py").write_text("import nowhere_to_be_found\n")
    assert passing(Mistake("", "", "", [], tests[:2]), tmp_path) == tests[1:2]
    assert passing(Mistake("", "", "", [], tests[2:]), tmp_path) == tests[2:]
