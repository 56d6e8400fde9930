"""A training as plain values and arrays, the same in every process of a team."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.config import TrainingSettings


@dataclass(frozen=True)
class TrainingRequest:
    """All of a training but its arrays, in plain JSON values.

    settings : the fields of `TrainingSettings`.
    checkpoint : path of the state to go on from, or None.
    """

    name: str
    backbone: str
    width: float
    settings: dict[str, Any]
    seed: int
    pseudo_share: float | None
    distil_weight: float
    class_weight: float
    checkpoint: str | None


def train_arrays(
    request: TrainingRequest,
    arrays: Mapping[str, np.ndarray],
    device: str,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[Any, list[dict[str, float]]]:
    """Train what was requested on these arrays; result as `train_recognizer`."""
    from safetensors.torch import load_file

    from cdp.images.degradation import get_degradation
    from cdp.recognizer.fit import train_recognizer
    from cdp.training.plan import TrainingPlan
    from cdp.training.sets import MaskedNegatives, SoftTargets

    settings = TrainingSettings.model_validate(request.settings)
    plan = TrainingPlan(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        optimizer=settings.optimizer,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_epochs=settings.warmup_epochs,
        margin_warmup_epochs=settings.margin_warmup_epochs,
        gradient_clip=settings.gradient_clip,
        ema_decay=settings.ema_decay,
        distil_weight=request.distil_weight,
        class_weight=request.class_weight,
        degradation=get_degradation(settings.degradation),
        seed=request.seed,
    )
    soft = None
    if "soft_row" in arrays:
        soft = SoftTargets(arrays["soft_row"], arrays["soft_label"], arrays["soft_weight"])
    masked = None
    if "masked_row" in arrays:
        masked = MaskedNegatives(arrays["masked_row"], arrays["masked_label"])
    return train_recognizer(
        arrays.get("images"),
        arrays.get("label"),
        arrays.get("pseudo_images"),
        arrays.get("pseudo_label"),
        confidence=arrays.get("confidence"),
        soft=soft,
        masked=masked,
        teacher=arrays.get("teacher"),
        pseudo_teacher=arrays.get("pseudo_teacher"),
        more_images=arrays.get("more_images"),
        more_teacher=arrays.get("more_teacher"),
        share=request.pseudo_share,
        plan=plan,
        min_size=1,
        sampling=settings.sampling,
        images_per_identity=settings.images_per_identity,
        backbone=request.backbone,
        width=request.width,
        input_px=settings.input_px,
        embedding_dim=settings.embedding_dim,
        head=settings.head,
        head_params=settings.head_options,
        auxiliaries=settings.auxiliary,
        sampled_classes=settings.sampled_classes,
        device=device,
        resume=None if request.checkpoint is None else load_file(request.checkpoint),
        on_epoch=on_epoch,
        description=request.name,
    )
