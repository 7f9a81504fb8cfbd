"""`key=value` as messages print it: a shell and Hydra read back the very value."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from modeling.system.overrides import nearest, override

pytest.importorskip("hypothesis", reason="Hypothesis is not installed: requirements-dev.txt")
from hypothesis import example, given, settings
from hypothesis import strategies as st

# No argument of a process holds NUL or half a surrogate pair; `???` is OmegaConf's word for a missing value.
ANY = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
TEXTS = st.text(ANY | st.sampled_from("\\\"'${}=(#,:[] \na1~")).filter(lambda text: text != "???")
VALUES = TEXTS | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(VALUES | st.lists(VALUES))
@example({"optimizer.lr": {"low": 0.1, "log": True}, "other": [50, "a b"]})
@example("C:\\data\\")
@example("${oc.env:HOME}")
@example('\\\\${a}\\"b')
@example("null")
@example("1e3")
@example("été/~a=b(c)#d\n")
def test_a_shell_and_hydra_read_the_very_value(value):
    (word,) = shlex.split(override("dataset.pictures", value))
    read = OverridesParser.create().parse_override(word)
    assert read.key_or_group == "dataset.pictures"
    assert not read.is_sweep_override()
    config = OmegaConf.create({"value": read.value()})
    assert OmegaConf.to_container(config, resolve=True) == {"value": value}
    assert type(config.value) is type(value) or isinstance(value, (list, dict))


def test_a_plain_value_stays_readable():
    assert override("dataset.root", "/data/my-pictures_1.0") == "dataset.root=/data/my-pictures_1.0"
    assert override("dataset.pictures", "/a(b)") == """'dataset.pictures="/a(b)"'"""


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("optimizer.lrr", "optimizer.lr"),
        ("train.lr", "optimizer.lr"),
        ("batch_size", "train.batch_size"),
        ("modelx", "model"),
    ],
)
def test_a_wrong_key_is_near_the_one_that_is_meant(key, expected):
    known = ["seed", "model", "model.name", "optimizer.lr", "optimizer.name", "train.batch_size", "train.log_every"]
    assert nearest(key, known) == expected
