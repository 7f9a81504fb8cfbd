"""`--help` and `--version` of a script, and the page of all keys: what they say is what the schemas say."""

import re
import sys
from typing import Literal

import pytest

import convert
import main
import sample
from modeling.system import manual
from modeling.system.manual import Key, code_version, help_text, keys_of
from modeling.system.values import PathText, PositiveInt, Section
from tests.configuration_page import PAGE, keys_by_script, page
from tests.helpers import run_script


@pytest.fixture
def printed(monkeypatch, capsys):
    """What a script prints on these arguments."""

    def run(script, *arguments: str) -> str:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # is set by the script, and restored after the test
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
        script.main()
        return capsys.readouterr().out

    return run


class Part(Section):
    kind: Literal["a", "b"]
    """Which one."""
    numbers: list[PositiveInt] | None
    """Which numbers."""
    flag: bool = False
    """A switch."""


class Whole(Section):
    part: Part
    out: PathText
    """Where it goes."""


class Silent(Section):
    a: int
    """A number."""
    b: int


def test_a_key_has_its_default_its_values_and_the_text_under_it():
    assert list(keys_of(Whole, {"part": {"kind": "a", "numbers": None, "flag": True}, "out": "???"})) == [
        Key("part.kind", "a", "a, b", "Which one."),
        Key("part.numbers", "null", "list of [whole number above 0] or null", "Which numbers."),
        Key("part.flag", "true", "true, false", "A switch."),
        Key("out", "", "path", "Where it goes."),
    ]


def test_a_key_without_a_meaning_is_an_error():
    with pytest.raises(KeyError, match="b"):
        list(keys_of(Silent, {"a": 1, "b": 2}))


def test_help_has_examples_then_keys_by_section_then_alternatives():
    keys = [Key("seed", "0", "whole number", "Of all."), Key("a.b", "", "path", "A long text " * 3)]
    assert help_text("Does it.\n\n    python x.py\n", keys, {"a": ["one", "two"]}, 40).startswith(
        "Does it.\n\n    python x.py\n\nKeys, each with its default:\n\n"
        "  seed=0  (whole number)\n      Of all.\n\na\n  a.b=...  (path)\n"
        "      A long text A long text A long\n      text\n\n"
        "Named alternatives, "
    )


def test_the_help_of_a_script_explains_each_key_with_what_will_run(printed):
    text = printed(main, "--help", "model=unet", "optimizer.lr=1e-3")
    assert text.startswith(main.__doc__.strip())
    assert "\nmodel\n  model.name=unet  (unet, ddpm)\n      The network: " in text
    assert "\n  optimizer.lr=0.001  (number at least 0)\n" in text
    assert "\n  optimizer=  adam, adamw, muon, sgd\n" in text
    assert all(f"\n  {key.name}=" in text for key in keys_by_script()["main.py"])
    assert max(map(len, text.splitlines())) <= 120


def test_the_help_of_a_script_has_its_own_alternatives_only(printed):
    assert "\n  checkpoint=...  (path)\n" in printed(convert, "--help")
    text = printed(sample, "--help")
    assert "\n  checkpoint=weights/cifar10.safetensors  (path)\n" in text
    assert "Named alternatives" not in text


def test_the_help_needs_nothing_heavy():
    done = run_script("main.py", "--help", env={"PYTHONPROFILEIMPORTTIME": "1"})
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0
    assert "pydantic" in imported
    assert not imported & {"torch", "numpy", "wandb"}


def test_the_page_of_all_keys_is_what_the_schemas_say():
    assert PAGE.read_text() == page(), "run `make configuration`"


def test_the_version_is_the_commit(printed, monkeypatch, tmp_path):
    pattern = r"unreleased, (commit [0-9a-f]{7,} of \d{4}-\d\d-\d\d|no Git repository)\n"
    assert re.fullmatch(pattern, printed(sample, "--version"))
    monkeypatch.setattr(manual, "REPOSITORY", tmp_path)
    assert code_version() == "unreleased, no Git repository"
