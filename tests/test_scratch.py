"""Large arrays: mapped, usable, and gone with their last reference."""

from __future__ import annotations

import numpy as np

from cdp.arrays import scratch


def test_small_ones_are_held_and_large_ones_mapped(monkeypatch, tmp_path):
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    assert not isinstance(scratch.allocate((3, 4)), np.memmap)
    monkeypatch.setattr(scratch, "HELD_BYTES", 1000)
    array = scratch.allocate((100, 7), np.int64)
    assert isinstance(array, np.memmap)
    array[:] = np.arange(7)
    assert array.sum() == 2100
    assert list(tmp_path.iterdir()) == []
