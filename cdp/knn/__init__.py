"""kNN graphs: embeddings to the k nearest neighbours of each row, by nmslib, faiss or exactly."""

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
