"""Pair scoring: pair features to calibrated probabilities that two images show one identity."""

from cdp.mediator.calibration import MediatorReport
from cdp.mediator.curriculum import JointSet
from cdp.mediator.ensemble import HeldOut, Mediator
from cdp.mediator.pair_scorer import PairScorer
from cdp.mediator.pair_voter import PairScores, PairVoter
from cdp.mediator.settings import MediatorSettings

__all__ = [
    "HeldOut",
    "JointSet",
    "Mediator",
    "MediatorReport",
    "MediatorSettings",
    "PairScorer",
    "PairScores",
    "PairVoter",
]
