"""Aggregation: several pictures of one person become one vector.

- `pooling.py`: mean, mean weighed by norm, parts weighed by their lengths
- `attention.py`: NAN, two attention blocks trained on labelled people
"""

from cdp.aggregation.attention import NeuralAggregator, train_aggregator
from cdp.aggregation.pooling import fuse_parts, pool_vectors, weigh_by_norm

__all__ = ["NeuralAggregator", "fuse_parts", "pool_vectors", "train_aggregator", "weigh_by_norm"]
