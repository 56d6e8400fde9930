"""Necks by name: what stands between a trunk's map and the embedding.

The contract:
- `NECKS` lists every one; `build_backbone(..., neck=NAME)` builds one in place of the family's
  ending. It is part of the backbone: saved, loaded and exported with it.
- The last layer is a batch normalisation without scale or shift, as of the endings (`backbone.py`).
- In `eval` mode nothing is drawn: two forward passes are equal.
"""

from __future__ import annotations

from cdp.models.backbone import Neck
from cdp.models.necks.balanced import BalancedNeck
from cdp.models.necks.subdecisions import SubdecisionNeck
from cdp.models.necks.trunk_branch import TrunkBranchNeck
from cdp.models.necks.twofold import TwofoldNeck

__all__ = ["NECKS"]

NECKS: dict[str, type[Neck]] = {
    "balanced": BalancedNeck,
    "subdecisions": SubdecisionNeck,
    "trunk_branch": TrunkBranchNeck,
    "twofold": TwofoldNeck,
}
"""Name -> class, called with (map_shape, early_shape, embedding_dim)."""
