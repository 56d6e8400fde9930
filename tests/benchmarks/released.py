"""The published steps in plain numpy and Python, as far as they are compared and timed here.

Written for the benchmark from the description of the released system, with its way of working:
tiled comparisons, gathered copies of the embeddings, one Python object a node. Graphs follow this
project's contract (a row excludes itself, -1 pads), so that results can be compared number for
number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cdp.types import KnnGraph


def list_pairs(base: KnnGraph) -> np.ndarray:
    """(m, 2) unordered unique pairs of the base graph."""
    anchor = np.repeat(np.arange(len(base))[:, None], base.k, axis=1)
    real = (base.neighbour != -1) & (base.neighbour != anchor)
    both = np.sort(np.stack([anchor[real], base.neighbour[real]], axis=1), axis=1)
    return np.unique(both, axis=0)


def relate(graphs: Sequence[KnnGraph], pairs: np.ndarray) -> np.ndarray:
    """(m, N) 1 where a member's graph has the pair, by tiling the other row's number."""
    columns = []
    for graph in graphs[1:]:
        tiled = np.tile(pairs[:, 1:], (1, graph.k)), np.tile(pairs[:, :1], (1, graph.k))
        forth = (graph.neighbour[pairs[:, 0]] == tiled[0]).any(axis=1)
        back = (graph.neighbour[pairs[:, 1]] == tiled[1]).any(axis=1)
        columns.append((forth | back).astype(np.float32))
    return np.stack(columns, axis=1) if columns else np.empty((len(pairs), 0), np.float32)


def compare(views: Sequence[np.ndarray], pairs: np.ndarray) -> np.ndarray:
    """(m, N + 1) cosines, by gathering both rows of every pair."""
    columns = []
    for view in views:
        one, other = view[pairs[:, 0]], view[pairs[:, 1]]
        one = one / np.linalg.norm(one, axis=1, keepdims=True)
        other = other / np.linalg.norm(other, axis=1, keepdims=True)
        columns.append(np.einsum("ij,ij->i", one, other))
    return np.stack(columns, axis=1).astype(np.float32)


def count_common(graphs: Sequence[KnnGraph], pairs: np.ndarray) -> np.ndarray:
    """(m, N + 1) common neighbours, by comparing every combination; a list holds its row too."""
    columns = []
    for graph in graphs:
        lists = np.column_stack([np.arange(len(graph)), graph.neighbour])
        one = lists[pairs[:, 0]][:, :, None]
        other = lists[pairs[:, 1]][:, None, :]
        one = np.tile(one, (1, 1, lists.shape[1]))
        other = np.tile(other, (1, lists.shape[1], 1))
        columns.append(((one == other) & (one != -1) & (other != -1)).sum(axis=(1, 2)))
    return np.stack(columns, axis=1).astype(np.float32)


def summarise(graphs: Sequence[KnnGraph], pairs: np.ndarray) -> np.ndarray:
    """(m, 4(N + 1)) mean and variance of both rows' cosines, view after view."""
    columns = []
    for graph in graphs:
        cosine = np.where(graph.neighbour == -1, np.nan, graph.similarity.astype(np.float64))
        mean, variance = np.nanmean(cosine, axis=1), np.nanvar(cosine, axis=1)
        for row in (0, 1):
            columns += [mean[pairs[:, row]], variance[pairs[:, row]]]
    return np.stack(columns, axis=1).astype(np.float32)


def describe(
    views: Sequence[np.ndarray], graphs: Sequence[KnnGraph], pairs: np.ndarray, variant: str
) -> np.ndarray:
    """Features of the variants "paper" and "released", in the order of `name_features`."""
    last = count_common(graphs, pairs) if variant == "released" else summarise(graphs, pairs)
    return np.hstack([relate(graphs, pairs), compare(views, pairs), last])


class _Node:
    def __init__(self, name: int) -> None:
        self.name = name
        self.links: set[_Node] = set()


def _walk(nodes: set[_Node], max_size: int, score_of: dict, threshold: float | None) -> tuple:
    done, remain = [], set()
    nodes = set(nodes)
    while nodes:
        node = nodes.pop()
        group, queue, small = {node}, [node], True
        while queue:
            node = queue.pop(0)
            if threshold is None:
                near = set(node.links)
            else:
                near = {
                    other
                    for other in node.links
                    if score_of[min(node.name, other.name), max(node.name, other.name)] >= threshold
                }
            near -= group
            nodes -= near
            group |= near
            queue.extend(near)
            if len(group) > max_size or remain & near:
                small = False
                remain |= group
                break
        if small:
            done.append(group)
    return done, remain


def propagate(
    pairs: np.ndarray,
    scores: np.ndarray,
    count: int,
    *,
    threshold: float,
    max_size: int,
    step: float,
) -> np.ndarray:
    """(n,) labels by walking from node to node, level by level, without the released cap."""
    kept = scores > np.float64(threshold)
    score_of = {
        (one, other): score
        for (one, other), score in zip(
            pairs[kept].tolist(), scores[kept].astype(np.float64).tolist(), strict=True
        )
    }
    nodes = {name: _Node(name) for name in np.unique(pairs[kept]).tolist()}
    for one, other in score_of:
        nodes[one].links.add(nodes[other])
        nodes[other].links.add(nodes[one])
    groups, remain = _walk(set(nodes.values()), max_size, score_of, None)
    level = threshold
    while remain and level < 1.0:
        raised = level + (1.0 - level) * step
        level = min(raised if raised > level else float(np.nextafter(level, 2.0)), 1.0)
        more, remain = _walk(remain, max_size, score_of, level)
        groups += more
    label = np.full(count, -1, np.int64)
    clusters = sorted(sorted(node.name for node in group) for group in groups if len(group) > 1)
    for number, rows in enumerate(clusters):
        label[rows] = number
    return label


def make_network(width: int):
    """The released mediator: two hidden layers of three times the inputs, two outputs."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(width, 3 * width),
        nn.ReLU(),
        nn.Linear(3 * width, 3 * width),
        nn.ReLU(),
        nn.Linear(3 * width, 2),
    )


def _load_rows(features: np.ndarray, same: np.ndarray | None, shuffle: bool):
    from torch.utils.data import DataLoader, Dataset

    class Rows(Dataset):
        def __len__(self) -> int:
            return len(features)

        def __getitem__(self, row: int):
            return features[row], 0 if same is None else int(same[row])

    return DataLoader(Rows(), batch_size=1024, shuffle=shuffle)


def train_mediator(features: np.ndarray, same: np.ndarray, epochs: int):
    """SGD over a loader that fetches one row at a time."""
    import torch

    features = np.array(features)
    net = make_network(features.shape[1])
    optimizer = torch.optim.SGD(net.parameters(), 0.001, momentum=0.9, weight_decay=1e-4)
    criterion = torch.nn.CrossEntropyLoss()
    for _ in range(epochs):
        for inputs, truth in _load_rows(features, same, True):
            loss = criterion(net(inputs), truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


def score_pairs(net, features: np.ndarray) -> np.ndarray:
    """Probabilities through the same loader."""
    import torch

    features = np.array(features)
    parts = []
    for inputs, _ in _load_rows(features, None, False):
        with torch.no_grad():
            parts.append(torch.softmax(net(inputs), dim=1)[:, 1].numpy())
    return np.concatenate(parts)
