"""The plan of a training: `TrainingPlan` with its schedules, the device and the precision.

The contract:
- A plan is frozen and says all about a training but its data, its network and its device.
- The schedules (learning rate, margin) are functions of the step and the plan alone.
- A value out of range is a `ConfigError` when the plan is made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from cdp.errors import BackendError, ConfigError
from cdp.images.degradation import DEGRADATIONS, Degradation

State = dict[str, Tensor]
Sampling = Literal["image", "identity", "reversed", "bilateral"]
SAMPLINGS = get_args(Sampling)

HISTORY = ("epoch", "step", "loss", "learning_rate", "accuracy", "seconds")
"""Keys of a history record: epochs and steps finished (from 1), the epoch's mean loss, its last
learning rate, its accuracy on the (degraded) training images in 0..1, its wall time."""

OPTIMIZERS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}
"""Optimizer name -> its tensors of the shape of a parameter (see `SampledHead`)."""


@dataclass(frozen=True)
class TrainingPlan:
    """How to train. The defaults suit ten epochs or so over some thousands of small faces."""

    epochs: int = 10
    batch_size: int = 32
    """Images a step, all training sets together."""
    optimizer: str = "sgd"
    """A key of `OPTIMIZERS`: "sgd" with Nesterov momentum, or "adamw", betas (momentum, .999)."""
    learning_rate: float = 0.1
    """The peak: reached linearly over the warm-up, then lowered along a half cosine to 0."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """On matrices and kernels; not on vectors (normalisations, biases)."""
    warmup_epochs: float = 1.0
    margin_warmup_epochs: float = 2.0
    """Epochs over which the heads' margins grow from 0 to full."""
    gradient_clip: float | None = 5.0
    """Largest 2-norm of the gradient; None clips nothing."""
    ema_decay: float | None = None
    """When given, the backbone ends with the exponential moving average of its weights."""
    distil_weight: float = 1.0
    """Weight of the distance to the teacher, `1 - cosine`, of the images that have one."""
    class_weight: float = 1.0
    """Weight of the heads' loss; with 0 the heads are not trained."""
    degradation: Degradation = field(default_factory=lambda: DEGRADATIONS["none"])
    flip: bool = True
    """Mirror every other image."""
    sampling: Sampling = "image"
    """"image": each image once a pass. "identity": each identity `images_per_identity` times a
    pass, however many images it has, against the long tail (Zhang et al. 2017). "reversed": an
    identity of half the images is drawn twice as often (Zhou et al. 2020, BBN, section 3.2).
    "bilateral": half of each batch by image, half reversed, mixed as BBN does (section 3.3)."""
    images_per_identity: int = 1
    """Images of one identity in a row, with sampling by identity; losses that compare images of one
    identity within a batch need 2 or more."""
    precision: str = "auto"
    """"float32", "bfloat16", or "auto": bfloat16 where the hardware computes with it."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer: sgd or adamw expected, got {self.optimizer!r}")
        if not self.distil_weight >= 0:
            raise ConfigError(f"distil_weight of 0 or above expected, got {self.distil_weight}")
        if not self.class_weight >= 0:
            raise ConfigError(f"class_weight of 0 or above expected, got {self.class_weight}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(
                f"precision: auto, float32 or bfloat16 expected, got {self.precision!r}"
            )
        if self.epochs < 1 or self.batch_size < 2:
            raise ConfigError(
                f"epochs of 1 or more and batches of 2 or more expected, got {self.epochs} and "
                f"{self.batch_size}"
            )
        if self.sampling not in SAMPLINGS or self.images_per_identity < 1:
            raise ConfigError(
                f"sampling of {', '.join(SAMPLINGS)}, of 1 image an identity or more, expected, "
                f"got {self.sampling!r} and {self.images_per_identity}"
            )
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate above 0 expected, got {self.learning_rate}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"ema_decay between 0 and 1 expected, got {self.ema_decay}")

    def learning_rate_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, from 0."""
        total = self.epochs * steps_per_epoch
        warmup = self.warmup_epochs * steps_per_epoch
        rising = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
        done = max(0.0, step - warmup) / max(1.0, total - warmup)
        return self.learning_rate * rising * 0.5 * (1 + math.cos(math.pi * done))

    def usual_share_at(self, step: int, steps_per_epoch: int) -> float:
        """BBN's alpha: the share of the usual order, 1 - (epochs done / epochs)^2.

        The authors' code has the same, but for 90 and 180 epochs, where it divides by 100 and 200.
        """
        return 1 - (step // steps_per_epoch / self.epochs) ** 2

    @property
    def mean_usual_share(self) -> float:
        """The mean of `usual_share_at` over the training."""
        return sum(self.usual_share_at(epoch, 1) for epoch in range(self.epochs)) / self.epochs

    def margin_share_at(self, step: int, steps_per_epoch: int) -> float:
        """The share of the heads' margins in a step, in 0..1."""
        length = self.margin_warmup_epochs * steps_per_epoch
        return min(1.0, step / length) if length > 0 else 1.0


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" to the GPU where there is one, else the CPU; a name to its device.

    Raises
    ------
    BackendError
        This machine has no such device.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise BackendError(
            f"device {str(device)!r} is not usable here ({str(error).splitlines()[0]}); "
            "choose cpu or auto"
        ) from error
    return resolved


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """ "auto" to bfloat16 where the hardware has it; emulated it is ten times slower."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = device.type == "cpu" and any(
                getattr(torch.cpu, name, lambda: False)()
                for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            )
        return torch.bfloat16 if native else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
