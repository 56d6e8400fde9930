"""Files below a data root: which are read, which are left out, and why.

The contract:
- Every file below a folder is listed, in a stable order, with a fault where it must not be opened.
- A file has one path below the root, whichever way the folder is spelt (`join_path`).
- A path stays inside the root. A link out of it, or to a folder, is followed only with `links`.
- Hidden files, and the folders in which servers and desktops keep thumbnails, deleted files and
  snapshots, are left out: one row a folder, whose fault begins with `LEFT_OUT`.
- A file whose name does not end like an image is listed by its first bytes.
"""

from __future__ import annotations

import os
import posixpath
import stat
from pathlib import Path

from cdp.errors import DataError

IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".avif", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".gif", ".jp2", ".j2k",
}  # fmt: skip
LEFT_OUT = "left out: "
"""How the fault of a file begins that no change of which makes another data set."""
WAY_OUT = "its path leads out of the data root; paths must stay in"
LINKS_HINT = "; `allow_links: true` in the manifest follows links"
SERVICE_FOLDERS = {
    "@eadir", "@recycle", "@recently-snapshot", "@tmp", "@sharebin", "@synoresource", "#recycle",
    "#snapshot", "~snapshot", "$recycle.bin", "recycler", "recycled", "system volume information",
    "lost+found", "found.000", "__macosx", "network trash folder", "temporary items",
}  # fmt: skip
"""Folders of file servers and desktops, in lower case."""
SERVICE_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db"}
RAW_SUFFIXES = {
    ".3fr", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw",
}  # fmt: skip
"""A camera's own files; many begin like TIFF, and a reader of TIFF finds a thumbnail in them."""


def clean_folder(folder: str) -> str:
    """One spelling of a folder: `staff/` and `./staff` are `staff`, `./` is `.`.

    `..` stays, since a link may lie before it; an empty path stays empty.
    """
    parts = [part for part in folder.split("/") if part not in ("", ".")]
    clean = "/".join(parts)
    return f"/{clean}" if folder.startswith("/") else clean or ("." if folder else "")


def join_path(folder: str, path: str) -> str:
    """The path below the data root of a file that is named by its path below a folder."""
    clean = clean_folder(folder)
    return path if clean == "." else posixpath.join(clean, path)


def locate(root: Path, path: str, *, links: bool = False) -> Path:
    """An existing or future path below the root; DataError when it would leave it.

    links : links are followed wherever they lead; the path as written must still stay inside.
    """
    place = Path(os.path.normpath(root / path)) if links else (root / path).resolve()
    if os.path.isabs(path) or not place.is_relative_to(root):
        hint = LINKS_HINT if (root / path).exists() else ""
        raise DataError(f"{path!r} leads out of the data root {root}; paths must stay in{hint}")
    return place


def find_fault(root: Path, path: str, *, links: bool = False) -> str:
    """Why a path below the root must not be opened, or an empty string."""
    try:
        path.encode()
        place = os.path.join(root, path)
        mode = os.lstat(place).st_mode
        if stat.S_ISLNK(mode):
            mode = locate(root, path, links=links).stat().st_mode
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        return f"cannot be read: {getattr(error, 'strerror', None) or 'links in a circle'}"
    except DataError:  # the reason names no path: many files have it, and are counted by it
        return f"{WAY_OUT}{LINKS_HINT if os.path.exists(place) else ''}"
    return "" if stat.S_ISREG(mode) else "a folder, pipe or device, no file"


def walk_folder(
    root: Path, folder: str, *, any_suffix: bool = False, links: bool = False
) -> list[tuple[str, str]]:
    """(path relative to the folder, fault or "") of everything below it, in a stable order.

    any_suffix : list every file, whatever its name and content.
    """
    place = locate(root, folder, links=links)
    found: list[tuple[str, str]] = []

    def add(directory: str, name: str, fault: str) -> None:
        found.append((os.path.relpath(os.path.join(directory, name), place), fault))

    def add_fault(error: OSError) -> None:
        add(error.filename, "", f"a folder that cannot be listed: {error.strerror}")

    entered: set[tuple[int, int]] = set()
    for directory, folders, files in os.walk(place, onerror=add_fault, followlinks=links):
        if links and _was_entered(directory, entered):
            folders.clear()
            add(directory, "", "a link to a folder that was listed already")
            continue
        folders.sort()
        for name in list(folders):
            reason = _leave_out_folder(name)
            if reason:
                folders.remove(name)
                add(directory, name, reason)
            elif not links and os.path.islink(os.path.join(directory, name)):
                add(directory, name, "a link to a folder; `allow_links: true` in the manifest "
                    "follows it")  # fmt: skip
        for name in sorted(files):
            path = os.path.relpath(os.path.join(directory, name), root)
            fault = _leave_out_file(name) or find_fault(root, path, links=links)
            if not fault and not any_suffix:
                fault = _find_other_content(os.path.join(directory, name))
            add(directory, name, fault)
    return found


def _was_entered(directory: str, entered: set[tuple[int, int]]) -> bool:
    found = os.stat(directory)
    key = (found.st_dev, found.st_ino)
    if key in entered:
        return True
    entered.add(key)
    return False


def _leave_out_folder(name: str) -> str:
    if name.casefold() in SERVICE_FOLDERS:
        return f"{LEFT_OUT}a folder in which a server or desktop keeps files of its own"
    return f"{LEFT_OUT}a hidden folder" if name.startswith(".") else ""


def _leave_out_file(name: str) -> str:
    if name.casefold() in SERVICE_FILES:
        return f"{LEFT_OUT}a file of the desktop"
    return f"{LEFT_OUT}a hidden file" if name.startswith(".") else ""


def _find_other_content(path: str) -> str:
    """Why a file without the suffix of an image is not read, by its first bytes."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return ""
    if suffix in RAW_SUFFIXES:
        return "a camera's raw file is not read; export it as JPEG or PNG"
    from cdp.images.decode import FORMATS, name_format
    from cdp.images.plugins import describe_format

    try:
        with open(path, "rb") as stream:
            kind = name_format(stream.read(64))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if kind is None:
        return f"{LEFT_OUT}not an image, by its first bytes"
    return describe_format(kind, FORMATS)
