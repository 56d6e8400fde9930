"""Domain balancing (Cao et al. 2020): a larger margin for classes in sparse surroundings.

Source: the compactness of a class's surroundings is the log-sum-exp over its nearest class vectors,
and the margin of CosFace is multiplied by a constant over it. Read: the three formulas, in a survey
(arXiv 2212.13038, eq. 78) and in a summary of the paper (ntechlab, 2020); neither has numbers, no
code of the authors was found. Ours: the factors are scaled to a mean of 1 over the classes and kept
within .5 and 2, in place of a constant that fits one number of neighbours only; 100 neighbours, the
renewal every 50 steps and the gate's weight of .01 are not checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from cdp.errors import ConfigError
from cdp.models.heads.head import CosineHead

RENEWAL_STEPS = 50
_BLOCK = 2048


class DomainBalanceHead(CosineHead):
    """The own logit is `scale * (cos(theta) - factor * margin)`, the factor its class's.

    margin : float
        In units of the cosine.
    neighbours : int
        K: nearest class vectors that are looked at; at most all others.
    """

    can_be_sampled = False
    factor: Tensor

    def __init__(
        self,
        embedding_dim: int,
        identity_count: int,
        *,
        scale: float | None = None,
        margin: float = 0.35,
        neighbours: float = 100,
    ) -> None:
        super().__init__(embedding_dim, identity_count, scale=scale)
        if neighbours < 1:
            raise ConfigError(f"1 neighbour or more expected, got {neighbours}")
        self.margin = margin
        self.neighbours = min(int(neighbours), identity_count - 1)
        self.register_buffer("factor", torch.ones(identity_count))

    @contextmanager
    def step(
        self, number: int, label: Tensor, margin_share: float, optimizer: torch.optim.Optimizer
    ) -> Iterator[None]:
        """Renew the factors every `RENEWAL_STEPS` steps, before the step."""
        if number % RENEWAL_STEPS == 0:
            self.renew()
        with super().step(number, label, margin_share, optimizer):
            yield

    @torch.no_grad()
    def renew(self) -> None:
        """Set each class's factor from where the class vectors are now."""
        compactness = measure_compactness(self.weight, self.neighbours, self.scale)
        self.factor.copy_(balance_factors(compactness))

    def penalise_classes(self, target: Tensor, norm: Tensor, label: Tensor) -> Tensor:
        return target - self.margin_share * self.margin * self.factor[label]


def measure_compactness(weight: Tensor, neighbours: int, scale: float) -> Tensor:
    """log sum of exp(scale cos) over each class vector's nearest others: (c, d) to (c,)."""
    unit = functional.normalize(weight.detach(), dim=1)
    found = []
    for start in range(0, len(unit), _BLOCK):
        cosine = unit[start : start + _BLOCK] @ unit.T
        own = torch.arange(len(cosine), device=unit.device)
        cosine[own, own + start] = -torch.inf
        found.append((scale * cosine.topk(neighbours, dim=1).values).logsumexp(1))
    return torch.cat(found)


def balance_factors(compactness: Tensor) -> Tensor:
    """1 / compactness, scaled to a mean of 1, within .5 and 2: (c,) to (c,)."""
    rare = 1 / compactness.clamp(min=0.1)
    return (rare / rare.mean()).clamp(0.5, 2)
