"""L2-constrained softmax head (Ranjan et al. 2017): features on a sphere, classes anywhere."""

from __future__ import annotations

import math

from torch import Tensor, nn

from cdp.errors import ConfigError
from cdp.models.heads.head import Head, HeadOutput, judge_logits


class L2SoftmaxHead(Head):
    """Cross-entropy over `weight @ (radius * embedding / |embedding|) + bias`.

    radius : float or None
        Length every embedding is brought to (alpha). None: the paper's lower bound for a
        probability of .99, `log(.99 (identities - 2) / .01)`, at least 10 (ours).
    """

    def __init__(
        self, embedding_dim: int, identity_count: int, *, radius: float | None = None
    ) -> None:
        super().__init__(embedding_dim, identity_count)
        if radius is not None and not radius > 0:
            raise ConfigError(f"a head's radius must be above 0, got {radius}")
        bound = max(10.0, math.log(99 * max(identity_count - 2, 1)))
        self.radius = float(radius) if radius is not None else bound
        self.linear = nn.Linear(embedding_dim, identity_count)
        nn.init.normal_(self.linear.weight, std=embedding_dim**-0.5)
        nn.init.zeros_(self.linear.bias)

    def score(self, embedding: Tensor, label: Tensor, masked: Tensor | None = None) -> HeadOutput:
        norm = embedding.norm(dim=1, keepdim=True).clamp(min=1e-6)
        logits = self.linear(self.radius * embedding / norm)
        return HeadOutput(judge_logits(logits, label, masked), logits)
