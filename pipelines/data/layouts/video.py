"""Videos: each frame an image, decoded by PyAV (`cdp[video]`) where it is read.

The contract:
- A frame's name is its number from 0, eight digits, and `.bmp`; frames are numbered as they are
  shown. Listing decodes the video once; reading goes on from the frame read before.
- A video that ends in the middle or is broken there gives the frames up to that place and one
  member with the fault. Without PyAV a video is one member with that fault.
- Sound, subtitles and further streams are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from cdp.errors import BackendError, DataError
from pipelines.data.layouts.member import Member

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts")
MOST_PIXELS = 100_000_000
"""Of a frame, width x height."""
_ENDED_EARLY = 0.97
"""Share of the frames that the video announces which must come: containers round durations."""


def list_members(path: Path) -> Iterator[Member]:
    """Every frame of the video."""
    number = 0
    try:
        with _open(path) as container:
            announced = _count_announced(container)
            for _ in container.decode(video=0):
                yield Member(f"{number:08d}.bmp", frame=number)
                number += 1
    except BackendError as error:
        yield Member("frames", fault=str(error))
        return
    except Exception as error:  # FFmpeg raises many kinds on a broken file
        reason = getattr(error, "strerror", None) or str(error)[:80] or type(error).__name__
        fault = f"the video cannot be read from frame {number} on: {reason}"
        yield Member(f"end ({number})", fault=fault)
        return
    if number < _ENDED_EARLY * announced - 1:
        fault = f"the video ends at frame {number} of about {announced}; the rest is missing"
        yield Member(f"end ({number})", fault=fault)


def read_member(path: Path, name: str) -> bytes:
    """One frame as a BMP file."""
    found = path.stat()
    reader = _open_reader(path, found.st_size, found.st_mtime_ns)
    stem = name.removesuffix(".bmp")
    if not stem.isdigit():
        raise DataError(f"{path.name} has no frame {name}")
    stream = BytesIO()
    reader.read(int(stem)).save(stream, "BMP")
    return stream.getvalue()


class _Reader:
    """Frames of one video by number; forward without decoding any twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.container: Any = None
        self.next = 0

    def read(self, number: int) -> Image.Image:
        try:
            if self.container is None or number < self.next:
                self._rewind()
            for frame in self.frames:
                self.next += 1
                if self.next > number:
                    image: Image.Image = frame.to_image()
                    return image
        except BackendError:
            raise
        except Exception as error:
            self.container = None
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise DataError(f"{self.path.name}: frame {number} cannot be read: {reason}") from error
        self.container = None
        raise DataError(f"{self.path.name} ends before frame {number}")

    def _rewind(self) -> None:
        if self.container is not None:
            self.container.close()
        self.container, self.next = _open(self.path), 0
        self.frames = self.container.decode(video=0)


@lru_cache(maxsize=2)
def _open_reader(path: Path, size: int, _changed: int) -> _Reader:
    return _Reader(path)


def _open(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise BackendError(
            f"{path.name} is a video, and PyAV is not installed. pip install 'cdp[video]'"
        ) from error
    container = av.open(str(path), metadata_errors="ignore")
    if not container.streams.video:
        raise ValueError("it has no picture")
    context = container.streams.video[0].codec_context
    if context.width * context.height > MOST_PIXELS:
        raise ValueError(f"too large: frames of {context.width} x {context.height} px")
    return container


def _count_announced(container: Any) -> int:
    """Frames by the header; 0 where it says nothing."""
    stream = container.streams.video[0]
    if stream.frames:
        return int(stream.frames)
    if container.duration and stream.average_rate:
        return int(container.duration / 1e6 * float(stream.average_rate))
    return 0
