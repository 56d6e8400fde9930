"""Are there enough labelled images to train a mediator on, or does the committee vote?

The contract:
- Enters: the identities of the labelled rows. Leaves: a reason why they are too few, or "".
- What counts is people with several images: a person with one image gives no positive pair.

Source: ours; the numbers are measured, see `LEAST_PEOPLE` and `LEAST_IMAGES`.
"""

from __future__ import annotations

import numpy as np

from cdp.errors import DataError

LEAST_PEOPLE = 5
"""Labelled people with two images or more; a mediator is validated on as many folds of them."""
LEAST_IMAGES = 3.0
"""Images that these people have on average. On a synthetic set of people of four images or one,
pairwise F was .04 to .11 with two images each, .83 to .88 with three, and .65 to .71 of clusters of
votes (three draws). Where the unlabelled people have more, more are needed
(`cdp.mediator.person_sizes`)."""
ESTIMATE_IMAGES = 4.0
"""Images that they have on average, below which no quality is estimated: with three of each, on the
same set, F was stated as .79 to .85, and precision 3 to 12 points too high."""
FEW_PEOPLE = 24
"""People below which no quality is estimated. With 20 people of 8 images each, and a synthetic set
of many people of four images or one, F was .77 to .85 and stated as .84 to .86 in three of six
draws (withheld in three), .62 and stated as .87 in a seventh; with 30 .77 and .82, stated as .83
and .86 in two. With 20 people of all their images of LFW the precision was off by .02."""

REACH = 20
"""Times the images of the largest labelled person that a cluster may have. At 10 times the estimate
held (LFW, one person of 527 images beside labelled ones of up to 52); at 60 times (8 images a
person) recall was .2 where .9 was estimated."""

FEW_IMAGES, MOST_TIMES = 300, 20
"""Labelled images, of people with several, that are too few for an unlabelled set so many times as
large. Of LFW (11,472 images) 108 and 196 of 20 and 40 people gave F .31 and .35, where .82 and .78
were estimated, and 397 of 80 people .99; clusters of votes gave .97."""


class ShortageError(DataError):
    """No mediator can be trained on these labelled images; the committee can vote instead."""


def describe_shortage(identity: np.ndarray) -> str:
    """Why these labelled rows cannot train a mediator; "" where they can.

    Parameters
    ----------
    identity : (n,) integers or names, of the labelled rows; n may be 0.
    """
    size = np.unique(np.asarray(identity), return_counts=True)[1]
    several = size[size >= 2]
    if len(several) < LEAST_PEOPLE:
        return (
            f"{_count_people(len(size))}, {len(several)} of them with two images or more, "
            f"cannot train a mediator, which needs {LEAST_PEOPLE} such people"
        )
    if several.mean() < LEAST_IMAGES:
        return (
            f"{_count_people(len(several))} with {several.mean():.1f} images each cannot train a "
            f"mediator, which needs {LEAST_IMAGES:.0f} images of each on average"
        )
    return ""


def describe_imbalance(identity: np.ndarray, unlabelled_count: int) -> str:
    """Why labelled rows are too few for so many unlabelled ones; "" where they are not.

    Parameters
    ----------
    identity : (n,) integers or names, of the labelled rows. unlabelled_count : of the others.
    """
    size = np.unique(np.asarray(identity), return_counts=True)[1]
    images = int(size[size >= 2].sum())
    if images >= FEW_IMAGES or unlabelled_count <= MOST_TIMES * images:
        return ""
    return (
        f"{images} labelled images of people with several are too few to train a mediator for "
        f"{unlabelled_count:,} unlabelled ones, which needs {FEW_IMAGES}"
    )


def describe_few_people(identity: np.ndarray) -> str:
    """Why labelled rows that train a mediator are too few to estimate its quality on, or ""."""
    several = int((np.unique(np.asarray(identity), return_counts=True)[1] >= 2).sum())
    if several >= FEW_PEOPLE:
        return ""
    return (
        f"{_count_people(several)} with several images cannot measure the quality of the clusters, "
        f"which needs {FEW_PEOPLE}"
    )


def describe_few_images(identity: np.ndarray) -> str:
    """Why the rows that trained a mediator have too few images a person for an estimate, or ""."""
    size = np.unique(np.asarray(identity), return_counts=True)[1]
    several = size[size >= 2]
    if several.mean() >= ESTIMATE_IMAGES:
        return ""
    return (
        f"people with {several.mean():.1f} images each cannot measure the quality of the clusters, "
        f"which needs {ESTIMATE_IMAGES:.0f} images of each on average"
    )


def describe_reach(largest_labelled: int, largest_cluster: int) -> str:
    """Why nothing labelled shows how well so large a cluster is found; "" where something does.

    largest_labelled : images of the labelled person with most. largest_cluster : rows.
    """
    if largest_cluster <= REACH * largest_labelled:
        return ""
    return (
        f"the largest cluster has {largest_cluster:,} images and no labelled person more than "
        f"{largest_labelled:,}: how well people of so many images are found was measured on nobody"
    )


def _count_people(count: int) -> str:
    return f"{count} labelled {'person' if count == 1 else 'people'}"
