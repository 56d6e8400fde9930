"""Restoration: a face of a few pixels becomes one of four times the side.

- `network.py`: the two generators, the two-headed discriminator, and their files
- `training.py`: `train_restorer` on sharp faces
- `embedder.py`: an embedder that sees restored faces
"""

from cdp.restoration.embedder import RestoringEmbedder
from cdp.restoration.network import (
    Restorer,
    build_restorer,
    load_restorer,
    restore_faces,
    save_restorer,
)
from cdp.restoration.training import RestorationPlan, train_restorer

__all__ = [
    "RestorationPlan",
    "Restorer",
    "RestoringEmbedder",
    "build_restorer",
    "load_restorer",
    "restore_faces",
    "save_restorer",
    "train_restorer",
]
