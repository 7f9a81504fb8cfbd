"""dataset=folder, from pictures to samples: the manifest, changed pictures, and what the scripts say."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import main
import prepare_data
from modeling.config import parse
from modeling.datasets.pictures import sha256_of_pictures
from modeling.datasets.preparation import prepare
from modeling.run.identity import data_sha256
from modeling.stage import read_manifest
from tests.datasets.drawings import drawings, fill, noise, stored
from tests.helpers import ROOT, TINY, dataset, ends_in_error


def test_the_manifest_names_source_counts_and_digest_but_not_the_disk(tmp_path, monkeypatch):
    fill(tmp_path / "first" / "in", 20)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "first"))
    manifest, is_new = prepare(dataset("folder", tmp_path, pictures="in"))
    assert is_new
    assert manifest["dataset"] == {"name": "folder", "num_images": None, "seed": None, "pictures": "in"}
    digest = sha256_of_pictures(tmp_path / "first" / "in")
    assert manifest["pictures"] == {"count": 20, "unusable": 0, "duplicates": 0, "sha256": digest}
    assert str(tmp_path) not in json.dumps(manifest)
    (tmp_path / "first").rename(tmp_path / "second")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "second"))
    assert prepare(dataset("folder", tmp_path, pictures="in")) == (manifest, False)


@pytest.mark.parametrize("change", ["pixels", "add", "remove", "rename", "manifest"])
def test_changed_pictures_are_prepared_again_and_unchanged_ones_are_not(tmp_path, change):
    source, folder = fill(tmp_path / "in", 20), tmp_path / "folder"
    manifest, _ = prepare(drawings(tmp_path))
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    (source / "0.png").touch()
    (source / "notes.txt").write_text("")
    assert prepare(drawings(tmp_path)) == (manifest, False)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    if change == "pixels":
        stored(noise(32, 32, 77), source / "3.png")
    elif change == "add":
        stored(noise(32, 32, 77), source / "77.png")
    elif change == "remove":
        (source / "3.png").unlink()
    elif change == "rename":
        (source / "3.png").rename(source / "z.png")
    else:
        (folder / "manifest.json").write_text(json.dumps(manifest | {"pictures": {}}))
    after, is_new = prepare(drawings(tmp_path))
    assert is_new
    assert (after == manifest) == (change == "manifest")
    assert prepare(drawings(tmp_path)) == (after, False)


def test_memory_does_not_grow_with_the_images(tmp_path):
    """In a process of its own, where no other thread allocates."""
    fill(tmp_path / "few", 5)
    fill(tmp_path / "in", 300)
    code = (
        "import sys, tracemalloc; from pathlib import Path; from modeling.datasets import preparation\n"
        "from tests.datasets.drawings import drawings; from tests.helpers import dataset\n"
        "here, preparation.CHUNK_BYTES = Path(sys.argv[1]), 1 << 14\n"
        "preparation.prepare(dataset('folder', here / 'small', pictures=str(here / 'few')))\n"  # what is allocated once
        "tracemalloc.start()\n"
        "manifest, _ = preparation.prepare(drawings(here))\n"
        "print(tracemalloc.get_traced_memory()[1], sum(entry['count'] for entry in manifest['files'].values()))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    peak, count = map(int, done.stdout.splitlines()[-1].split())
    assert count == 300
    assert peak < 300 * 3 * 32 * 32 / 2


# ---- from pictures to samples


@pytest.fixture
def drawn(tmp_path) -> Path:
    """Forty drawings in various formats and sizes."""
    for number in range(40):
        rng = np.random.default_rng(number)
        image = Image.new("RGB", tuple(rng.integers(40, 120, 2).tolist()), tuple(rng.integers(0, 256, 3).tolist()))
        ImageDraw.Draw(image).ellipse((5, 5, 35, 35), fill=tuple(rng.integers(0, 256, 3).tolist()))
        suffix = ("png", "jpg", "webp", "bmp", "gif", "tif", "jfif")[number % 7]
        stored(image, tmp_path / "my pictures" / f"{number % 3}" / f"{number}.{suffix}")
    return tmp_path / "my pictures"


@pytest.mark.slow
def test_from_a_folder_of_pictures_to_a_trained_model(tmp_path, monkeypatch, compose_config, capsys, drawn):
    monkeypatch.chdir(tmp_path)
    options = [*TINY, "dataset=folder", f"dataset.pictures={drawn}", "dataset.num_images=null"]
    values = compose_config(*options, "runtime.output_dir=run")
    (drawn / "photo.heic").write_bytes(b"")
    (drawn / "bad.png").write_bytes(b"bad")
    quoted = re.escape(f"'dataset.pictures=\"{drawn}\"'")  # for the shell and for Hydra
    with ends_in_error(capsys, f"holds no prepared data: run `python prepare_data.py .*{quoted}"):
        main.main(values)
    with ends_in_error(capsys, r"1 of 41 pictures cannot be used.*\n  bad\.png: not a picture"):
        prepare_data.main(values)
    values.dataset.skip_unusable = True
    prepare_data.main(values)
    prepare_data.main(values)
    passed_over, first, passed_over_again, second = capsys.readouterr().out.splitlines()
    assert passed_over == passed_over_again
    assert passed_over.startswith("passed over: 1 .heic (pictures are ")
    counts = ", of 41 pictures, 0 of them duplicates, 1 unusable (listed in data/folder.unusable.txt) (written)"
    assert first.startswith("data/folder: train.npy ")
    assert first.endswith(counts)
    assert second == first.replace("(written)", "(already there, verified)")
    values.dataset.skip_unusable = False  # what is prepared is prepared
    main.main(values)
    metrics, details = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("metrics", "details"))
    manifest = json.loads((tmp_path / "data" / "folder" / "manifest.json").read_text())
    counts = [manifest["files"][f"{name}.npy"]["count"] for name in ("train", "test")]
    assert sum(counts) == 40
    assert metrics["steps"] == counts[0] // 16 * 2
    assert details["data_sha256"] == data_sha256(manifest)
    with Image.open(tmp_path / "run" / "samples" / "ema" / f"{metrics['steps']}.png") as grid:
        assert np.asarray(grid).std() > 10


@pytest.mark.fault("wrong input")
def test_a_batch_larger_than_the_folder_is_one_line(tmp_path, monkeypatch, compose_config, capsys):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "in", 8)
    values = compose_config(*TINY, "dataset=folder", "dataset.pictures=in", "dataset.num_images=null")
    prepare_data.main(values)
    with ends_in_error(capsys, r"train\.batch_size must be in 1\.\.[67] \(the training images\), got 16"):
        main.main(values)


def test_only_the_prepared_pictures_are_trained_on(tmp_path, monkeypatch, compose_config, capsys):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "in", 8)
    values = compose_config(*TINY, "dataset=folder", "dataset.pictures=in", "dataset.num_images=null")
    prepare_data.main(values)
    assert read_manifest(parse(values).dataset)["pictures"]["count"] == 8
    values.dataset.pictures = "other"
    with ends_in_error(capsys, r"was prepared with pictures=in, not other: .*dataset\.pictures=other"):
        main.main(values)
