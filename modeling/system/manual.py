"""What each key of a script means: for its `--help`, and for docs/configuration.md. Read from the script's schema."""

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import SubprocessError, run
from typing import Any

from modeling.system.overrides import assignment

REPOSITORY = Path(__file__).resolve().parents[2]
BOUNDS = {
    "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
    "multipleOf": "a multiple of", "minItems": "at least", "maxItems": "at most",
}  # fmt: skip
TYPES = {"boolean": "true, false", "integer": "whole number", "number": "number", "null": "null"}
CLOSING = (
    "Several values for a key, as key=1,2, need -m: every combination is a run. --print-jobs lists these, --version is "
    "the code's, and --hydra-help explains Hydra's own flags, such as --cfg job."
)


@dataclass(frozen=True)
class Key:
    """A key as the command line takes it."""

    name: str
    default: str  # as the command line takes it, too; empty where it has none
    allowed: str
    meaning: str

    @property
    def section(self) -> str:
        """Its name without the last part; empty for a key of no section."""
        return self.name.rpartition(".")[0]


def _meanings(schema: type) -> dict[str, str]:
    """The text under each key; read when it is asked for, because pydantic would read it at every start."""
    found = {}
    for part in [one for one in reversed(schema.__mro__) if one.__module__ not in ("builtins", "pydantic.main")]:
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(part))).body
        assert isinstance(definition, ast.ClassDef)
        for key, text in itertools.pairwise(definition.body):
            if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(key.target)] = str(text.value.value)
    return found


def _allowed(entry: dict[str, Any], definitions: dict[str, Any]) -> str:
    """The values that an entry of a JSON schema allows, in words."""
    if "$ref" in entry:
        return f"{{{', '.join(definitions[entry['$ref'].rpartition('/')[2]]['properties'])}}}"
    if "anyOf" in entry:
        return " or ".join(_allowed(one, definitions) for one in entry["anyOf"])
    if "enum" in entry:
        return ", ".join(map(str, entry["enum"]))
    kind = entry["type"]
    if kind == "string":
        return entry.get("format", "text")
    if kind == "object":
        return f"for each key: {_allowed(entry['additionalProperties'], definitions)}"
    bounds = [f"{words} {entry[name]:g}" for name, words in BOUNDS.items() if name in entry]
    if kind == "array":
        if entry.get("minItems", 0) == entry.get("maxItems"):
            bounds = [str(entry["minItems"])]
        count = f" ({', '.join(bounds)} of them)" if bounds else ""
        return f"list of [{_allowed(entry['items'], definitions)}]{count}"
    return " ".join([TYPES[kind], *filter(None, [", ".join(bounds)])])


def keys_of(schema: Any, values: Mapping[Any, Any], prefix: str = "") -> Iterator[Key]:
    """Every key of a pydantic model and of its sections; a section with sections of its own counts as one key.

    Args:
        values: the defaults, nested as the schema is.
    """
    described, meanings = schema.model_json_schema(), _meanings(schema)
    for name, field in schema.model_fields.items():
        section = getattr(field.annotation, "model_fields", None)
        if section is None:
            allowed = _allowed(described["properties"][name], described.get("$defs", {}))
            value = values.get(name, "???")
            default = "" if value == "???" else assignment(name, value).partition("=")[2]
            yield Key(prefix + name, default, allowed, meanings[name])
        elif any(hasattr(one.annotation, "model_fields") for one in section.values()):
            yield Key(f"{prefix}{name}.KEY", "", "every key of main.py", meanings[name])
        else:
            yield from keys_of(field.annotation, values[name], f"{prefix}{name}.")


def help_text(doc: str, keys: list[Key], groups: dict[str, list[str]], width: int) -> str:
    """What `--help` of a script prints.

    Args:
        doc: the script's, with its examples.
        groups: of named alternatives, with the names.
        width: of the terminal, in characters.
    """
    lines = [doc.strip(), "", "Keys, each with its default:"]

    def add(text: str, indent: int, hanging: int) -> None:
        lines.extend(
            textwrap.wrap(
                text, width, initial_indent=" " * indent, subsequent_indent=" " * hanging,
                break_long_words=False, break_on_hyphens=False,
            )
        )  # fmt: skip

    for section, members in itertools.groupby(keys, key=lambda key: key.section):
        lines += ["", *filter(None, [section])]
        for key in members:
            add(f"{key.name}={key.default or '...'}  ({key.allowed})", 2, 6)
            add(key.meaning, 6, 6)
    if groups:
        lines += ["", "Named alternatives, which set several keys; single keys beside them win:", ""]
        for group, options in groups.items():
            add(f"{group}=  {', '.join(options)}", 2, 6)
    lines.append("")
    add(CLOSING, 0, 0)
    return "\n".join(lines)


def markdown_table(keys: list[Key]) -> str:
    """The same as a table of a page."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;")

    rows = [
        f"| `{key.name}` | {f'`{key.default}`' if key.default else ''} | {cell(key.allowed)} | {cell(key.meaning)} |"
        for key in keys
    ]
    return "\n".join(["| key | default | values | meaning |", "|---|---|---|---|", *rows])


def code_version() -> str:
    """The commit of the code, if this is a clone; no version is tagged yet."""
    command = ["git", "log", "-1", "--format=commit %h of %cs"]
    try:
        commit = run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, SubprocessError):
        commit = "no Git repository"
    return f"unreleased, {commit}"
