"""`key=value` on a command line: how a value is written, and which known key a wrong one means."""

import difflib
import re
import shlex
from collections.abc import Collection, Iterator
from typing import Any

# Text that neither the shell nor Hydra changes, and that Hydra takes for no number.
_PLAIN = re.compile(r"(\.{0,2}/)?[a-z_][\w./-]*", re.ASCII | re.IGNORECASE)


def _written(value: object) -> str:
    """A plain value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_written(one)}' for key, one in value.items())}}}"
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return str(value)
    if _PLAIN.fullmatch(value) and value.lower() not in ("null", "true", "false", "inf", "nan"):
        return value
    # Backslashes count where `${` or a quote follows, and nowhere else.
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return '"' + re.sub(r'(\\*)("|\Z)', lambda match: match[1] * 2 + ('\\"' if match[2] else ""), value) + '"'


def assignment(key: str, value: object) -> str:
    """The argument by which Hydra sets the key to this very value.

    Args:
        value: text, a number, a truth value, None, or a list or a dictionary of these.
    """
    return f"{key}={_written(value)}"


def override(key: str, value: object) -> str:
    """`assignment` as a word of a shell's command line."""
    return shlex.quote(assignment(key, value))


def known_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a pydantic model, with those of its sections."""
    for name, field in schema.model_fields.items():
        yield prefix + name
        if hasattr(field.annotation, "model_fields"):
            yield from known_keys(field.annotation, f"{prefix}{name}.")


def nearest(key: str, known: Collection[str]) -> str:
    """The known key that a wrong one means: one with the same last part (`train.lr`: `optimizer.lr`) comes first."""
    same = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return difflib.get_close_matches(key, same or known, n=1, cutoff=0)[0]
