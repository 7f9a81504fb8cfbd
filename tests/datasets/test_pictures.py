"""What becomes of one picture, and which files are rejected."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from modeling.datasets.pictures import read_picture
from modeling.datasets.preparation import prepare
from modeling.system.errors import UserError
from tests.datasets.drawings import drawings, fill, noise, stored


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


@pytest.mark.parametrize("transparency", [None, 0x1234])
def test_16_bit_grey_keeps_its_upper_8_bits(tmp_path, transparency):
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
def test_an_animation_is_its_first_picture(tmp_path, suffix):
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


@pytest.mark.parametrize("name", REJECTED)
def test_a_file_that_is_no_harmless_picture_is_rejected_by_name(tmp_path, name):
    make, reason = REJECTED[name]
    fill(tmp_path / "in", 5)
    (tmp_path / "in" / "deep").mkdir()
    (tmp_path / "in" / "deep" / name).write_bytes(make())
    with pytest.raises(UserError, match=rf"(?s)1 of 6 pictures cannot be used.*\n  deep/{name}: .*({reason})"):
        prepare(drawings(tmp_path))
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("form", ["BMP", "JPEG", "PNG", "WEBP"])
def test_a_damaged_file_is_read_or_rejected_and_nothing_else_happens(tmp_path, form):
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
