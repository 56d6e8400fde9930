"""A map of the embeddings: unlabelled images as points of a plane, near where their vectors are.

The contract:
- Of many images a choice is drawn, `MOST` at most: whole clusters, and images without a label in
  their share. The choice and the places depend on input and seed alone.
- Places are by t-SNE (van der Maaten and Hinton 2008) of the cosines in the base view, as
  scikit-learn computes it. Neighbours stay neighbours; distances of far groups mean nothing.
- scikit-learn is a dependency already, and fast enough for `MOST` points; UMAP would bring two
  packages that follow numba's versions.
- The figure is one `<svg>`: a `<g>` a cluster, in a colour of its own, and a `<g>` of the images
  without a label. A script makes them selectable; without one the map can still be read.
"""

from __future__ import annotations

import numpy as np
from markupsafe import Markup

from cdp.types import UNLABELLED

MOST, LEAST = 1500, 10
"""Points drawn at most, and images below which a map says nothing."""
PERPLEXITY = 30.0
WIDTH, HEIGHT, MARGIN = 1000.0, 620.0, 18.0
NAMED = 14
"""Clusters with their number beside them, the largest on the map."""
GOLDEN_ANGLE = 137.508


def choose_rows(label: np.ndarray, seed: int, most: int = MOST) -> np.ndarray:
    """Ascending rows to draw: all, or whole clusters and a share of the images without a label.

    label : (n,) int64, -1 is none.
    """
    if len(label) <= most:
        return np.arange(len(label))
    random = np.random.default_rng(seed)
    alone = np.flatnonzero(label == UNLABELLED)
    singles = random.permutation(alone)[: most * len(alone) // len(label)]
    rows = np.flatnonzero(label != UNLABELLED)
    rank = random.permutation(int(label.max()) + 1)
    rows = rows[np.argsort(rank[label[rows]], kind="stable")]
    last = most - len(singles)
    whole = label[rows[last - 1]] if last < len(rows) and last > 0 else UNLABELLED
    taken = rows[:last]
    if whole != UNLABELLED and label[rows[last]] == whole and label[rows[0]] != whole:
        taken = taken[label[taken] != whole]
    return np.sort(np.concatenate([taken, singles]))


def place_rows(vectors: np.ndarray, seed: int) -> np.ndarray | None:
    """Places in the plane, (n, 2) float32; None for fewer than `LEAST` rows.

    vectors : (n, d) float32 of unit length.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    count = len(vectors)
    if count < LEAST:
        return None
    places = TSNE(
        metric="cosine", init="pca", random_state=seed, perplexity=min(PERPLEXITY, (count - 1) / 3)
    )
    with threadpool_limits(1):  # sums in one order: the same map every time
        return np.asarray(places.fit_transform(np.asarray(vectors, np.float32)), np.float32)


def draw_map(places: np.ndarray, label: np.ndarray) -> Markup:
    """The map as an `<svg>` element.

    places : (n, 2). label : (n,) int64 of the same rows; `data-point` counts these from 0.
    """
    x, y = _fit(places)
    groups, names = [], []
    order = np.argsort(label, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(label[order]) != 0])
    parts = np.split(order, starts[1:])
    named = sorted((p for p in parts if label[p[0]] != UNLABELLED), key=lambda p: -len(p))[:NAMED]
    for part in parts:
        dots = "".join(
            f'<circle data-point="{row}" cx="{x[row]:.1f}" cy="{y[row]:.1f}" r="4"/>'
            for row in part.tolist()
        )
        number = int(label[part[0]])
        colour = (
            "" if number == UNLABELLED else f' style="--hue: {number * GOLDEN_ANGLE % 360:.0f}"'
        )
        kind = "alone" if number == UNLABELLED else "cluster"
        groups.append(f'<g class="{kind}" data-cluster="{number}"{colour}>{dots}</g>')
    for part in named:
        middle = part[np.argmin(np.hypot(x[part] - x[part].mean(), y[part] - y[part].mean()))]
        names.append(f'<text x="{x[middle]:.1f}" y="{y[middle] - 8:.1f}">{label[middle]}</text>')
    return Markup(
        f'<svg class="map" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="group" '
        'aria-label="Map of the embeddings">'
        f'{"".join(groups)}<g class="names" aria-hidden="true">{"".join(names)}</g></svg>'
    )


def _fit(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places stretched to the margins of the figure."""
    low, high = places.min(axis=0), places.max(axis=0)
    span = np.maximum(high - low, 1e-9)
    size = np.array([WIDTH, HEIGHT]) - 2 * MARGIN
    fitted = (places - low) / span * size + MARGIN
    return fitted[:, 0], fitted[:, 1]
