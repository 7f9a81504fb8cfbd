"""One picture of a folder: decoded by Pillow, in admitted formats only, and reduced to the size of the data set."""

import functools
import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from modeling import IMAGE_SHAPE

# Whatever the suffix says: Pillow gives some others to outside programs.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_JPEG_DATA = bytes(range(254, 0, -1))  # no marker; its first bit differs from those that libjpeg makes up, zeros
_UPRIGHT = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow's decoders raise for damaged files, beside its own errors; AVIF's a RuntimeError.
_DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, Image.DecompressionBombError,
)  # fmt: skip


@functools.cache
def suffixes() -> list[str]:
    """The suffixes of pictures, as the installed Pillow knows them (.avif is missing where it was built without)."""
    return sorted(suffix for suffix, form in Image.registered_extensions().items() if form in _FORMATS)


def _to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, on white where it is transparent; 16 bits become their upper 8, as Pillow does for colours."""
    if image.mode in ("I", "F"):  # which `convert` would clip at 0 and 255
        raise ValueError(f"its pixels are 32-bit numbers (mode {image.mode}) of unknown range, 8 or 16 bits needed")
    if image.mode.startswith("I;16"):  # clipped, too
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _decode(file: Path | io.BytesIO) -> Image.Image:
    """The picture in RGB, upright."""
    with Image.open(file, formats=_FORMATS) as image:
        image.load()  # in a PNG the orientation may come last
        # Not ImageOps.exif_transpose: it rewrites the metadata, and fails where they are damaged.
        try:
            turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        except _DECODING_ERRORS:  # damaged metadata say nothing
            turn = None
        return _to_rgb(image if turn is None else image.transpose(turn))


def _decode_without_end(path: Path) -> Image.Image | None:
    """A JPEG that lacks nothing but its end marker; None for any other file.

    libjpeg makes up in silence for data that is missing, but first takes it from whatever follows. So all of it is
    there if something in front of the added end marker changes no pixel. (A progressive picture that is cut exactly
    between two of its scans passes: it is whole in a lower quality.)
    """
    with path.open("rb") as file:
        if file.read(len(_JPEG_START)) != _JPEG_START:
            return None
        content = _JPEG_START + file.read().rstrip(b"\xff")  # which may be half of the marker
    image, other = (_decode(io.BytesIO(content + more + _JPEG_END)) for more in (b"", _JPEG_DATA))
    return image if image.tobytes() == other.tobytes() else None


def open_picture(path: Path) -> Image.Image:
    """A picture in RGB, turned upright (EXIF).

    An animation or several pages are their first picture; a colour profile is ignored.

    Raises:
        ValueError: for a file that is not a whole picture in one of the formats, or with more pixels than Pillow
            considers harmless (89 million).
    """
    # A megabyte, by default, is less than some programs write; what all texts of a picture may take stays bounded.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata that does not matter here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            try:
                return _decode(path)
            except OSError:
                image = _decode_without_end(path)
                if image is None:
                    raise
                return image
    except UnidentifiedImageError:
        raise ValueError(f"not a picture in {', '.join(_FORMATS)}") from None
    except (*_DECODING_ERRORS, Image.DecompressionBombWarning) as error:
        raise ValueError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def reduce(image: Image.Image, image_shape: tuple[int, int, int]) -> np.ndarray:
    """A picture's centre, the largest rectangle of the images' ratio, reduced to (C, H, W) uint8.

    Pillow's Lanczos filter (antialiased) reduces it, and Pillow's "L" makes it grey.

    Raises:
        ValueError: for a picture smaller than the images.
    """
    channels, height, width = image_shape
    if image.width < width or image.height < height:
        raise ValueError(f"{image.width}x{image.height} pixels, at least {width}x{height} needed")
    cut_width = min(image.width, image.height * width // height)
    cut_height = min(image.height, image.width * height // width)
    left, top = (image.width - cut_width) // 2, (image.height - cut_height) // 2
    centre = image.crop((left, top, left + cut_width, top + cut_height)).convert("RGB" if channels == 3 else "L")
    pixels = np.asarray(centre.resize((width, height), Image.Resampling.LANCZOS))
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def read_picture(path: Path, image_shape: tuple[int, int, int] = IMAGE_SHAPE) -> np.ndarray:
    """A file's picture as an image of a data set, (C, H, W) uint8; raises as `open_picture` and `reduce`."""
    return reduce(open_picture(path), image_shape)
