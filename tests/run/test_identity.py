"""What makes a run another run: values, data, the meaning of the code; not its comments."""

import shutil

import pytest

from modeling.run.identity import code_sha256, describe_differences, differences, run_length
from tests.helpers import ROOT

CODE = """
def f(x):
    return [x + 1, None]


class Section:
    key: int
"""


def version(tmp_path, text: str) -> str:
    (tmp_path / "main.py").write_text(text)
    return code_sha256(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        CODE,
        f"# a comment\n{CODE}# another\n",
        CODE.replace("return [x + 1, None]", "return [\n        x + 1,  # why\n        None,\n    ]"),
        f'"""What it is."""\n{CODE}',
        CODE.replace("    return", '    """What it does."""\n    return'),
        CODE.replace("return [x + 1, None]", "return [(x + 1), None]"),
        CODE.replace("    key: int", '    key: int\n    """What the key means."""'),
    ],
)
def test_comments_docstrings_and_layout_leave_the_version_of_the_code(tmp_path, text):
    assert version(tmp_path, text) == version(tmp_path, CODE)


@pytest.mark.parametrize(
    "text",
    [
        CODE.replace("1", "2"),
        CODE.replace("1", "1.0"),
        CODE.replace("None", "0"),
        CODE.replace(", None", ""),
        CODE.replace("f(x)", "f(x=1)"),
        CODE.replace("return", "yield"),
        f"{CODE}\nf(1)\n",
        f'{CODE}\n"""Text that is no docstring."""\n',
    ],
)
def test_what_can_change_a_result_changes_the_version_of_the_code(tmp_path, text):
    assert version(tmp_path, text) != version(tmp_path, CODE)


def test_the_version_of_the_code_is_one_for_every_checkout(tmp_path):
    shutil.copytree(ROOT / "modeling", tmp_path / "copy" / "modeling")
    shutil.copy(ROOT / "main.py", tmp_path / "copy" / "main.py")
    assert code_sha256(tmp_path / "copy") == code_sha256()
    module = tmp_path / "copy" / "modeling" / "run" / "step.py"
    module.write_text(module.read_text() + "\nX = 1\n")
    assert code_sha256(tmp_path / "copy") != code_sha256()
    shutil.move(module, module.with_name("move.py"))
    with pytest.raises(FileNotFoundError, match=r"modeling/run/step\.py does not exist"):
        code_sha256(tmp_path / "copy")


def test_differences_name_the_key_and_what_the_values_are_of():
    changed = differences({"seed": 0, "train": {"lr": 1.0}, "old": None}, {"seed": 1, "train": {"lr": 1.0, "new": "a"}})
    assert changed == {"seed": (0, 1), "train.new": (None, "a")}
    assert describe_differences({"code": ("1f", "2e"), "data": ("3d", "4c")}, "checkpoint") == (
        "other code; other training or held-out images"
    )
    assert describe_differences(changed, "checkpoint") == (
        'seed: checkpoint 0, this run 1; train.new: checkpoint null, this run "a"'
    )


@pytest.mark.parametrize(
    ("num_images", "num_epochs", "max_steps", "length"),
    [(100, 2, None, 12), (100, 2, 5, 5), (100, 2, 50, 12), (15, 3, None, 0), (100, 1.5, None, 9), (100, 0.01, None, 1)],
)
def test_a_run_ends_at_the_earlier_of_its_two_lengths(num_images, num_epochs, max_steps, length):
    assert run_length(num_images, 16, num_epochs, max_steps) == length
