"""Disjoint sets (union-find) for compiled code: path halving, union by size.

The contract:
- `parent` is (n,) int64, a root is its own parent; `size` is (n,) int64, right at roots.
- Both arrays are changed in place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from cdp.types import UNLABELLED


@njit(cache=True)
def find_root(parent: Any, node: int) -> int:
    """The root of a node's set."""
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@njit(cache=True)
def join_sets(parent: Any, size: Any, one: int, other: int) -> None:
    """Join the sets of two different roots; the root of the larger set stays."""
    if size[one] < size[other]:
        one, other = other, one
    parent[other] = one
    size[one] += size[other]


@njit(cache=True)
def label_sets(parent: Any, size: Any) -> Any:
    """(n,) int64: sets numbered from 0 by their smallest node; -1 for a node alone."""
    count = len(parent)
    label = np.full(count, UNLABELLED, np.int64)
    number = np.full(count, UNLABELLED, np.int64)
    found = 0
    for node in range(count):
        root = find_root(parent, node)
        if size[root] > 1:
            if number[root] < 0:
                number[root] = found
                found += 1
            label[node] = number[root]
    return label
