"""One image of an archive, before it is read."""

from __future__ import annotations

from dataclasses import dataclass

LARGEST_MEMBER = 256 << 20
"""Most bytes of an image inside an archive."""


@dataclass(frozen=True)
class Member:
    """An image of an archive.

    name : its name inside, unique.
    identity : the person, where the archive says so.
    fault : why it must not be read, or empty.
    frame : its number in a video; None for other images.
    """

    name: str
    identity: str | None = None
    fault: str = ""
    frame: int | None = None
