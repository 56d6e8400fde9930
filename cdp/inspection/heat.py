"""Heat maps: the cells of a network's map that carry the match of two vectors.

Source: Grad-CAM (Selvaraju et al. 2017) of the cosine to a reference vector.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from cdp.errors import DataError
from cdp.images.degradation import DEGRADATIONS, degrade
from cdp.models import Backbone


def map_attention(
    backbone: Backbone,
    images: np.ndarray,
    reference: np.ndarray | None = None,
    *,
    early: bool = True,
) -> np.ndarray:
    """Heat of each pixel: how much its cell adds to the cosine to a reference.

    Parameters
    ----------
    backbone : Backbone
        In `eval` mode; its weights get no gradient.
    images : (n, s, s, 3) uint8, RGB
        Aligned faces, a page of them: all are computed at once.
    reference : (n, d) float or None
        The vector that each face is compared with, another picture's of the person for instance;
        None is that of its mirror image.
    early : bool
        On the last map but one, which has more cells; else on the last.

    Returns
    -------
    heat : (n, p, p) float32 in 0..1, p the backbone's input side; 1 is each face's hottest pixel, 0
        everywhere where no cell adds anything.
    """
    device = next(backbone.parameters()).device
    pixels = torch.from_numpy(np.array(images)).to(device)
    seeds = torch.zeros(len(pixels), dtype=torch.int64, device=device)
    side_px = backbone.spec.input_px
    faces = degrade(pixels, seeds, DEGRADATIONS["none"], side_px)
    if reference is None:
        with torch.no_grad():
            goal = backbone(faces.flip(3))
    else:
        goal = torch.as_tensor(np.asarray(reference, dtype=np.float32), device=device)
    if goal.shape != (len(faces), backbone.spec.embedding_dim):
        raise DataError(
            f"a reference ({len(faces)}, {backbone.spec.embedding_dim}) expected, got "
            f"{tuple(goal.shape)}"
        )
    with torch.enable_grad():
        features = backbone.extract(faces.requires_grad_(), early=early)
        seen = features.early_map if early else features.map
        assert seen is not None
        cosine = functional.cosine_similarity(features.embedding, goal).sum()
        (gradient,) = torch.autograd.grad(cosine, seen)
    heat = (gradient.mean((2, 3), keepdim=True) * seen.detach()).sum(1, keepdim=True).clamp(min=0)
    heat = functional.interpolate(heat, size=(side_px, side_px), mode="bilinear")[:, 0]
    largest = heat.amax((1, 2), keepdim=True)
    scaled: np.ndarray = (heat / largest.clamp(min=1e-12)).cpu().numpy()
    return scaled
