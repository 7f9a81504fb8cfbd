"""A folder of pictures as a data set: the centre of each, reduced to one size; duplicates once; a held-out tenth.

Nothing outside the folder is read, and nothing is left out in silence: what is passed over is counted, and where a
picture cannot be used, none is, unless the user says to go on without it.
"""

import bisect
import hashlib
import os
import re
import tempfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np

from modeling import IMAGE_SHAPE
from modeling.datasets.decoding import read_picture, suffixes
from modeling.stage import PictureFacts
from modeling.system.errors import UserError
from modeling.system.files import sha256_of, write_atomically
from modeling.system.progress import progress_bar

MAX_TEST_IMAGES = 10_000
_TENTH = (2**256 // 10).to_bytes(32, "big")  # a tenth of all SHA-256 digests is below
_MAX_NAMED = 5  # unusable pictures in an error message
_MAX_REASONS = 8  # why files were passed over, in a line


def find_pictures(folder: Path) -> tuple[list[str], Counter[str]]:
    """The pictures in a folder at any depth, in the order of their names' code points.

    Returns:
        Their paths, relative to the folder (as text, which takes less memory); and why other things were passed over,
        which is their suffix or one of hidden, linked file, linked folder, no file, with how many.

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
                found.append(path.relative_to(folder).as_posix())
        folders[:] = [name for name in folders if not name.startswith(".")]  # links are not followed anyway
    return sorted(found), passed_over


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


def _line(folder: Path, path: str) -> bytes:
    """A picture's part of the digest over all; one that cannot be read has one, too, as it may be left out."""
    try:
        sha256 = sha256_of(folder / path)
    except OSError:
        sha256 = "unreadable"
    return os.fsencode(f"{sha256} {path}\n")


def sha256_of_pictures(folder: Path) -> str:
    """SHA-256 over the pictures' relative paths and contents, by which a change is noticed.

    Raises:
        UserError, OSError: as `find_pictures`.
    """
    digest = hashlib.sha256()
    for path in progress_bar(find_pictures(folder)[0], desc="verifying pictures"):
        digest.update(_line(folder, path))
    return digest.hexdigest()


def split(digests: Collection[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Which images are for training and which are held out: an image's own digest decides, and no other image moves it.

    About a tenth is held out: at least one image, at most 10,000, never all. Only these bounds can move an image.

    Args:
        digests: SHA-256 of the images, at least two, all different.

    Returns:
        Their numbers, from 0, ascending.
    """
    ordered = sorted(digests)
    num_test = min(max(bisect.bisect(ordered, _TENTH), 1), MAX_TEST_IMAGES, len(ordered) - 1)
    is_test = np.array([digest <= ordered[num_test - 1] for digest in digests])
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def load_pictures(
    folder: Path,
    unusable_list: Path,
    workspace: Path,
    image_shape: tuple[int, int, int] = IMAGE_SHAPE,
    *,
    skip_unusable: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, PictureFacts]:
    """The pictures in a folder, split.

    Args:
        unusable_list: this file will list the pictures that cannot be used, and why; there is none if all can be.
        workspace: a folder for a file without a name, which holds the images.
        image_shape: (C, H, W) of the images.
        skip_unusable: goes on without them.

    Returns:
        Images, (N, C, H, W) uint8, which stay in that file; the numbers of those for training and of those held out;
        and the facts of the pictures, whose `sha256` is that of `sha256_of_pictures`.

    Raises:
        UserError: when pictures cannot be used, naming the first ones and why; or fewer than two differ.
        OSError: for a folder in it that cannot be read.
    """
    (paths, passed_over), digest = find_pictures(folder), hashlib.sha256()
    digests, unusable = dict[bytes, None](), []  # of the images, in their order
    with tempfile.TemporaryFile(dir=workspace) as file:
        for path in progress_bar(paths, desc="reading pictures"):
            # The digest first: were the file to change in between, it would be noticed the next time.
            digest.update(_line(folder, path))
            try:
                image = read_picture(folder / path, image_shape)
            except ValueError as error:
                unusable.append(f"{path}: {error}")
                continue
            if (key := hashlib.sha256(content := image.tobytes()).digest()) not in digests:
                digests[key] = None
                file.write(content)
        _report_unusable(folder, len(paths), unusable, unusable_list, skip_unusable)
        if len(digests) < 2:
            raise UserError(
                f"dataset.pictures={folder}: {len(paths)} pictures, {len(digests)} of them different, at least 2 "
                f"needed; {describe_passed_over(passed_over)}".removesuffix("; ")
            )
        file.flush()
        images = np.memmap(file, np.uint8, mode="r").reshape(-1, *image_shape)
    facts: PictureFacts = {
        "count": len(paths),
        "unusable": len(unusable),
        "duplicates": len(paths) - len(unusable) - len(digests),
        "sha256": digest.hexdigest(),
    }
    return images, *split(digests), facts


def _report_unusable(
    folder: Path, num_pictures: int, unusable: list[str], unusable_list: Path, skip_unusable: bool
) -> None:
    if not unusable:
        unusable_list.unlink(missing_ok=True)
        return
    write_atomically(unusable_list, os.fsencode("\n".join([*unusable, ""])))
    if not skip_unusable:
        num_more = len(unusable) - _MAX_NAMED
        more = [f"and {num_more} more: {unusable_list} lists all"] if num_more > 0 else []
        head = (
            f"dataset.pictures={folder}: {len(unusable)} of {num_pictures} pictures cannot be used, remove them or go "
            "on without them (dataset.skip_unusable=true):"
        )
        raise UserError("\n  ".join([head, *unusable[:_MAX_NAMED], *more]))
