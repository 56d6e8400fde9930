"""Clusterings to be doubted at first sight: none found, or one that holds most of the rows.

The contract:
- Enters: labels. Leaves: what is doubtful, with its likeliest causes, or "". One person can
  dominate a pile, so that doubt is a reason to look, not proof of a mistake.
- `measure_likeness` separates the causes: embeddings of random rows are nearly unrelated where a
  model was shown the right pixels of many people, and alike where it was not, or of one person.

Source: ours.
"""

from __future__ import annotations

import numpy as np

from cdp.arrays.cosine import draw_pairs
from cdp.types import UNLABELLED

MOST_ROWS = 0.5
"""Share of the rows in one cluster, above which it is said to hold most of them."""
FEW_ROWS = 30
"""Of fewer rows one cluster, or none, may well be the truth."""
ALIKE = 0.3
"""Median cosine of random rows from which on embeddings are said to be all alike. It was .02 to .11
on LFW at 24 to 12 px, .20 where seven of ten images show one person, .50 where all do."""
_SAMPLE = 20_000
"""Pairs of random rows."""

NOTHING = (
    "no cluster was found. Either the threshold is too high, or hardly any person has two images "
    "here, or the models were shown the wrong pixels (colour order, range, faces not aligned)"
)
EVERYTHING = (
    "Either one person does dominate, or the threshold is too low, or the embeddings are all alike "
    "because the models were shown the wrong pixels (colour order, range, faces not aligned)"
)


def describe_doubt(label: np.ndarray) -> str:
    """What is doubtful about a clustering as a whole, "" where nothing is.

    Parameters
    ----------
    label : (n,) int64, 0 .. clusters - 1; -1 none.
    """
    label = np.asarray(label)
    if len(label) < FEW_ROWS:
        return ""
    found = label[label != UNLABELLED]
    if not len(found):
        return NOTHING
    if holds_most_rows(label):
        largest = int(np.bincount(found).max())
        return f"one cluster holds {largest:,} of {len(label):,} images. {EVERYTHING}"
    return ""


def holds_most_rows(label: np.ndarray) -> bool:
    """Whether one cluster holds most of the rows; labels as for `describe_doubt`."""
    label = np.asarray(label)
    largest = int(np.bincount(label[label != UNLABELLED], minlength=1).max())
    return len(label) >= FEW_ROWS and largest > MOST_ROWS * len(label)


def measure_likeness(view: np.ndarray, *, seed: int = 0) -> float:
    """Median cosine of pairs of different random rows; 0 for fewer than two rows.

    Parameters
    ----------
    view : (n, d) float, unit vectors.
    seed : of the sample.
    """
    count = len(view)
    if count < 2:
        return 0.0
    one, other = draw_pairs(count, _SAMPLE, [seed, 0x616C696B])
    cosine = np.einsum("ij,ij->i", view[one], view[other], dtype=np.float64)
    return float(np.median(cosine))
