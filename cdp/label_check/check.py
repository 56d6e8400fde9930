"""Which labels to believe: wrong names, people with two labels, labelled people among unlabelled.

The contract:
- Enters: the committee's vectors of labelled images, and their labels. Leaves: for each image the
  probability that its label is right and the person it seems to be, for each label the label it is
  a second one of, and a model that finds the labelled people among other images.
- Nothing is taken for granted but that most labels are right. An image's label is right, another
  labelled person's, or an unknown person's; the shares of the three are estimated with the
  likelihoods by expectation and maximisation over the images themselves. Where labels contradict
  nothing the estimated share of wrong ones is zero, and nothing changes.
- An image is compared with the centre of its label's other images, never with itself.
- With few people (`LEAST_IDENTITIES`) nothing can be estimated, and every label is believed.
- The same bits with any number of threads.

Source: ours; the idea of estimating which labels are wrong from the data itself is that of
confident learning (Northcutt, Jiang & Chuang 2021), the estimated shares of unlabelled people are
those of Saerens, Latinne & Decaestecker (2002).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cdp.arrays.cosine import make_unit
from cdp.arrays.threads import limit_blas
from cdp.label_check.people import BELIEVED, LabelledPeople
from cdp.label_check.rows import LabelledRows
from cdp.types import UNLABELLED, View, load_view

ISSUES = ("wrong_name", "second_label")
"""The kinds of issues."""
_JOINS = 3
"""Times labels are joined: with fewer people counted twice, others are seen more clearly."""
LEAST_IDENTITIES = 10
"""Labels with two images or more, below which no label is doubted."""


@dataclass(frozen=True)
class LabelCheck:
    """The result of `check_labels`.

    right : (n,) float32, the probability that each image's label is right.
    apart : (n,) bool, whether the label of each image is surely not a larger label's person.
    seems : (n,) int64, the label that fits an image best among the others; -1 where none is likely.
    seems_probability : (n,) float32, the probability that it is that person's.
    person : (n,) int64, the label that each image's label is joined to: itself, or the larger label
        of the same person. person_probability : (n,) float32, how sure that is; 1 for itself.
    wrong_share : estimated share of images with a wrong label.
    people : the model of the labelled people; None where there were too few.
    """

    right: np.ndarray
    apart: np.ndarray
    seems: np.ndarray
    seems_probability: np.ndarray
    person: np.ndarray
    person_probability: np.ndarray
    wrong_share: float
    people: LabelledPeople | None

    @property
    def believed(self) -> np.ndarray:
        """(n,) bool, the images whose labels are taken for right."""
        return self.right > BELIEVED

    @property
    def trained(self) -> np.ndarray:
        """(n,) bool, the images to train on: believed, and of labels that are surely different."""
        return self.believed & self.apart


def check_labels(views: Sequence[View], identity: np.ndarray, *, seed: int = 0) -> LabelCheck:
    """Find the labels that the images contradict.

    Parameters
    ----------
    views : one (n, d_v) array a model, the base first, or a function that loads it.
    identity : (n,) int64, the labels.
    seed : decides which other labels an image is compared with while fitting.
    """
    labels, number, size = np.unique(identity, return_inverse=True, return_counts=True)
    if (size >= 2).sum() < LEAST_IDENTITIES:
        return _believe_all(identity)
    units = [make_unit(load_view(view))[0] for view in views]
    count = len(labels)
    with limit_blas():
        person, sure = np.arange(count), np.ones(count, np.float32)
        rows = LabelledRows(units, number, count, seed)
        rows.fit()
        for _ in range(_JOINS):
            joined, joined_sure, unsure = rows.join_labels()
            if (joined == np.arange(count)).all():
                break
            sure = np.minimum(sure, joined_sure[person])
            person = joined[person]
            rows = LabelledRows(units, person[number], count, seed, rows.likelihood)
            rows.fit()
    likely = rows.other_probability > BELIEVED
    return LabelCheck(
        rows.right.astype(np.float32),
        ~unsure[rows.identity],
        np.where(likely, labels[rows.best], UNLABELLED),
        rows.other_probability.astype(np.float32),
        labels[rows.identity],
        sure[number],
        rows.wrong,
        rows.list_people(labels),
    )


def _believe_all(identity: np.ndarray) -> LabelCheck:
    count = len(identity)
    return LabelCheck(
        np.ones(count, np.float32),
        np.ones(count, bool),
        np.full(count, UNLABELLED, np.int64),
        np.zeros(count, np.float32),
        np.array(identity),
        np.ones(count, np.float32),
        0.0,
        None,
    )


def list_issues(
    check: LabelCheck | None,
    identity: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    names: np.ndarray | None = None,
) -> pd.DataFrame:
    """Every image whose label is doubted, the surest first; none without a check.

    Parameters
    ----------
    check : the result of `check_labels`.
    identity : (n,) int64, the labels that were checked.
    rows : (n,) int64, the number that each image is listed by.
    names : (labels,) name of each label.

    Returns
    -------
    DataFrame
        row; issue ("wrong_name" or "second_label"); label, the name given; seems, the name that
        fits best, None where no labelled person is likely; probability of the issue.
    """
    columns = ["row", "issue", "label", "seems", "probability"]
    if check is None or identity is None or rows is None or names is None:
        return pd.DataFrame({name: [] for name in columns})
    person = check.person
    wrong, second = ~check.believed, check.believed & (person != identity)
    listed = np.concatenate([np.flatnonzero(wrong), np.flatnonzero(second)])
    is_wrong = wrong[listed]
    seems = np.where(is_wrong, check.seems[listed], person[listed])
    probability = np.where(is_wrong, 1 - check.right[listed], check.person_probability[listed])
    found = pd.DataFrame(
        {
            "row": rows[listed],
            "issue": np.where(is_wrong, *ISSUES),
            "label": names[identity[listed]],
            "seems": [names[each] if each >= 0 else None for each in seems],
            "probability": probability,
        }
    )
    order = np.lexsort((found.row, -found.probability))
    return found.iloc[order].reset_index(drop=True)
