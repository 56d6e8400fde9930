"""The exact kNN graph by torch on a GPU: seconds, and its agreement with an exhaustive search.

    python -m tests.benchmarks.bench_gpu_knn [--rows 1000000] [--dimension 256] [--device auto]

One command of under five minutes on a GPU with 16 GiB. Rows are drawn with heavy-tailed identities.
The graph of 20,000 of them is compared bit by bit with backend `exact`; of the whole graph 500 rows
are compared with products in float64. Code is compiled before the clock starts.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from cdp.knn.graph import build_knn_graph
from cdp.knn.torch_search import propose_torch

K = 20


def draw_rows(count: int, dimension: int, device: str) -> np.ndarray:
    """Unit float32 rows of identities with one to 300 images each."""
    random = np.random.default_rng(0)
    sizes = np.minimum(np.ceil(random.pareto(1.1, count) * 6 + 0.05), 300).astype(np.int64)
    sizes = sizes[: np.searchsorted(np.cumsum(sizes), count) + 1]
    identity = torch.from_numpy(random.permutation(np.repeat(np.arange(len(sizes)), sizes)[:count]))
    generator = torch.Generator(device).manual_seed(0)
    centre = torch.randn(len(sizes), dimension, device=device, generator=generator)
    rows = centre[identity.to(device)]
    rows += 0.8 * torch.randn(count, dimension, device=device, generator=generator)
    return torch.nn.functional.normalize(rows, dim=1).cpu().numpy()


def measure_recall(rows: np.ndarray, neighbour: np.ndarray, device: str) -> float:
    """Share of 500 rows' true neighbours in the graph; equal to 1e-9 in float64 counts as true."""
    chosen = np.random.default_rng(1).choice(len(rows), 500, replace=False)
    cosine = torch.empty(500, len(rows), dtype=torch.float64)
    queries = torch.from_numpy(rows[chosen]).to(device, torch.float64)
    for low in range(0, len(rows), 50_000):
        part = torch.from_numpy(rows[low : low + 50_000]).to(device, torch.float64)
        cosine[:, low : low + 50_000] = (queries @ part.T).cpu()
    cosine[torch.arange(500), torch.from_numpy(chosen)] = -2
    kth = cosine.topk(K, 1).values[:, -1:]
    found = cosine.gather(1, torch.from_numpy(neighbour[chosen]))
    return float((found >= kth - 1e-9).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    rows = draw_rows(options.rows, options.dimension, device)
    few = rows[:20_000]
    ours, exact = (build_knn_graph(few, K, backend=name) for name in ("torch", "exact"))
    same = (ours.neighbour == exact.neighbour).all() and (ours.similarity == exact.similarity).all()
    print(f"{name}; {len(few)} rows: {'same bits as exact' if same else 'DIFFERS FROM exact'}")
    start = time.perf_counter()
    propose_torch(rows, K, device, 16)
    proposed = time.perf_counter() - start
    start = time.perf_counter()
    graph = build_knn_graph(rows, K, backend="torch", device=device)
    seconds = time.perf_counter() - start
    recall = measure_recall(rows, graph.neighbour, device)
    print(
        f"{len(rows)} x {rows.shape[1]}, k={K}: {seconds:.1f} s (candidates {proposed:.1f} s), "
        f"recall {recall:.6f} on 500 rows"
    )


if __name__ == "__main__":
    main()
