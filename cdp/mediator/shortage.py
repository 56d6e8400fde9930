"""Are there enough labelled people to train a mediator on, or does the committee vote?

The contract:
- Enters: the identities of the labelled rows. Leaves: a reason why they are too few, or "".
- What counts is people with several images: a person with one image gives no positive pair.

Source: ours; the number is measured, see `LEAST_PEOPLE`.
"""

from __future__ import annotations

import numpy as np

from cdp.errors import DataError

LEAST_PEOPLE = 10
"""Labelled people with two images or more, below which voting was better than a mediator."""


class ShortageError(DataError):
    """The labelled images are too few to train a mediator on; the committee can vote."""


def describe_shortage(identity: np.ndarray) -> str:
    """Why these labelled rows cannot train a mediator; "" where they can.

    Parameters
    ----------
    identity : (n,) integers or names, of the labelled rows; n may be 0.
    """
    size = np.unique(np.asarray(identity), return_counts=True)[1]
    several = int((size >= 2).sum())
    if several >= LEAST_PEOPLE:
        return ""
    return (
        f"{len(size)} labelled {'person' if len(size) == 1 else 'people'}, {several} of them with "
        f"two images or more, are too few to train a mediator on (at least {LEAST_PEOPLE} needed)"
    )
