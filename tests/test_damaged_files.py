"""Every file that is read back may be damaged or another project's: one line names it, and nothing else happens."""

import copy
import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from modeling.checkpoint import CheckpointError, export_weights, load_weights
from modeling.comparison.bands import compare
from modeling.comparison.curves import read_run
from modeling.comparison.references import choose_reference, load_references
from modeling.comparison.report import describe, judge
from modeling.config import Config, parse
from modeling.interchange.pipeline import SCHEDULER, UNET, WEIGHTS, read_pipeline, write_pipeline
from modeling.measures.evaluation_file import FILE, describe_record, read_records
from modeling.measures.extractors import Extractor
from modeling.measures.features import extract_features
from modeling.measures.resumable import draw_in_parts
from modeling.measures.sample_files import read_samples, write_samples
from modeling.measures.subject import load_data
from modeling.run.folder import RunFolder
from modeling.run.identity import identify
from modeling.stage import read_manifest
from modeling.system.errors import UserError
from modeling.system.files import write_json
from modeling.system.reading import reading
from tests.helpers import ROOT, dataset, random_images
from tests.interchange.networks import TINY, network

pytestmark = pytest.mark.fault("damaged file")

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: content[: len(content) // 2] + bytes(600) + content[len(content) // 2 :],
    "list": lambda content: b"[]",
    "text": lambda content: b'"text"',
    "number": lambda content: b"5",
    "another's": lambda content: b'{"status": "COMPLETED"}\n',
    "Latin-1": lambda content: b'{"\xe9": 1}',
    "deep": lambda content: b"[" * 100_000,
}
READABLE = {("metrics.jsonl", "cut")}  # a run that is writing it


# ---- the files, as the product writes them, and what reads them


@pytest.fixture(scope="module")
def config(tiny_data, compose_config) -> Config:
    model = [f"model.{key}={TINY[key]}" for key in ("hidden_size", "multipliers", "num_blocks")]
    return parse(compose_config("dataset=shapes", f"dataset.root={tiny_data}", "dataset.num_images=64", *model))


def run_folder(folder: Path, config: Config) -> RunFolder:
    return RunFolder(folder, identify(config, 8, "data", "code"))


def write_run(folder: Path, config: Config) -> None:
    """A run of this project that is finished, and one beside it."""
    with run_folder(folder / "run", config).claimed():
        write_json(folder / "run" / "metrics.json", {"steps": 8})


def read_owner(folder: Path, config: Config) -> None:
    with run_folder(folder / "run", config).claimed():
        pass


def write_data(folder: Path, config: Config) -> None:
    shutil.copytree(config.dataset.folder, folder / "shapes")


def write_compared(folder: Path, config: Config) -> None:
    shutil.copytree(ROOT / "references", folder / "references")
    shutil.copy(ROOT / "params.yaml", folder / "config.yaml")
    reference = json.loads((ROOT / "references" / "default.json").read_text())
    write_json(folder / "metrics.json", {"steps": reference["steps"]} | reference["losses"])
    write_json(folder / "details.json", {"bins": reference["bins"]})
    rows = [
        {"step": int(point["step"]), "train/loss": point["loss"], "train/skipped": 0, "seconds": 1.0}
        for point in reference["curve"]
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_compared(folder: Path, config: Config) -> None:
    run = read_run(folder)
    comparison = compare(run, *choose_reference(load_references(folder / "references"), run.config, "default"))
    judge(comparison)
    describe(comparison)


def draw(folder: Path, config: Config) -> None:
    draw_in_parts(folder / "parts", {"seed": 1}, 6, 3, lambda start, count: torch.arange(count)[:, None])


def extract(folder: Path, config: Config) -> None:
    extractor = Extractor("pixels", "0", torch.device("cpu"), lambda images: (images.flatten(1).float(), None))
    extract_features(extractor, random_images(12, 3, 2, 2), cache=folder)


def write_evaluation(folder: Path, config: Config) -> None:
    bound = {"total": 4.0, "standard_error": None, "rate": 2.0, "distortion": 2.0, "variance": "large"}
    values = {"bits_per_dim": {"large, raw": bound}, "heldout_loss": {"total": 0.1, "bins": {"1-500": 0.1}}}
    write_json(folder / FILE, {name: {"values": values[name], "identity": {"seed": 1}} for name in values})


def export(folder: Path, config: Config) -> None:
    export_weights(folder / "model.safetensors", network("tiny"), config.model_dump())
    write_pipeline(str(folder / "model.safetensors"), folder)


FILES: dict[str, tuple[Callable[[Path, Config], object], Callable[[Path, Config], object]]] = {
    "run/run.json": (write_run, read_owner),
    "run/metrics.json": (write_run, lambda folder, config: run_folder(folder / "run", config).finished_at()),
    "shapes/manifest.json": (
        write_data,
        lambda folder, config: read_manifest(dataset("shapes", folder, num_images=64, seed=0)),
    ),
    "shapes/train.npy": (write_data, lambda folder, config: load_data(folder / "shapes")),
    "config.yaml": (write_compared, read_compared),
    "metrics.jsonl": (write_compared, read_compared),
    "metrics.json": (write_compared, read_compared),
    "details.json": (write_compared, read_compared),
    "references/default.json": (write_compared, read_compared),
    FILE: (
        write_evaluation,
        lambda folder, config: [describe_record(*item) for item in read_records(folder / FILE).items()],
    ),
    "parts/identity.json": (draw, draw),
    "parts/000000003.npy": (draw, draw),
    "pixels-*.npz": (extract, extract),
    "samples.npz": (
        lambda folder, config: write_samples(random_images(9, 3, 4, 4), {"seed": 1}, folder / "samples.npz"),
        lambda folder, config: read_samples(folder / "samples.npz"),
    ),
    "compressed.npz": (
        lambda folder, config: np.savez_compressed(folder / "compressed.npz", arr_0=np.ones((9, 4, 4, 3), np.uint8)),
        lambda folder, config: read_samples(folder / "compressed.npz"),
    ),
    "model.safetensors": (export, lambda folder, config: load_weights(folder / "model.safetensors")),
    **{name: (export, lambda folder, config: read_pipeline(folder, folder / "back.safetensors", config))
       for name in (UNET, SCHEDULER, f"unet/{WEIGHTS[0]}")},
}  # fmt: skip


def outcome(name: str, folder: Path, config: Config) -> str:
    """How the file is read: "read", "named" (or its folder) in an error of one line, or that error's text."""
    (path,) = folder.glob(name)
    try:
        FILES[name][1](folder, config)
    except (UserError, OSError) as error:
        is_named = path.name in str(error) or (path.parent != folder and str(path.parent) in str(error))
        return "named" if is_named and "\n" not in str(error) else str(error)
    return "read"


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_in_one_line(tmp_path, config, name):
    FILES[name][0](tmp_path, config)
    (path,) = tmp_path.glob(name)
    assert outcome(name, tmp_path, config) == "read"
    whole = path.read_bytes()
    expected = {damage: "read" if (name, damage) in READABLE else "named" for damage in DAMAGES}
    found = {}
    for damage, harm in DAMAGES.items():
        path.write_bytes(harm(whole))
        found[damage] = outcome(name, tmp_path, config)
    assert found == expected


def altered(content: Any) -> Iterator[Any]:
    """Copies of nested plain values, in each of which one of them is missing or of another type."""
    paths: list[tuple] = []

    def walk(node: Any, path: tuple) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, item in itertools.islice(items, 3 if path else None):
            paths.append((*path, key))
            walk(item, (*path, key))

    walk(content, ())
    for (*path, key), value in itertools.product(paths, ("missing", [{}])):
        other = parent = copy.deepcopy(content)
        for step in path:
            parent = parent[step]
        if value == "missing":
            del parent[key]
        else:
            parent[key] = value
        yield other


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("json")])
def test_a_value_of_another_type_inside_ends_in_one_line_or_does_not_matter(tmp_path, config, name):
    FILES[name][0](tmp_path, config)
    content = json.loads((tmp_path / name).read_text())
    found = set()
    for other in altered(content):
        (tmp_path / name).write_text(json.dumps(other))
        found.add(outcome(name, tmp_path, config))
    assert "named" in found
    assert not [text for text in found if "\n" in text]


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, *({"config": text} for text in ("[1]", "{", "[" * 10**5))]
)
def test_weights_without_a_configuration_are_no_exported_model(tmp_path, metadata):
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({"weight": torch.ones(1)}, metadata=metadata))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no exported model of this project, or damaged: "):
        load_weights(path)


@pytest.mark.parametrize("num_bytes", [50_000_000, 2**40])
def test_a_huge_header_is_rejected(tmp_path, num_bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(num_bytes.to_bytes(8, "little"))
    with path.open("r+b") as file:
        file.truncate(100_000_000)  # takes no space on the disk
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no exported model of this project, or damaged: "):
        load_weights(path)


def test_a_failing_disk_is_no_damaged_file():
    with pytest.raises(OSError, match=r"\[Errno 5\] Input/output error: 'x\.json'"), reading("x.json", "JSON"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
