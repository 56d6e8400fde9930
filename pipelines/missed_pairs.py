"""Missed pairs among the facts of mediate, for every estimate of a run's labels.

The contract:
- mediate writes them at full precision. propagate, report and review read them here, so that all
  three estimate alike, and as the estimator (`cdp.clusterer`) does.
- Facts that lack them (votes, self-training) give `MissedPairs()`: nothing is known to be missed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cdp.propagation.missed_pairs import MissedPairs


def describe_missed(missed: MissedPairs) -> dict[str, Any]:
    """The facts that `read_missed` reads, bit for bit: JSON keeps every float64."""
    return {"unlisted": missed.unlisted.tolist(), "missed_log_odds": float(missed.log_odds)}


def read_missed(facts: Mapping[str, Any]) -> MissedPairs:
    """How many positive pairs the labels miss, by the facts of mediate."""
    from cdp.propagation.missed_pairs import MissedPairs

    unlisted = np.array(facts.get("unlisted", []), np.float64).reshape(-1, 2)
    return MissedPairs(unlisted, float(facts.get("missed_log_odds", 0)))
