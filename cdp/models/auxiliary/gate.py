"""Gate loss (Cao et al. 2020, domain balancing): the balancing gate follows the class's rarity.

Source: the soft gate is trained towards the frequency indicator of the image's domain. Read: a
summary of the paper (ntechlab, 2020), without numbers. Ours: the squared difference; a weight of
.01 is not checked. It needs the neck `balanced` and the head `domain_balance`.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from cdp.errors import ConfigError
from cdp.models.auxiliary.auxiliary import Auxiliary, Seen
from cdp.models.heads import DomainBalanceHead


class GateLoss(Auxiliary):
    """(gate - factor of the image's class)^2."""

    neck: ClassVar[str | None] = "balanced"

    def judge(self, seen: Seen) -> Tensor:
        assert seen.gate is not None
        if not isinstance(seen.head, DomainBalanceHead):
            raise ConfigError("auxiliary loss gate needs the head domain_balance: choose it")
        return (seen.gate - seen.head.factor[seen.label]).square()
