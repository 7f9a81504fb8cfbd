"""Nothing read from a file is run: what ruff rejects (pyproject.toml), and what it does not see."""

import ast
import json
import re
import subprocess
import sys
import tomllib

import pytest

from tests.helpers import ROOT

CODE = sorted([*ROOT.glob("*.py"), *(ROOT / "modeling").rglob("*.py")])
CONFIGURATION = [ROOT / "params.yaml", *sorted((ROOT / "conf").rglob("*.yaml"))]

REJECTED_BY_RUFF = """\
import torch; torch.load(path, weights_only=True)
import torch as t; t.load(path)
from torch import load as read
import torch; read = torch.load
import torch; torch.hub.load(repository, name)
from torch.package import PackageImporter
import pandas; pandas.read_pickle(path)
import pickle; pickle.load(file)
import pickle as p; p.loads(content)
from pickle import loads
import pickle; read = pickle.load
import pickle; pickle.Unpickler(file).load()
import joblib
import dill as d
from cloudpickle import load
import shelve
import marshal; marshal.loads(content)
import yaml; yaml.load(text)
import yaml; yaml.load(text, Loader=yaml.Loader)
import yaml; yaml.load(text, Loader=yaml.UnsafeLoader)
import yaml; yaml.load_all(text, Loader=yaml.Loader)
import yaml; yaml.unsafe_load(text)
from yaml import full_load
eval(text)
exec(text)
import builtins; builtins.exec(text)
import importlib; importlib.import_module(name)
import runpy; runpy.run_path(path)
import tarfile; tarfile.open(path).extractall(folder)
import shutil; shutil.unpack_archive(path)
import subprocess; subprocess.run(text, shell=True)
import os; os.system(text)
import os; os.popen(text)
import hydra; hydra.utils.instantiate(config)
from hydra.utils import instantiate
from hydra import utils
import logging.config; logging.config.dictConfig(values)
""".splitlines()
ADMITTED_BY_RUFF = """\
import numpy as np; np.load(path, allow_pickle=False)
import pickle; pickle.UnpicklingError
import yaml; yaml.load(text, Loader=yaml.SafeLoader)
import yaml; yaml.safe_load(text)
import subprocess; subprocess.run(["/bin/ls"], shell=False)
module.eval()
tar.extractfile(info).read()
""".splitlines()


def test_ruff_rejects_code_that_could_run_what_a_file_says():
    pytest.importorskip("ruff")
    lines = REJECTED_BY_RUFF + ADMITTED_BY_RUFF
    command = [sys.executable, "-m", "ruff", "check", "--output-format=json", "--stdin-filename=modeling/any.py", "-"]
    done = subprocess.run(command, cwd=ROOT, input="\n".join(lines), capture_output=True, text=True)
    rules = ("S1", "S2", "S3", "S5", "S6", "TID251")
    rows = {entry["location"]["row"] for entry in json.loads(done.stdout) if entry["code"].startswith(rules)}
    assert [line for row, line in enumerate(lines, 1) if row in rows] == REJECTED_BY_RUFF


def test_the_bans_are_lifted_on_known_lines_only():
    lines = [line for path in CODE for line in path.read_text().splitlines()]
    lifted = [line for line in lines if re.search(r"noqa(?!:)|noqa: .*(TID251|S\d)", line)]
    assert [re.split("[(:]", line.strip())[0] for line in lifted] == [
        "class _ArrayUnpickler",  # knows the three names of an array, see tests/datasets/test_cifar10.py
        "with urllib.request.urlopen",  # what it delivers is verified
    ]
    ignored = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]["per-file-ignores"]
    assert {path: rules for path, rules in ignored.items() if path != "tests/*"} == {
        "modeling/checkpoint.py": ["TID251"]  # calls torch.load, which must say weights_only=True
    }


# Calls that must have this argument, arguments that must have this value, attributes that must not occur.
GUARDS = {"torch.load": "weights_only=True", "numpy.load": "allow_pickle=False"}
VALUES = {"weights_only": "weights_only=True", "allow_pickle": "allow_pickle=False", "shell": "shell=False"}
METHODS = {"extract", "extractall", "instantiate", "_target_"}
MARK = re.compile(r"_target_|!!python")  # of a callable's name in a file: Hydra's and YAML's
FACTORY = re.compile(r"""^\s*(?:'\(\)'|"\(\)"|\(\)):""", re.MULTILINE)  # logging's, which only a file can have


def dangers(source: str) -> set[str]:
    """What in Python code could run what a file says; it notices oversights, not malice."""
    nodes = list(ast.walk(ast.parse(source)))  # a call comes before the name that it calls
    imported = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    known_as = {alias.asname: alias.name for alias in imported if alias.asname}
    found, passed = set(), set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & GUARDS.keys()
        elif isinstance(node, ast.Call):
            given = {keyword.arg: ast.unparse(keyword) for keyword in node.keywords}
            found |= {given[key] for key, value in VALUES.items() if given.get(key, value) != value}
            if GUARDS.get(full_name(node.func, known_as)) in given.values():
                passed.add(node.func)
        elif isinstance(node, ast.Name | ast.Attribute) and node not in passed:
            found |= {full_name(node, known_as)} & {*GUARDS, "eval", "exec", "__import__"}
            found |= {getattr(node, "attr", "")} & METHODS
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(MARK.findall(node.value))
        elif isinstance(node, ast.keyword) and node.arg == "_target_":
            found.add("_target_")
    return found


def full_name(node: ast.expr, known_as: dict[str, str]) -> str:
    """What an expression spells, with import aliases resolved: `np.load` is `numpy.load`."""
    first, dot, rest = ast.unparse(node).partition(".")
    return known_as.get(first, first) + dot + rest


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.stem)
def test_no_code_runs_what_a_file_says(path):
    assert not dangers(path.read_text())


@pytest.mark.parametrize("path", CONFIGURATION, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_configuration_names_a_callable(path):
    assert not marks(path.read_text())


def marks(text: str) -> set[str]:
    """What in a YAML file could name a callable."""
    return {*MARK.findall(text), *FACTORY.findall(text)}


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("torch.load(path)", "torch.load"),
        ("torch.load(path, weights_only=False)", "weights_only=False"),
        ("torch.load(path, weights_only=trusted)", "weights_only=trusted"),
        ("torch.load(path, **options)", "torch.load"),
        ("import torch as t\nt.load(path)", "torch.load"),
        ("from torch import load as read\nread(path)", "torch.load"),
        ("read = torch.load", "torch.load"),
        ("read(path, weights_only=False)", "weights_only=False"),
        ("import numpy as np\nnp.load(path)", "numpy.load"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("import numpy as np\nnp.load(path, None, False)", "numpy.load"),
        ("from numpy import load\nload(path)", "numpy.load"),
        ("np.save(path, array, allow_pickle=True)", "allow_pickle=True"),
        ("run = eval", "eval"),
        ("__import__(name)", "__import__"),
        ("archive.extract(name)", "extract"),
        ("tarfile.open(path).extractall(folder, filter='data')", "extractall"),
        ("from subprocess import Popen\nPopen(text, shell=flag)", "shell=flag"),
        ("build = loader.instantiate", "instantiate"),
        ("config['_target_']", "_target_"),
        ("config._target_", "_target_"),
        ("dict(_target_=name)", "_target_"),
        ("text = f'_target_: {name}'", "_target_"),
        ("text = '!!python/object/apply:os.system'", "!!python"),
    ],
)
def test_code_that_could_run_what_a_file_says_is_noticed(source, danger):
    assert danger in dangers(source)


@pytest.mark.parametrize(
    "text",
    [
        "model:\n  _target_: os.system\n",
        "a: !!python/object/apply:os.system [ls]\n",
        "formatters:\n  simple:\n    (): os.system\n",
        "formatters:\n  simple:\n    '()': os.system\n",
    ],
)
def test_a_configuration_that_names_a_callable_is_noticed(text):
    assert marks(text)
