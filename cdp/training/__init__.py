"""Training of one model on one or two labelled sets."""

from cdp.training.loop import train_model
from cdp.training.plan import (
    HISTORY,
    OPTIMIZERS,
    State,
    TrainingPlan,
    resolve_device,
    resolve_precision,
)
from cdp.training.sets import Branch, FaceRows, MaskedNegatives, Sampling, SoftTargets

__all__ = [
    "HISTORY",
    "OPTIMIZERS",
    "Branch",
    "FaceRows",
    "MaskedNegatives",
    "Sampling",
    "SoftTargets",
    "State",
    "TrainingPlan",
    "resolve_device",
    "resolve_precision",
    "train_model",
]
