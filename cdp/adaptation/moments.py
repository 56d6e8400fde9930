"""Adaptive batch normalisation: the running moments of a network anew, from unlabelled faces.

Source: Li et al. 2018 (AdaBN): the statistics of a batch normalisation belong to the domain, the
weights to the task. Only running means and variances change; nothing is trained.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from cdp.errors import DataError
from cdp.images.degradation import DEGRADATIONS, degrade
from cdp.models import Backbone
from cdp.training.plan import resolve_device


def adapt_moments(
    backbone: Backbone, images: np.ndarray, *, batch_size: int = 256, device: str = "auto"
) -> None:
    """Set the batch normalisations' moments to those of these images, in place.

    One pass in the images' order: each normalisation sees what the ones before it give in training
    mode, and averages the moments of all batches alike.

    Parameters
    ----------
    backbone : Backbone
        Left in `eval` mode on the CPU.
    images : (n, s, s, 3) uint8, RGB
        Aligned faces as the cameras deliver them, unlabelled; about 2,000 or more are steady.
    batch_size : int
        The last batch is left out where it is smaller, unless it is the only one.
    device : str
        "auto", "cpu", "cuda", ...

    Raises
    ------
    DataError
        Fewer than 2 images.
    """
    if len(images) < 2:
        raise DataError(f"2 images or more expected to adapt to, got {len(images)}")
    where = resolve_device(device)
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    before = [module.momentum for module in norms]
    backbone.to(where).train()
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # torch's cumulative average: all batches count alike
    try:
        with torch.no_grad():
            for start in range(0, len(images), batch_size):
                part = images[start : start + batch_size]
                if len(part) == batch_size or start == 0:
                    backbone(prepare_faces(part, backbone.spec.input_px, where))
    finally:
        for module, momentum in zip(norms, before, strict=True):
            module.momentum = momentum
        backbone.cpu().eval()


def prepare_faces(images: np.ndarray, size_px: int, device: torch.device) -> Tensor:
    """Faces as the network reads them: (n, s, s, 3) uint8 to (n, 3, px, px) float in [-1, 1]."""
    pixels = torch.from_numpy(np.array(images)).to(device)
    seeds = torch.zeros(len(pixels), dtype=torch.int64, device=device)
    return degrade(pixels, seeds, DEGRADATIONS["none"], size_px)
