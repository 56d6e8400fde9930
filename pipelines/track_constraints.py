"""What the tracks of a run say about its unlabelled images, as constraints.

The contract:
- The same in `propagate` and in a review: from the tables `ingest/samples` and `embed/embeddings`.
- Tracks that the data set does not have, or that `propagate.tracks` leaves aside, say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cdp.review.constraints import Constraints
from pipelines.tables import read_vectors

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("track", "frame", "clip")


def find_track_constraints(
    samples: pd.DataFrame, views: Sequence[Path], *, seed: int
) -> Constraints:
    """Must-links and cannot-links of the tracks of some images.

    samples : rows of `ingest/samples`, the unlabelled ones.
    views : the table of embeddings of each member, over the same images in the same order.
    """
    from cdp.review.tracks import constrain_tracks

    if samples.track.isna().all():
        return Constraints(len(samples))
    track = samples.track.fillna(-1).to_numpy(np.int64)
    number = samples.frame.fillna(0).astype(np.int64).astype(str).str.zfill(12)
    name = samples["clip"].fillna("") + "/" + number
    frame = name.where(samples.frame.notna() & (track >= 0)).factorize(sort=True)[0]
    read = [partial(read_vectors, view, "embedding") for view in views]
    return constrain_tracks(track, frame, read, seed=seed)
