"""Consensus-Driven Propagation: pseudo-labels for faces from a committee that agrees."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdp.clusterer import ConsensusClusterer
    from cdp.propagation.rising_threshold import propagate_labels
    from cdp.recognizer.recognizer import Recognizer

__version__ = "0.1.0"
__all__ = ["ConsensusClusterer", "Recognizer", "open_run", "propagate_labels"]

_HOME = {
    "ConsensusClusterer": "cdp.clusterer",
    "Recognizer": "cdp.recognizer.recognizer",
    # The one name that lives in the plumbing: people look for it here, and a run is files. It is
    # looked up by name when used, so nothing in cdp imports pipelines; tests/test_house.py holds
    # this to be the only such name.
    "open_run": "pipelines.results",
    "propagate_labels": "cdp.propagation.rising_threshold",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that `import cdp` costs nothing."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'cdp' has no attribute {name!r}")
