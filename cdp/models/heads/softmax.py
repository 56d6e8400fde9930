"""Linear softmax head: no sphere, no margin. The baseline."""

from __future__ import annotations

from torch import Tensor, nn

from cdp.models.heads.head import Head, HeadOutput, judge_logits


class SoftmaxHead(Head):
    """Cross-entropy over `weight @ embedding + bias`."""

    def __init__(self, embedding_dim: int, identity_count: int) -> None:
        super().__init__(embedding_dim, identity_count)
        self.linear = nn.Linear(embedding_dim, identity_count)
        nn.init.normal_(self.linear.weight, std=0.1 * embedding_dim**-0.5)
        nn.init.zeros_(self.linear.bias)

    def score(self, embedding: Tensor, label: Tensor, masked: Tensor | None = None) -> HeadOutput:
        logits = self.linear(embedding)
        return HeadOutput(judge_logits(logits, label, masked), logits)
