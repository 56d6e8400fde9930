"""Weighted two-way KL consistency (Zhao et al. 2022): the parts of a neck decide alike.

Source: that parts agree by a weighted KL divergence in both directions, weighed by the concept
branch, is the paper's, of which the abstract and summaries could be read. Ours: its form, and the
entropy that keeps the weights apart from 0 and 1.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from cdp.errors import ConfigError
from cdp.models.auxiliary.auxiliary import Auxiliary, Seen
from cdp.models.heads import score_quietly


class ConsistencyLoss(Auxiliary):
    """Mean over ordered pairs of parts of w_i KL(p_i | p_j), p_i held fixed.

    p_i are the probabilities that the head gives to part i, w_i the part's weight: the less
    informed parts follow the more informed.

    entropy : float
        Factor on the entropy of the weights, which is subtracted.
    """

    neck: ClassVar[str | None] = "subdecisions"

    def __init__(self, embedding_dim: int, identity_count: int, *, entropy: float = 0.01) -> None:
        super().__init__(embedding_dim, identity_count)
        if not entropy >= 0:
            raise ConfigError(f"entropy of 0 or above expected, got {entropy}")
        self.entropy = entropy

    def judge(self, seen: Seen) -> Tensor:
        assert seen.parts is not None
        assert seen.part_weight is not None
        assert seen.head is not None
        count, parts, _ = seen.parts.shape
        logits = score_quietly(
            seen.head, seen.parts.flatten(0, 1), seen.label.repeat_interleave(parts)
        ).logits
        log_probability = logits.log_softmax(1).reshape(count, parts, -1)
        weight = seen.part_weight
        total = weigh_divergence(log_probability, weight)
        spread = -(weight * weight.clamp(min=1e-12).log()).sum(1)
        return total - self.entropy * spread


def measure_divergence(log_probability: Tensor) -> Tensor:
    """KL(p_i | p_j) of all parts, (b, k, c) to (b, k, k); p_i carries no gradient."""
    fixed = log_probability.detach()
    own = (fixed.exp() * fixed).sum(2)
    return own[:, :, None] - torch.einsum("bic,bjc->bij", fixed.exp(), log_probability)


def weigh_divergence(log_probability: Tensor, weight: Tensor) -> Tensor:
    """Mean over ordered pairs i != j of w_i KL(p_i | p_j): (b, k, c), (b, k) to (b,)."""
    parts = log_probability.shape[1]
    divergence = measure_divergence(log_probability)  # 0 on the diagonal in value
    apart = 1 - torch.eye(parts, device=weight.device, dtype=divergence.dtype)
    return (weight[:, :, None] * divergence * apart).sum((1, 2)) / (parts * (parts - 1))
