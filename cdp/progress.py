"""Progress on stderr: a bar on a terminal; elsewhere one plain line each half minute.

The contract:
- On a terminal, `show_progress` draws a tqdm bar. Into a file or a pipe it writes nothing for the
  first half minute, then a line such as `train base: 120 of 700 steps, 60 s` each half minute.
- `report_elapsed` writes lines alone, such as `mediate: 90 s`; on a terminal it writes nothing.
- Where one is open inside another, the lines are about the inner one; the half minutes count from
  the start of the outer one, so that many short parts do not add up to silence.
- Both are context managers; lines come from a daemon thread that ends with the outer block.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

LINE_INTERVAL_S = 30.0

_open: list[_Lines] = []
"""The blocks that write lines now, outermost first."""


class Progress(Protocol):
    """What a loop calls while it works: tqdm's own names."""

    def update(self, n: int = 1) -> Any:
        """Count n more units as done."""

    def set_postfix(self, *, refresh: bool, **figures: Any) -> Any:
        """Show these figures behind the count, at once with `refresh`."""


def show_progress(
    total: int, *, label: str, unit: str, initial: int = 0, enabled: bool = True, leave: bool = True
) -> AbstractContextManager[Progress]:
    """Progress of a loop over `total` units.

    Parameters
    ----------
    total, initial : int
        Number of units in all, and of those that were done before.
    label, unit : str
        What is being done, and the singular of what is counted.
    enabled : bool
        False shows nothing anywhere.
    leave : bool
        Keep the finished bar on the terminal; a bar that does not stay appears after a second.
    """
    if not enabled:
        return nullcontext(_Silent())
    if not sys.stderr.isatty():
        return _Lines(label, unit, total, initial)
    from tqdm import tqdm

    bar: AbstractContextManager[Progress] = tqdm(
        total=total,
        initial=initial,
        desc=label,
        unit=unit,
        leave=leave,
        delay=0.0 if leave else 1.0,
        dynamic_ncols=True,
        mininterval=0.5,
    )
    return bar


def report_elapsed(label: str) -> AbstractContextManager[object]:
    """Say each half minute that work without a count goes on; nothing on a terminal."""
    return nullcontext() if sys.stderr.isatty() else _Lines(label)


class _Silent:
    def update(self, n: int = 1) -> None: ...

    def set_postfix(self, *, refresh: bool, **figures: Any) -> None: ...


class _Writer:
    """The thread that writes a line about the innermost open block each half minute."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_lines, daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _write_lines(self) -> None:
        while not self._ended.wait(LINE_INTERVAL_S):
            for block in _open[-1:]:
                print(block.describe(), file=sys.stderr, flush=True)


class _Lines:
    """A block of work that is reported in plain lines."""

    def __init__(
        self, label: str, unit: str = "", total: int | None = None, initial: int = 0
    ) -> None:
        self._label, self._unit, self._total, self._done = label, unit, total, initial
        self._figures: dict[str, Any] = {}
        self._writer: _Writer | None = None

    def __enter__(self) -> _Lines:
        self._started = time.monotonic()
        _open.append(self)
        if len(_open) == 1:
            self._writer = _Writer()
        return self

    def __exit__(self, *_: object) -> None:
        _open.remove(self)
        if self._writer is not None:
            self._writer.end()

    def update(self, n: int = 1) -> None:
        self._done += n

    def set_postfix(self, *, refresh: bool, **figures: Any) -> None:
        self._figures = figures

    def describe(self) -> str:
        """The line."""
        seconds = f"{time.monotonic() - self._started:.0f} s"
        if self._total is None:
            return f"{self._label}: {seconds}"
        figures = [f"{name} {value}" for name, value in self._figures.items()]
        count = f"{self._done:,} of {self._total:,} {self._unit}s"
        return f"{self._label}: {', '.join([count, *figures, seconds])}"
