"""Reads files back, whoever wrote them: a damaged or other one is a line with its name and the remedy.

Nothing else in `modeling/` parses JSON, YAML, NumPy's formats or safetensors. The libraries are imported where they are
used: the scripts check their values before they import anything heavy, and training needs no pydantic.
"""

import contextlib
import functools
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from modeling.system.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Kind = TypeVar("Kind")


@contextlib.contextmanager
def reading(path: str | Path, kind: str, remedy: str = "", error: type[UserError] = UserError) -> Iterator[None]:
    """Turns any exception raised while reading an untrusted file into a UserError; an OSError passes, with the path.

    Args:
        kind: what the file should be, and `remedy`: what to do if it is not; for the message.
        error: the kind of UserError.
    """
    try:
        yield
    except Exception as problem:  # a damaged or malicious file may raise anything
        if isinstance(problem, OSError) and problem.errno is not None:
            raise OSError(problem.errno, problem.strerror, str(path)) from problem
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        if isinstance(problem, pickle.UnpicklingError):  # torch's message explains how to load it anyway
            reason = "it holds more than tensors and plain values"
        raise error(f"{path} is no {kind}, or damaged: {reason}" + (f"; {remedy}" if remedy else "")) from problem


@functools.cache
def _validator(kind: Any):
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def check(content: Any, kind: type[Kind]) -> Kind:
    """Plain values, unchanged, if they are of this kind.

    Args:
        kind: a TypedDict (of typing_extensions), whose unknown keys are kept, or a type such as `dict[str, int]`.

    Raises:
        ValueError: in one line: the place in the content, and what was expected there.
    """
    from pydantic import ValidationError

    try:
        _validator(kind).validate_python(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(": ".join([*filter(None, [".".join(map(str, first["loc"]))]), first["msg"]])) from error
    return content


def parse_json(text: str | bytes, kind: type[Kind]) -> Kind:
    """JSON text as values of this kind.

    Raises:
        ValueError: for other text, or as `check`; RecursionError for a text that is nested too deeply.
    """
    return check(json.loads(text), kind)


def read_json(path: Path, kind: type[Kind], remedy: str = "") -> Kind:
    """A JSON file's values.

    Raises:
        UserError: if it is damaged or not of this kind.
        OSError: if it cannot be read.
    """
    with reading(path, "JSON of the expected form", remedy):
        return parse_json(path.read_bytes(), kind)


def read_json_lines(path: Path, kind: type[Kind]) -> list[Kind | None]:
    """The lines of a file with a JSON text in each; None for each that is damaged or not of this kind.

    A last line without an end is left out if it is damaged: a process was writing it, or is.

    Raises:
        OSError: if it cannot be read.
    """
    rows, lines = [], path.read_bytes().split(b"\n")
    for line in lines:
        try:
            rows.append(parse_json(line, kind))
        except (ValueError, RecursionError):
            rows.append(None)
    return rows if rows[-1] is not None else rows[:-1]


def read_yaml(path: Path, kind: type[Kind], remedy: str = "") -> Kind:
    """A YAML file's values, with interpolations as they are written.

    Raises:
        UserError: if it is damaged or not of this kind.
        OSError: if it cannot be read.
    """
    from omegaconf import OmegaConf

    with reading(path, "YAML of the expected form", remedy):
        return check(OmegaConf.to_container(OmegaConf.load(path)), kind)


def read_array(path: Path, remedy: str = "", *, is_mapped: bool = False) -> "np.ndarray":
    """The array of a .npy file.

    Args:
        is_mapped: it stays in the file, read-only: what is used is read, and processes share the system's one copy.

    Raises:
        UserError: if it is damaged or another file.
        OSError: if it cannot be read.
    """
    import numpy as np

    with reading(path, "NumPy array", remedy):
        array = np.load(path, mmap_mode="r" if is_mapped else None, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise TypeError("it is an archive")
        return array


@contextlib.contextmanager
def reading_arrays(path: Path, kind: str, remedy: str = "") -> Iterator[Any]:
    """The open .npz file, name -> array; what is wrong inside the section is an error as in `reading`."""
    import numpy as np

    # numpy leaves a file open that it opened itself and found damaged.
    with reading(path, kind, remedy), path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        yield archive


def read_safetensors(
    path: Path, kind: str, error: type[UserError] = UserError
) -> "tuple[dict[str, str], dict[str, Tensor]]":
    """The metadata of a .safetensors file and its tensors by name, on the CPU.

    Raises:
        UserError: of the kind `error`, if it is damaged or another file.
        OSError: if it cannot be read.
    """
    from safetensors import safe_open

    path.open("rb").close()  # for an error that names the path
    with reading(path, kind, error=error), safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
