"""How a model is trained: `TrainingPlan`, the device and the precision."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cdp.errors import BackendError, ConfigError
from cdp.images.degradation import DEGRADATIONS, Degradation

State = dict[str, Tensor]

HISTORY = ("epoch", "step", "loss", "learning_rate", "accuracy", "seconds")
"""Keys of a history record: epochs and steps finished (from 1), the epoch's mean loss, its last
learning rate, its accuracy on the (degraded) training images in 0..1, its wall time."""

OPTIMIZERS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}
"""Optimizer name -> what it remembers of each parameter (see `SampledHead`)."""


@dataclass(frozen=True)
class TrainingPlan:
    """How to train. The defaults suit ten epochs or so over some thousands of small faces."""

    epochs: int = 10
    batch_size: int = 32
    """Images a step, all branches together."""
    optimizer: str = "sgd"
    """A key of `OPTIMIZERS`: "sgd" with Nesterov momentum, or "adamw", betas (momentum, .999)."""
    learning_rate: float = 0.1
    """Its peak: reached linearly over the warm-up, left along a half cosine to 0."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """On matrices and kernels; vectors (normalisations, biases) go free."""
    warmup_epochs: float = 1.0
    margin_warmup_epochs: float = 2.0
    """Over which the heads' margins grow from 0 to full."""
    gradient_clip: float | None = 5.0
    """Largest 2-norm of the gradient; None leaves it."""
    ema_decay: float | None = None
    """When given, the backbone ends with the exponential moving average of its weights."""
    distil_weight: float = 1.0
    """Of the distance to the teacher, `1 - cosine`, where branches have one."""
    class_weight: float = 1.0
    """Of the heads' loss; with 0 they are not asked."""
    degradation: Degradation = field(default_factory=lambda: DEGRADATIONS["none"])
    flip: bool = True
    """Mirror every other image."""
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
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate above 0 expected, got {self.learning_rate}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"ema_decay between 0 and 1 expected, got {self.ema_decay}")


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" to the GPU where there is one, else the CPU; a name to its device.

    Raises
    ------
    BackendError
        The device asked for is not there.
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
