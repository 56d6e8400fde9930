"""The base classes of all classification heads.

The contract:
- A head maps raw embeddings (b, d) and labels (b,) to a loss per sample and to logits, from which
  the caller takes the accuracy. Logits carry no margin.
- The embedding's direction is the identity and its norm the image's quality; a head that wants
  unit vectors normalises by itself.
- Heads compute in float32 whatever autocast says: an angle near 0 has no digits in bfloat16.
- A class that is masked for a sample is left out of the negatives of its softmax: the sample is not
  pushed away from a class it may belong to.
- `step` is all that a training loop does with a head beside the loss. It scales the margin by
  `margin_share` in [0, 1], which rises over the warm-up: random weights learn nothing from a full
  margin. Outside of a step the margin is full.
- In `eval` mode nothing depends on the rest of the batch and nothing is updated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from cdp.errors import ConfigError


class HeadOutput(NamedTuple):
    """loss : (b,) float32, one a sample. logits : (b, identities) float32, without margin."""

    loss: Tensor
    logits: Tensor


class Head(nn.Module):
    """Base of all heads: the identity count and the training step."""

    can_be_sampled: ClassVar[bool] = False
    """Whether a sample of its classes is enough for a step (`SampledHead`)."""

    def __init__(self, embedding_dim: int, identity_count: int) -> None:
        super().__init__()
        if identity_count < 2:
            raise ConfigError(f"a head needs 2 identities or more, got {identity_count}")
        self.embedding_dim = embedding_dim
        self.identity_count = identity_count
        self.margin_share = 1.0

    def forward(self, embedding: Tensor, label: Tensor, masked: Tensor | None = None) -> HeadOutput:
        """(b, d) float and (b,) int64 in 0..identities-1 to loss and logits.

        masked : (e, 2) int64 or None, a row of the batch and a class other than its own.
        """
        with torch.autocast(embedding.device.type, enabled=False):
            return self.score(embedding.float(), label, masked)

    def score(self, embedding: Tensor, label: Tensor, masked: Tensor | None = None) -> HeadOutput:
        """`forward` in float32, or in the embedding's own precision when called directly."""
        raise NotImplementedError

    def place(self, label: Tensor) -> Tensor:
        """The columns of `logits` that stand for these labels."""
        return label

    @contextmanager
    def step(
        self, number: int, label: Tensor, margin_share: float, optimizer: torch.optim.Optimizer
    ) -> Iterator[None]:
        """One training step: `with` it, from the loss to `optimizer.step()`.

        number : int
            Of the step, from 0; it seeds what a head draws at random.
        label : (l,) int64
            All labels that this step's loss is computed for, repeats included.
        margin_share : float
            Factor on the margin in this step, 0..1.
        optimizer : Optimizer
            It updates this head's parameters; `SampledHead` swaps its state by class.
        """
        self.margin_share = margin_share
        try:
            yield
        finally:
            self.margin_share = 1.0


def score_quietly(head: Head, embedding: Tensor, label: Tensor) -> HeadOutput:
    """A head's output for embeddings that it does not learn its moments from."""
    was_training = head.training
    head.eval()
    try:
        return head(embedding, label)
    finally:
        head.train(was_training)


class CosineHead(Head):
    """Base of the heads on the unit sphere: logits are scale x cosine to each identity's centre.

    scale : float or None
        None chooses `default_scale(identity_count)`.
    """

    can_be_sampled: ClassVar[bool] = True

    def __init__(
        self, embedding_dim: int, identity_count: int, *, scale: float | None = None
    ) -> None:
        super().__init__(embedding_dim, identity_count)
        if scale is not None and not scale > 0:
            raise ConfigError(f"a head's scale must be above 0, got {scale}")
        self.scale = float(scale) if scale is not None else default_scale(identity_count)
        self.weight = nn.Parameter(torch.empty(identity_count, embedding_dim))
        nn.init.normal_(self.weight, std=embedding_dim**-0.5)

    def score(self, embedding: Tensor, label: Tensor, masked: Tensor | None = None) -> HeadOutput:
        norm = embedding.norm(dim=1).clamp(min=1e-6)
        cosine = (embedding / norm[:, None]) @ functional.normalize(self.weight, dim=1).T
        target = cosine.gather(1, label[:, None]).squeeze(1)
        penalised = self.penalise_classes(target, norm.detach(), label)
        logits = self.scale * cosine
        with_margin = logits.scatter(1, label[:, None], (self.scale * penalised)[:, None])
        return HeadOutput(judge_logits(with_margin, label, masked), logits)

    def penalise_classes(self, target: Tensor, norm: Tensor, label: Tensor) -> Tensor:
        """`penalise`, for a margin that depends on the class (b,) too."""
        return self.penalise(target, norm)

    def penalise(self, target: Tensor, norm: Tensor) -> Tensor:
        """The margin: cosine to the own centre (b,) and embedding norm (b,) to a harder cosine."""
        raise NotImplementedError


def judge_logits(logits: Tensor, label: Tensor, masked: Tensor | None) -> Tensor:
    """Cross-entropy a sample, (b,): logits (b, identities), the margin in them."""
    if masked is not None:
        logits = logits.index_put((masked[:, 0], masked[:, 1]), logits.new_tensor(-math.inf))
    return functional.cross_entropy(logits, label, reduction="none")


def default_scale(identity_count: int) -> float:
    """A scale that fits the number of identities: 64 for a million of them, less for few.

    With few identities a large scale saturates the softmax and the gradient dies before the margin
    is met. Ours: twice the fixed scale of AdaCos (Zhang et al. 2019, eq. 11), within 16..64.
    """
    return min(64.0, max(16.0, 2 * math.sqrt(2) * math.log(max(identity_count - 1, 2))))


def bound_angle(cosine: Tensor) -> Tensor:
    """The angle of a cosine, in radians; kept off the ends, where the gradient is infinite."""
    return torch.acos(cosine.clamp(-1 + 1e-6, 1 - 1e-6))
