"""Centralized coordinate learning (Qi and Zhang 2018): centred features, class vectors on a sphere.

Source: features are centred and scaled coordinate by coordinate with running moments, their length
stays in the logits, class vectors have unit length. Read: the abstract (arXiv 1801.05678) and a
re-implementation of others (`CclNorm2d`), a batch normalisation without scale and shift, momentum
.1, behind one factor; no text of the paper beyond the abstract, and no code of the authors, could
be read. Ours: the form of the adaptive angular margin, which the abstract names without a formula,
its .5, the scale, and that the first batch sets the moments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from cdp.errors import ConfigError
from cdp.models.heads.head import Head, HeadOutput, bound_angle, judge_logits


class CentralizedHead(Head):
    """Logits are scale x |x| cos(theta), x centred; the own angle becomes t + margin (1 - t / pi).

    The margin is full for an image at its class vector and fades for one that points away from it,
    so the own angle stays below pi.

    margin_rad : float
        0 to below pi.
    scale : float or None
        None is learned, from 1; at a high learning rate it can grow until the loss is zero and
        nothing is learned.
    momentum : float
        Share of the new batch in the running moments.
    """

    mean: Tensor
    variance: Tensor
    moments_known: Tensor

    def __init__(
        self,
        embedding_dim: int,
        identity_count: int,
        *,
        margin_rad: float = 0.5,
        scale: float | None = 1.0,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(embedding_dim, identity_count)
        if not 0 <= margin_rad < math.pi:
            raise ConfigError(f"margin_rad of 0 to below pi (radians) expected, got {margin_rad}")
        if scale is not None and not scale > 0:
            raise ConfigError(f"a head's scale must be above 0, got {scale}")
        self.margin_rad, self.momentum = margin_rad, momentum
        self.scale = nn.Parameter(torch.tensor(scale or 1.0), requires_grad=scale is None)
        self.weight = nn.Parameter(torch.empty(identity_count, embedding_dim))
        nn.init.normal_(self.weight, std=embedding_dim**-0.5)
        self.register_buffer("mean", torch.zeros(embedding_dim))
        self.register_buffer("variance", torch.ones(embedding_dim))
        self.register_buffer("moments_known", torch.tensor(0.0))

    def score(self, embedding: Tensor, label: Tensor, masked: Tensor | None = None) -> HeadOutput:
        centred = self.centre(embedding)
        norm = centred.norm(dim=1).clamp(min=1e-6)
        cosine = (centred / norm[:, None]) @ functional.normalize(self.weight, dim=1).T
        angle_rad = bound_angle(cosine.gather(1, label[:, None]))
        margin_rad = self.margin_share * self.margin_rad
        own = torch.cos(angle_rad + margin_rad * (1 - angle_rad / math.pi))
        reach = (self.scale * norm)[:, None]
        logits = reach * cosine
        harder = logits.scatter(1, label[:, None], reach * own)
        return HeadOutput(judge_logits(harder, label, masked), logits)

    def centre(self, embedding: Tensor) -> Tensor:
        """(x - mean) / sqrt(variance), with the running moments, which `train` mode moves first."""
        if self.training and len(embedding) > 1:
            self._observe(embedding.detach())
        return (embedding - self.mean) / (self.variance + 1e-5).sqrt()

    @torch.no_grad()
    def _observe(self, embedding: Tensor) -> None:
        share = 1 - self.moments_known * (1 - self.momentum)
        self.mean.lerp_(embedding.mean(0).to(self.mean), share)
        self.variance.lerp_(embedding.var(0, correction=0).to(self.variance), share)
        self.moments_known.fill_(1.0)
