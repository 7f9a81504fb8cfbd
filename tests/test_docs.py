"""Every command of the pages works, and what the pages name exists: files, tests, configuration keys and values.

Commands are the indented blocks, the fenced blocks other than ```text, and spans of code that begin with a program's
name. Bash runs them with a recorder instead of each program, so that loops and quotes mean what they mean to a reader.
What was recorded is then checked; nothing is trained, sampled or installed.
"""

import argparse
import functools
import importlib
import itertools
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import SubprocessError, run

import pytest
import yaml
from dvc.cli import DvcParserError, parse_args
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from torch.distributed.run import parse_args as parse_torchrun

from modeling.config import Config, parse
from modeling.system.errors import UserError
from tests.configuration_page import SCHEMAS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("benchmarks", "conf", "docs", "encoders", "modeling", "references", "tests")
BASH = shutil.which("bash") or "bash"
UNCHECKED = (".", "cd", "git", "scontrol", "uv", "uvx", "wandb")
RECORDER = r"""
record() {
    local IFS=$'\x1f'
    [[ $seen == *"<$*>"* ]] && return 1  # a command fails the second time, which ends a loop
    seen+="<$*>"
    printf '%s\n' "$*"
}
for name in NAMES; do eval "$name() { record $name \"\$@\"; }"; done
srun() { "$@"; }
"""
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^\n((?: {4}.*\n|\n(?= {4}))+)", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)")


class Wrong(Exception):
    """What is wrong with a command or a name."""


class Parsed(Exception):
    """Ends a script as soon as its parser has accepted the arguments."""


REJECTIONS = (Wrong, UserError, HydraException, DvcParserError, pytest.UsageError, SystemExit, SubprocessError)

# ---- commands: a function for each program, which raises an error for wrong arguments


@functools.cache
def check_overrides(script: str, *overrides: str) -> None:
    name, schema = SCHEMAS[script]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        parse(compose(name, overrides=list(overrides)), schema)


def check_sweep(script: str, *overrides: str) -> None:
    choices = []  # the values of each key, several in a sweep
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        values = override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_string()]
        choices.append([f"{override.key_or_group}={value}" for value in values])
    for chosen in itertools.product(*choices):
        check_overrides(script, *chosen)


def check_argparse(script: str, *arguments: str) -> None:
    read = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser) -> None:
        raise Parsed(read(parser, arguments))

    module = importlib.import_module(Path(script).stem)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) as parsed:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        module.main()
    sections = getattr(parsed.value.args[0], "sections", [])  # of benchmark.py
    if unknown := [section for section in sections if section not in (*module.SECTIONS, "start")]:
        raise Wrong(f"unknown section {unknown}")


@functools.cache
def check_python(script: str, *arguments: str) -> None:
    if "--help" in arguments:
        run([sys.executable, script, *arguments], cwd=ROOT, check=True, capture_output=True)
    elif arguments[:1] == ("-m",):
        check_sweep(script, *arguments[1:])
    elif script in SCHEMAS:
        check_overrides(script, *arguments)
    elif script in ("report.py", "benchmark.py"):
        check_argparse(script, *arguments)
    elif (script, *arguments[:1]) != ("-m", "venv"):
        raise Wrong(f"unknown script {script}")


def check_torchrun(*arguments: str) -> None:
    options = parse_torchrun(list(arguments))
    check_python(options.training_script, *options.training_script_args)


def check_dvc(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dvc", *arguments])  # which DVC reads beside what it is given
        options = parse_args(list(arguments))
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    if unknown := set(getattr(options, "targets", None) or []) - set(stages):
        raise Wrong(f"unknown stage {unknown}")
    check_sweep("main.py", *(getattr(options, "set_param", None) or []))


def check_make(*arguments: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if unknown := [word for word in arguments if word not in targets and "=" not in word]:
        raise Wrong(f"unknown target {unknown}")


def check_pytest(config: pytest.Config, *arguments: str) -> None:
    options = config._parser.parse(arguments)
    markers = [re.match(r"\w+", line)[0] for line in config.getini("markers")]
    if unknown := set(re.findall(r"\w+", options.markexpr)) - {"and", "or", "not", *markers}:
        raise Wrong(f"unknown marker {unknown}")
    check_names(" ".join(options.file_or_dir))


CHECKS: dict[str, Callable] = {
    "python": check_python, "python3": check_python, "dvc": check_dvc, "make": check_make, "pytest": check_pytest,
    "pip": lambda *arguments: check_names(" ".join(arguments)), "torchrun": check_torchrun,
}  # fmt: skip


def recorded(script: str) -> list[list[str]]:
    """The commands that bash would run; it may write no file and start no program."""
    script = RECORDER.replace("NAMES", " ".join([*CHECKS, *UNCHECKED])) + script
    done = run([BASH, "-rc", script], env={"PATH": "/dev/null"}, capture_output=True, text=True, timeout=5)
    if done.stderr:
        raise Wrong(done.stderr.strip())
    return [line.split("\x1f") for line in done.stdout.splitlines()]


@functools.cache
def python_files() -> dict[Path, str]:
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return {path: path.read_text() for path in paths}


def check_names(text: str) -> None:
    """Files, tests, configuration keys and values, in prose and in blocks that are no commands."""
    for path in re.findall(rf"(?<![\w/.-])(?:(?:{'|'.join(FOLDERS)})/[\w./-]*|requirements[\w.-]*)", text):
        if not (ROOT / path).exists():
            raise Wrong(f"there is no {path}")
    for name in re.findall(r"(?<![\w/.-])\w+\.py\b", text):
        if name not in [path.name for path in python_files()]:
            raise Wrong(f"there is no {name}")
    for file, name in re.findall(r"\b(test_\w+)(?:\.py)?::(test_\w+)", text):
        if not any(path.stem == file and f"def {name}(" in code for path, code in python_files().items()):
            raise Wrong(f"there is no {file}::{name}")
    sections, words = "|".join(Config.model_fields), text.split()
    if words and all(re.fullmatch(rf"(?:{sections}|experiment)(?:\.\w+)?=\S+", word) for word in words):
        missing = ["dataset.pictures=pictures"] if "dataset=folder" in words else []
        check_overrides("main.py", *words, *missing)
    key = re.fullmatch(rf"({sections})\.(?!safetensors)(\w+)", text)
    if key is not None and key[2] not in Config.model_fields[key[1]].annotation.model_fields:
        raise Wrong(f"there is no key {text}")


def check_link(page: Path, path: str, heading: str) -> None:
    target = page.parent / path if path else page
    if not target.exists():
        raise Wrong(f"there is no {target}")
    titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if heading else []
    if heading and heading not in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]:
        raise Wrong(f"{path} has no heading {heading}")


@pytest.fixture
def problems(pytestconfig) -> Callable:
    """All that is wrong in a page's text, a line for each."""
    checks = CHECKS | {"pytest": functools.partial(check_pytest, pytestconfig)}

    def check_all(text: str, page: Path = ROOT / "README.md") -> list[str]:
        prose = FENCED.sub("\n", text)
        spans = re.findall(r"`([^`]+)`", INDENTED.sub("\n", prose))
        commands = [span for span in spans if span.startswith(tuple(f"{name} " for name in checks))]
        scripts = [block for kind, block in FENCED.findall(text) if kind != "text"] + INDENTED.findall(prose) + commands
        others = [block for kind, block in FENCED.findall(text) if kind == "text"] + spans
        todo = [(recorded, script) for script in scripts]
        todo += [(check_names, other) for other in others] + [(check_link, page, *link) for link in LINK.findall(prose)]
        found = []
        for check, *arguments in todo:  # which grows by the commands that are recorded
            try:
                for name, *words in check(*arguments) or []:
                    if name in checks:
                        todo.append((checks[name], *words))
            except REJECTIONS as error:
                found.append(f"{' '.join(map(str, arguments))}: {error}")
        return found

    return check_all


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_a_page_says_holds(problems, page):
    assert problems(page.read_text(), page) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("    python main.py train.lrr=1", "lrr"),
        ("    python main.py \\\n        train.num_epochs=0", "train.num_epochs=0"),
        ("    for steps in 10 0; do python sample.py checkpoint=a num_steps=$steps; done", "num_steps=0: input"),
        ("    python report.py runs/RUN --plots a.png", "2"),
        ("    python benchmark.py trainings", "unknown section"),
        ("    python trains.py", "unknown script trains.py"),
        ("    dvc exp run -S 'optimizer.lr=1e-3,-1'", "optimizer.lr=-1"),
        ("    python main.py -m optimizer.lr=1e-3,-1", "optimizer.lr=-1"),
        ("    dvc exp runs", "parser error"),
        ("    dvc repro -f prepare", "unknown stage"),
        ("    make demo && make trian", "unknown target"),
        ("    pytest --covv", "--covv"),
        ("    pytest -m quick", "unknown marker"),
        ("    pytest tests/test_docs.py::test_nothing", "there is no test_docs::test_nothing"),
        ("    pip install -r requirements-test.txt", "there is no requirements-test.txt"),
        ("    pyhton main.py", "pyhton: command not found"),
        ("```sh\npython main.py seed=x\n```", "seed=x"),
        ("Set `train.lrr`.", "there is no key train.lrr"),
        ("Choose `optimizer=sgdd`.", "sgdd"),
        ("Run `python main.py train.lrr=1`.", "lrr"),
        ("Read `modeling/diffusions.py`.", "there is no modeling/diffusions.py"),
        ("```text\nmodeling/rooms/    the map\n```", "there is no modeling/rooms/"),
        ("Held by `test_docs::test_nothing`.", "there is no test_docs::test_nothing"),
        ("See [it](docs/nothing.md).", "nothing.md"),
        ("See [it](docs/quality.md#nothing).", "has no heading nothing"),
    ],
)
def test_a_wrong_command_or_name_is_found(problems, text, message):
    assert message in problems(f"A page.\n\n{text}\n")[0]
