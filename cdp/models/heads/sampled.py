"""Sampled softmax: a head over millions of identities that computes a sample of them each step.

The contract:
- The classes of the batch are always in the sample; the rest of it is drawn from all others, each
  equally likely, as a function of (seed, step) alone (Partial FC, An et al. 2021, section 3.2).
- Loss, gradient and optimizer touch the sample only: per step, memory and time grow with the
  sample and not with the identities. All class vectors lie in one table, and the optimizer's state
  of each class in tables beside it. `step` copies the sample's rows into the inner head and into
  the optimizer, and after the block back into the tables.
- With a sample of all identities it is the head it samples for, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from cdp.errors import ConfigError
from cdp.models.heads.head import CosineHead, Head, HeadOutput


class SampledHead(Head):
    """Stands for `identity_count` classes; `inner` is a head over the sample's.

    inner : CosineHead
        Its class vectors are overwritten in each step.
    identity_count : int
    seed : int
        Of the samples, and of the class vectors.
    memories : sequence of str
        The optimizer's tensors a parameter that are kept for each class: `momentum_buffer` for SGD,
        `exp_avg` and `exp_avg_sq` for Adam.
    """

    table: Tensor

    def __init__(
        self,
        inner: CosineHead,
        identity_count: int,
        *,
        seed: int = 0,
        memories: Sequence[str] = ("momentum_buffer",),
    ) -> None:
        super().__init__(inner.embedding_dim, identity_count)
        if inner.identity_count > identity_count:
            raise ConfigError(
                f"a sample of at most the {identity_count} identities expected, got "
                f"{inner.identity_count}"
            )
        self.inner = inner
        self.seed = seed
        self.memories = tuple(memories)
        table = torch.empty(identity_count, inner.embedding_dim)
        self.register_buffer("table", table.normal_(std=inner.embedding_dim**-0.5))
        for name in self.memories:
            self.register_buffer(f"table_{name}", torch.zeros_like(table))
        self.active = torch.arange(inner.identity_count)

    @contextmanager
    def step(
        self, number: int, label: Tensor, margin_share: float, optimizer: torch.optim.Optimizer
    ) -> Iterator[None]:
        """Draw the step's classes; their rows come from the tables, and go back after the block."""
        self.active = self._draw(label, number).to(self.table.device)
        self._load_rows(optimizer)
        with super().step(number, label, margin_share, optimizer):
            yield
        self._store_rows(optimizer)

    @torch.no_grad()
    def _load_rows(self, optimizer: torch.optim.Optimizer) -> None:
        weight = self.inner.weight
        weight.copy_(self.table[self.active])
        # An optimizer that has not stepped yet has no state, and the tables are zero.
        for name in self.memories if optimizer.state.get(weight) else ():
            optimizer.state[weight][name].copy_(self._table_of(name)[self.active])

    @torch.no_grad()
    def _store_rows(self, optimizer: torch.optim.Optimizer) -> None:
        weight = self.inner.weight
        self.table[self.active] = weight.detach()
        state = optimizer.state.get(weight, {})
        for name in self.memories:
            value = state.get(name)
            if value is not None:
                self._table_of(name)[self.active] = value

    def place(self, label: Tensor) -> Tensor:
        return torch.searchsorted(self.active, label)

    def score(self, embedding: Tensor, label: Tensor, masked: Tensor | None = None) -> HeadOutput:
        self.inner.margin_share = self.margin_share
        self.inner.train(self.training)
        return self.inner.score(embedding, self.place(label), self._place_masked(masked))

    def _place_masked(self, masked: Tensor | None) -> Tensor | None:
        """The masked classes that are in the sample, by their place in it."""
        if masked is None:
            return None
        place = self.place(masked[:, 1].contiguous()).clamp(max=len(self.active) - 1)
        seen = self.active[place] == masked[:, 1]
        return torch.stack([masked[seen, 0], place[seen]], dim=1)

    def _table_of(self, name: str) -> Tensor:
        return self.get_buffer(f"table_{name}")

    def _draw(self, label: Tensor, step: int) -> Tensor:
        """The classes of a step, (sample,) int64, ascending."""
        own = np.unique(label.cpu().numpy())
        missing = self.inner.identity_count - len(own)
        if missing < 0:
            raise ConfigError(
                f"a sample of {self.inner.identity_count} classes cannot hold the {len(own)} of "
                "one batch; raise sampled_classes or lower batch_size"
            )
        rng = np.random.default_rng([self.seed, step])
        others = rng.choice(self.identity_count - len(own), missing, replace=False)
        # Numbers among the classes that are not in the batch, to numbers among all.
        others += np.searchsorted(own - np.arange(len(own)), others, side="right")
        return torch.from_numpy(np.sort(np.concatenate([own, others])))
