"""The base class of the losses that are added to a head.

The contract:
- One maps raw embeddings (b, d) and labels (b,) to (b,) losses; one that is defined on the batch as
  a whole gives every sample the same, so that the mean over the batch is the batch's.
- They compute in float32 whatever autocast says.
- In `eval` mode nothing is updated.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Auxiliary(nn.Module):
    """Base of all: owns the sizes."""

    def __init__(self, embedding_dim: int, identity_count: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.identity_count = identity_count

    def forward(self, embedding: Tensor, label: Tensor) -> Tensor:
        """(b, d) float and (b,) int64 in 0..identities-1 to (b,) float32."""
        with torch.autocast(embedding.device.type, enabled=False):
            return self.score(embedding.float(), label)

    def score(self, embedding: Tensor, label: Tensor) -> Tensor:
        """`forward` in float32, or in the embedding's own precision when called directly."""
        raise NotImplementedError


def mean_by_class(embedding: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means (c, d) of the c classes in a batch, each sample's class among them (b,), sizes (c,)."""
    _, place, size = torch.unique(label, return_inverse=True, return_counts=True)
    total = embedding.new_zeros(len(size), embedding.shape[1]).index_add(0, place, embedding)
    return total / size[:, None], place, size
