"""Classification heads by name.

The contract:
- `HEADS` lists every head; `build_head` is the one way to make one.
- Parameters are passed by name and carry their unit where it is not plain (`margin_rad`).
- Building is deterministic given `seed` and leaves torch's random state as it was.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from cdp.errors import ConfigError
from cdp.models.heads.adaface import AdaFaceHead
from cdp.models.heads.arcface import ArcFaceHead
from cdp.models.heads.cosface import CosFaceHead
from cdp.models.heads.head import CosineHead, Head, HeadOutput, default_scale
from cdp.models.heads.normface import NormFaceHead
from cdp.models.heads.softmax import SoftmaxHead

__all__ = ["HEADS", "CosineHead", "Head", "HeadOutput", "build_head", "default_scale"]

HEADS: dict[str, type[Head]] = {
    "adaface": AdaFaceHead,
    "arcface": ArcFaceHead,
    "cosface": CosFaceHead,
    "normface": NormFaceHead,
    "softmax": SoftmaxHead,
}
"""Head name -> class, called with (embedding_dim, identity_count, **params)."""


def build_head(
    name: str, embedding_dim: int, identity_count: int, *, seed: int = 0, **params: Any
) -> Head:
    """Make a head with fresh weights.

    Parameters
    ----------
    name : str
        A key of `HEADS`.
    embedding_dim, identity_count : int
        Length of the embedding; number of classes, 2 or more.
    seed : int
        Of the initial weights.
    **params
        The head's own, see its class: `scale`, `margin`, `margin_rad`, ...

    Raises
    ------
    ConfigError
        An unknown name or parameter, or a value out of range.
    """
    if name not in HEADS:
        raise ConfigError(f"unknown head {name!r}; choose one of: {', '.join(HEADS)}")
    signature = inspect.signature(HEADS[name].__init__)
    known = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise ConfigError(
            f"head {name} has no parameter {', '.join(unknown)}; "
            f"it has: {', '.join(known) or 'none'}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HEADS[name](embedding_dim, identity_count, **params)
