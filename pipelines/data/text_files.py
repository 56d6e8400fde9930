"""Text files that people hand in: UTF-8, or UTF-16 with its mark.

The contract:
- UTF-8 with or without a byte order mark is read, and UTF-16 with one. Every line ends with a
  newline, whatever ended it in the file.
- A file in another encoding is a DataError that names the file, the line and what to do.
"""

from __future__ import annotations

import codecs
from pathlib import Path

from cdp.errors import DataError

_HEAD = 1000
"""First bytes by which UTF-16 without its mark is known: many of them are zero."""


def read_text(path: Path) -> str:
    """The whole text of a file.

    Raises
    ------
    DataError
        It is text of another encoding.
    OSError
        It cannot be read.
    """
    data = path.read_bytes()
    return _decode(data, path).replace("\r\n", "\n").replace("\r", "\n")


def _decode(data: bytes, path: Path) -> str:
    try:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return data.decode("utf-16")
        if data[:_HEAD].count(0) * 4 > len(data[:_HEAD]):
            raise DataError(_explain(path, "many of its bytes are zero, as in UTF-16."))
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        found = (
            f"line {line} holds the byte 0x{data[error.start]:02x}. It may be Windows-1252 or "
            "Latin-1, as older spreadsheets save it."
        )
        raise DataError(_explain(path, found)) from error


def _explain(path: Path, found: str) -> str:
    return (
        f"cannot read {path}: text in UTF-8 expected, and {found} Save it as UTF-8 (in Excel: CSV "
        "UTF-8)"
    )
