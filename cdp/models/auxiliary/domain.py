"""Domain-adversarial loss (Ganin and Lempitsky 2015): sharp and degraded faces look alike.

Source: the reversed gradient, as SSPP-DAN (Hong et al. 2017, of which the abstract was read) uses
it for surveillance faces, and the schedule of its factor, from memory. Ours: the domains are an
image as it is degraded and the same image sharp, and the classifier is one hidden layer.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from cdp.models.auxiliary.auxiliary import Auxiliary, Seen, TwinKind, reverse_gradient


class DomainLoss(Auxiliary):
    """Cross-entropy of a classifier of the domain, its gradient reversed below the embedding.

    hidden : int
        Units of the classifier's hidden layer.
    """

    twin: ClassVar[TwinKind | None] = "sharp"

    def __init__(self, embedding_dim: int, identity_count: int, *, hidden: float = 64) -> None:
        super().__init__(embedding_dim, identity_count)
        self.classifier = nn.Sequential(
            nn.Linear(embedding_dim, int(hidden)), nn.ReLU(), nn.Linear(int(hidden), 1)
        )

    def judge(self, seen: Seen) -> Tensor:
        twin = seen.require_twin()
        strength = rise(seen.progress)
        total = seen.embedding.new_zeros(len(seen.label))
        for number, embedding in enumerate((seen.embedding, twin.embedding)):
            # The reversed gradient is scaled by the strength; the classifier's own is not.
            mixed = reverse_gradient(strength * embedding) + (1 - strength) * embedding.detach()
            logit = self.classifier(mixed)[:, 0]
            target = torch.full_like(logit, number)
            found = functional.binary_cross_entropy_with_logits(logit, target, reduction="none")
            total = total + found / 2
        return total


def rise(progress: float) -> float:
    """Factor on the reversed gradient: 0 at the start, near 1 at the end of the training."""
    return 2 / (1 + math.exp(-10 * progress)) - 1
