"""Bytes of an image file to an array of RGB pixels, or a short reason why not.

The contract:
- Input is untrusted: any bytes at all. Output is uint8 (h, w, 3) RGB, upright, or a `DataError`
  whose message is short enough to be a cell of the `rejected` table.
- The size is checked on the header, before a pixel is decoded, so a decompression bomb costs
  nothing.
- Only the formats below are tried, and HEIC and JPEG XL where their plugins are installed
  (`cdp.images.plugins`): others of Pillow's would run a program (EPS: Ghostscript) or are no
  photographs.
- No setting of Pillow, OpenCV or the warnings module is left changed.
"""

from __future__ import annotations

import io
import threading
import warnings

import cv2
import numpy as np
from PIL import Image

from cdp.errors import DataError
from cdp.images.plugins import describe_format, list_plugin_formats, read_jxl_size

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

_STARTS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"8BPS", "Photoshop"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
)
_BRANDS = {
    b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC",
    b"hevx": "HEIC", b"heim": "HEIC", b"heis": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC",
}  # fmt: skip

_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The list of warning filters belongs to the whole process: two threads that silence Pillow at once
# could restore each other's list. One lock, so that decoding in threads is safe (and serial).
_silence = threading.Lock()


def name_format(head: bytes) -> str | None:
    """The format of a picture by its first bytes (32 or more), also of some that are not read.

    One of `FORMATS`, or "HEIC", "JPEG XL", "Photoshop"; None for anything else.
    """
    for start, name in _STARTS:
        if head.startswith(start):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if len(head) > 2 and head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PPM"
    if head[4:8] == b"ftyp":
        # The first brand may be a general one; the list of compatible ones follows from byte 16.
        brands = [head[8:12], *(head[at : at + 4] for at in range(16, min(len(head), 64), 4))]
        found = [_BRANDS[brand] for brand in brands if brand in _BRANDS]
        return "AVIF" if "AVIF" in found else found[0] if found else None
    return None


def decode_image(data: bytes, *, max_pixels: int = 100_000_000, min_px: int = 16) -> np.ndarray:
    """Decode any common image file.

    Parameters
    ----------
    data : bytes
        The whole file, in one of `FORMATS`, whatever its name.
    max_pixels : int
        Largest width x height, in pixels, that is decoded.
    min_px : int
        Smallest side, in pixels, that is accepted.

    Returns
    -------
    image : (h, w, 3) uint8, RGB
        Turned upright by the EXIF orientation. Of an animation, the first frame; transparent
        pixels over white; 16-bit grey scaled to 8 bits, also where the camera has 10 or 12 of them;
        CMYK and palette converted.

    Raises
    ------
    DataError
        Empty, unreadable, truncated, too large, or smaller than `min_px`; the message is the
        reason alone ("too small: 9 x 12 px, at least 16 wanted").
    """
    if not data:
        raise DataError("empty file")
    with _silence, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if name_format(data[:64]) == "JPEG XL":
                _check_size(*read_jxl_size(data), max_pixels, min_px)
            with Image.open(io.BytesIO(data), formats=_list_formats()) as image:
                _check_size(*image.size, max_pixels, min_px)
                image.load()
                return _to_rgb(image)
        except DataError:
            raise
        except Image.DecompressionBombError as error:
            raise DataError(f"too large: at most {max_pixels} px are decoded") from error
        except Image.UnidentifiedImageError as error:
            kind = name_format(data[:64])
            fault = describe_format(kind, FORMATS) if kind is not None else ""
            if fault:
                raise DataError(fault) from error
            raise DataError(f"not an image: expected one of {', '.join(FORMATS)}") from error
        except Exception as error:  # a broken file can make a codec raise anything at all
            reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
            raise DataError(f"corrupt image: {reason}") from error


def _list_formats() -> tuple[str, ...]:
    return (*FORMATS, *list_plugin_formats())


def _check_size(width: int, height: int, max_pixels: int, min_px: int) -> None:
    if width * height > max_pixels:
        raise DataError(f"too large: {width} x {height} px, at most {max_pixels} px")
    if min(width, height) < min_px:
        raise DataError(f"too small: {width} x {height} px, at least {min_px} wanted")


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Pillow's image, loaded, to upright (h, w, 3) uint8 RGB."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the pixels are whole even where the tags are not
        orientation = 1
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError(f"pixels out of range: {grey.min()}..{grey.max()}, 16 bits expected")
        if image.mode != "I" or grey.max() > 255:
            # A camera of 10 or 12 bits writes them as they are; what fits into 8 is a dark frame.
            full = next((most for most in (1023, 4095) if 255 < grey.max() <= most), 65535)
            grey = (grey * 255 + full // 2) // full
        upright = Image.fromarray(grey.astype(np.uint8))
    elif image.mode == "F":
        raise DataError("floating-point pixels: their range is unknown; save as 8 or 16 bits")
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        upright = Image.new("RGB", image.size, (255, 255, 255))
        upright.paste(with_alpha, mask=with_alpha.getchannel("A"))
    else:
        upright = image
    if orientation in _TRANSPOSE:
        upright = upright.transpose(_TRANSPOSE[orientation])
    return np.array(upright.convert("RGB"), dtype=np.uint8)


def is_blank(image: np.ndarray) -> bool:
    """Whether a picture, (h, w, 3) uint8, shows one colour: no channel varies by a grey level."""
    step = max(1, min(image.shape[:2]) // 256)
    return bool((image[::step, ::step].std(axis=(0, 1)) < 1).all())


def pad_square(image: np.ndarray) -> np.ndarray:
    """The whole picture, (h, w, 3) uint8, centred on a grey square of its longer side."""
    height, width = image.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), 127, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def fit_square(image: np.ndarray, size_px: int) -> np.ndarray:
    """Crop the centred square and resize it.

    Parameters
    ----------
    image : (h, w, 3) uint8
    size_px : int
        Side of the result, in pixels.

    Returns
    -------
    square : (size_px, size_px, 3) uint8
        By area averaging where the crop is larger, bilinear where it is smaller; an image that is
        already so is returned as it is. An odd margin loses its extra row at the bottom/right.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    crop = image[top : top + side, left : left + side]
    if side == size_px:
        return np.ascontiguousarray(crop)
    method = cv2.INTER_AREA if side > size_px else cv2.INTER_LINEAR
    return np.asarray(
        cv2.resize(np.ascontiguousarray(crop), (size_px, size_px), interpolation=method)
    )
