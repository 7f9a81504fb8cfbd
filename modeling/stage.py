"""What both stages agree on: the values they run on and the prepared data. Imports no torch."""

import os
from pathlib import Path
from typing import Any, NotRequired

from omegaconf import DictConfig, OmegaConf
from typing_extensions import TypedDict  # pydantic reads typing's from Python 3.12 on only

from modeling.config import Config, parse
from modeling.sections import Dataset
from modeling.system.errors import UserError
from modeling.system.overrides import override
from modeling.system.reading import parse_json, read_yaml, reading


def parse_stage(values: DictConfig, schema: type[Config] = Config) -> Config:
    """`parse` for the scripts that are DVC stages: inside DVC they run on exactly what params.yaml says.

    Raises:
        UserError: also where DVC would record other values than the ones that run.
    """
    config = parse(values, schema)
    if "DVC_STAGE" in os.environ:
        if (root := values.dataset.root).startswith("~"):
            raise UserError(f"dataset.root={root}: DVC does not know ~, expected the whole path, {config.dataset.root}")
        if config != parse(OmegaConf.create(read_yaml(Path("params.yaml"), dict[str, Any]))):
            raise UserError(
                "inside a DVC stage the values must be those of params.yaml: use `dvc exp run -S key=value`"
            )
        is_named = config.runtime.resume not in ("auto", "never")
        for key, value, expected in (
            ("runtime.resume", config.runtime.resume if is_named else None, "auto or never"),
            ("train.init", config.train.init, "null"),
        ):
            if value is not None:
                raise UserError(
                    f"{key}={value}: a recorded stage cannot start from a file that DVC does not know, "
                    f"expected {expected}"
                )
    return config


class FileFacts(TypedDict):
    sha256: str
    count: int
    shape: list[int]
    dtype: str
    sampled_sha256: NotRequired[str]  # of a large file: `sampled_sha256_of`


class PictureFacts(TypedDict):
    count: int
    unusable: int  # left out, with dataset.skip_unusable
    duplicates: int  # equal to others once they are reduced
    sha256: str


class Facts(TypedDict):
    """What a manifest says of its data set beside the source."""

    pictures: NotRequired[PictureFacts]  # of dataset=folder


class Manifest(Facts):
    """`manifest.json`, which describes the prepared data beside it."""

    dataset: dict[str, Any]  # the keys of the configuration that it was prepared with
    source: str
    files: dict[str, FileFacts]  # train.npy and test.npy


def repository() -> Path:
    """Where relative paths of archive, pictures and runs begin: the original repository, even in DVC's temporary copy.

    DVC deletes the copy, in which an experiment of `--queue` or `--temp` runs, with all that Git does not know.
    """
    root = Path(os.environ.get("DVC_ROOT", "."))
    return Path() if root == Path.cwd() else root


def load_manifest(folder: Path, remedy: str) -> Manifest:
    """The manifest in a folder of prepared data.

    Raises:
        UserError: when there is none, or it is damaged; names the remedy.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no prepared data: {remedy}")
    with reading(path, "manifest of prepared data", remedy):
        manifest = parse_json(path.read_bytes(), Manifest)
        if not isinstance(manifest["dataset"].get("name"), str) or set(manifest["files"]) != {"train.npy", "test.npy"}:
            raise ValueError("it describes other data")
        return manifest


def read_manifest(dataset: Dataset) -> Manifest:
    """The manifest of the prepared data.

    Raises:
        UserError: when the data is not prepared, or not as configured; names the command to run.
    """
    folder = dataset.folder
    command = f"python prepare_data.py dataset={dataset.name}"
    for key in ("root", "archive", "pictures", "skip_unusable", "num_images", "seed", "image_size", "channels"):
        if (value := getattr(dataset, key)) is not None and value is not False:
            command += f" {override(f'dataset.{key}', value)}"
    manifest = load_manifest(folder, f"run `{command}`")
    found = {**manifest["dataset"], "images": manifest["files"]["train.npy"]["shape"][1:]}
    wanted = {key: getattr(dataset, key, None) for key in manifest["dataset"]} | {"images": list(dataset.image_shape)}
    if found != wanted:
        changed = (f"{key}={found[key]}, not {wanted[key]}" for key in found if found[key] != wanted[key])
        raise UserError(
            f"{folder} was prepared with {'; '.join(changed)}: run `{command}`, or keep both: with another dataset.root"
        )
    return manifest
