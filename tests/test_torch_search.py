"""The exact search by torch has the bits of backend `exact`, on a CPU and on a GPU."""

import numpy as np
import pytest
import torch

from cdp.errors import BackendError
from cdp.knn import build_index, build_knn_graph, query_index, torch_search
from tests.benchmarks.embeddings import draw_views

pytestmark = pytest.mark.torch

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


def draw_rows(kind: str) -> np.ndarray:
    random = np.random.default_rng(8)
    if kind == "faces":
        return draw_views(5000, (48,), seed=2)[0][0]
    if kind == "repeated":
        rows = draw_views(3000, (32,), seed=3)[0][0]
        rows[random.permutation(3000)[:300]] = rows[0]
        return rows
    if kind == "ties":
        return random.integers(0, 2, (2600, 7)).astype(np.float32) + 0.5
    return random.standard_normal((2600, 20)).astype(np.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["faces", "repeated", "ties", "isotropic"])
@pytest.mark.parametrize("k", [1, 20])
def test_it_has_the_bits_of_the_exact_backend(kind, device, k, monkeypatch):
    monkeypatch.setattr(torch_search, "_ROWS", 700)
    monkeypatch.setattr(torch_search, "_COLUMNS", 1280)
    rows = draw_rows(kind)
    ours = build_knn_graph(rows, k, backend="torch", device=device)
    exact = build_knn_graph(rows, k, backend="exact")
    np.testing.assert_array_equal(ours.neighbour, exact.neighbour)
    np.testing.assert_array_equal(ours.similarity, exact.similarity)


def test_parts_and_threads_change_nothing():
    rows = draw_rows("faces")
    whole = build_knn_graph(rows, 9, backend="torch", threads=1)
    index = build_index(rows, "torch", k=9, threads=2)
    part = query_index(index, rows, slice(1200, 4100), threads=2)
    np.testing.assert_array_equal(part.neighbour, whole.neighbour[1200:4100])


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_few_rows_have_few_neighbours(count):
    rows = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    graph = build_knn_graph(rows, 20, backend="torch")
    assert (graph.neighbour >= 0).sum() == count * max(count - 1, 0)


def test_precision_of_products_is_restored():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        build_knn_graph(draw_rows("faces"), 5, backend="torch")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_unknown_device_is_one_message():
    with pytest.raises(BackendError, match=r"device 'toaster'.*backend exact gives the same"):
        build_knn_graph(draw_rows("faces"), 5, backend="torch", device="toaster")
