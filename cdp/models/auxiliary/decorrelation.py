"""Decorrelation of variations (Shi et al. 2020, URFace): half of the parts know each variation.

Source: for each variation a random half of the sub-embeddings is trained to predict it, the other
half so that it cannot. Read: the abstract and a re-implementation of others. Ours: linear
classifiers, a reversed gradient (a re-implementation draws the other half's prediction to one half
instead), and the variations of the degradation (small, covered, noisy).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from cdp.errors import ConfigError
from cdp.models.auxiliary.auxiliary import Auxiliary, Seen, reverse_gradient

VARIATION_COUNT = 3


class DecorrelationLoss(Auxiliary):
    """Cross-entropies of each variation from one half of the parts, and from the other, reversed.

    parts : int
        K: equal slices of the embedding, 2 or more; it divides the embedding's length.
    adversary : float
        Factor on the reversed gradient's half.
    """

    sees_variations: ClassVar[bool] = True
    known_half: Tensor

    def __init__(
        self,
        embedding_dim: int,
        identity_count: int,
        *,
        parts: float = 8,
        adversary: float = 1.0,
    ) -> None:
        super().__init__(embedding_dim, identity_count)
        if parts < 2 or embedding_dim % int(parts):
            raise ConfigError(f"2 parts or more that divide {embedding_dim} expected, got {parts}")
        self.adversary = adversary
        chosen = torch.rand(VARIATION_COUNT, int(parts)).argsort(1) < int(parts) // 2
        half = chosen.repeat_interleave(embedding_dim // int(parts), 1)
        self.register_buffer("known_half", half.float())
        self.knows = nn.ModuleList(nn.Linear(embedding_dim, 1) for _ in range(VARIATION_COUNT))
        self.ignores = nn.ModuleList(nn.Linear(embedding_dim, 1) for _ in range(VARIATION_COUNT))

    def judge(self, seen: Seen) -> Tensor:
        assert seen.variation is not None
        target = seen.variation.to(seen.embedding.dtype)
        total = seen.embedding.new_zeros(len(target))
        for number in range(VARIATION_COUNT):
            half = self.known_half[number].to(seen.embedding.dtype)
            known = self.knows[number](seen.embedding * half)[:, 0]
            hidden = self.ignores[number](reverse_gradient(seen.embedding) * (1 - half))[:, 0]
            total = total + _cross_entropy(known, target[:, number])
            total = total + self.adversary * _cross_entropy(hidden, target[:, number])
        return total / VARIATION_COUNT


def _cross_entropy(logit: Tensor, target: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logit, target, reduction="none")
