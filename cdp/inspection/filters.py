"""Places of filters: where each channel of a network's map responds most, over many faces.

Source: the average filter response and its spreadness of Yin et al. 2019: the mean place of a
filter's peak, and how far the places of all filters lie apart.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from cdp.errors import DataError
from cdp.images.degradation import DEGRADATIONS, degrade
from cdp.models import Backbone


class FilterPlaces(NamedTuple):
    """Places of c filters; lengths are shares of the face's side.

    place : (c, 2) float64, mean y and x of the peak in 0..1; NaN for a filter that never responds
    spread : (c, 2) float64, standard deviations of y and x over the faces
    response : (c, h, w) float64, the mean response, each filter's largest cell 1
    spreadness : float, mean distance of the filters' places from their centre
    """

    place: np.ndarray
    spread: np.ndarray
    response: np.ndarray
    spreadness: float


def locate_filters(
    backbone: Backbone, images: np.ndarray, *, early: bool = True, batch_size: int = 256
) -> FilterPlaces:
    """Find where each filter looks.

    Parameters
    ----------
    backbone : Backbone
        On any device, in `eval` mode.
    images : (n, s, s, 3) uint8, RGB
        Aligned faces; some hundreds give steady places.
    early : bool
        Filters of the last map but one, which has more cells; else of the last.

    Raises
    ------
    DataError
        No images.
    """
    if not len(images):
        raise DataError("faces expected to locate filters with, got none")
    device = next(backbone.parameters()).device
    peaks, live = [], []
    total = np.zeros(())
    for start in range(0, len(images), batch_size):
        pixels = torch.from_numpy(np.array(images[start : start + batch_size])).to(device)
        seeds = torch.zeros(len(pixels), dtype=torch.int64, device=device)
        faces = degrade(pixels, seeds, DEGRADATIONS["none"], backbone.spec.input_px)
        with torch.no_grad():
            features = backbone.extract(faces, early=early)
        seen = features.early_map if early else features.map
        assert seen is not None
        magnitude = seen.abs().cpu().double()
        flat = magnitude.flatten(2)
        peaks.append(flat.argmax(2).numpy())
        live.append((flat.amax(2) > 0).numpy())
        total = total + magnitude.sum(0).numpy()
    rows, columns = magnitude.shape[2:]
    responds = np.concatenate(live)
    peak = np.concatenate(peaks)
    y, x = np.divmod(peak, columns)
    where = np.stack([(y + 0.5) / rows, (x + 0.5) / columns], 2)
    count = responds.sum(0)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        place = (where * responds[:, :, None]).sum(0) / count
        spread = np.sqrt(((where - place) ** 2 * responds[:, :, None]).sum(0) / count)
    largest = total.max((1, 2), keepdims=True)
    response = total / np.maximum(largest, 1e-12)
    known = place[count[:, 0] > 0]
    apart = np.linalg.norm(known - known.mean(0), axis=1).mean() if len(known) else np.nan
    return FilterPlaces(place, spread, response, float(apart))
