"""Whether labelled pictures are cleaner than the pile's: size, and appearance measure by measure.

The contract:
- Enters: `measure_appearance` of either set. Leaves: every shift, and the one number that decides.
- No label of the pile is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cdp.arrays.two_samples import MeasureShift, compare_samples
from cdp.images.appearance import APPEARANCE

GAP = 1.0
"""Shift of fine detail, in deviations, from which on the labelled pictures are cleaner. Halves of
LFW by person differ by .1; a pile reduced to 32 px of surveillance by 3."""
_DECIDING = ("detail_1", "detail_2")
"""The two finest octaves of detail."""


@dataclass(frozen=True)
class SharpnessGap:
    """How far labelled pictures and the pile lie apart.

    shifts : of each measure. sharpness : the larger shift of the two finest octaves of detail;
        positive where the labelled pictures are sharper.
    """

    shifts: tuple[MeasureShift, ...]
    sharpness: float

    @property
    def is_wide(self) -> bool:
        """Whether the labelled pictures are clearly cleaner than the pile."""
        return self.sharpness >= GAP

    def describe(self) -> str:
        """A sentence for a summary."""
        size = f"their fine detail lies {abs(self.sharpness):.1f} deviations"
        if self.is_wide:
            return f"the labelled pictures are sharper than the pile's: {size} higher"
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
    return SharpnessGap(shifts, max(fine, key=abs))
