"""Whether labelled pictures are cleaner than the pile's: size, and appearance measure by measure.

The contract:
- Enters: `measure_appearance` of either set. Leaves: every shift, and the two numbers that decide.
- A labelled set may be cleaner in part: sharp photos beside pictures of the cameras themselves.
- No label of the pile is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cdp.images.appearance import APPEARANCE
from cdp.images.two_samples import MeasureShift, compare_samples

GAP = 1.0
"""Shift of fine detail, in deviations, from which on the labelled pictures are cleaner. Halves of
LFW by person differ by .1; a pile reduced to 32 px of surveillance by 3."""
SHARPER = 0.3
"""Share of the labelled pictures beyond nine tenths of the pile's, from which on they are cleaner.
It is .1 where both are alike. Of LFW, half of the labelled pictures sharp and half as the pile's at
14 to 40 px, it is .5, and pairwise F was 67.1, with the sharp half degraded 72.6, with all labels
of the pile's quality 75.0 (one draw)."""
_HIGH = 0.9
_DECIDING = ("detail_1", "detail_2")
"""The two finest octaves of detail."""


@dataclass(frozen=True)
class SharpnessGap:
    """How far labelled pictures and the pile lie apart.

    shifts : of each measure. sharpness : the larger shift of the two finest octaves of detail;
        positive where the labelled pictures are sharper. sharper : the share of the labelled
        pictures with more fine detail than nine tenths of the pile's, less two deviations of it by
        chance.
    """

    shifts: tuple[MeasureShift, ...]
    sharpness: float
    sharper: float

    @property
    def is_wide(self) -> bool:
        """Whether the labelled pictures are clearly cleaner than the pile."""
        return self.sharpness >= GAP or self.sharper >= SHARPER

    def describe(self) -> str:
        """A sentence for a summary."""
        size = f"their fine detail lies {abs(self.sharpness):.1f} deviations"
        if self.sharpness >= GAP:
            return f"the labelled pictures are sharper than the pile's: {size} higher"
        if self.is_wide:
            return (
                f"at least {self.sharper:.0%} of the labelled pictures are sharper than nine "
                "tenths of the pile's"
            )
        if self.sharpness <= -GAP:
            return f"the labelled pictures are less sharp than the pile's: {size} lower"
        return f"labelled and unlabelled pictures are alike: {size} apart"


def measure_sharpness_gap(labelled: np.ndarray, pile: np.ndarray) -> SharpnessGap:
    """Compare the appearance of labelled pictures with the pile's.

    Source: ours, by Cohen's d of each measure.

    Parameters
    ----------
    labelled, pile : (n, 14) float32, n >= 1
        From `measure_appearance`; a sample of either will do.

    Raises
    ------
    DataError
        As `compare_samples`.
    """
    shifts = compare_samples(APPEARANCE, labelled, pile)
    fine = [each.shift for each in shifts if each.measure in _DECIDING]
    one, other = (_take_detail(each) for each in (labelled, pile))
    sharper = (one > np.quantile(other, _HIGH, axis=0)).mean(axis=0).max()
    chance = np.sqrt(_HIGH * (1 - _HIGH) * (1 / len(one) + 1 / len(other)))
    return SharpnessGap(shifts, max(fine, key=abs), max(float(sharper - 2 * chance), 0.0))


def find_poor(measured: np.ndarray, pile: np.ndarray) -> np.ndarray:
    """(n,) bool: the pictures with no more fine detail than the pile's median in either octave.

    measured : (n, 14) float32, from `measure_appearance`. pile : (p, 14), p >= 1, likewise.
    """
    poor: np.ndarray = (_take_detail(measured) <= np.median(_take_detail(pile), axis=0)).all(axis=1)
    return poor


def _take_detail(measured: np.ndarray) -> np.ndarray:
    return np.asarray(measured)[:, [APPEARANCE.index(name) for name in _DECIDING]]
