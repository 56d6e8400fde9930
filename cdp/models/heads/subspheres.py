"""Sub-embeddings with confidence (URFace, Shi et al. 2020): parts on spheres of their own.

Source: the logit is the mean over the parts of confidence x cosine, the margin is taken from the
own logit, and squared confidences are kept small. Ours: a part's length is its confidence, so that
no second branch is needed and a stored raw embedding carries its confidences; 8 parts of 128
dimensions, where the paper has 16 of 512; and the margin by the scale, where a re-implementation
(there is no code of the authors) subtracts 30 from the logit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from cdp.errors import ConfigError
from cdp.models.heads.head import Head, HeadOutput, default_scale, judge_logits


class SubspheresHead(Head):
    """Logits are the mean over parts of s_k cos_k, s_k the scale x length of part k over its usual.

    parts : int
        K: equal slices of the embedding; it divides the embedding's length.
    scale : float or None
        None chooses `default_scale(identity_count)`.
    margin : float
        In units of the cosine: the own logit loses scale x margin.
    confidence_decay : float
        Factor on the mean of the squared confidences s_k.
    """

    def __init__(
        self,
        embedding_dim: int,
        identity_count: int,
        *,
        parts: float = 8,
        scale: float | None = None,
        margin: float = 0.35,
        confidence_decay: float = 0.001,
    ) -> None:
        super().__init__(embedding_dim, identity_count)
        if parts < 1 or embedding_dim % int(parts):
            raise ConfigError(f"parts that divide {embedding_dim} expected, got {parts}")
        if scale is not None and not scale > 0:
            raise ConfigError(f"a head's scale must be above 0, got {scale}")
        self.parts = int(parts)
        self.scale = float(scale) if scale is not None else default_scale(identity_count)
        self.margin, self.confidence_decay = margin, confidence_decay
        self.weight = nn.Parameter(torch.empty(identity_count, embedding_dim))
        nn.init.normal_(self.weight, std=embedding_dim**-0.5)

    def score(self, embedding: Tensor, label: Tensor, masked: Tensor | None = None) -> HeadOutput:
        confidence = self.measure_confidence(embedding)
        centre = functional.normalize(self._split(self.weight), dim=2).flatten(1)
        usual = math.sqrt(self.embedding_dim / self.parts)
        logits = self.scale / (self.parts * usual) * embedding @ centre.T
        own = functional.one_hot(label, self.identity_count).to(logits.dtype)
        harder = logits - self.margin_share * self.margin * self.scale * own
        loss = judge_logits(harder, label, masked)
        return HeadOutput(loss + self.confidence_decay * confidence.square().mean(1), logits)

    def measure_confidence(self, embedding: Tensor) -> Tensor:
        """s_k of raw embeddings, (b, d) to (b, parts)."""
        usual = math.sqrt(self.embedding_dim / self.parts)
        return self.scale / usual * (self._split(embedding).square().sum(2) + 1e-12).sqrt()

    def _split(self, vectors: Tensor) -> Tensor:
        return vectors.unflatten(1, (self.parts, -1))
