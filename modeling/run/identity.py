"""What a run is: its length, everything that can change its result, and the name made of it. Imports no torch."""

import ast
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from modeling.config import Config
from modeling.stage import Manifest

ROOT = Path(__file__).resolve().parents[2]

# Keys left out of a run's identity: they cannot change its result, or only through the learning-rate schedule, which
# `identify` adds back.
NO_EFFECT: Any = {
    "dataset": {"root", "archive", "urls", "pictures", "skip_unusable"},
    "optimizer": {"warmup_steps"},
    "train": {"init", "num_epochs", "max_steps", "checkpoint_every"},
    "runtime": {
        "keep_freed_memory", "num_threads", "num_workers", "processes", "name", "output_dir", "resume",
        "max_seconds", "checkpoint_seconds", "keep_checkpoints",
    },
    "wandb": True,
}  # fmt: skip


class Identity(TypedDict):
    """Everything that can change the result of a step; the sections are those of the configuration."""

    seed: int
    dataset: dict[str, Any]
    model: dict[str, Any]
    diffusion: dict[str, Any]
    optimizer: dict[str, Any]
    train: dict[str, Any]
    runtime: dict[str, Any]
    data: str  # `data_sha256`
    code: str  # `code_sha256`
    origin: str | None  # another run's name and step, or the SHA-256 of weights, from which this one started


def run_length(num_images: int, batch_size: int, num_epochs: float, max_steps: int | None) -> int:
    """Steps of a run: `num_epochs` of whole batches (to the nearest step), or `max_steps` if that is less."""
    per_epoch = num_images // batch_size
    length = max(min(1, per_epoch), round(per_epoch * num_epochs))  # none without a whole batch, which others reject
    return length if max_steps is None else min(length, max_steps)


def data_sha256(manifest: Manifest) -> str:
    """SHA-256 over the hashes of the training and the held-out images, in this order."""
    hashes = [manifest["files"][name]["sha256"] for name in ("train.npy", "test.npy")]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def identify(config: Config, last_step: int, data_sha256: str, code_sha256: str) -> Identity:
    """The identity of a run of `last_step` steps that starts from scratch.

    The length of the run is left out, so that a run can be made longer, except where the learning rate depends on it.
    """
    values = config.model_dump(exclude=NO_EFFECT)
    values["optimizer"]["warmup_steps"] = min(config.optimizer.warmup_steps, last_step)
    values["optimizer"]["cosine_steps"] = last_step if config.optimizer.lr_schedule == "cosine" else None
    return Identity(**values, data=data_sha256, code=code_sha256, origin=None)


def run_name(identity: Identity) -> str:
    """`<dataset>-<model>-<optimizer>-<hash>`: equal exactly if the identities are equal."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    dataset, model, optimizer = identity["dataset"], identity["model"], identity["optimizer"]
    return f"{dataset['name']}-{model['name']}{model['hidden_size']}-{optimizer['name']}-{digest[:10]}"


def folder_name(name: str | None, identity: Identity) -> str:
    """`<the name that was given>-<hash>`, else `run_name`."""
    full = run_name(identity)
    return full if name is None else f"{name}-{full.rpartition('-')[2]}"


# ---- differences of two nested dictionaries


def differences(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two nested dictionaries differ: dotted key -> (value in the first, in the second); None where missing."""
    result = {}
    for key in sorted(first.keys() | second.keys()):
        a, b = first.get(key), second.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            result |= differences(a, b, prefix=f"{prefix}{key}.")
        elif a != b:
            result[prefix + key] = a, b
    return result


_IN_WORDS = {"data": "other training or held-out images", "code": "other code"}  # hashes explain nothing


def describe_differences(changed: Mapping[str, tuple[Any, Any]], first: str, second: str = "this run") -> str:
    """What `differences` found, in a line: `other code; seed: checkpoint 0, this run 1`.

    Args:
        first, second: what the two dictionaries are of.
    """
    return "; ".join(
        _IN_WORDS.get(key, f"{key}: {first} {json.dumps(a)}, {second} {json.dumps(b)}")
        for key, (a, b) in changed.items()
    )


# ---- the code that runs


def imported_files(path: Path, root: Path = ROOT) -> set[Path]:
    """The project's files that a Python file imports, anywhere in it, with the packages they are in.

    Args:
        root: the project's folder; its packages and modules are the project's own.

    Raises:
        FileNotFoundError: for an import of the project's own that is no file.
        ValueError: for a relative import.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= _module_files(alias.name, root, path)
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise ValueError(f"{path}: relative imports are not followed: name the package")
            package = _module_files(node.module, root, path)
            found |= package
            if root / node.module.replace(".", "/") / "__init__.py" in package:
                for alias in node.names:  # a module, or a name that the package defines
                    if (root / f"{node.module}.{alias.name}".replace(".", "/")).with_suffix(".py").is_file():
                        found |= _module_files(f"{node.module}.{alias.name}", root, path)
    return found


def _module_files(name: str, root: Path, importer: Path) -> set[Path]:
    """The file of a module and of the packages around it; none where it is not of this project."""
    parts = name.split(".")
    if not ((root / parts[0] / "__init__.py").is_file() or (root / f"{parts[0]}.py").is_file()):
        return set()
    packages = [root.joinpath(*parts[:depth], "__init__.py") for depth in range(1, len(parts))]
    module = root.joinpath(*parts)
    own = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    if missing := [path for path in [*packages, own] if not path.is_file()]:
        raise FileNotFoundError(f"{importer}: imports {name}, but {missing[0]} does not exist")
    return {*packages, own}


def code_files(script: Path = ROOT / "main.py", root: Path = ROOT) -> list[Path]:
    """A script and every file of the project that it imports, at any depth.

    Raises:
        FileNotFoundError, ValueError: as `imported_files`.
    """
    found, todo = {script}, [script]
    while todo:
        new = imported_files(todo.pop(), root) - found
        found |= new
        todo += new
    return sorted(found)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _syntax(node: Any) -> Any:
    """A syntax tree as plain values, without positions and docstrings, the same in every version of Python."""
    if isinstance(node, list):
        return [_syntax(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
        fields["body"] = fields["body"][1:]
    if isinstance(node, ast.ClassDef):  # the text under a key of a schema is its docstring
        fields["body"] = [item for item in node.body if not _is_text(item)]
    # Newer versions have fields that are empty where nothing new is used.
    return [type(node).__name__, {key: _syntax(value) for key, value in fields.items() if value not in (None, [])}]


def code_sha256(root: Path = ROOT) -> str:
    """SHA-256 over the syntax of `code_files`: the version of the code that runs, whatever its comments say."""
    digest = hashlib.sha256()
    for path in code_files(root / "main.py", root):
        syntax = json.dumps(_syntax(ast.parse(path.read_bytes())))
        digest.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(syntax.encode()).hexdigest()}\n".encode())
    return digest.hexdigest()
