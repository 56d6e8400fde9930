"""Formats of pictures that Pillow reads with a plugin: HEIC and JPEG XL (`cdp[formats]`).

The contract:
- A plugin is imported once, when a picture is first decoded; without it the format is not read, and
  `describe_format` says which extra reads it.
- The size of a JPEG XL picture is read from its header (`read_jxl_size`): its plugin decodes a
  picture as soon as it is opened.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib import import_module

from cdp.errors import DataError

EXTRA = "cdp[formats]"
PLUGINS = {"HEIC": ("HEIF", "pillow_heif"), "JPEG XL": ("JXL", "pillow_jxl")}
"""Format -> Pillow's name of it, and the module that reads it."""
_RATIOS = ((0, 0), (1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_BITS = (9, 13, 18, 30)


@cache
def list_plugin_formats() -> tuple[str, ...]:
    """Pillow's names of the formats whose plugin is installed."""
    found = []
    for name, module in PLUGINS.values():
        with suppress(ImportError, OSError):  # OSError: its library does not fit this system
            plugin = import_module(module)
            if name == "HEIF":
                plugin.register_heif_opener()
            found.append(name)
    return tuple(found)


def describe_format(kind: str, read: tuple[str, ...]) -> str:
    """Why pictures of a format are not read and what to do, or "".

    kind : as `cdp.images.decode.name_format` names it. read : formats that need no plugin.
    """
    if kind in read:
        return ""
    if kind not in PLUGINS:
        return f"{kind} is not read; convert it to JPEG or PNG"
    if PLUGINS[kind][0] in list_plugin_formats():
        return ""
    return f"{kind} is not read without a plugin: pip install '{EXTRA}', or convert it to JPEG"


def read_jxl_size(data: bytes) -> tuple[int, int]:
    """Width and height in the header of a JPEG XL file, in pixels.

    Raises DataError where there is no such header.

    Source: ISO/IEC 18181-1, SizeHeader, and 18181-2 for the boxes around it.
    """
    start = data[:16] if data.startswith(b"\xff\x0a") else _find_codestream(data)
    if not start.startswith(b"\xff\x0a"):
        raise DataError("corrupt image: no JPEG XL stream in it")
    bits, place = int.from_bytes(start[2:16], "little"), 0

    def take(count: int) -> int:
        nonlocal place
        value = bits >> place & ((1 << count) - 1)
        place += count
        return value

    small = take(1)

    def take_side() -> int:
        return (take(5) + 1) * 8 if small else take(_BITS[take(2)]) + 1

    height = take_side()
    wide, high = _RATIOS[take(3)]
    return (height * wide // high if wide else take_side()), height


def _find_codestream(data: bytes) -> bytes:
    """The first bytes of the stream in a file of boxes."""
    place = 0
    while place + 8 <= len(data):
        size, kind, head = (
            int.from_bytes(data[place : place + 4], "big"),
            data[place + 4 : place + 8],
            8,
        )
        if size == 1:
            size, head = int.from_bytes(data[place + 8 : place + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            start = place + head + (4 if kind == b"jxlp" else 0)
            return data[start : start + 16]
        if size < head:
            break
        place += size
    return b""
