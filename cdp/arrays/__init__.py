"""Arrays: the arithmetic and memory that every other package builds on.

cosine         unit vectors, cosines in one order of additions, top-k insertion
log_odds       probability <-> log-odds within a limit
disjoint_set   union-find for compiled code
threads        thread counts, one-thread BLAS, rows in blocks
scratch        arrays that lie on disk where they are too large for memory
"""

from cdp.arrays.cosine import dot_rows, insert_neighbour, make_unit
from cdp.arrays.disjoint_set import find_root, join_sets, label_sets
from cdp.arrays.log_odds import convert_threshold, to_log_odds, to_probability
from cdp.arrays.scratch import allocate
from cdp.arrays.threads import BLOCK, count_threads, limit_blas, list_blocks

__all__ = [
    "BLOCK",
    "allocate",
    "convert_threshold",
    "count_threads",
    "dot_rows",
    "find_root",
    "insert_neighbour",
    "join_sets",
    "label_sets",
    "limit_blas",
    "list_blocks",
    "make_unit",
    "to_log_odds",
    "to_probability",
]
