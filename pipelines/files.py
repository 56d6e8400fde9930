"""Atomic files, and digests of their content.

The contract:
- A file written here appears complete under its name, or not at all; it is synced first.
- A file that cannot be written is a StageError with the path and the system's reason.
- A digest is a SHA-256 in hex; that of a JSON value does not depend on the order of its keys.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from cdp.errors import StageError

DIGEST = "digest"


def digest_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value` (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------- files


@contextmanager
def open_atomically(path: Path) -> Iterator[Path]:
    """Yield a sibling path to write to, and rename it to `path` when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    try:
        yield draft
        with draft.open("rb") as stream:
            os.fsync(stream.fileno())
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        draft.unlink(missing_ok=True)


def reserve_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
    """Create a .npy file to be mapped, with all its blocks allocated; StageError on a full disk.

    Without the allocation, a full disk would kill the process that writes to the map (SIGBUS).
    """
    try:
        np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
        with path.open("r+b") as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: Exception) -> StageError:
    reason = getattr(error, "strerror", None) or error
    return StageError(
        f"cannot write {path}: {reason}; earlier publications are untouched. Free space or "
        "correct the permissions, then run the same command again"
    )


def drop_drafts(directory: Path) -> None:
    """Delete the drafts of killed writers; call it with the directory locked."""
    for draft in directory.rglob(".*.draft-*"):
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, UTF-8."""
    with open_atomically(path) as draft:
        draft.write_text(text, encoding="utf-8")


def sync_directory(directory: Path) -> None:
    """Sync the entries of a directory, so that a rename in it survives a power failure."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -------------------------------------------------------------------------------- input files


class FileDigests:
    """SHA-256 of input files, cached by path, size, inode and modification time.

    path : the cache, JSON. rehash : ignore it.

    The digest of a file modified less than two seconds ago is not cached, so that a second edit in
    the same clock tick is noticed.
    """

    def __init__(self, path: Path, *, rehash: bool = False) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        if not rehash:
            try:
                self._known = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                self._known = {}

    def digest(self, path: Path) -> str:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_ino, stat.st_mtime_ns]
        key = os.fspath(path)
        known = self._known.get(key)
        if known is not None and known[:3] == stamp:
            return str(known[3])
        value = digest_file(path)
        if stat.st_mtime_ns < time.time_ns() - 2_000_000_000:
            self._known[key] = [*stamp, value]
            self._changed = True
        return value

    def digest_tree(self, root: Path, paths: Iterable[str]) -> str:
        """One digest over (relative path, content) of many files.

        A file that cannot be read enters with the error number instead of its content, so the
        digest changes once the file becomes readable.
        """
        total = hashlib.sha256()
        for path in sorted(paths):
            try:
                content = self.digest(root / path)
            except OSError as error:
                content = f"unreadable: {error.errno}"
            total.update(path.encode("utf-8", "surrogateescape"))
            total.update(b"\0" + content.encode() + b"\n")
        return total.hexdigest()

    def save(self) -> None:
        """Write the cache; a failure to write is ignored, as the cache only saves time."""
        if self._changed:
            try:
                write_text(self._path, json.dumps(self._known))
            except (StageError, UnicodeError):
                return
            self._changed = False


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays to one `.npz` file atomically."""
    draft = path.with_suffix(".draft")
    with draft.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
    draft.replace(path)
