"""The mediator: pair features to calibrated probabilities."""

from cdp.mediator.calibration import MediatorReport
from cdp.mediator.ensemble import Mediator
from cdp.mediator.settings import MediatorSettings

__all__ = [
    "Mediator",
    "MediatorReport",
    "MediatorSettings",
]
