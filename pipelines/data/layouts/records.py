"""RecordIO, as InsightFace hands out training sets: a `.rec` file with or without its `.idx`.

The contract:
- A record is a magic number, its length, and its bytes; those of an image begin with a header that
  holds the label. The name of a record is its key, in eight digits.
- Records without an image (InsightFace's first one, and its list of identities) are left out.
- A record that is cut, lies about its length or is none at all is a member with a fault. Without an
  index the next record is found by its magic number.

Source: the format of dmlc-core's RecordIO and of MXNet's image records, read anew.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np

from cdp.errors import DataError
from pipelines.data.layouts.member import LARGEST_MEMBER, Member

SUFFIXES = (".rec",)
MAGIC = 0xCED7230A
HEAD = struct.Struct("<II")
"""Magic number; upper three bits: place in a record of several pieces, lower 29: its length."""
LABEL = struct.Struct("<IfQQ")
"""Count of further labels, label, and two ids, at the start of a record's bytes."""
WHOLE, FIRST, MIDDLE, LAST = range(4)
MOST_LABELS = 1 << 16
BLOCK_BYTES = 1 << 20


def list_members(path: Path) -> Iterator[Member]:
    """Every image of the file, with its label as identity."""
    with path.open("rb") as stream:
        size = path.stat().st_size
        for key, offset in _iterate_offsets(path, stream, size):
            name = f"{key:08d}"
            try:
                data = _read_record(stream, offset, size, most=LABEL.size + 4 * MOST_LABELS)
                label, start = _read_label(data)
            except DataError as error:
                yield Member(name, None, str(error))
                continue
            if len(data) > start:
                yield Member(name, f"{label:g}")


def read_member(path: Path, name: str) -> bytes:
    """The bytes of the image in one record."""
    found = path.stat()
    offset = _index_offsets(path, found.st_size, found.st_mtime_ns).get(name)
    if offset is None:
        raise DataError(f"{path.name} has no record {name}")
    with path.open("rb") as stream:
        data = _read_record(stream, offset, found.st_size)
    return data[_read_label(data)[1] :]


@lru_cache(maxsize=4)
def _index_offsets(path: Path, size: int, _changed: int) -> dict[str, int]:
    with path.open("rb") as stream:
        return {f"{key:08d}": offset for key, offset in _iterate_offsets(path, stream, size)}


def _iterate_offsets(path: Path, stream: IO[bytes], size: int) -> Iterator[tuple[int, int]]:
    """(key, byte) of every record: of the index beside the file, or one after the other."""
    index = path.with_suffix(".idx")
    if index.is_file() and not index.is_symlink():  # a link could lead out of the data root
        yield from _read_index(index)
        return
    key = offset = last = 0
    while offset < size:
        yield key, offset
        try:
            end = _find_end(stream, offset, size)
        except DataError:  # reported for this record; the one before may have said a wrong length
            tried = {last, offset}
            offset = last = _find_next(stream, last + HEAD.size, size, tried)
        else:
            last, offset = offset, _find_next(stream, offset + HEAD.size, end, set(), to_end=True)
        key += 1


def _find_next(
    stream: IO[bytes], start: int, end: int, tried: set[int], *, to_end: bool = False
) -> int:
    """The first byte from `start` on at which a whole record begins; `end` where none does.

    Inside a record no four bytes at a multiple of four are the magic number: writers cut there.
    tried : bytes at which a record was looked for already.
    to_end : only a record after which others follow up to `end` without a gap.
    """
    for first in range(start, end, BLOCK_BYTES):
        stream.seek(first)
        data = stream.read(min(BLOCK_BYTES, end - first))
        words = np.frombuffer(data, "<u4", len(data) // 4)
        for word in np.flatnonzero(words == MAGIC).tolist():
            offset = following = first + 4 * word
            try:
                if offset not in tried:
                    following = _find_end(stream, offset, end)
                    while to_end and following < end:
                        following = _find_end(stream, following, end)
                    return offset
            except DataError:
                continue
    return end


def _read_index(index: Path) -> Iterator[tuple[int, int]]:
    seen: set[int] = set()
    with index.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                key, offset = (int(word) for word in line.split())
                if key < 0 or offset < 0 or key in seen:
                    raise ValueError("a number twice or below 0")
            except ValueError as error:
                raise DataError(
                    f"{index}, line {number}: a key and a byte expected, got {line[:40]!r} "
                    f"({error}). Without the .idx file the .rec file is read from its start"
                ) from error
            seen.add(key)
            yield key, offset


def _read_pieces(stream: IO[bytes], offset: int, size: int) -> Iterator[tuple[int, int]]:
    """(byte, length) of each piece of the record at `offset`, checked against the file."""
    first = True
    while True:
        stream.seek(offset)
        head = stream.read(HEAD.size)
        if len(head) < HEAD.size:
            raise DataError(f"the file ends at byte {size}, where a record should be")
        magic, word = HEAD.unpack(head)
        kind, length = word >> 29, word & ((1 << 29) - 1)
        if magic != MAGIC or kind not in ((WHOLE, FIRST) if first else (MIDDLE, LAST)):
            raise DataError(f"no record at byte {offset}")
        if offset + HEAD.size + length > size:
            raise DataError(
                f"the record at byte {offset} says {length} bytes, the file has "
                f"{size - offset - HEAD.size} more"
            )
        yield offset + HEAD.size, length
        if kind in (WHOLE, LAST):
            return
        offset, first = offset + HEAD.size + (length + 3) // 4 * 4, False


def _find_end(stream: IO[bytes], offset: int, size: int) -> int:
    *_, (start, length) = _read_pieces(stream, offset, size)
    return start + (length + 3) // 4 * 4


def _read_record(stream: IO[bytes], offset: int, size: int, *, most: int | None = None) -> bytes:
    """The bytes of a record, or the first `most` of them.

    A record whose bytes hold the magic number is stored in pieces, cut where the number stood.
    """
    pieces = []
    total = 0
    for start, length in _read_pieces(stream, offset, size):
        total += length + 4
        if total > LARGEST_MEMBER:
            raise DataError(f"too large: more than {LARGEST_MEMBER} bytes")
        stream.seek(start)
        pieces.append(stream.read(length if most is None else min(length, most)))
    return struct.pack("<I", MAGIC).join(pieces)


def _read_label(data: bytes) -> tuple[float, int]:
    """The label of a record and the byte at which its image starts."""
    if len(data) < LABEL.size:
        raise DataError(f"a record of {len(data)} bytes has no label")
    count, label, _, _ = LABEL.unpack_from(data)
    start = LABEL.size + 4 * count
    if count > MOST_LABELS or start > len(data):
        raise DataError(f"a record of {len(data)} bytes says that it has {count} labels")
    if count:
        (label,) = struct.unpack_from("<f", data, LABEL.size)
    if label != label:
        raise DataError("the label of the record is not a number")
    return label, start
