"""A folder of pictures: which files are pictures, what rejects the folder, and how the images are split."""

import hashlib
import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from modeling.datasets import decoding, pictures
from modeling.datasets.pictures import describe_passed_over, find_pictures, load_pictures, split
from modeling.datasets.preparation import prepare
from modeling.system.errors import UserError
from tests.datasets.drawings import as_set, drawings, fill, noise, stored
from tests.helpers import dataset


def load(folder: Path) -> tuple:
    """Training images, held-out images, facts."""
    images, train, test, facts = load_pictures(folder, folder.with_suffix(".unusable.txt"), folder.parent)
    return images[train], images[test], facts


def test_pictures_are_found_at_any_depth_in_the_order_of_their_names(tmp_path, monkeypatch):
    names = ["B.png", "a/z.JPEG", "a.webp", "a/b/c.bmp", "b.jpg", "ä.png"]
    for name in names:
        stored(noise(32, 32), tmp_path / name)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **options: reversed(list(walk(*args, **options))))
    assert find_pictures(tmp_path)[0] == sorted(names)


def test_hidden_files_other_suffixes_links_and_devices_are_passed_over_and_counted(tmp_path):
    folder = fill(tmp_path / "in", 2)
    fill(folder / ".thumbnails", 3, first=10)
    fill(tmp_path / "outside", 1, first=20)
    stored(noise(32, 32, 30), folder / "._0.png")
    for name in ("notes.txt", "a.HEIC", "sub/b.heic", "README", "trailing.", "a.b c"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to(tmp_path / "outside" / "20.png")
    (folder / "outside").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    found, passed_over = find_pictures(folder)
    assert found == ["0.png", "1.png"]
    assert passed_over == {
        "hidden": 2, "linked file": 1, "linked folder": 2, "no file": 1, ".txt": 1, ".heic": 2, "without suffix": 3,
    }  # fmt: skip
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be one
    assert len(find_pictures(tmp_path / "link")[0]) == 2


def test_duplicates_are_kept_once_and_counted(tmp_path):
    fill(tmp_path, 6)
    stored(noise(32, 32, 3), tmp_path / "sub" / "copy.png")
    stored(noise(32, 32, 3), tmp_path / "other format.bmp")
    train, test, facts = load(tmp_path)
    assert (facts["count"], facts["duplicates"]) == (8, 2)
    assert as_set(train) | as_set(test) == {noise(32, 32, n).transpose(2, 0, 1).tobytes() for n in range(6)}
    assert len(train) + len(test) == 6


# ---- folders that are rejected


@pytest.mark.parametrize(("height", "width"), [(31, 100), (100, 31), (1, 1)])
def test_a_picture_is_never_enlarged(tmp_path, height, width):
    stored(noise(height, width), tmp_path / "a.png")
    with pytest.raises(UserError, match=rf"a\.png: {width}x{height} pixels, at least 32x32 needed"):
        load(tmp_path)


def test_all_unusable_pictures_are_listed_in_a_file_and_the_first_are_named(tmp_path):
    folder, listed = fill(tmp_path / "in", 10), tmp_path / "folder.unusable.txt"
    for number in range(8):
        (folder / f"bad{number}.png").write_bytes(b"bad")
    with pytest.raises(UserError) as caught:
        prepare(drawings(tmp_path))
    head, *rest = str(caught.value).splitlines()
    assert head.startswith(f"dataset.pictures={folder}: 8 of 18 pictures cannot be used, remove them or go on without")
    lines = [f"bad{number}.png: not a picture in AVIF, BMP, GIF, JPEG, PNG, TIFF, WEBP" for number in range(8)]
    assert rest == [*(f"  {line}" for line in lines[:5]), f"  and 3 more: {listed} lists all"]
    assert listed.read_text().splitlines() == lines
    for number in range(8):
        (folder / f"bad{number}.png").unlink()
    prepare(drawings(tmp_path))
    assert not listed.exists()


def test_skip_unusable_goes_on_without_them_and_only_then(tmp_path):
    fill(tmp_path / "in", 10)
    expected, _ = prepare(drawings(tmp_path))
    (tmp_path / "in" / "bad.png").write_bytes(b"bad")
    manifest, is_new = prepare(drawings(tmp_path, skip_unusable=True))
    assert is_new
    assert manifest["files"] == expected["files"]
    assert (manifest["pictures"]["count"], manifest["pictures"]["unusable"]) == (11, 1)
    assert (tmp_path / "folder.unusable.txt").read_text().startswith("bad.png: not a picture")
    assert prepare(drawings(tmp_path, skip_unusable=True)) == (manifest, False)
    with pytest.raises(UserError, match="1 of 11 pictures cannot be used"):
        prepare(drawings(tmp_path))
    assert prepare(drawings(tmp_path, skip_unusable=True)) == (manifest, False)


def test_a_file_or_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    fill(tmp_path / "in", 5)
    fill(tmp_path / "in" / "sub", 5, first=5)
    scandir, sha256_of, decode = os.scandir, pictures.sha256_of, decoding._decode

    def deny(real, name):
        def call(path):
            if Path(path).name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", deny(scandir, "sub"))
        with pytest.raises(UserError, match=r"in/sub: Permission denied"):
            prepare(drawings(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "sha256_of", deny(sha256_of, "7.png"))
        patch.setattr(decoding, "_decode", deny(decode, "7.png"))
        with pytest.raises(UserError, match=r"1 of 10 pictures.*\n  sub/7\.png: Permission denied"):
            prepare(drawings(tmp_path))
        assert prepare(drawings(tmp_path, skip_unusable=True))[1]
        assert not prepare(drawings(tmp_path, skip_unusable=True))[1]
    assert prepare(drawings(tmp_path))[0]["pictures"]["unusable"] == 0


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_different_pictures_are_no_data_set(tmp_path, count):
    fill(tmp_path, count)
    for copy in "ab"[: 2 * count]:
        stored(noise(32, 32), tmp_path / f"{copy}.bmp")
    (tmp_path / "a.heic").write_bytes(b"")
    expected = rf"{3 * count} pictures, {count} of them different, at least 2 needed; passed over: 1 \.heic \(pictures"
    with pytest.raises(UserError, match=expected):
        load(tmp_path)


def test_what_is_passed_over_is_one_line_with_the_most_frequent_first():
    counts = Counter({f".{number}": number for number in range(1, 13)})
    head, _, tail = describe_passed_over(counts).partition(" (")
    assert head == "passed over: 12 .12, 11 .11, 10 .10, 9 .9, 8 .8, 7 .7, 6 .6, 5 .5, 10 others"
    assert tail.endswith(".webp; not hidden, no links)")
    assert describe_passed_over(Counter()) == ""


@pytest.mark.parametrize("is_file", [False, True])
def test_a_missing_folder_is_an_error_with_the_key(tmp_path, is_file):
    if is_file:
        fill(tmp_path, 1)
    with pytest.raises(UserError, match=r"dataset\.pictures=.*0\.png: there is no such folder"):
        prepare(dataset("folder", tmp_path, pictures=str(tmp_path / "0.png")))


# ---- the split


def test_every_image_is_in_exactly_one_split_in_the_order_of_names(tmp_path):
    train, test, _ = load(fill(tmp_path, 60))
    images = [noise(32, 32, int(Path(path).stem)).transpose(2, 0, 1).tobytes() for path in find_pictures(tmp_path)[0]]
    is_held_out = [hashlib.sha256(image).digest() < (2**256 // 10).to_bytes(32, "big") for image in images]
    assert [image.tobytes() for image in test] == list(itertools.compress(images, is_held_out))
    assert [image.tobytes() for image in train] == [
        image for image, held_out in zip(images, is_held_out, strict=True) if not held_out
    ]
    assert train.dtype == test.dtype == np.uint8
    assert train.shape[1:] == test.shape[1:] == (3, 32, 32)


def test_further_pictures_move_no_other_into_the_other_split(tmp_path):
    train, test, _ = load(fill(tmp_path, 40))
    more_train, more_test, _ = load(fill(tmp_path, 40, first=40))
    assert as_set(train) < as_set(more_train)
    assert as_set(test) < as_set(more_test)


def digest(share: float, number: int) -> bytes:
    """A digest that is larger than this share of all digests."""
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
    digests = [digest(share, number) for number, share in enumerate(shares)]
    train, test = split(digests)
    assert test.tolist() == sorted(digests.index(lowest) for lowest in sorted(digests)[:num_test])
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(shares)))
