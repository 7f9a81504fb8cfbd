"""A folder of pictures as a data set: the centre square of each, reduced to 32x32; duplicates once; a held-out tenth.

Nothing outside the folder is read, and nothing is left out in silence: what is passed over is counted, and where a
picture cannot be used, none is, unless the user says to go on without it.
"""

import bisect
import hashlib
import os
import re
from collections import Counter
from pathlib import Path, PurePath

import numpy as np

from modeling.datasets.decoding import read_picture, suffixes
from modeling.stage import PictureFacts
from modeling.system.errors import UserError
from modeling.system.files import sha256_of, write_atomically
from modeling.system.progress import progress_bar

MAX_TEST_IMAGES = 10_000
_TENTH = (2**256 // 10).to_bytes(32, "big")  # a tenth of all SHA-256 digests is below
_MAX_NAMED = 5  # unusable pictures in an error message
_MAX_REASONS = 8  # why files were passed over, in a line


def find_pictures(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The pictures in a folder at any depth, relative to it, in the order of their names' code points.

    Returns:
        The pictures; and why other things were passed over, which is their suffix or one of hidden, linked file,
        linked folder, no file, with how many.

    Raises:
        UserError: when there is no such folder.
        OSError: for a folder in it that cannot be read.
    """

    def fail(error: OSError) -> None:  # os.walk would ignore it
        raise error

    if not folder.is_dir():
        raise UserError(f"dataset.pictures={folder}: there is no such folder")
    found, passed_over = [], Counter()
    for parent, folders, names in os.walk(folder, onerror=fail):
        for path in (Path(parent, name) for name in (*folders, *names)):
            if reason := _why_passed_over(path):
                passed_over[reason] += 1
            elif path.is_file():
                found.append(path.relative_to(folder))
        folders[:] = [name for name in folders if not name.startswith(".")]  # links are not followed anyway
    return sorted(found, key=PurePath.as_posix), passed_over


def _why_passed_over(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if path.is_symlink():
        return "linked folder" if path.is_dir() else "linked file"
    if path.is_dir():
        return None
    if (suffix := path.suffix.lower()) not in suffixes():
        return suffix if re.fullmatch(r"\.\w+", suffix) else "without suffix"
    return None if path.is_file() else "no file"


def describe_passed_over(passed_over: Counter[str]) -> str:
    """What `find_pictures` passed over, in a line; empty if it was nothing."""
    most = passed_over.most_common(_MAX_REASONS)
    if rest := passed_over.total() - sum(count for _, count in most):
        most.append(("others", rest))
    found = ", ".join(f"{count} {reason}" for reason, count in most)
    return f"passed over: {found} (pictures are {' '.join(suffixes())}; not hidden, no links)" if found else ""


def _line(folder: Path, path: Path) -> bytes:
    """A picture's part of the digest over all; one that cannot be read has one, too, as it may be left out."""
    try:
        sha256 = sha256_of(folder / path)
    except OSError:
        sha256 = "unreadable"
    return os.fsencode(f"{sha256} {path.as_posix()}\n")


def sha256_of_pictures(folder: Path) -> str:
    """SHA-256 over the pictures' relative paths and contents, by which a change is noticed.

    Raises:
        UserError, OSError: as `find_pictures`.
    """
    digest = hashlib.sha256()
    for path in progress_bar(find_pictures(folder)[0], desc="verifying pictures"):
        digest.update(_line(folder, path))
    return digest.hexdigest()


def split(images: dict[bytes, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out images: an image's own digest decides, so that adding or removing others does not move it.

    About a tenth is held out: at least one image, at most 10,000, never all. Only these bounds can move an image.

    Args:
        images: at least two, under their SHA-256, in the order that both splits keep.
    """
    digests = sorted(images)
    num_test = min(max(bisect.bisect(digests, _TENTH), 1), MAX_TEST_IMAGES, len(digests) - 1)
    held_out = set(digests[:num_test])
    train = [image for digest, image in images.items() if digest not in held_out]
    return np.stack(train), np.stack([image for digest, image in images.items() if digest in held_out])


def load_pictures(
    folder: Path, unusable_list: Path, *, skip_unusable: bool = False
) -> tuple[np.ndarray, np.ndarray, PictureFacts]:
    """The pictures in a folder, split.

    Args:
        unusable_list: this file will list the pictures that cannot be used, and why; there is none if all can be.
        skip_unusable: goes on without them.

    Returns:
        Training images and held-out images, (N, 3, 32, 32) uint8, and the facts of the pictures; their `sha256` is
        that of `sha256_of_pictures`.

    Raises:
        UserError: when pictures cannot be used, naming the first ones and why; or fewer than two differ.
        OSError: for a folder in it that cannot be read.
    """
    (paths, passed_over), digest = find_pictures(folder), hashlib.sha256()
    images, unusable = {}, []
    for path in progress_bar(paths, desc="reading pictures"):
        # The digest first: were the file to change in between, it would be noticed the next time.
        digest.update(_line(folder, path))
        try:
            image = read_picture(folder / path)
        except ValueError as error:
            unusable.append(f"{path}: {error}")
        else:
            images.setdefault(hashlib.sha256(image.tobytes()).digest(), image)
    if unusable:
        write_atomically(unusable_list, os.fsencode("\n".join([*unusable, ""])))
    else:
        unusable_list.unlink(missing_ok=True)
    if unusable and not skip_unusable:
        num_more = len(unusable) - _MAX_NAMED
        more = [f"and {num_more} more: {unusable_list} lists all"] if num_more > 0 else []
        head = (
            f"dataset.pictures={folder}: {len(unusable)} of {len(paths)} pictures cannot be used, remove them or go on "
            "without them (dataset.skip_unusable=true):"
        )
        raise UserError("\n  ".join([head, *unusable[:_MAX_NAMED], *more]))
    if len(images) < 2:
        raise UserError(
            f"dataset.pictures={folder}: {len(paths)} pictures, {len(images)} of them different, at least 2 needed; "
            f"{describe_passed_over(passed_over)}".removesuffix("; ")
        )
    facts: PictureFacts = {
        "count": len(paths),
        "unusable": len(unusable),
        "duplicates": len(paths) - len(unusable) - len(images),
        "sha256": digest.hexdigest(),
    }
    return *split(images), facts
