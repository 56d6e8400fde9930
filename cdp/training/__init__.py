"""Training of one model on one or several training sets.

- `plan.py`: `TrainingPlan` with its schedules, device and precision
- `sets.py`: `TrainingSet`, soft targets, masked negatives
- `batches.py`: which image comes in which step, degraded, with its targets
- `loop.py`: `train_model`, the loop and its state
- `distributed.py`: several processes, the result of one
- `distillation.py`: a teacher's vectors as targets
"""

from cdp.training.loop import train_model
from cdp.training.plan import (
    HISTORY,
    OPTIMIZERS,
    Sampling,
    State,
    TrainingPlan,
    resolve_device,
    resolve_precision,
)
from cdp.training.sets import FaceRows, MaskedNegatives, SoftTargets, TrainingSet

__all__ = [
    "HISTORY",
    "OPTIMIZERS",
    "FaceRows",
    "MaskedNegatives",
    "Sampling",
    "SoftTargets",
    "State",
    "TrainingPlan",
    "TrainingSet",
    "resolve_device",
    "resolve_precision",
    "train_model",
]
