"""Classification heads by name.

The contract:
- `HEADS` lists every head; `build_head` is the one way to make one.
- Parameters are passed by name and carry their unit where it is not plain (`margin_rad`).
- Building is deterministic given `seed` and leaves torch's random state as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cdp.errors import ConfigError
from cdp.models.heads.adaface import AdaFaceHead
from cdp.models.heads.arcface import ArcFaceHead
from cdp.models.heads.ccl import CentralizedHead
from cdp.models.heads.cosface import CosFaceHead
from cdp.models.heads.domain_balance import DomainBalanceHead
from cdp.models.heads.head import CosineHead, Head, HeadOutput, default_scale, score_quietly
from cdp.models.heads.l2softmax import L2SoftmaxHead
from cdp.models.heads.largemargin import LargeMarginHead
from cdp.models.heads.normface import NormFaceHead
from cdp.models.heads.sampled import SampledHead
from cdp.models.heads.softmax import SoftmaxHead
from cdp.models.heads.sphereface import SphereFaceHead
from cdp.models.heads.subspheres import SubspheresHead

__all__ = [
    "HEADS",
    "CosineHead",
    "DomainBalanceHead",
    "Head",
    "HeadOutput",
    "SampledHead",
    "build_head",
    "check_params",
    "default_scale",
    "score_quietly",
]

HEADS: dict[str, type[Head]] = {
    "adaface": AdaFaceHead,
    "arcface": ArcFaceHead,
    "ccl": CentralizedHead,
    "cosface": CosFaceHead,
    "domain_balance": DomainBalanceHead,
    "l2softmax": L2SoftmaxHead,
    "largemargin": LargeMarginHead,
    "normface": NormFaceHead,
    "softmax": SoftmaxHead,
    "sphereface": SphereFaceHead,
    "subspheres": SubspheresHead,
}
"""Head name -> class, called with (embedding_dim, identity_count, **params)."""


def check_params(title: str, kind: type, params: Mapping[str, Any]) -> None:
    """`ConfigError` when `kind` takes no keyword of one of these names."""
    signature = inspect.signature(kind.__init__)  # type: ignore[misc]
    known = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise ConfigError(
            f"{title} has no parameter {', '.join(unknown)}; it has: {', '.join(known) or 'none'}"
        )


def build_head(
    name: str,
    embedding_dim: int,
    identity_count: int,
    *,
    seed: int = 0,
    sampled_classes: int | None = None,
    memories: Sequence[str] = ("momentum_buffer",),
    **params: Any,
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
    sampled_classes : int or None
        Identities a training step looks at (see `SampledHead`); None, or a number that reaches
        `identity_count`, looks at all. For heads on the unit sphere.
    memories : sequence of str
        As `SampledHead`; follows from the optimizer.
    **params
        The head's own, see its class: `scale`, `margin`, `margin_rad`, ...

    Raises
    ------
    ConfigError
        An unknown name or parameter, or a value out of range.
    """
    if name not in HEADS:
        raise ConfigError(f"unknown head {name!r}; choose one of: {', '.join(HEADS)}")
    check_params(f"head {name}", HEADS[name], params)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if sampled_classes is None or sampled_classes >= identity_count:
            return HEADS[name](embedding_dim, identity_count, **params)
        if not HEADS[name].can_be_sampled:
            spherical = [key for key, kind in HEADS.items() if kind.can_be_sampled]
            raise ConfigError(
                f"head {name} cannot be sampled; these can: {', '.join(spherical)}. Leave "
                "sampled_classes out, or choose one of them"
            )
        # The scale belongs to the number of identities, not to the sample's.
        scaled = {**params, "scale": params.get("scale") or default_scale(identity_count)}
        inner = HEADS[name](embedding_dim, sampled_classes, **scaled)
        assert isinstance(inner, CosineHead)
        return SampledHead(inner, identity_count, seed=seed, memories=memories)
