"""decode: whatever the bytes are, upright RGB or one short reason."""

import io
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cdp.errors import DataError
from cdp.images.decode import decode_image, fit_square, is_blank, name_format, pad_square
from cdp.images.plugins import list_plugin_formats, read_jxl_size


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8)


def test_lossless_formats_come_back_exactly(pixels: np.ndarray) -> None:
    for format, options in [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]:
        np.testing.assert_array_equal(
            decode_image(encode(Image.fromarray(pixels), format, **options)), pixels
        )


def test_jpeg_comes_back_as_pillow_reads_it(pixels: np.ndarray) -> None:
    data = encode(Image.fromarray(pixels), "JPEG")
    np.testing.assert_array_equal(
        decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )


@pytest.mark.parametrize(
    ("kind", "options"), [("AVIF", {"quality": 95}), ("JPEG2000", {}), ("PPM", {})]
)
def test_other_formats_of_photos(kind: str, options: dict, pixels: np.ndarray) -> None:
    smooth = np.asarray(Image.fromarray(pixels[:4, :6]).resize((40, 24), Image.Resampling.BICUBIC))
    data = encode(Image.fromarray(smooth), kind, **options)
    assert name_format(data[:64]) == kind
    assert np.abs(decode_image(data).astype(int) - smooth).mean() < 6


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)


@pytest.fixture
def plugins():
    pytest.importorskip("pillow_heif")
    pytest.importorskip("pillow_jxl")
    assert list_plugin_formats() == ("HEIF", "JXL")


@pytest.mark.parametrize(("kind", "name"), [("HEIF", "HEIC"), ("JXL", "JPEG XL")])
@pytest.mark.parametrize("orientation", [1, 6])
def test_formats_of_plugins(plugins, kind: str, name: str, orientation: int) -> None:
    """Pictures that a phone held upright are turned once, as for JPEG."""
    ramp = np.tile(np.linspace(0, 250, 64).astype(np.uint8), (40, 1))
    picture = np.stack([ramp, ramp // 2, 255 - ramp], axis=2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif.tobytes(), "quality": 95}
    data = encode(Image.fromarray(picture), kind, **options)
    assert name_format(data[:64]) == name
    expected = decode_image(encode(Image.fromarray(picture), "JPEG", **options))
    found = decode_image(data)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 4
    with pytest.raises(DataError, match=r"too large: \d+ x \d+ px, at most 1000 px"):
        decode_image(data, max_pixels=1000)
    for cut in (40, len(data) // 2, len(data) - 20):
        with pytest.raises(DataError):
            decode_image(data[:cut])


@pytest.mark.parametrize(
    ("width", "height"), [(64, 64), (160, 120), (33, 17), (1, 300), (700, 500), (9000, 2)]
)
@pytest.mark.parametrize("boxes", [True, False])
def test_the_size_of_jpeg_xl_is_read_from_its_header(plugins, width, height, boxes) -> None:
    data = encode(Image.new("RGB", (width, height)), "JXL", use_container=boxes)
    assert data.startswith(b"\xff\x0a") != boxes
    assert read_jxl_size(data) == (width, height)


def test_a_large_jpeg_xl_is_refused_before_it_is_decoded(plugins, monkeypatch) -> None:
    data = encode(Image.new("RGB", (3000, 3000)), "JXL")
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(DataError, match="too large: 3000 x 3000 px"):
        decode_image(data, max_pixels=1_000_000)
    with pytest.raises(DataError, match="no JPEG XL stream"):
        decode_image(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50))


def test_pictures_that_are_not_read_are_named(monkeypatch) -> None:
    list_plugin_formats.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DataError, match=r"HEIC is not read without a plugin: pip install 'cdp\["):
        decode_image(HEIC)
    list_plugin_formats.cache_clear()
    with pytest.raises(DataError, match="Photoshop is not read; convert it to JPEG or PNG"):
        decode_image(b"8BPS" + bytes(60))
    assert name_format(b"#!/bin/sh and more of the same text") is None
    assert name_format(b"") is None


def test_blank_pictures_are_known_and_padding_keeps_everything(pixels: np.ndarray) -> None:
    assert is_blank(np.full((1080, 1920, 3), 17, np.uint8))
    assert not is_blank(pixels)
    square = pad_square(pixels)
    assert square.shape == (40, 40, 3)
    np.testing.assert_array_equal(square[8:32], pixels)
    assert (square[:8] == 127).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int, pixels: np.ndarray) -> None:
    stored = {  # how a camera held so stores the upright picture (EXIF 2.3, tag 0x0112)
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, 1),
        7: np.rot90(pixels.transpose(1, 0, 2), 2),
        8: np.rot90(pixels, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(data), pixels)


def test_grey_palette_and_bilevel(pixels: np.ndarray) -> None:
    grey = Image.fromarray(pixels[:, :, 0])
    np.testing.assert_array_equal(decode_image(encode(grey)), np.repeat(pixels[:, :, :1], 3, 2))
    palette = Image.fromarray(pixels).convert("P")
    np.testing.assert_array_equal(decode_image(encode(palette)), np.asarray(palette.convert("RGB")))
    assert set(np.unique(decode_image(encode(grey.convert("1"))))) <= {0, 255}


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(format: str) -> None:
    deep = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    image = decode_image(encode(Image.fromarray(deep), format))
    np.testing.assert_array_equal(image[:, :, 0], np.round(deep / 257).astype(np.uint8))


@pytest.mark.parametrize(("brightest", "full"), [(1000, 1023), (3000, 4095), (9000, 65535)])
def test_cameras_of_ten_and_twelve_bits_are_not_dark(brightest: int, full: int) -> None:
    deep = np.linspace(0, brightest, 400).astype(np.uint16).reshape(20, 20)
    image = decode_image(encode(Image.fromarray(deep), "PNG"))
    np.testing.assert_array_equal(image[:, :, 0], np.round(deep * 255.0 / full))


def test_a_dark_frame_stays_dark() -> None:
    noise = np.random.default_rng(0).integers(0, 200, (20, 20)).astype(np.uint16)
    assert decode_image(encode(Image.fromarray(noise), "PNG")).max() <= 1


def test_cmyk(pixels: np.ndarray) -> None:
    cmyk = Image.fromarray(np.full((20, 20, 3), (200, 30, 60), np.uint8)).convert("CMYK")
    image = decode_image(encode(cmyk, "JPEG", quality=95))
    assert np.abs(image.astype(int) - (200, 30, 60)).max() <= 4


def test_transparent_pixels_are_white(pixels: np.ndarray) -> None:
    alpha = np.full((24, 40, 1), 255, np.uint8)
    alpha[:12] = 0
    image = decode_image(encode(Image.fromarray(np.concatenate([pixels, alpha], 2))))
    assert (image[:12] == 255).all()
    np.testing.assert_array_equal(image[12:], pixels[12:])
    grey = Image.fromarray(pixels[:, :, 0]).convert("P")
    assert decode_image(encode(grey, "GIF", transparency=0)).shape == pixels.shape


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.95])
def test_truncated_files_are_refused(format: str, kept: float, pixels: np.ndarray) -> None:
    data = encode(Image.fromarray(np.tile(pixels, (8, 8, 1))), format)
    with pytest.raises(DataError) as caught:
        decode_image(data[: int(len(data) * kept)])
    assert 0 < len(str(caught.value)) < 120


def test_reasons() -> None:
    with pytest.raises(DataError, match=r"^empty file$"):
        decode_image(b"")
    with pytest.raises(DataError, match="not an image"):
        decode_image(b"hello" * 100)
    with pytest.raises(DataError, match="too small: 40 x 9 px, at least 16 wanted"):
        decode_image(encode(Image.new("RGB", (40, 9))))
    with pytest.raises(DataError, match="too large: 200 x 100 px"):
        decode_image(encode(Image.new("RGB", (200, 100))), max_pixels=10_000)
    with pytest.raises(DataError, match="floating-point"):
        decode_image(encode(Image.new("F", (20, 20)), "TIFF"))


def test_a_bomb_is_refused_on_its_header_without_warnings() -> None:
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
    before = list(warnings.filters)
    with pytest.raises(DataError, match="too large"):
        decode_image(bomb + chunk(b"IEND", b""))
    assert warnings.filters == before
    header = struct.pack(">IIBBBBB", 11_000, 10_000, 8, 2, 0, 0, 0)
    warned = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    with pytest.raises(DataError, match="too large: 11000 x 10000"):
        decode_image(warned)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_bytes_give_an_image_or_a_data_error(data: st.DataObject) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    format = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"]))
    raw = bytearray(encode(Image.fromarray(pixels), format))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(raw), max_pixels=10**6)
    except DataError:
        return
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3


def test_fit_square_crops_the_centre_and_averages() -> None:
    image = np.zeros((8, 14, 3), np.uint8)
    image[:, 3:11] = np.arange(8)[None, :, None] * 10
    square = fit_square(image, 4)
    assert square.shape == (4, 4, 3)
    np.testing.assert_array_equal(square[0, :, 0], [5, 25, 45, 65])
    np.testing.assert_array_equal(fit_square(image, 8), image[:, 3:11])
    assert fit_square(image, 16).shape == (16, 16, 3)
