"""Disjoint sets (union-find) for compiled code: path halving, union by size.

The contract: `parent` is (n,) int64, a root points to itself; `size` is (n,) int64, right at roots.
"""

from __future__ import annotations

from typing import Any

from numba import njit


@njit(cache=True)
def find_root(parent: Any, node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@njit(cache=True)
def join_sets(parent: Any, size: Any, one: int, other: int) -> None:
    if size[one] < size[other]:
        one, other = other, one
    parent[other] = one
    size[one] += size[other]
