"""Tar shards, as WebDataset writes them: images, and beside each its label.

The contract:
- An image is a regular member with the suffix of one. Its person is the text of `<same name>.cls`,
  the `label`, `identity` or `person` of `<same name>.json`, or else the first folder of its name.
- Nothing is unpacked. Links, devices, names with `..` and members beyond the end of the file are
  members with a fault; so is the place where a file is cut or damaged. The members after a damaged
  place, or after an end in the middle of the file, are found by their headers.
"""

from __future__ import annotations

import json
import os
import posixpath
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO

from cdp.errors import DataError
from pipelines.data.fields import read_field
from pipelines.data.folders import IMAGE_SUFFIXES
from pipelines.data.layouts.member import LARGEST_MEMBER, Member

SUFFIXES = (".tar",)
_PLUGIN_SUFFIXES = {".heic", ".heif", ".hif", ".jxl"}
"""Of pictures that a plugin reads; without it they are rejected with that reason."""
_SUFFIXES = IMAGE_SUFFIXES | _PLUGIN_SUFFIXES
LABELS = (".cls", ".json")
LARGEST_LABEL = 1 << 20
"""Most bytes of a label file."""
KEYS = ("label", "identity", "person", "cls")


def list_members(path: Path) -> Iterator[Member]:
    """Every image of the shard; members without the suffix of an image are left out."""
    size = path.stat().st_size
    members = list(_iterate_members(path, size))
    labels = _read_labels(path, members)
    for name, offset, _, fault in members:
        if not fault and offset >= 0 and os.path.splitext(name)[1].lower() not in _SUFFIXES:
            continue
        folder = name.partition("/")[0] if "/" in name else None
        yield Member(name, labels.get(_strip_suffix(name), folder), fault)


def read_member(path: Path, name: str) -> bytes:
    """The bytes of one image."""
    found = path.stat()
    place = _index_members(path, found.st_size, found.st_mtime_ns).get(name)
    if place is None:
        raise DataError(f"{path.name} has no file {name}")
    with path.open("rb") as stream:
        stream.seek(place[0])
        data = stream.read(place[1])
    if len(data) < place[1]:
        raise DataError(f"{path.name} ends inside {name}")
    return data


@lru_cache(maxsize=8)
def _index_members(path: Path, size: int, _changed: int) -> dict[str, tuple[int, int]]:
    return {
        name: (offset, length)
        for name, offset, length, fault in _iterate_members(path, size)
        if not fault
    }


def _iterate_members(path: Path, size: int) -> Iterator[tuple[str, int, int, str]]:
    """(name, byte, length, fault) of every member that is no folder; each name once."""
    seen: set[str] = set()
    number = start = 0
    while True:
        before, following, reason = number, start + tarfile.BLOCKSIZE, ""
        try:
            with path.open("rb") as stream:
                stream.seek(start)
                # From the second time on blocks that are no header are passed over.
                with tarfile.open(fileobj=stream, mode="r:", ignore_zeros=start > 0) as tar:
                    for member in tar:
                        number += 1
                        tar.members = []  # type: ignore[attr-defined] # else it grows
                        following = max(following, member.offset_data)
                        if not member.isdir():
                            yield _describe_member(member, number, size, seen)
                    if tar.offset > size:
                        reason = f"the file has only {size} bytes"
                    elif not start:
                        stream.seek(tar.offset)
                        if any(stream.read(tarfile.BLOCKSIZE)):
                            reason = f"no header at byte {tar.offset}"
                        else:
                            following = max(following, tar.offset)
        except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
            reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        if reason:
            said = f"is damaged after {number} files" if number else "cannot be read"
            yield f"end ({number})", -1, 0, f"the shard {said}: {reason}"
        if (number == before and (start or reason)) or following >= size:
            return
        start = following


def _describe_member(
    member: tarfile.TarInfo, number: int, size: int, seen: set[str]
) -> tuple[str, int, int, str]:
    name = posixpath.normpath(member.name)
    fault = _find_fault(member, name, size)
    if name in seen:
        name, fault = f"{name} ({number})", fault or "a name that the shard has already"
    seen.add(name)
    return name, member.offset_data, member.size, fault


def _find_fault(member: tarfile.TarInfo, name: str, size: int) -> str:
    if name.startswith(("/", "..")):
        return "a name that leads out of the shard"
    if not member.isreg() or member.issparse():
        return "a link, device or sparse file, no plain file"
    if member.offset_data + member.size > size:
        return f"cut: {member.size} bytes said, the shard ends before"
    if member.size > LARGEST_MEMBER:
        return f"too large: {member.size} bytes, at most {LARGEST_MEMBER}"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    return ""


def _strip_suffix(name: str) -> str:
    """The name up to the first point of its last part: the key of a WebDataset sample."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _read_labels(path: Path, members: list[tuple[str, int, int, str]]) -> dict[str, str]:
    labels: dict[str, str] = {}
    with path.open("rb") as stream:
        for name, offset, length, fault in members:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in LABELS and not fault and length <= LARGEST_LABEL:
                label = _read_label(stream, offset, length, suffix)
                if label is not None:
                    labels.setdefault(_strip_suffix(name), label)
    return labels


def _read_label(stream: IO[bytes], offset: int, length: int, suffix: str) -> str | None:
    stream.seek(offset)
    try:
        text = stream.read(length).decode("utf-8-sig").strip()
        if suffix == ".json":
            value = json.loads(text)
            found = [value[key] for key in KEYS if value.get(key) is not None]
            return read_field(found[0]) if found else None
        return read_field(text)
    except (ValueError, AttributeError, RecursionError):
        return None
