"""The command line of a script: Hydra builds the values, and a user's mistake is answered in one line."""

import contextlib
import functools
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from modeling.system.errors import UserError, errors_in_one_line
from modeling.system.manual import code_version, help_text, keys_of
from modeling.system.overrides import assignment, known_keys, nearest, override
from modeling.system.reading import read_yaml
from modeling.system.sweep import Sweep, parallel

Options = TypeVar("Options")

CONFIGURATION = Path(__file__).resolve().parents[2] / "conf"


def script(
    name: str, schema: type[Options], read: Callable[[DictConfig, type[Options]], Options]
) -> Callable[[Callable[[Options], None]], Callable]:
    """Makes a script's `main` of a function of its options; a user's mistake then ends it with one line.

    `main()` runs on `sys.argv`, `main(values)` on composed values. In a sweep (`-m`) a failed run does not end the
    others, but a signal does; the exit code is the number of failed runs. With
    `--print-jobs` they are checked and printed, a line of overrides each, as words of a shell.

    Args:
        name: of its configuration, `conf/<name>.yaml`.
        schema: of its options, a pydantic model.
        read: checks the composed values against the schema.
    """

    def decorate(function: Callable[[Options], None]) -> Callable:
        def run(values: DictConfig) -> None:
            with _naming_the_way_back(), errors_in_one_line():
                try:
                    checked = read(values, schema)
                except UserError as error:
                    example = _example(function, error.__cause__)
                    raise UserError(f"{error}{example}") from error
                function(checked)

        def start(sweep: Sweep | None, only_print: bool = False) -> None:
            """Lets Hydra build the values and run the script on them, as each job of a sweep if there is one."""

            @functools.wraps(function)  # by which Hydra finds the script's name
            def job(values: DictConfig) -> None:
                if only_print:
                    with errors_in_one_line():
                        read(values, schema)
                    print(shlex.join(HydraConfig.get().overrides.task))
                elif sweep is None:
                    run(values)
                else:
                    sweep.run(HydraConfig.get().job.num, functools.partial(run, values))

            hydra.main(version_base="1.3", config_path=str(CONFIGURATION), config_name=name)(job)()

        @functools.wraps(function)
        def main(values: DictConfig | None = None) -> None:
            if values is not None:
                run(values)
                return
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print its own errors, and cut tracebacks
            sys.argv[1:] = map(_with_home, sys.argv[1:])
            with errors_in_one_line():
                try:
                    if only_print := "--print-jobs" in sys.argv:
                        sys.argv.remove("--print-jobs")
                    if "--version" in sys.argv:  # Hydra's parser would print its own
                        print(code_version())
                        return
                    arguments = get_args_parser().parse_args()
                    if arguments.help:
                        print(_help(function, name, schema, arguments.overrides))
                        return
                    if only_print or not arguments.multirun:
                        start(None, only_print)
                        return
                    batch = jobs(arguments.overrides)
                    sys.argv += parallel(arguments.overrides, len(batch))
                    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
                        sweep = Sweep(Path(folder), batch)
                        with sweep.stopping_jobs_on_signals():
                            start(sweep)
                        sweep.end()
                except (HydraException, ValueError) as error:  # Hydra raises both for a wrong argument
                    if mistakes := list(_mistakes(name, schema)):
                        raise UserError("\n".join(mistakes)) from error
                    if isinstance(error, HydraException):
                        reason = str(error) or str(error.__cause__)
                        raise UserError(" ".join(reason.split())) from error
                    raise

        return main

    return decorate


@contextlib.contextmanager
def _naming_the_way_back() -> Iterator[None]:
    """Says how to go back, where a failed DVC stage leaves an experiment's values, and no results, in the workspace."""
    try:
        yield
    except BaseException as error:
        if os.environ.get("DVC_ROOT") == str(Path.cwd()) and getattr(error, "code", 1):
            print("`make restore` brings back params.yaml and outputs/ as they were committed", file=sys.stderr)
        raise


def _help(function: Callable, name: str, schema: type, overrides: list[str]) -> str:
    """The script's `--help`, with the values that these overrides give as defaults."""
    with hydra.initialize_config_dir(str(CONFIGURATION), version_base="1.3"):
        values = OmegaConf.to_container(hydra.compose(name, jobs(overrides)[0]), resolve=False)
    assert isinstance(values, dict)
    groups = {group: options(group) for group in groups_of(name)}
    doc = function.__globals__["__doc__"]
    return help_text(doc, list(keys_of(schema, values)), groups, min(100, shutil.get_terminal_size().columns))


def _example(function: Callable, cause: BaseException | None) -> str:
    """A command of the script's own that sets the key which is missing; nothing where there is none."""
    if not isinstance(cause, MissingMandatoryValue):
        return ""
    examples = re.findall(
        rf"^ *(python .*? {cause.full_key}=.*?)(?:  +#.*)?$", function.__globals__["__doc__"], re.MULTILINE
    )
    return f", as in `{examples[0]}`" if examples else ""


def groups_of(name: str) -> list[str]:
    """The groups of named alternatives that a script takes."""
    defaults = read_yaml(CONFIGURATION / f"{name}.yaml", dict[str, Any])["defaults"]
    return [group for entry in defaults if isinstance(entry, dict) for group in entry]


def options(group: str) -> list[str]:
    """The names in a group."""
    return sorted(path.stem for path in (CONFIGURATION / group).glob("*.yaml"))


def jobs(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of a sweep, in its order.

    Raises:
        HydraException: for an override that Hydra cannot read.
    """
    groups = ConfigLoaderImpl(create_config_search_path(str(CONFIGURATION)))  # for `model=glob(*)`
    parsed = OverridesParser.create(groups).parse_overrides(overrides)
    [batch] = BasicSweeper.split_arguments([one for one in parsed if not one.is_hydra_override()], None)
    return batch


def _with_home(word: str) -> str:
    """`key=~/path`, which Hydra cannot read, with the home folder's path instead of `~`."""
    match = re.fullmatch(r"([\w.]+)=(~[^,]*)", word)
    return word if match is None else assignment(match[1], os.path.expanduser(match[2]))


def _mistakes(name: str, schema: type) -> Iterator[str]:
    """What is wrong with each argument of the command line, a line for each mistake."""
    groups = groups_of(name)
    known = [*groups, *known_keys(schema)]
    arguments = get_args_parser().parse_args()
    for word in arguments.overrides:
        try:
            parsed = OverridesParser.create().parse_override(word)
        except HydraException:
            yield _unreadable(word)
            continue
        key = parsed.key_or_group
        is_sweep = parsed.is_sweep_override()
        if key == "hydra" or parsed.is_hydra_override():
            continue
        if not key:
            yield f"{word}: expected key=value"
        elif key not in known:
            yield f"{key}: unknown key; the nearest known one is {nearest(key, known)}"
        elif parsed.is_add():
            yield f"{word}: {key} is known already; leave out the +"
        elif parsed.is_delete():
            yield f"{word}: a key cannot be removed, only set"
        elif is_sweep and not arguments.multirun:
            text = parsed.get_value_string()
            yield (
                f"{word}: several values need -m, which runs one after the other; "
                f"a list is written {shlex.quote(f'{key}=[{text}]')}, a text {override(key, text)}"
            )
        elif key in groups and parsed.value_type != ValueType.GLOB_CHOICE_SWEEP:
            names = options(key)
            chosen = parsed.sweep_string_iterator() if is_sweep else [parsed.get_value_element_as_str()]
            for option in sorted(set(chosen) - {*names, "null"}):
                yield (
                    f"{key}={option}: unknown option; the nearest known one is {nearest(option, names)} "
                    f"(of {', '.join(names)})"
                )


def _unreadable(word: str) -> str:
    """The line for an argument that is not in Hydra's grammar."""
    key, is_pair, text = word.partition("=")
    if not is_pair or not re.fullmatch(r"[+~]*[a-z_]\w*([./]\w+)*", key, re.ASCII | re.IGNORECASE):
        return f"{word}: expected key=value"
    return f"{word}: Hydra cannot read this value; a text is written {override(key, text)}"
