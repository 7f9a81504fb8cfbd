"""What becomes of one picture, and which files are rejected."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from modeling.datasets.decoding import read_picture, suffixes
from modeling.datasets.preparation import prepare
from modeling.system.errors import UserError
from tests.datasets.drawings import drawings, fill, noise, stored

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
LOSSLESS = {"webp": {"lossless": True}, "tif": {"compression": "tiff_lzw"}}


def test_the_suffixes_are_those_of_the_admitted_formats():
    avif = [".avif", ".avifs"] if features.check("avif") else []
    others = [".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"]
    assert suffixes() == [".apng", *avif, *others]


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "PNG", "tif", "tiff"])
def test_a_picture_of_the_right_size_keeps_its_pixels(tmp_path, suffix):
    path = stored(noise(32, 32), tmp_path / f"a.{suffix}", **LOSSLESS.get(suffix, {}))
    np.testing.assert_array_equal(read_picture(path), noise(32, 32).transpose(2, 0, 1))


@pytest.mark.parametrize("suffix", ["jpg", "jfif", pytest.param("avif", marks=needs_avif)])
def test_a_picture_that_was_stored_with_loss_keeps_its_pixels_nearly(tmp_path, suffix):
    path = stored(noise(32, 32), tmp_path / f"a.{suffix}", quality=100, subsampling="4:4:4")
    np.testing.assert_allclose(read_picture(path).astype(int), noise(32, 32).transpose(2, 0, 1), atol=8)


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


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", AS_STORED)
def test_a_camera_held_sideways_makes_no_difference(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[274] = orientation
    stored_so = np.ascontiguousarray(AS_STORED[orientation])
    turned = stored(stored_so, tmp_path / f"a.{suffix}", exif=exif, **LOSSLESS.get(suffix, {}))
    np.testing.assert_array_equal(read_picture(turned), read_picture(stored(UPRIGHT, tmp_path / "upright.png")))


def test_transparent_pixels_are_on_white(tmp_path):
    rgba = np.dstack([noise(32, 32), np.zeros((32, 32), np.uint8)])
    rgba[:16, :, 3] = 255
    rgba[16, :] = (0, 100, 255, 51)  # a fifth of it
    image = read_picture(stored(rgba, tmp_path / "a.png"))
    np.testing.assert_array_equal(image[:, :16], rgba[:16, :, :3].transpose(2, 0, 1))
    assert image[:, 16, 0].tolist() == [204, 224, 255]
    assert (image[:, 17:] == 255).all()


@pytest.mark.parametrize("transparency", [7, bytes([255, 0])])
def test_a_transparent_palette_is_on_white(tmp_path, transparency):
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([10, 20, 30] * 256)
    for x in range(16):
        palette.paste(7 if transparency == 7 else 1, (x, 0, x + 1, 32))
        palette.paste(0, (x + 16, 0, x + 17, 32))
    image = read_picture(stored(palette, tmp_path / "a.png", transparency=transparency))
    assert (image[:, :, :16] == 255).all()
    assert image[:, 5, 20].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("suffix", "dtype", "options"),
    [("png", "<u2", {}), ("png", "<u2", {"transparency": 0x1234}), ("tif", "<u2", {}), ("tif", ">u2", {})],
)
def test_16_bit_grey_keeps_its_upper_8_bits(tmp_path, suffix, dtype, options):
    grey = (np.arange(1024).reshape(32, 32) * 64).astype(dtype)
    grey[0, 0] = 0x1234
    expected = (grey // 256).astype(np.uint8)
    expected[0, 0] = 255 if options else 0x12
    np.testing.assert_array_equal(read_picture(stored(grey, tmp_path / f"a.{suffix}", **options)), [expected] * 3)


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_numbers_of_32_bits_are_rejected_as_their_range_is_unknown(tmp_path, dtype):
    with pytest.raises(ValueError, match="32-bit numbers .* of unknown range, 8 or 16 bits needed"):
        read_picture(stored(np.zeros((32, 32), dtype), tmp_path / "a.tif"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_kind_of_pixel_becomes_the_same_grey(tmp_path, mode):
    white = Image.new("L", (40, 40), 255).convert("RGB").convert(mode)
    path = stored(white, tmp_path / f"a.{'jpg' if mode == 'CMYK' else 'png'}")
    assert (read_picture(path) == 255).all()


@pytest.mark.parametrize("suffix", ["gif", "png", "tif", "webp"])
def test_an_animation_or_several_pages_are_their_first_picture(tmp_path, suffix):
    pixels = [noise(32, 32, seed) // 128 * 255 for seed in range(3)]  # eight colours: a palette holds them
    first, *others = map(Image.fromarray, pixels)
    path = stored(first, tmp_path / f"a.{suffix}", save_all=True, append_images=others, **LOSSLESS.get(suffix, {}))
    np.testing.assert_array_equal(read_picture(path), pixels[0].transpose(2, 0, 1))


def test_damaged_metadata_neither_warn_nor_matter(tmp_path):
    exif = Image.Exif()
    exif[270] = "a description " * 10
    exif = exif.tobytes()[:-100]  # the description ends too early
    path = stored(noise(32, 32), tmp_path / "a.png", exif=exif)
    with Image.open(path) as image, pytest.warns(UserWarning, match="Tag data larger than file"):
        image.getexif().get(270)
    np.testing.assert_array_equal(read_picture(path), noise(32, 32).transpose(2, 0, 1))


def test_metadata_that_are_none_do_not_matter(tmp_path):
    path = stored(noise(32, 32), tmp_path / "a.png", exif=b"Exif\0\0" + bytes(64))
    with Image.open(path) as image, pytest.raises(SyntaxError):
        image.getexif().get(270)
    np.testing.assert_array_equal(read_picture(path), noise(32, 32).transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["compressed", "international", "profile"])
def test_metadata_of_megabytes_do_not_matter(tmp_path, kind):
    """Pillow reads a megabyte of each by default."""
    text, info = "a description " * 200_000, PngImagePlugin.PngInfo()
    if kind == "profile":
        options = {"icc_profile": text.encode()}
    else:
        add = info.add_text if kind == "compressed" else info.add_itxt
        add("Description", text, zip=True)
        options = {"pnginfo": info}
    path = stored(noise(32, 32), tmp_path / "a.png", **options)
    np.testing.assert_array_equal(read_picture(path), noise(32, 32).transpose(2, 0, 1))


JPEGS = {
    "noise": (noise(50, 70), {}),
    "progressive": (noise(50, 70), {"progressive": True}),
    "optimized": (noise(50, 70), {"optimize": True}),
    "plain": (np.full((50, 70, 3), 77, np.uint8), {}),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_may_lack_its_end_marker_and_nothing_else(tmp_path, kind):
    pixels, options = JPEGS[kind]
    path = stored(pixels, tmp_path / "a.jpg", **options)
    content, expected = path.read_bytes(), read_picture(path)
    for cut in (1, 2):
        path.write_bytes(content[:-cut])
        np.testing.assert_array_equal(read_picture(path), expected)
    for cut in range(6, 106, 7):
        path.write_bytes(content[:-cut])
        with pytest.raises(ValueError):  # noqa: PT011 (the cut may be in any part of a short file)
            read_picture(path)


# ---- rejected files


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


REJECTED = {
    "text.jpg": (lambda: b"<html>not found</html>", "not a picture in AVIF, BMP, GIF, JPEG, PNG, TIFF, WEBP"),
    "empty.png": (lambda: b"", "not a picture"),
    "ppm.png": (lambda: encoded("PPM"), "not a picture"),
    "cut.gif": (lambda: encoded("GIF", 0.6), "truncated"),
    "cut.tif": (lambda: encoded("TIFF", 0.6), "truncated|not a picture"),
    "cut.png": (lambda: encoded("PNG", 0.6), "truncated"),
    "cut.jpg": (lambda: encoded("JPEG", 0.6), "truncated"),
    "cut.bmp": (lambda: encoded("BMP", 0.6), "truncated"),
    "cut.webp": (lambda: encoded("WEBP", 0.6), "could not create decoder object|truncated|decode|not a picture"),
    "bomb.png": (lambda: empty_png(20_000, 20_000), "decompression bomb"),
    "large.png": (lambda: empty_png(10_000, 10_000), "decompression bomb"),  # where Pillow only warns
}


@pytest.mark.parametrize("name", REJECTED)
def test_a_file_that_is_no_harmless_picture_is_rejected_by_name(tmp_path, name):
    make, reason = REJECTED[name]
    fill(tmp_path / "in", 5)
    (tmp_path / "in" / "deep").mkdir()
    (tmp_path / "in" / "deep" / name).write_bytes(make())
    with pytest.raises(UserError, match=rf"(?s)1 of 6 pictures cannot be used.*\n  deep/{name}: .*({reason})"):
        prepare(drawings(tmp_path))
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("form", [pytest.param("AVIF", marks=needs_avif), "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_a_damaged_file_is_read_or_rejected_and_nothing_else_happens(tmp_path, form):
    exif = Image.Exif()
    exif.update({274: 6, 270: "a description", 282: 72.0})
    whole, outcomes = encoded(form, **({} if form in ("BMP", "GIF") else {"exif": exif})), set()
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
