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
from cdp.models.auxiliary.auxiliary import Auxiliary, MapLoss, Seen, Twin, TwinKind
from cdp.models.auxiliary.batch_triplet import BatchTripletLoss
from cdp.models.auxiliary.center import CenterLoss
from cdp.models.auxiliary.coco import CocoLoss
from cdp.models.auxiliary.consistency import ConsistencyLoss
from cdp.models.auxiliary.construction import ConstructionLoss
from cdp.models.auxiliary.contrastive_center import ContrastiveCenterLoss
from cdp.models.auxiliary.decorrelation import DecorrelationLoss
from cdp.models.auxiliary.domain import DomainLoss
from cdp.models.auxiliary.feature_diversity import FeatureDiversityLoss
from cdp.models.auxiliary.gate import GateLoss
from cdp.models.auxiliary.mutual_channel import MutualChannelLoss
from cdp.models.auxiliary.promotion import PromotionLoss
from cdp.models.auxiliary.range import RangeLoss
from cdp.models.auxiliary.sharp_twin import MapDistillationLoss, RelationDistillationLoss
from cdp.models.auxiliary.spatial_diversity import SpatialDiversityLoss
from cdp.models.backbone import Backbone
from cdp.models.heads import check_params

__all__ = [
    "AUXILIARIES",
    "Auxiliary",
    "MapLoss",
    "Seen",
    "Twin",
    "TwinKind",
    "build_auxiliary",
]

AUXILIARIES: dict[str, type[Auxiliary]] = {
    "angular": AngularLoss,
    "batch_triplet": BatchTripletLoss,
    "center": CenterLoss,
    "coco": CocoLoss,
    "consistency": ConsistencyLoss,
    "construction": ConstructionLoss,
    "contrastive_center": ContrastiveCenterLoss,
    "decorrelation": DecorrelationLoss,
    "domain": DomainLoss,
    "feature_diversity": FeatureDiversityLoss,
    "gate": GateLoss,
    "map_distillation": MapDistillationLoss,
    "mutual_channel": MutualChannelLoss,
    "promotion": PromotionLoss,
    "range": RangeLoss,
    "relation_distillation": RelationDistillationLoss,
    "spatial_diversity": SpatialDiversityLoss,
}
"""Name -> class, called with (embedding_dim, identity_count, **params); the map's channels and side
stand before the params of one that reads a map."""


def build_auxiliary(
    name: str,
    embedding_dim: int,
    identity_count: int,
    *,
    seed: int = 0,
    backbone: Backbone | None = None,
    **params: Any,
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
    backbone : Backbone or None
        The one it is trained with; a loss that reads a map or a neck's parts needs it.
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
    kind = AUXILIARIES[name]
    check_params(f"auxiliary loss {name}", kind, params)
    sizes = _find_sizes(name, kind, backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(embedding_dim, identity_count, *sizes, **params)


def _find_sizes(name: str, kind: type[Auxiliary], backbone: Backbone | None) -> tuple[int, ...]:
    """Channels and side of the map that a loss reads; none where it reads no map."""
    if kind.neck is not None and (backbone is None or backbone.spec.neck != kind.neck):
        got = "none" if backbone is None else repr(backbone.spec.neck)
        raise ConfigError(
            f"auxiliary loss {name} reads the neck {kind.neck!r}, got {got}; set neck: {kind.neck}"
        )
    if kind.reads is None:
        return ()
    if backbone is None:
        raise ConfigError(f"auxiliary loss {name} reads a feature map: give the backbone")
    return backbone.early_shape if kind.reads == "early_map" else backbone.map_shape
