"""Promotion of underrepresented classes (Guo and Zhang 2017): longer vectors of rare classes.

Source: the squared norms of rare classes' vectors come near the mean of the other classes'. Read:
others' summaries of the term, without its constants. Ours: that 2 images or fewer make a class
rare, where the paper has one image of some classes; the weight is not checked. It is for heads
whose class vectors have a length, `softmax` and `l2softmax`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdp.errors import ConfigError
from cdp.models.auxiliary.auxiliary import Auxiliary, Seen


class PromotionLoss(Auxiliary):
    """Mean over rare classes of (|w_k|^2 - mean of the other classes' |w|^2)^2, theirs held fixed.

    rare : int
        Images a class, at most, that make it rare.
    """

    is_rare: Tensor

    def __init__(self, embedding_dim: int, identity_count: int, *, rare: float = 2) -> None:
        super().__init__(embedding_dim, identity_count)
        self.rare = rare
        self.register_buffer("is_rare", torch.zeros(identity_count, dtype=torch.bool))

    @torch.no_grad()
    def prepare(self, label: Tensor) -> None:
        size = torch.bincount(label, minlength=self.identity_count)
        self.is_rare.copy_((size <= self.rare).to(self.is_rare.device))

    def judge(self, seen: Seen) -> Tensor:
        linear = getattr(seen.head, "linear", None)
        if not isinstance(linear, nn.Linear):
            raise ConfigError(
                "auxiliary loss promotion needs class vectors of any length: choose the head "
                "softmax or l2softmax"
            )
        total = promote(linear.weight.to(seen.embedding.dtype), self.is_rare)
        return total.expand(len(seen.embedding))


def promote(weight: Tensor, is_rare: Tensor) -> Tensor:
    """The term of class vectors (c, d), rare where (c,) bool; 0 where all or none are rare."""
    squared = weight.square().sum(1)
    rare = is_rare.to(squared.dtype)
    others = (1 - rare).sum()
    goal = (squared * (1 - rare)).sum().detach() / others.clamp(min=1)
    missed = ((squared - goal).square() * rare).sum() / rare.sum().clamp(min=1)
    return missed * (others > 0)
