"""One training as plain JSON values and named arrays, the same in every process of a team.

The contract:
- A request is JSON: it says all about a training but its images and labels.
- Face sets travel as arrays named `<role>.<field>`, or `<role>.<field>.<column>` for a table:
  `pseudo.images`, `pseudo.soft.row`. `name_arrays` and `read_face_sets` undo each other, but for
  `min_size`: the sets of a run hold only classes that are large enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.config import TrainingSettings
from pipelines.training.pretrained import Pretrained

if TYPE_CHECKING:
    from cdp.recognizer.fit import FaceSet
    from cdp.recognizer.recognizer import Recognizer

ROLES = ("labelled", "pseudo", "extra")
"""The face sets of `train_recognizer`, by the names of its parameters."""


@dataclass(frozen=True)
class TrainingRequest:
    """All of a training but its face sets, in plain JSON values.

    settings : the fields of `TrainingSettings`.
    checkpoint : path of the state to go on from, or None.
    pretrained : a packed `Pretrained`, or None for fresh weights.
    """

    name: str
    backbone: str
    width: float
    settings: dict[str, Any]
    seed: int
    pseudo_share: float | tuple[float, float] | None
    distil_weight: float
    class_weight: float
    checkpoint: str | None
    pretrained: dict[str, Any] | None = None


def train_requested(
    request: TrainingRequest,
    face_sets: Mapping[str, FaceSet],
    device: str,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[Recognizer, list[dict[str, float]]]:
    """Train what was requested on the sets of these `ROLES`; result as `train_recognizer`."""
    from safetensors.torch import load_file

    from cdp.recognizer.fit import train_recognizer

    settings = TrainingSettings.model_validate(request.settings)
    packed = request.pretrained
    return train_recognizer(
        *(face_sets.get(role) for role in ROLES),
        spec=settings.make_spec(request.backbone, request.width),
        plan=settings.make_plan(
            seed=request.seed,
            distil_weight=request.distil_weight,
            class_weight=request.class_weight,
        ),
        pretrained=None if packed is None else Pretrained.unpack(packed).open(settings),
        pseudo_share=request.pseudo_share,
        device=device,
        resume=None if request.checkpoint is None else load_file(request.checkpoint),
        on_epoch=on_epoch,
        description=request.name,
    )


def name_arrays(face_sets: Mapping[str, FaceSet]) -> dict[str, np.ndarray]:
    """Every array of some face sets by name; what a set lacks is missing."""
    found: dict[str, np.ndarray] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, np.ndarray):
            found[name] = value
        elif is_dataclass(value):
            for field in fields(value):
                collect(f"{name}.{field.name}", getattr(value, field.name))

    for role, faces in face_sets.items():
        collect(role, faces)
    return found


def read_face_sets(arrays: Mapping[str, np.ndarray]) -> dict[str, FaceSet]:
    """The face sets whose arrays `name_arrays` has named."""
    from cdp.recognizer.fit import FaceSet
    from cdp.training.sets import MaskedNegatives, SoftTargets

    tables = {"soft": SoftTargets, "masked_negatives": MaskedNegatives}
    values: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        role, field, *column = name.split(".")
        of_role = values.setdefault(role, {})
        if column:
            of_role.setdefault(field, {})[column[0]] = array
        else:
            of_role[field] = array
    return {
        role: FaceSet(
            **{name: tables[name](**value) if name in tables else value
               for name, value in of_role.items()}
        )
        for role, of_role in values.items()
    }  # fmt: skip
