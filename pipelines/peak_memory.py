"""Peak memory of a block of code: of this process and its children together, sampled."""

from __future__ import annotations

import threading

import psutil

SAMPLE_S = 0.25
"""Seconds between two samples."""


class PeakMemory:
    """A context in which memory is watched.

    peak_mib : the largest resident memory of this process and its children together, in MiB.
    """

    def __enter__(self) -> PeakMemory:
        self.peak_mib = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            total = 0
            try:
                for each in (process, *process.children(recursive=True)):
                    total += _resident_bytes(each)
            except psutil.Error:
                pass
            self.peak_mib = max(self.peak_mib, total >> 20)
            if self._stop.wait(SAMPLE_S):
                return


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
