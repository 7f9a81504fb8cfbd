"""A folder of pictures as a data set: the centre square of each, reduced to 32x32; duplicates once; a held-out tenth.

Nothing outside the folder is read, and nothing is left out in silence: where a picture cannot be used, none is.
"""

import bisect
import hashlib
import os
import struct
import warnings
from pathlib import Path, PurePath

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from modeling import IMAGE_SIZE
from modeling.stage import PictureFacts
from modeling.system.errors import UserError
from modeling.system.files import sha256_of
from modeling.system.progress import progress_bar

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
MAX_TEST_IMAGES = 10_000
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")  # whatever the suffix says: Pillow gives some others to outside programs
_TENTH = (2**256 // 10).to_bytes(32, "big")  # a tenth of all SHA-256 digests is below
_MAX_NAMED = 5  # rejected pictures in an error message
_UPRIGHT = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow's decoders raise for damaged files, beside its own errors.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def find_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder at any depth, relative to it, in the order of their names' code points.

    Hidden files and folders, other suffixes and symbolic links are ignored.

    Raises:
        UserError: when there is no such folder.
        OSError: for a folder in it that cannot be read.
    """

    def fail(error: OSError) -> None:  # os.walk would ignore it
        raise error

    if not folder.is_dir():
        raise UserError(f"dataset.pictures={folder}: there is no such folder")
    found = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [
            path.relative_to(folder)
            for path in paths
            if path.suffix.lower() in SUFFIXES and path.is_file() and not path.is_symlink()
        ]
    return sorted(found, key=PurePath.as_posix)


def _line(path: Path, sha256: str) -> bytes:
    return os.fsencode(f"{sha256} {path.as_posix()}\n")


def sha256_of_pictures(folder: Path) -> str:
    """SHA-256 over the pictures' relative paths and contents, by which a change is noticed.

    Raises:
        UserError, OSError: as `find_pictures`; OSError also for a picture that cannot be read.
    """
    digest = hashlib.sha256()
    for path in progress_bar(find_pictures(folder), desc="verifying pictures"):
        digest.update(_line(path, sha256_of(folder / path)))
    return digest.hexdigest()


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, on white where it is transparent; 16 bits become their upper 8, as Pillow does for colours."""
    if image.mode == "I;16":  # which `convert` would clip at 255
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_picture(path: Path) -> np.ndarray:
    """A picture's centre square, reduced by Pillow's Lanczos filter (antialiased) to (3, 32, 32) uint8.

    It is turned upright (EXIF); an animation is its first picture; a colour profile is ignored.

    Raises:
        ValueError: for a file that is not a whole picture in one of the formats, smaller than 32 pixels on a side, or
            with more pixels than Pillow considers harmless (89 million).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata that does not matter here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as file:
                if min(file.size) < IMAGE_SIZE:
                    raise ValueError(f"{file.width}x{file.height} pixels, at least {IMAGE_SIZE}x{IMAGE_SIZE} needed")
                file.load()  # in a PNG the orientation may come last
                # Not ImageOps.exif_transpose: it rewrites the metadata, and fails where they are damaged.
                turn = _UPRIGHT.get(file.getexif().get(ExifTags.Base.Orientation, 1))
                image = _to_rgb(file if turn is None else file.transpose(turn))
    except UnidentifiedImageError:
        raise ValueError(f"not a picture in {', '.join(_FORMATS)}") from None
    except (*_DECODING_ERRORS, Image.DecompressionBombWarning) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)).transpose(2, 0, 1)


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


def load_pictures(folder: Path) -> tuple[np.ndarray, np.ndarray, PictureFacts]:
    """The pictures in a folder, split.

    Returns:
        Training images and held-out images, (N, 3, 32, 32) uint8, and the facts of the pictures; their `sha256` is
        that of `sha256_of_pictures`.

    Raises:
        UserError: when pictures cannot be used, naming the first ones and why; or fewer than two differ.
        OSError: for a folder in it that cannot be read.
    """
    paths, digest = find_pictures(folder), hashlib.sha256()
    images, rejected = {}, []
    for path in progress_bar(paths, desc="reading pictures"):
        try:
            # The digest first: were the file to change in between, it would be noticed the next time.
            digest.update(_line(path, sha256_of(folder / path)))
            image = read_picture(folder / path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            rejected.append(f"{path}: {reason}")
        else:
            images.setdefault(hashlib.sha256(image.tobytes()).digest(), image)
    if rejected:
        more = [f"and {len(rejected) - _MAX_NAMED} more"] if len(rejected) > _MAX_NAMED else []
        head = f"dataset.pictures={folder}: {len(rejected)} of {len(paths)} pictures cannot be used, remove them:"
        raise UserError("\n  ".join([head, *rejected[:_MAX_NAMED], *more]))
    if len(images) < 2:
        raise UserError(
            f"dataset.pictures={folder}: {len(paths)} pictures ({' '.join(SUFFIXES)}; not hidden, no links), "
            f"{len(images)} of them different, at least 2 needed"
        )
    facts: PictureFacts = {"count": len(paths), "duplicates": len(paths) - len(images), "sha256": digest.hexdigest()}
    return *split(images), facts
