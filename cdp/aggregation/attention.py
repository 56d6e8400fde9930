"""Neural aggregation network (NAN, Yang et al. 2017): a learned weight for each picture of a set.

The contract:
- Two attention blocks: e = q . f, a = softmax(e), r = sum of a f. The second block's q is
  tanh(W r + b) of the first one's r. Any number of pictures, in any order.
- Before it is trained (q, W and b of 0) it is the plain mean.
- Training sees frozen vectors of labelled people only, in sets of 2 to 8; everything drawn follows
  from the seed.

Source: both attention blocks, and that vectors have unit length. Read: notes on the paper by two
readers (alexobednikov/papers, aleju/papers) and a re-implementation (jinyanxu's, in TensorFlow,
which starts q, W and b near 0 and trains them by RMSProp, .001); the paper trains by cross-entropy
or a contrastive loss. Ours: a CosFace head in place of these, sets of 2 to 8, 500 steps, and a
start at exactly 0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cdp.errors import DataError
from cdp.models.heads import build_head

SET_SIZES = (2, 8)


class NeuralAggregator(nn.Module):
    """Sets of unit vectors to one unit vector each.

    embedding_dim : int
        d; there are d * d + 2 d weights.
    """

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(embedding_dim))
        self.second = nn.Linear(embedding_dim, embedding_dim)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, vectors: Tensor, present: Tensor) -> Tensor:
        """(b, m, d) unit vectors, present where (b, m) bool, to (b, d) of unit length."""
        return functional.normalize(self.attend_twice(vectors, present)[0], dim=1)

    def attend_twice(self, vectors: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """The second block's sums (b, d) and weights (b, m)."""
        first, _ = attend(vectors, present, self.query.expand(len(vectors), -1))
        return attend(vectors, present, torch.tanh(self.second(first)))

    def pool(self, vectors: np.ndarray, group: np.ndarray) -> np.ndarray:
        """As `cdp.aggregation.pool_vectors`: (n, d), (n,) to (sets, d) float32."""
        names, place, size = np.unique(group, return_inverse=True, return_counts=True)
        order = np.argsort(place, kind="stable")
        first = np.cumsum(size) - size
        column = np.arange(len(order)) - np.repeat(first, size)
        filled = torch.zeros(len(names), int(size.max()), vectors.shape[1])
        present = torch.zeros(filled.shape[:2], dtype=torch.bool)
        filled[place[order], column] = torch.from_numpy(np.asarray(vectors, np.float32)[order])
        present[place[order], column] = True
        with torch.inference_mode():
            return self.eval()(filled, present).numpy()


def attend(vectors: Tensor, present: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Weighed sums (b, d) and weights (b, m) of sets (b, m, d) by queries (b, d)."""
    score = torch.einsum("bmd,bd->bm", vectors, query)
    weight = score.masked_fill(~present, -torch.inf).softmax(1)
    return torch.einsum("bm,bmd->bd", weight, vectors), weight


def train_aggregator(
    vectors: np.ndarray,
    label: np.ndarray,
    *,
    steps: int = 500,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> NeuralAggregator:
    """Train an aggregator on sets of pictures of labelled people.

    Parameters
    ----------
    vectors : (n, d) float32, unit length
        Of a frozen recognizer, best of degraded pictures: where all are sharp there is nothing to
        choose. Several rows may come from one picture.
    label : (n,) integer
        Two people or more; those with one row are left out.
    steps, batch_size : int
        Steps of the optimizer (Adam), and sets a step.
    learning_rate : float
    seed : int

    Returns
    -------
    aggregator : NeuralAggregator
        In `eval` mode on the CPU.

    Raises
    ------
    DataError
        Fewer than two people with two rows.
    """
    names, place, size = np.unique(label, return_inverse=True, return_counts=True)
    known = np.flatnonzero(size > 1)
    if len(known) < 2:
        raise DataError(f"two people with two pictures or more expected, got {len(known)} of "
                        f"{len(names)}")  # fmt: skip
    rows = np.argsort(place, kind="stable")
    first = np.cumsum(size) - size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        aggregator = NeuralAggregator(vectors.shape[1])
    head = build_head("cosface", vectors.shape[1], len(known), seed=seed)
    parameters = [*aggregator.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    rng = np.random.default_rng(seed)
    whole = torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))
    most = SET_SIZES[1]
    for _ in range(steps):
        chosen = rng.integers(0, len(known), batch_size)
        # Without replacement where there are enough: the first places of a random order.
        length = size[known[chosen]]
        drawn = np.argsort(rng.random((batch_size, int(length.max()))) +
                           (np.arange(int(length.max())) >= length[:, None]), axis=1)  # fmt: skip
        drawn = drawn[:, :most]
        wanted = np.minimum(rng.integers(SET_SIZES[0], most + 1, batch_size), length)
        present = np.arange(drawn.shape[1]) < wanted[:, None]
        index = rows[first[known[chosen]][:, None] + np.where(present, drawn, 0)]
        pooled = aggregator(whole[torch.from_numpy(index)], torch.from_numpy(present))
        loss = head(pooled, torch.from_numpy(chosen)).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return aggregator.eval()
