"""Losses that are added to a head, by name.

The contract:
- `AUXILIARIES` lists every one; `build_auxiliary` is the one way to make one.
- They see raw embeddings, whose norm is near the root of the embedding's length (see
  `backbone.py`); the weight each is added with is the caller's.
- Building is deterministic given `seed` and leaves torch's random state as it was.
"""

from __future__ import annotations

from typing import Any

import torch

from cdp.errors import ConfigError
from cdp.models.auxiliary.angular import AngularLoss
from cdp.models.auxiliary.auxiliary import Auxiliary
from cdp.models.auxiliary.center import CenterLoss
from cdp.models.auxiliary.coco import CocoLoss
from cdp.models.auxiliary.contrastive_center import ContrastiveCenterLoss
from cdp.models.auxiliary.range import RangeLoss
from cdp.models.heads import check_params

__all__ = ["AUXILIARIES", "Auxiliary", "build_auxiliary"]

AUXILIARIES: dict[str, type[Auxiliary]] = {
    "angular": AngularLoss,
    "center": CenterLoss,
    "coco": CocoLoss,
    "contrastive_center": ContrastiveCenterLoss,
    "range": RangeLoss,
}
"""Name -> class, called with (embedding_dim, identity_count, **params)."""


def build_auxiliary(
    name: str, embedding_dim: int, identity_count: int, *, seed: int = 0, **params: Any
) -> Auxiliary:
    """Make a loss that is added to a head's.

    Parameters
    ----------
    name : str
        A key of `AUXILIARIES`.
    embedding_dim, identity_count : int
        Length of the embedding; number of classes.
    seed : int
        Of the initial weights, where it has any.
    **params
        The loss's own, see its class.

    Raises
    ------
    ConfigError
        An unknown name or parameter, or a value out of range.
    """
    if name not in AUXILIARIES:
        raise ConfigError(
            f"unknown auxiliary loss {name!r}; choose one of: {', '.join(AUXILIARIES)}"
        )
    check_params(f"auxiliary loss {name}", AUXILIARIES[name], params)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AUXILIARIES[name](embedding_dim, identity_count, **params)
