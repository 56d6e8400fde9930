"""Faces already cut from videos: the track and the frame that the path of each crop says.

The contract:
- A pattern is a path below the folder, without suffix: `{track}` and `{frame}` (a number), maybe
  `{clip}`, and `*` for anything; `{track}` is part of one name, `{clip}` may be several folders.
  `{clip}/{frame}_{track}` finds track b of frame 120 of door in door/000120_b.jpg.
- All of the path but the frame names the track: tracks of one name in two folders are two.
- With `{clip}` frames are counted in the clip: two tracks of one frame show two people. Without it
  frames only put a track in order.
- A file that does not fit has neither: it is an image of its own. So is the frame of a video.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace

from cdp.errors import ConfigError
from pipelines.data.manifest import Entry

FOLDERS = "*{track}/*{frame}"
"""The pattern where none is given: each folder is a track, file names end in the frame."""
_FIELDS = {
    "{track}": "(?P<track>[^/]+)",
    "{frame}": r"(?P<frame>\d{1,12})",
    "{clip}": "(?P<clip>.+)",
    "*": ".*?",
}
_FIELD = re.compile(r"(\{\w*\}|\*)")


def name_tracks(entries: Iterable[Entry], root: str, pattern: str, every: int) -> list[Entry]:
    """The entries below `root` with track, frame and clip; of a track every so many frames."""
    expression = compile_pattern(pattern)
    named = []
    for entry in entries:
        path = os.path.splitext(os.path.relpath(entry.path, root))[0].replace(os.sep, "/")
        match = expression.fullmatch(path)
        if match is None or entry.fault or entry.clip is not None:
            named.append(entry)
        elif int(match["frame"]) % every == 0:
            begin, end = match.span("frame")
            track = f"{root}:{path[:begin]}{{}}{path[end:]}"
            clip = match.groupdict().get("clip")
            clip = track if clip is None else f"{root}:{clip}"
            named.append(replace(entry, clip=clip, frame=int(match["frame"]), track=track))
    return named


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The expression of a pattern; ConfigError for one without track or frame, or other fields."""
    parts = [part for part in _FIELD.split(pattern) if part]
    fields = [part for part in parts if part.startswith("{") and part.endswith("}")]
    once = len(set(fields)) == len(fields)
    if not once or not {"{track}", "{frame}"} <= set(fields) <= set(_FIELDS):
        raise ConfigError(
            "pattern: {track} and {frame} expected once each, {clip} once or not at all, as in "
            f"'{{clip}}/{{frame}}_{{track}}' for door/000120_b.jpg; got {pattern!r}"
        )
    return re.compile("".join(_FIELDS.get(part, re.escape(part)) for part in parts), re.DOTALL)
