"""kNN graphs: embeddings to the k nearest neighbours of each row, by nmslib, faiss or exactly.

graph       build_knn_graph, build_knn_graphs and measure_recall
index       the same in two steps: build once, save, query in parts
libraries   candidates by nmslib and faiss, which are imported nowhere else
pivots      candidates by shared pivots, and the order of queries
refine      candidates -> the most similar, compared in full
exact       all pairs, most of them ruled out by a bound
"""

from cdp.knn.graph import build_knn_graph, build_knn_graphs, measure_recall
from cdp.knn.index import BACKENDS, EXACT_LIMIT, KnnIndex, build_index, load_index, query_index

__all__ = [
    "BACKENDS",
    "EXACT_LIMIT",
    "KnnIndex",
    "build_index",
    "build_knn_graph",
    "build_knn_graphs",
    "load_index",
    "measure_recall",
    "query_index",
]
