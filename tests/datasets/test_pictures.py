"""A folder of pictures as a data set: what becomes of each, what is refused, and how they are split."""

import hashlib
import io
import itertools
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import main
import prepare_data
from modeling import pictures
from modeling.datasets.cifar10 import PreparationError
from modeling.datasets.pictures import find_pictures, load_pictures, read_picture, sha256_of_pictures, split
from modeling.datasets.preparation import prepare
from modeling.stage import read_manifest
from tests.helpers import TINY


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def stored(image: np.ndarray | Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def fill(folder: Path, count: int, first: int = 0) -> Path:
    """Pictures 0.png, 1.png ... of 32x32 pixels, all different."""
    for number in range(first, first + count):
        stored(noise(32, 32, number), folder / f"{number}.png")
    return folder


def as_set(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


# ---- what becomes of a picture


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "PNG"])
def test_a_picture_of_the_right_size_keeps_its_pixels(tmp_path, suffix):
    path = stored(noise(32, 32), tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read_picture(path), noise(32, 32).transpose(2, 0, 1))


@pytest.mark.parametrize(("height", "width", "top", "left"), [(32, 71, 0, 19), (32, 70, 0, 19), (50, 32, 9, 0)])
def test_the_centre_square_is_taken(tmp_path, height, width, top, left):
    picture = noise(height, width)
    expected = picture[top : top + 32, left : left + 32].transpose(2, 0, 1)
    np.testing.assert_array_equal(read_picture(stored(picture, tmp_path / "a.png")), expected)


def test_reducing_averages_so_that_a_fine_pattern_becomes_grey(tmp_path):
    checkerboard = (np.indices((320, 320)).sum(axis=0) % 2 * 255).astype(np.uint8)
    image = read_picture(stored(checkerboard, tmp_path / "a.png")).astype(int)
    assert np.abs(image - 127.5).max() < 3  # picking single pixels would leave 0 and 255
    for value in (0, 77, 255):
        plain = read_picture(stored(np.full((100, 300), value, np.uint8), tmp_path / "b.png"))
        assert (plain == value).all()


UPRIGHT = noise(40, 60)
AS_STORED = {  # Exif 2.3, tag 274: what row 0 and column 0 of the file are in the upright picture
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: UPRIGHT.transpose(1, 0, 2),  # left, top
    6: UPRIGHT[:, ::-1].transpose(1, 0, 2),  # right, top
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: UPRIGHT[::-1].transpose(1, 0, 2),  # left, bottom
}


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.parametrize("orientation", AS_STORED)
def test_a_camera_held_sideways_makes_no_difference(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    turned = stored(np.ascontiguousarray(AS_STORED[orientation]), tmp_path / f"a.{suffix}", exif=exif, **options)
    np.testing.assert_array_equal(read_picture(turned), read_picture(stored(UPRIGHT, tmp_path / "upright.png")))


def test_what_is_transparent_lies_on_white(tmp_path):
    rgba = np.dstack([noise(32, 32), np.zeros((32, 32), np.uint8)])
    rgba[:16, :, 3] = 255
    rgba[16, :] = (0, 100, 255, 51)  # a fifth of it
    image = read_picture(stored(rgba, tmp_path / "a.png"))
    np.testing.assert_array_equal(image[:, :16], rgba[:16, :, :3].transpose(2, 0, 1))
    assert image[:, 16, 0].tolist() == [204, 224, 255]
    assert (image[:, 17:] == 255).all()


@pytest.mark.parametrize("transparency", [7, bytes([255, 0])])
def test_a_transparent_palette_lies_on_white(tmp_path, transparency):
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([10, 20, 30] * 256)
    for x in range(16):
        palette.paste(7 if transparency == 7 else 1, (x, 0, x + 1, 32))
        palette.paste(0, (x + 16, 0, x + 17, 32))
    image = read_picture(stored(palette, tmp_path / "a.png", transparency=transparency))
    assert (image[:, :, :16] == 255).all()
    assert image[:, 5, 20].tolist() == [10, 20, 30]


@pytest.mark.parametrize("transparency", [None, 0x1234])
def test_of_16_bit_grey_the_upper_8_bits_stay(tmp_path, transparency):
    grey = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    grey[0, 0] = 0x1234
    options = {} if transparency is None else {"transparency": transparency}
    expected = (grey // 256).astype(np.uint8)
    expected[0, 0] = 0x12 if transparency is None else 255
    np.testing.assert_array_equal(read_picture(stored(grey, tmp_path / "a.png", **options)), [expected] * 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_kind_of_pixel_becomes_the_same_grey(tmp_path, mode):
    white = Image.new("L", (40, 40), 255).convert("RGB").convert(mode)
    path = stored(white, tmp_path / f"a.{'jpg' if mode == 'CMYK' else 'png'}")
    assert (read_picture(path) == 255).all()


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_of_an_animation_the_first_picture_counts(tmp_path, suffix):
    frames = [Image.fromarray(noise(32, 32, seed)) for seed in range(3)]
    options = {"lossless": True} if suffix == "webp" else {}
    path = stored(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(read_picture(path), noise(32, 32, 0).transpose(2, 0, 1))


def test_damaged_metadata_neither_warn_nor_matter(tmp_path):
    exif = Image.Exif()
    exif[270] = "a description " * 10
    exif = exif.tobytes()[:-100]  # the description ends too early
    path = stored(noise(32, 32), tmp_path / "a.png", exif=exif)
    with Image.open(path) as image, pytest.warns(UserWarning, match="Tag data larger than file"):
        image.getexif().get(270)
    np.testing.assert_array_equal(read_picture(path), noise(32, 32).transpose(2, 0, 1))


# ---- what is refused


def empty_png(width: int, height: int) -> bytes:
    """A picture that claims this many pixels in a hundred bytes."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def encoded(form: str, part: float = 1, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, form, **options)
    return buffer.getvalue()[: int(len(buffer.getvalue()) * part)]


REFUSED = {
    "text.jpg": (lambda: b"<html>not found</html>", "not a picture in BMP, JPEG, PNG, WEBP"),
    "empty.png": (lambda: b"", "not a picture"),
    "gif.png": (lambda: encoded("GIF"), "not a picture"),
    "cut.png": (lambda: encoded("PNG", 0.6), "truncated"),
    "cut.jpg": (lambda: encoded("JPEG", 0.6), "truncated"),
    "cut.bmp": (lambda: encoded("BMP", 0.6), "truncated"),
    "cut.webp": (lambda: encoded("WEBP", 0.6), "could not create decoder object|truncated|decode|not a picture"),
    "bomb.png": (lambda: empty_png(20_000, 20_000), "decompression bomb"),
    "large.png": (lambda: empty_png(10_000, 10_000), "decompression bomb"),  # where Pillow only warns
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_harmless_picture_is_refused_with_its_name(tmp_path, name):
    make, reason = REFUSED[name]
    fill(tmp_path / "in", 5)
    (tmp_path / "in" / "deep").mkdir()
    (tmp_path / "in" / "deep" / name).write_bytes(make())
    with pytest.raises(PreparationError, match=rf"(?s)1 of 6 pictures cannot be used.*\n  deep/{name}: .*({reason})"):
        prepare("folder", tmp_path / "out", pictures=str(tmp_path / "in"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["BMP", "JPEG", "PNG", "WEBP"])
def test_a_damaged_file_is_read_or_refused_and_nothing_else_happens(tmp_path, form):
    exif = Image.Exif()
    exif.update({274: 6, 270: "a description", 282: 72.0})
    whole, outcomes = encoded(form, **({} if form == "BMP" else {"exif": exif})), set()
    for seed in range(150):
        rng = np.random.default_rng(seed)
        content = bytearray(whole[: rng.integers(1, len(whole)) if seed % 4 == 0 else None])
        for place in rng.integers(0, min(len(content), 200 if seed % 2 else len(content)), seed % 3):
            content[place] = rng.integers(256)
        (tmp_path / "a").write_bytes(content)
        try:
            outcomes.add(read_picture(tmp_path / "a").shape)
        except ValueError as error:
            outcomes.add(type(error))
    assert outcomes == {(3, 32, 32), ValueError}


@pytest.mark.parametrize(("height", "width"), [(31, 100), (100, 31), (1, 1)])
def test_a_picture_is_never_enlarged(tmp_path, height, width):
    stored(noise(height, width), tmp_path / "a.png")
    with pytest.raises(PreparationError, match=rf"a\.png: {width}x{height} pixels, at least 32x32 needed"):
        load_pictures(tmp_path)


def test_all_refusals_are_counted_and_the_first_named(tmp_path):
    fill(tmp_path, 10)
    for number in range(8):
        (tmp_path / f"bad{number}.png").write_bytes(b"bad")
    with pytest.raises(PreparationError) as caught:
        load_pictures(tmp_path)
    head, *rest = str(caught.value).splitlines()
    assert head == f"dataset.pictures={tmp_path}: 8 of 18 pictures cannot be used, remove them:"
    assert rest[:-1] == [f"  bad{number}.png: not a picture in BMP, JPEG, PNG, WEBP" for number in range(5)]
    assert rest[-1] == "  and 3 more"


def test_a_file_or_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    fill(tmp_path / "in", 5)
    fill(tmp_path / "in" / "sub", 5, first=5)
    scandir, sha256_of = os.scandir, pictures.sha256_of

    def deny(real, name):
        def call(path):
            if Path(path).name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", deny(scandir, "sub"))
        with pytest.raises(PreparationError, match=r"in/sub: Permission denied"):
            prepare("folder", tmp_path / "out", pictures=str(tmp_path / "in"))
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "sha256_of", deny(sha256_of, "7.png"))
        with pytest.raises(PreparationError, match=r"1 of 10 pictures.*\n  sub/7\.png: Permission denied"):
            prepare("folder", tmp_path / "out", pictures=str(tmp_path / "in"))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_different_pictures_are_no_data_set(tmp_path, count):
    fill(tmp_path, count)
    for copy in "ab"[: 2 * count]:
        stored(noise(32, 32), tmp_path / f"{copy}.bmp")
    with pytest.raises(PreparationError, match=rf"{3 * count} pictures .*{count} of them different, at least 2 needed"):
        load_pictures(tmp_path)


@pytest.mark.parametrize("is_file", [False, True])
def test_a_folder_that_is_none_is_an_error_with_the_key(tmp_path, is_file):
    if is_file:
        fill(tmp_path, 1)
    with pytest.raises(PreparationError, match=r"dataset\.pictures=.*0\.png: there is no such folder"):
        prepare("folder", tmp_path / "out", pictures=str(tmp_path / "0.png"))


# ---- which pictures there are


def test_pictures_are_found_at_any_depth_in_an_order_that_no_machine_changes(tmp_path, monkeypatch):
    names = ["B.png", "a/z.JPEG", "a.webp", "a/b/c.bmp", "b.jpg", "ä.png"]
    for name in names:
        stored(noise(32, 32), tmp_path / name)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **options: reversed(list(walk(*args, **options))))
    assert [str(path) for path in find_pictures(tmp_path)] == sorted(names)


def test_hidden_files_other_suffixes_links_and_devices_are_passed_over(tmp_path):
    folder = fill(tmp_path / "in", 2)
    fill(folder / ".thumbnails", 3, first=10)
    fill(tmp_path / "outside", 1, first=20)
    stored(noise(32, 32, 30), folder / "._0.png")
    stored(noise(32, 32, 31), folder / "31.gif")
    (folder / "notes.txt").write_text("")
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to(tmp_path / "outside" / "20.png")
    (folder / "outside").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    assert [str(path) for path in find_pictures(folder)] == ["0.png", "1.png"]
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be one
    assert len(find_pictures(tmp_path / "link")) == 2


def test_duplicates_are_kept_once_and_counted(tmp_path):
    fill(tmp_path, 6)
    stored(noise(32, 32, 3), tmp_path / "sub" / "copy.png")
    stored(noise(32, 32, 3), tmp_path / "other format.bmp")
    train, test, facts = load_pictures(tmp_path)
    assert (facts["count"], facts["duplicates"]) == (8, 2)
    assert as_set(train) | as_set(test) == {noise(32, 32, n).transpose(2, 0, 1).tobytes() for n in range(6)}
    assert len(train) + len(test) == 6


# ---- the split


def test_every_image_is_in_exactly_one_split_in_the_order_of_the_names(tmp_path):
    train, test, _ = load_pictures(fill(tmp_path, 60))
    images = [noise(32, 32, int(path.stem)).transpose(2, 0, 1).tobytes() for path in find_pictures(tmp_path)]
    is_held_out = [hashlib.sha256(image).digest() < (2**256 // 10).to_bytes(32, "big") for image in images]
    assert [image.tobytes() for image in test] == list(itertools.compress(images, is_held_out))
    assert [image.tobytes() for image in train] == [
        image for image, held_out in zip(images, is_held_out, strict=True) if not held_out
    ]
    assert train.dtype == test.dtype == np.uint8
    assert train.shape[1:] == test.shape[1:] == (3, 32, 32)


def test_further_pictures_move_no_other_into_the_other_split(tmp_path):
    train, test, _ = load_pictures(fill(tmp_path, 40))
    more_train, more_test, _ = load_pictures(fill(tmp_path, 40, first=40))
    assert as_set(train) < as_set(more_train)
    assert as_set(test) < as_set(more_test)


def digest(share: float, number: int) -> bytes:
    """A digest below which this share of all lies."""
    return int(share * 2**40).to_bytes(5, "big") + number.to_bytes(27, "big")


@pytest.mark.parametrize(
    ("shares", "num_test"),
    [
        ([0.05] * 3 + [0.5] * 7, 3),
        ([0.2, 0.15, 0.9], 1),  # none is in the tenth: one all the same
        ([0.05] * 4, 3),  # all are: not all the same
        ([0.05] * 10_050 + [0.5] * 10, 10_000),
    ],
)
def test_the_bounds_of_the_held_out_part_hold(shares, num_test):
    images = {digest(share, number): np.array(number) for number, share in enumerate(shares)}
    train, test = split(images)
    lowest = sorted(images)[:num_test]
    assert test.tolist() == sorted(int(images[key]) for key in lowest)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(shares)))


# ---- preparing


def test_the_manifest_tells_source_counts_and_digest_but_not_where_the_disk_is(tmp_path):
    fill(tmp_path / "here" / "in", 20)
    manifest, is_new = prepare("folder", tmp_path / "out", pictures="in", repository=tmp_path / "here")
    assert is_new
    assert manifest["dataset"] == {"name": "folder", "num_images": None, "seed": None, "pictures": "in"}
    digest = sha256_of_pictures(tmp_path / "here" / "in")
    assert manifest["pictures"] == {"count": 20, "duplicates": 0, "sha256": digest}
    assert str(tmp_path) not in json.dumps(manifest)
    (tmp_path / "here").rename(tmp_path / "there")
    assert prepare("folder", tmp_path / "out", pictures="in", repository=tmp_path / "there") == (manifest, False)


def test_the_other_data_sets_manifests_know_nothing_of_pictures(tiny_data):
    manifest = json.loads((tiny_data / "shapes" / "manifest.json").read_text())
    assert set(manifest) == {"dataset", "source", "files"}
    assert set(manifest["dataset"]) == {"name", "num_images", "seed"}


@pytest.mark.parametrize("change", ["pixels", "add", "remove", "rename", "manifest"])
def test_changed_pictures_are_prepared_anew_and_unchanged_ones_are_not(tmp_path, change):
    source, folder = fill(tmp_path / "in", 20), tmp_path / "out"
    manifest, _ = prepare("folder", folder, pictures=str(source))
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    (source / "0.png").touch()
    (source / "notes.txt").write_text("")
    assert prepare("folder", folder, pictures=str(source)) == (manifest, False)
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
    after, is_new = prepare("folder", folder, pictures=str(source))
    assert is_new
    assert (after == manifest) == (change == "manifest")
    assert prepare("folder", folder, pictures=str(source)) == (after, False)


def test_a_refused_picture_leaves_what_was_prepared_before(tmp_path):
    source, folder = fill(tmp_path / "in", 20), tmp_path / "out"
    prepare("folder", folder, pictures=str(source))
    before = {file: file.read_bytes() for file in folder.iterdir()}
    (source / "bad.png").write_bytes(b"bad")
    with pytest.raises(PreparationError, match="1 of 21 pictures"):
        prepare("folder", folder, pictures=str(source))
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_num_images_limits_the_training_images(tmp_path):
    source = str(fill(tmp_path / "in", 20))
    everything = prepare("folder", tmp_path / "out", pictures=source)[0]["files"]["train.npy"]["count"]
    train = np.load(tmp_path / "out" / "train.npy")
    prepare("folder", tmp_path / "out", pictures=source, num_images=5)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "train.npy"), train[:5])
    with pytest.raises(PreparationError, match=f"num_images must be at most {everything} for folder, got 21"):
        prepare("folder", tmp_path / "out", pictures=source, num_images=21)


# ---- from pictures to samples


@pytest.fixture
def drawn(tmp_path) -> Path:
    """Forty drawings in various formats and sizes."""
    for number in range(40):
        rng = np.random.default_rng(number)
        image = Image.new("RGB", tuple(rng.integers(40, 120, 2).tolist()), tuple(rng.integers(0, 256, 3).tolist()))
        ImageDraw.Draw(image).ellipse((5, 5, 35, 35), fill=tuple(rng.integers(0, 256, 3).tolist()))
        suffix = ("png", "jpg", "webp", "bmp")[number % 4]
        stored(image, tmp_path / "my pictures" / f"{number % 3}" / f"{number}.{suffix}")
    return tmp_path / "my pictures"


@pytest.mark.slow
def test_from_a_folder_of_pictures_to_a_trained_model(tmp_path, monkeypatch, compose_config, capsys, drawn):
    monkeypatch.chdir(tmp_path)
    options = [*TINY, "dataset=folder", f"dataset.pictures={drawn}", "dataset.num_images=null"]
    values = compose_config(*options, "runtime.output_dir=run")
    with pytest.raises(SystemExit, match="holds no prepared data: run `python prepare_data.py") as caught:
        main.main(values)
    assert f"'dataset.pictures='\"'\"'{drawn}'" in str(caught.value)  # quoted for the shell and for Hydra
    prepare_data.main(values)
    prepare_data.main(values)
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("data/folder: "))
    assert ", of 40 pictures, 0 of them duplicates (written)" in first
    assert second == first.replace("(written)", "(already there, verified)")
    main.main(values)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    manifest = json.loads((tmp_path / "data" / "folder" / "manifest.json").read_text())
    counts = [manifest["files"][f"{name}.npy"]["count"] for name in ("train", "test")]
    assert sum(counts) == 40
    assert metrics["steps"] == counts[0] // 16 * 2
    assert metrics["data_sha256"] == manifest["files"]["train.npy"]["sha256"]
    with Image.open(tmp_path / "run" / "samples" / "ema" / f"{metrics['steps']}.png") as grid:
        assert np.asarray(grid).std() > 10


@pytest.mark.fault("wrong input")
def test_a_batch_larger_than_the_folder_is_one_line(tmp_path, monkeypatch, compose_config):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "in", 8)
    values = compose_config(*TINY, "dataset=folder", "dataset.pictures=in", "dataset.num_images=null")
    prepare_data.main(values)
    with pytest.raises(SystemExit, match=r"train\.batch_size must be in 1\.\.[67] \(the training images\), got 16"):
        main.main(values)


def test_other_pictures_than_the_prepared_ones_are_not_trained_on(tmp_path, monkeypatch, compose_config):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "in", 8)
    values = compose_config(*TINY, "dataset=folder", "dataset.pictures=in", "dataset.num_images=null")
    prepare_data.main(values)
    assert read_manifest(values.dataset)["pictures"]["count"] == 8
    values.dataset.pictures = "other"
    with pytest.raises(SystemExit, match=r"was prepared with .*'in'.*, not with .*'other'.*dataset\.pictures=other"):
        main.main(values)
