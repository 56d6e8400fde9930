"""Which image is shown when."""

from __future__ import annotations

import numpy as np

from cdp.training.sets import Branch


class Order:
    """Which images a branch gives to each step: pass after pass, without end.

    branch : Branch
    seed, number : int
        Of the run, and the branch's place among the branches.
    """

    def __init__(self, branch: Branch, seed: int, number: int) -> None:
        self.branch = branch
        self.key = (seed, number)
        self.by_identity = branch.sampling == "identity" and branch.label is not None
        self.length = len(branch.images)
        if self.by_identity:
            assert branch.label is not None
            self.size = np.bincount(branch.label)
            self.size = self.size[self.size > 0]
            self.length = len(self.size) * branch.images_per_identity
        self.current = -1
        self.rows = self.seeds = np.empty(0, dtype=np.int64)

    def take(self, start: int, amount: int) -> tuple[np.ndarray, np.ndarray]:
        """Places start..start+amount of the sequence: image numbers and their random seeds."""
        rows, seeds = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while amount > 0:
            number, offset = divmod(start, self.length)
            if number != self.current:
                rng = np.random.default_rng([*self.key, number])
                self.rows = self._draw_people(rng) if self.by_identity else self._draw_images(rng)
                self.seeds = rng.integers(0, 2**63 - 1, self.length)
                self.current = number
            part = slice(offset, offset + amount)
            rows.append(self.rows[part])
            seeds.append(self.seeds[part])
            taken = len(self.rows[part])
            start, amount = start + taken, amount - taken
        return np.concatenate(rows), np.concatenate(seeds)

    def _draw_images(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self.length)

    def _draw_people(self, rng: np.random.Generator) -> np.ndarray:
        """Each identity's first few images in an order of its own; one with fewer repeats them."""
        assert self.branch.label is not None
        each = self.branch.images_per_identity
        shuffled = np.lexsort((rng.random(len(self.branch.label)), self.branch.label))
        first = np.cumsum(self.size) - self.size
        place = first[:, None] + np.arange(each) % self.size[:, None]
        return shuffled[place][rng.permutation(len(self.size))].ravel()


def apportion(batch_size: int, shares: np.ndarray) -> list[int]:
    """Whole images of a batch by share, by largest remainder, at least 1 each."""
    exact = shares * batch_size
    counts = np.maximum(np.floor(exact), 1).astype(int)
    while counts.sum() < batch_size:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > batch_size and counts.max() > 1:
        counts[np.argmax(counts)] -= 1
    return [int(c) for c in counts]
