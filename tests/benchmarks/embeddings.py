"""Seeded face-like embeddings for benchmarks and tests: several views of the same images.

The contract:
- Identities have heavy-tailed sizes: many have one image, some with hundreds.
- Some identities are look-alikes of another one; an image's noise is partly shared by all views
  (pose, blur), partly each view's own, and of varying strength from image to image.
- The same seed and count give the same arrays; rows come in random order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def draw_views(
    count: int, dimensions: Sequence[int] = (256,) * 5, *, seed: int = 0, noise: float = 0.8
) -> tuple[list[np.ndarray], np.ndarray]:
    """Draw unit float32 views, one (count, d) array a dimension, and the (count,) int64 truth."""
    generator = np.random.default_rng(seed)
    sizes: list[int] = []
    total, largest = 0, min(300, 5 + count // 50)
    while total < count:
        size = int(min(np.ceil(generator.pareto(1.1) * 6 + 0.05), largest))
        sizes.append(min(max(size, 1), count - total))
        total += sizes[-1]
    identity = np.repeat(np.arange(len(sizes)), sizes)
    generator.shuffle(identity)
    identities, latent = len(sizes), 64
    centre = generator.standard_normal((identities, latent)).astype(np.float32)
    alike = generator.random(identities) < 0.15
    model = generator.integers(0, identities, identities)
    centre[alike] = 0.8 * centre[model[alike]] + 0.6 * centre[alike]
    strength = noise * np.exp(0.35 * generator.standard_normal((count, 1))).astype(np.float32)
    shared = generator.standard_normal((count, latent)).astype(np.float32)
    views = []
    for dimension in dimensions:
        own = generator.standard_normal((count, latent)).astype(np.float32)
        hidden = centre[identity] + strength * (0.6 * shared + 0.8 * own)
        lift = generator.standard_normal((latent, dimension)).astype(np.float32)
        view = hidden @ lift
        view += 1.5 * generator.standard_normal(view.shape, dtype=np.float32)
        view /= np.linalg.norm(view, axis=1, keepdims=True)
        views.append(view)
    return views, identity
