"""Consensus-Driven Propagation: pseudo-labels for unlabelled faces from a committee of embedders.

    from cdp import ConsensusClusterer
    label = ConsensusClusterer().fit_predict(embeddings)

The contract:
- Where numba could write compiled code nowhere, it is given a folder; see `cdp.numba_cache`.
- `dir(cdp)` and `__all__` list every public name; a name or a subpackage is imported on first use,
  so `import cdp` itself loads nothing.
- The same names can be imported from the modules that define them, listed in `_MODULE_OF`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cdp.numba_cache import choose_folder

if TYPE_CHECKING:
    import cdp.adaptation as adaptation
    import cdp.aggregation as aggregation
    import cdp.arrays as arrays
    import cdp.assignment as assignment
    import cdp.clusterer as clusterer
    import cdp.committee as committee
    import cdp.embedding as embedding
    import cdp.errors as errors
    import cdp.images as images
    import cdp.inputs as inputs
    import cdp.inspection as inspection
    import cdp.knn as knn
    import cdp.label_check as label_check
    import cdp.mediator as mediator
    import cdp.metrics as metrics
    import cdp.models as models
    import cdp.numba_cache as numba_cache
    import cdp.onnx_session as onnx_session
    import cdp.parameters as parameters
    import cdp.progress as progress
    import cdp.propagation as propagation
    import cdp.recognizer as recognizer
    import cdp.restoration as restoration
    import cdp.review as review
    import cdp.separation as separation
    import cdp.synthetic as synthetic
    import cdp.training as training
    import cdp.types as types
    from cdp.clusterer import ConsensusClusterer
    from cdp.errors import BackendError, CdpError, ConfigError, DataError, StageError
    from cdp.images.align import align_face
    from cdp.knn.graph import build_knn_graph
    from cdp.propagation.average_linkage import agglomerate
    from cdp.propagation.clustering import cluster_pairs
    from cdp.propagation.quality import estimate_quality
    from cdp.propagation.rising_threshold import propagate_labels
    from cdp.recognizer.fit import FaceSet, RecognizerSpec, train_recognizer
    from cdp.recognizer.gallery import Gallery
    from cdp.recognizer.recognizer import Recognizer
    from cdp.synthetic.identities import SyntheticFaces
    from cdp.training.plan import TrainingPlan

    __version__: str

choose_folder()

_MODULE_OF = {
    "BackendError": "cdp.errors",
    "CdpError": "cdp.errors",
    "ConfigError": "cdp.errors",
    "ConsensusClusterer": "cdp.clusterer",
    "DataError": "cdp.errors",
    "FaceSet": "cdp.recognizer.fit",
    "Gallery": "cdp.recognizer.gallery",
    "Recognizer": "cdp.recognizer.recognizer",
    "RecognizerSpec": "cdp.recognizer.fit",
    "StageError": "cdp.errors",
    "SyntheticFaces": "cdp.synthetic.identities",
    "TrainingPlan": "cdp.training.plan",
    "agglomerate": "cdp.propagation.average_linkage",
    "align_face": "cdp.images.align",
    "build_knn_graph": "cdp.knn.graph",
    "cluster_pairs": "cdp.propagation.clustering",
    "estimate_quality": "cdp.propagation.quality",
    # The one name defined in `pipelines`: users look for it here, and a run is a folder of files.
    # It is imported by name on first use, so no module of cdp imports pipelines.
    "open_run": "pipelines.results",
    "propagate_labels": "cdp.propagation.rising_threshold",
    "train_recognizer": "cdp.recognizer.fit",
}
"""Public name -> the module that defines it."""

__all__ = [
    "BackendError",
    "CdpError",
    "ConfigError",
    "ConsensusClusterer",
    "DataError",
    "FaceSet",
    "Gallery",
    "Recognizer",
    "RecognizerSpec",
    "StageError",
    "SyntheticFaces",
    "TrainingPlan",
    "__version__",
    "adaptation",
    "agglomerate",
    "aggregation",
    "align_face",
    "arrays",
    "assignment",
    "build_knn_graph",
    "cluster_pairs",
    "clusterer",
    "committee",
    "embedding",
    "errors",
    "estimate_quality",
    "images",
    "inputs",
    "inspection",
    "knn",
    "label_check",
    "mediator",
    "metrics",
    "models",
    "numba_cache",
    "onnx_session",
    "open_run",
    "parameters",
    "progress",
    "propagate_labels",
    "propagation",
    "recognizer",
    "restoration",
    "review",
    "separation",
    "synthetic",
    "train_recognizer",
    "training",
    "types",
]


def __getattr__(name: str) -> Any:
    """Import a public name, a subpackage or the version when it is first used."""
    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    elif name == "__version__":
        value = _read_version()
    elif name in __all__:
        value = import_module(f"cdp.{name}")
    else:
        raise AttributeError(f"module 'cdp' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(__all__)


def _read_version() -> str:
    """The installed version; "0+unknown" for a source tree that is not installed."""
    from importlib import metadata

    try:
        return metadata.version("cdp")
    except metadata.PackageNotFoundError:
        return "0+unknown"
