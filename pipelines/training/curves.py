"""Training curves for TensorBoard, beside the history table.

The contract:
- One event file a model, written again from the whole history after every epoch: after a restart a
  curve has no gap and no point twice.
- `tensorboard --logdir runs` shows them while a training runs; nothing in the pipeline reads them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

CURVES = ("loss", "learning_rate", "accuracy")


def write_curves(directory: Path, history: Iterable[Mapping[str, float]]) -> None:
    """Write the curves of one training into a directory, which is emptied first.

    history : records with the keys of `CURVES` and `step`.
    """
    from tensorboardX import SummaryWriter

    shutil.rmtree(directory, ignore_errors=True)
    with SummaryWriter(str(directory)) as writer:
        for record in history:
            for name in CURVES:
                writer.add_scalar(name, record[name], int(record["step"]))
