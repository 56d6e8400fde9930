"""The faces of LFW as `bench_methods --faces DIR` reads them, with pseudo-labels and a teacher.

    python -m tests.benchmarks.lfw_faces --out DIR [--px 24] [--teacher edgeface_xs]

The split is that of `data_manifests/lfw.yaml`, its images below `CDP_DATA_ROOT`. Pseudo-labels are
those of `ConsensusClusterer` on the vectors of five networks at 24 px (`lfw_features`), its scorer
fitted on the labelled people of the split; no identity of an unlabelled image is read for them. The
teacher sees the faces at full size.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from tests.benchmarks.bench_pseudo_labels import read_release

SPLITS = ("labelled", "unlabelled", "evaluation")


def read_views(root: Path) -> tuple[list[np.ndarray], dict[str, int]]:
    """The released vectors, and the row of each image by its name."""
    views = read_release(root)[0]
    listed = [
        line
        for half in ("labeled", "unlabeled")
        for line in (root / half / "list.txt").read_text().split("\n")
        if line
    ]
    return views, {Path(name).name: row for row, name in enumerate(listed)}


def cluster(
    views: list[np.ndarray], rows: dict[str, np.ndarray], identity: np.ndarray
) -> np.ndarray:
    """Pseudo-labels of the unlabelled rows."""
    from cdp.clusterer import ConsensusClusterer

    model = ConsensusClusterer(backend="exact", random_state=0)
    model.fit(
        [view[rows["unlabelled"]] for view in views],
        labelled_views=[view[rows["labelled"]] for view in views],
        labelled_ids=identity,
    )
    return model.labels_


def main() -> None:
    """Write the arrays and say how good the pseudo-labels are."""
    from cdp.images.degradation import reduce_faces
    from cdp.metrics.clustering import score_bcubed, score_pairwise
    from pipelines.data.dataset import Dataset

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--px", type=int, default=24, help="side that the recognizer reads")
    parser.add_argument("--teacher", help="a network of `onnx/`; none by default")
    options = parser.parse_args()
    root = Path(os.environ["CDP_DATA_ROOT"])
    dataset = Dataset.open(Path("data_manifests/lfw.yaml"), root)
    views, row_of = read_views(root / "lfw_features")
    options.out.mkdir(parents=True, exist_ok=True)
    rows, identity = {}, {}
    for split in SPLITS:
        entries = [entry for entry in dataset.list_entries() if entry.split == split]
        names = [entry.path for entry in entries]
        rows[split] = np.array([row_of[Path(name).name] for name in names])
        people = [Path(name).parent.name for name in names]
        identity[split] = np.unique(people, return_inverse=True)[1]
        faces = dataset.read_faces(names)
        if options.teacher:
            vectors = embed(root / "onnx" / f"{options.teacher}.onnx", faces)
            np.save(options.out / f"{split}_teacher.npy", vectors)
        size_px = faces.shape[1] if split == "evaluation" else 2 * options.px
        np.save(options.out / f"{split}_images.npy", reduce_faces(faces, size_px))
    label = cluster(views, rows, identity["labelled"])
    for name, score in (("pairwise", score_pairwise), ("BCubed", score_bcubed)):
        print(
            name,
            "P, R, F:",
            *(f"{100 * value:.1f}" for value in score(identity["unlabelled"], label)),
        )
    identity["unlabelled"] = label
    for split in SPLITS:
        np.save(options.out / f"{split}_identity.npy", identity[split])
    print({split: len(rows[split]) for split in SPLITS})


def embed(path: Path, faces: np.ndarray) -> np.ndarray:
    """A ready network's unit vectors of faces."""
    from cdp.embedding import OnnxEmbedder

    model = OnnxEmbedder(path.read_bytes(), threads=1, name=path.stem)
    return np.concatenate(
        [model.embed(faces[at : at + 512])[0] for at in range(0, len(faces), 512)]
    )


if __name__ == "__main__":
    main()
