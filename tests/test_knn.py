"""kNN graphs against a float64 oracle, over backends, input kinds, parts and threads."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdp.arrays.cosine import make_unit
from cdp.errors import BackendError, ConfigError, DataError
from cdp.knn.exact import scan_all
from cdp.knn.graph import build_knn_graph, build_knn_graphs, measure_recall
from cdp.knn.index import build_index, load_index, query_index
from cdp.types import KnnGraph
from tests.benchmarks.embeddings import draw_views

CPU_BACKENDS = ("nmslib", "faiss", "exact")

ROOT = Path(__file__).parent.parent


def exact_graph(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    unit = np.asarray(vectors, np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    order = np.argsort(-cosine, axis=1, kind="stable")[:, : min(k, len(unit) - 1)]
    return order, np.take_along_axis(cosine, order, axis=1)


def assert_contract(graph: KnnGraph, vectors: np.ndarray, k: int) -> None:
    count, found = len(vectors), min(k, len(vectors) - 1)
    assert graph.neighbour.shape == graph.similarity.shape == (count, k)
    assert graph.neighbour.dtype == np.int64
    assert graph.similarity.dtype == np.float32
    if count == 0:
        return
    found = max(found, 0)
    assert (graph.neighbour[:, found:] == -1).all()
    assert (graph.similarity[:, found:] == 0).all()
    near, cosine = graph.neighbour[:, :found], graph.similarity[:, :found]
    assert (near >= 0).all()
    assert (near != np.arange(count)[:, None]).all()
    assert all(len(set(row)) == found for row in near.tolist())
    step = np.diff(cosine, axis=1)
    assert (step <= 0).all()
    assert (np.diff(near, axis=1)[step == 0] > 0).all()
    unit = np.asarray(vectors, np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    true = np.einsum("id,ijd->ij", unit, unit[near])
    np.testing.assert_allclose(cosine, true, atol=2e-6)


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    return draw_views(3000, (32,), seed=5)[0][0]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("exact_limit", [0, 10_000])
def test_contract_and_recall(backend, exact_limit, faces):
    options = {} if backend == "exact" else {"exact_limit": exact_limit}
    graph = build_knn_graph(faces, 15, backend=backend, **options)
    assert_contract(graph, faces, 15)
    assert measure_recall(faces, graph) >= 0.99
    _, cosine = exact_graph(faces, 15)
    assert (graph.similarity <= cosine + 2e-6).all()
    if backend == "exact" or exact_limit:
        np.testing.assert_allclose(graph.similarity, cosine, atol=2e-6)


def test_exact_search_is_the_brute_search_bit_for_bit():
    """Bounds, pivots and blocks save comparisons and change no result, nor the order of ties."""
    generator = np.random.default_rng(8)
    kinds = {
        "clustered": draw_views(2600, (48,), seed=2)[0][0],
        "isotropic": generator.standard_normal((2600, 20)).astype(np.float32),
        "ties": generator.integers(0, 2, (2600, 7)).astype(np.float32) + 0.5,
        "one axis": np.repeat(generator.choice([-1.0, 1.0], (2600, 1)), 4, axis=1),
    }
    for vectors in kinds.values():
        unit, _ = make_unit(vectors)
        near = np.empty((len(unit), 9), np.int64)
        best = np.empty((len(unit), 9), np.float32)
        scan_all(unit, 0, near, best)
        graph = build_knn_graph(vectors, 9, backend="exact", threads=2)
        np.testing.assert_array_equal(graph.similarity, best)
        np.testing.assert_array_equal(graph.neighbour, near)
        index = build_index(vectors, "exact", k=9)
        part = query_index(index, vectors, slice(900, 2100))
        np.testing.assert_array_equal(part.neighbour, near[900:2100])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_same_bits_whatever_the_threads_the_parts_and_the_process(backend, faces, tmp_path):
    options = {} if backend == "exact" else {"exact_limit": 0}
    whole = build_knn_graph(faces, 12, backend=backend, threads=1, **options)
    for graph in [
        build_knn_graph(faces, 12, backend=backend, threads=3, **options),
        *build_knn_graphs([faces, faces], 12, backend=backend, threads=2, **options),
    ]:
        np.testing.assert_array_equal(graph.neighbour, whole.neighbour)
        np.testing.assert_array_equal(graph.similarity, whole.similarity)
    index = build_index(faces, backend, k=12, settings=options, threads=2)
    index.save(tmp_path / "view.index")
    np.save(tmp_path / "view.npy", faces)
    script = (
        "import sys, numpy as np\n"
        "from cdp.knn import load_index, query_index\n"
        "vectors = np.load('view.npy', mmap_mode='r')\n"
        "index = load_index('view.index', vectors)\n"
        "parts = [query_index(index, vectors, slice(a, b), 12, threads=2)\n"
        "         for a, b in ((0, 700), (700, 1111), (1111, 3000), (3000, 3000))]\n"
        "np.save('n.npy', np.concatenate([p.neighbour for p in parts]))\n"
        "np.save('s.npy', np.concatenate([p.similarity for p in parts]))\n"
    )
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, env={"PYTHONPATH": str(ROOT)}
    )
    np.testing.assert_array_equal(np.load(tmp_path / "n.npy"), whole.neighbour)
    np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), whole.similarity)
    fewer = query_index(load_index(tmp_path / "view.index", faces), faces, slice(0, 50), 5)
    assert fewer.neighbour.shape == (50, 5)


@pytest.mark.nmslib
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 9),
    st.integers(1, 30),
    st.sampled_from([np.float16, np.float32, np.float64]),
    st.sampled_from(["plain", "fortran", "strided", "duplicates"]),
    st.sampled_from(CPU_BACKENDS),
)
def test_small_input_of_any_kind(count, dimension, k, dtype, layout, backend):
    generator = np.random.default_rng(count * 100 + dimension)
    vectors = (generator.standard_normal((count, dimension)) + 0.05).astype(dtype)
    if layout == "fortran":
        vectors = np.asfortranarray(vectors)
    elif layout == "strided":
        vectors = np.repeat(np.repeat(vectors, 2, 0), 3, 1)[::2, ::3]
    elif layout == "duplicates":
        vectors[: count // 2] = vectors[0]
    graph = build_knn_graph(vectors, k, backend=backend)
    assert_contract(graph, vectors, k)
    if count > 1:
        np.testing.assert_allclose(
            graph.similarity[:, : count - 1], exact_graph(vectors, k)[1], atol=2e-6
        )


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("count", [700, 2500])
def test_all_duplicates(backend, count):
    vectors = np.ones((count, 4), np.float32)
    options = {} if backend == "exact" else {"exact_limit": 0}
    graph = build_knn_graph(vectors, 6, backend=backend, **options)
    assert_contract(graph, vectors, 6)
    assert graph.similarity.min() > 1 - 1e-6
    assert measure_recall(vectors, graph) == 1.0
    if backend == "exact":
        assert graph.neighbour[0].tolist() == [1, 2, 3, 4, 5, 6]
        assert graph.neighbour[3].tolist() == [0, 1, 2, 4, 5, 6]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_hardly_any_points(backend, count):
    vectors = np.eye(3, 4, dtype=np.float32)[:count]
    graph = build_knn_graph(vectors, 3, backend=backend)
    assert graph.neighbour.shape == (count, 3)
    assert graph.neighbour.max(initial=-1) == (1 if count == 2 else -1)
    assert measure_recall(vectors, graph) == 1.0


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_bad_vector_is_named(value):
    vectors = np.ones((2000, 3), np.float32)
    vectors[1500] = value
    with pytest.raises(DataError, match="vector 1500 "):
        build_knn_graph(vectors, 3, backend="exact")


@pytest.mark.parametrize(
    "vectors", [np.ones(3), np.ones((2, 0)), np.array([["a", "b"]]), np.ones((2, 2, 2))]
)
def test_what_is_no_matrix_is_refused(vectors):
    with pytest.raises(DataError, match=r"\(n, d\)"):
        build_knn_graph(vectors, 1, backend="exact")


def test_bad_settings_are_refused(faces):
    for options in ({"backend": "annoy"}, {"k": 0}, {"efSerch": 3}, {"threads": 0}):
        with pytest.raises(ConfigError):
            build_knn_graph(faces, **options)
    index = build_index(faces, "exact", k=4)
    with pytest.raises(ConfigError, match=r"1 \.\. 4"):
        query_index(index, faces, slice(0, 3), 5)
    with pytest.raises(ConfigError, match="contiguous"):
        query_index(index, faces, slice(0, 6, 2))
    with pytest.raises(DataError, match="build it again"):
        query_index(index, faces[:-1], slice(0, 3))


def test_a_damaged_index_is_refused(faces, tmp_path):
    path = tmp_path / "index"
    build_index(faces[:50], "exact", k=4).save(path)
    with pytest.raises(DataError, match="shape"):
        load_index(path, faces)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="not a kNN index"):
        load_index(path, faces[:50])


@pytest.mark.parametrize("missing", ["nmslib", "faiss"])
def test_missing_library_says_what_to_do(missing, monkeypatch, faces):
    real = builtins.__import__

    def refuse(name, *rest, **named):
        if name == missing:
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(BackendError, match=r"pip install .* or exact"):
        build_knn_graph(faces, 3, backend=missing)


def test_unit_input_is_not_copied(faces, tmp_path):
    np.save(tmp_path / "v.npy", faces)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    unit, as_is = make_unit(mapped)
    assert as_is
    assert np.shares_memory(unit, mapped)


def test_measured_recall_counts_what_is_missing(faces):
    near, cosine = exact_graph(faces, 10)
    wrong = near.copy()
    wrong[:, 5:] = (near[:, :1] + 1500) % len(faces)
    graph = KnnGraph(wrong.astype(np.int64), cosine.astype(np.float32))
    assert measure_recall(faces, graph, sample=3000) == pytest.approx(0.5, abs=0.02)
