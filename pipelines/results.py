"""The results of a run as DataFrames: `cdp.open_run("runs/default")`.

The contract:
- A table is read on first use, and once. Nothing is written.
- Images are identified by `sample_id` in every table.
- A stage that is not published is a StageError with the command that makes it.
"""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdp.errors import DataError, StageError
from cdp.types import UNLABELLED
from pipelines.decisions import CorrectionTable, Decision
from pipelines.invocation import format_command
from pipelines.store import RECORD, Published
from pipelines.verdict import Finding, reach_verdict

if TYPE_CHECKING:
    import networkx
    import pandas as pd

    from pipelines.data.dataset import Dataset

NEEDED = {
    ("ingest", "samples"): ("sample_id", "path", "split", "identity", "sha256", "copy_of", "clip"),
    ("propagate", "labels"): (
        "sample_id", "path", "pseudo_label", "cluster_size", "confidence", "representative",
    ),
    ("propagate", "clusters"): ("pseudo_label", "size", "expected_precision", "medoid_sample_id"),
}  # fmt: skip
"""Columns of a table that exports, review and this module read; other versions may lack some."""
SHOWN = 60
"""Most faces of one cluster in a notebook."""


def open_run(path: str | os.PathLike[str]) -> RunResults:
    """The published results of a run.

    path : the directory of the run, e.g. `runs/default`.

    Raises
    ------
    DataError
        There is no run at that path.
    """
    directory = Path(path)
    if not any(
        (directory / stage).is_dir() for stage in ("detect", "ingest", "embed", "propagate")
    ):
        near = [*directory.glob("[!.]*/ingest"), *directory.parent.glob("[!.]*/ingest")]
        raise DataError(
            f"no run at {directory}: expected a directory with ingest/, propagate/ and so on. "
            + (f"There is {', '.join(sorted(str(place.parent) for place in near))}"
               if near else f"Make one with: {format_command('run')}")
        )  # fmt: skip
    return RunResults(directory)


class RunResults:
    """The tables of one run, read when they are first used.

    Examples
    --------
    >>> run = open_run("runs/default")                               # doctest: +SKIP
    >>> run.clusters.sort_values("expected_precision").head()        # doctest: +SKIP
    >>> run.cluster(17).graph                                        # doctest: +SKIP
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __repr__(self) -> str:
        return f"open_run({str(self.directory)!r})"

    # -- tables

    @cached_property
    def samples(self) -> pd.DataFrame:
        """Every accepted image: sample_id, path, split, identity (if labelled), size in pixels."""
        return self.read("ingest", "samples")

    @cached_property
    def rejected(self) -> pd.DataFrame:
        """Every rejected image, with the reason."""
        return self.read("ingest", "rejected")

    @cached_property
    def truth(self) -> pd.DataFrame:
        """sample_id and true identity of unlabelled images, where the data set has them."""
        return self.read("ingest", "truth")

    @cached_property
    def labels(self) -> pd.DataFrame:
        """The pseudo-label of every unlabelled image; -1 is none."""
        return self.read("propagate", "labels")

    @cached_property
    def clusters(self) -> pd.DataFrame:
        """One row a pseudo-label: size, expected precision, weakest edge, medoid."""
        return self.read("propagate", "clusters")

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """Every candidate pair of unlabelled images with its probability."""
        return self.read("mediate", "pairs")

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """The evaluation: subject, protocol, metric, value, count."""
        return self.read("evaluate", "metrics")

    @cached_property
    def assignments(self) -> pd.DataFrame:
        """The unlabelled images that show a labelled person, with the person's name."""
        return self.read("propagate", "assignments")

    @cached_property
    def label_issues(self) -> pd.DataFrame:
        """The labelled images whose name is in doubt, and the name they seem to have."""
        return self.read("knn", "label_issues")

    @cached_property
    def verdict(self) -> list[Finding]:
        """How good the run is, what to distrust and why, and what to do next."""
        names = [path.name for path in self.directory.iterdir()]
        found = {name: self.find(name) for name in names}
        present = {name: stage for name, stage in found.items() if stage is not None}
        return reach_verdict(present, self.directory)

    @cached_property
    def corrections(self) -> pd.DataFrame:
        """The reviewers' decisions, in order; may be empty."""
        import pandas as pd

        names = list(Decision.__dataclass_fields__)
        rows = [vars(decision) for decision in CorrectionTable(self.directory).read()]
        return pd.DataFrame(rows, columns=names)

    @cached_property
    def thumbnails(self) -> Mapping[int, bytes]:
        """sample_id -> WebP file of the unlabelled image; empty for a run on features."""
        return self._read_thumbnails("thumbnails")

    @cached_property
    def labelled_thumbnails(self) -> Mapping[int, bytes]:
        """sample_id -> WebP file of the labelled image; empty for a run on features."""
        return self._read_thumbnails("labelled")

    @cached_property
    def rejected_thumbnails(self) -> Mapping[str, bytes]:
        """path -> WebP file of a rejected file that could be decoded; of a bounded number."""
        return self._read_thumbnails("rejected", key="path")

    def _read_thumbnails(self, name: str, key: str = "sample_id") -> dict[Any, bytes]:
        published = self.find("thumbnails")
        if published is None or not published.path(name).exists():
            return {}
        table = published.read(name)
        keys, images = table[key].to_pylist(), table["image"].to_pylist()
        return dict(zip(keys, images, strict=True))

    # -- stages and their tables

    def find(self, stage: str) -> Published | None:
        """The publication of a stage, or None."""
        return Published.open(stage, self.directory / stage)

    def manifest(self, stage: str) -> Mapping[str, Any]:
        """The manifest of a stage: fingerprint, facts, seconds, memory, environment."""
        return self._require(stage).manifest

    def read(self, stage: str, table: str, columns: list[str] | None = None) -> pd.DataFrame:
        """Any table: `read("embed", "embeddings/unlabelled/base")`."""
        published = self._require(stage)
        found = published.read(table, columns)
        wanted = NEEDED.get((stage, table), ()) if columns is None else ()
        missing = [name for name in wanted if name not in found.column_names]
        if missing:
            raise StageError(
                f"{published.path(table)} has no column {missing[0]}: another version of CDP made "
                f"it. Make it again with: {self.compose_command('--until', stage)}"
            )
        return found.to_pandas()

    def _require(self, stage: str) -> Published:
        published = self.find(stage)
        if published is None:
            raise StageError(
                f"{self.directory} has published no {stage}. Make it with: "
                f"{self.compose_command('--until', stage)}"
            )
        return published

    def compose_command(self, *arguments: str) -> str:
        """The command that brings this run up to date, with its config and settings.

        arguments : further ones, such as `--until`.
        """
        try:
            options = json.loads((self.directory / RECORD).read_text(encoding="utf-8"))["options"]
            return format_command("run", *map(str, options), *arguments)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return f"{format_command('run', *arguments)}, with the options of this run"

    def open_dataset(self, data_root: Path | None = None) -> Dataset:
        """The data set of this run, to read its images.

        data_root : the data root; None is the one recorded with the run.
        """
        from pipelines.data.dataset import Dataset
        from pipelines.data.manifest import DataManifest
        from pipelines.yaml_files import validate_settings

        path = self.directory / RECORD
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            manifest, root = record["data"], record["data_root"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StageError(
                f"cannot read {path}, the record of the run's data set. It is written again by: "
                f"{format_command('run', '--stage', 'all')}, with the options of this run"
            ) from error
        settings = validate_settings(DataManifest, manifest, source=str(path))
        if settings.kind == "synthetic":
            return Dataset(settings, None)
        place = data_root or (root and Path(root))
        if not place or not place.is_dir():
            raise DataError(f"the data root {place} is not a directory. Pass --data-root DIR")
        crops = None if settings.align is None else self._require("detect").directory
        return Dataset(settings, place.resolve(), crops=crops)

    # -- clusters

    def cluster(self, label: int) -> Cluster:
        """One cluster: its images, the pairs inside it, and its graph.

        Raises
        ------
        DataError
            There is no such pseudo-label.
        """
        last = len(self.clusters) - 1
        if not isinstance(label, int | np.integer) or not 0 <= label <= last:
            raise DataError(
                f"there is no cluster {label!r}: pseudo-labels go from 0 to {last}, -1 means none"
            )
        label = int(label)
        images = self.labels[self.labels.pseudo_label == label].copy()
        medoid = int(self.clusters.medoid_sample_id[label])
        members = set(images.sample_id)
        inside = self.pairs.source.isin(members) & self.pairs.target.isin(members)
        pairs = self.pairs[inside].sort_values("probability", ascending=False, kind="stable")
        distance = self._measure_distance(images.sample_id.to_numpy(), medoid)
        if distance is not None:
            images["distance"] = distance
            images = images.sort_values(["distance", "sample_id"])
        return Cluster(
            label,
            self.clusters.loc[label].to_dict(),
            images.reset_index(drop=True),
            pairs.reset_index(drop=True),
            {sample: self.thumbnails[sample] for sample in members & self.thumbnails.keys()},
        )

    def _measure_distance(self, sample_id: np.ndarray, medoid: int) -> np.ndarray | None:
        """1 - cosine to the medoid in the base view; None where the run has no views."""
        vectors = self.view_of(np.append(sample_id, medoid))
        if vectors is None:
            return None
        return np.round(np.clip(1 - vectors[:-1] @ vectors[-1], 0, 2), 4)

    def view_of(self, sample_id: np.ndarray) -> np.ndarray | None:
        """(n, d) float32 unit vectors of unlabelled images in the base view, or None."""
        view = self._base_view
        return None if view is None else view[1][np.searchsorted(view[0], sample_id)]

    @cached_property
    def _base_view(self) -> tuple[np.ndarray, np.ndarray] | None:
        from pipelines.tables import read_vectors

        published = self.find("embed")
        if published is None:
            return None
        base = published.manifest["ingredients"]["config"]["committee"]["base"]["name"]
        table = f"embeddings/unlabelled/{base}"
        ids = published.read(table, ["sample_id"])["sample_id"].to_numpy()
        return ids, read_vectors(published.path(table), "embedding")

    def compare(self, other: RunResults | str | os.PathLike[str]) -> Comparison:
        """The difference between this run's clusters and another's over the same images."""
        other = other if isinstance(other, RunResults) else open_run(other)
        return compare_labels(
            _name_labels(self.labels, self.samples), _name_labels(other.labels, other.samples)
        )


@dataclass(frozen=True)
class Cluster:
    """One cluster. A notebook displays its faces.

    facts : the row of `clusters`.
    images : rows of `labels`, nearest to the medoid first, with their distance (1 - cosine in the
        base view).
    pairs : candidate pairs inside the cluster, most probable first.
    """

    label: int
    facts: Mapping[str, Any]
    images: pd.DataFrame
    pairs: pd.DataFrame
    thumbnails: Mapping[int, bytes] = field(repr=False, default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        precision = self.facts["expected_precision"]
        known = "" if np.isnan(precision) else f", expected precision {precision:.3f}"
        return f"Cluster {self.label}: {len(self)} images, {len(self.pairs)} pairs{known}"

    @cached_property
    def graph(self) -> networkx.Graph:
        """Images as `sample_id`, candidate pairs as edges with `score`; bridges are marked.

        `graph.graph["bridges"]` lists the edges whose removal disconnects the graph, weakest first.
        """
        import networkx

        from cdp.propagation.rising_threshold import Propagation, to_networkx

        ids = np.sort(self.images.sample_id.to_numpy())
        count = len(ids)
        propagation = Propagation(np.zeros(count, np.int64), np.zeros(count, np.float32), -1.0, 0)
        ends = [np.searchsorted(ids, self.pairs[end].to_numpy()) for end in ("source", "target")]
        scores = self.pairs.probability.to_numpy()
        graph = to_networkx(np.stack(ends, axis=1), scores, propagation, 0)
        names = dict(enumerate(ids.tolist()))
        bridges = [(names[a], names[b], score) for a, b, score in graph.graph["bridges"]]
        graph = networkx.relabel_nodes(graph, names)
        graph.graph |= {"label": self.label, "bridges": bridges}
        return graph

    def _repr_html_(self) -> str:
        faces = []
        for row in self.images.head(SHOWN).itertuples():
            picture = self.thumbnails.get(row.sample_id)
            caption = html.escape(f"{row.path}, confidence {row.confidence:.2f}", quote=True)
            if picture is not None:
                data = base64.b64encode(picture).decode()
                faces.append(
                    f'<img alt="{caption}" title="{caption}" width="64" height="64" '
                    f'src="data:image/webp;base64,{data}">'
                )
        more = f" and {len(self) - SHOWN} more" if len(self) > SHOWN else ""
        return f"<p>{html.escape(repr(self))}</p><div>{''.join(faces)}{more}</div>"


@dataclass(frozen=True)
class Comparison:
    """The difference between two labellings of the same images.

    merged : clusters of the second run that contain at least two clusters of the first.
    split : clusters of the first run that were divided among at least two of the second.
    moved : images whose cluster in the second run is not the one that got most images of their old
        cluster (`others_there`). Cluster numbers of two runs are unrelated.
    same : number of clusters with exactly the same images in both.
    only_here, only_there : number of images that the other run does not have.
    """

    merged: pd.DataFrame
    split: pd.DataFrame
    moved: pd.DataFrame
    same: int
    only_here: int
    only_there: int

    def __repr__(self) -> str:
        text = (
            f"{self.same:,} clusters are the same, {len(self.merged):,} merged, "
            f"{len(self.split):,} split, {len(self.moved):,} images moved"
        )
        if self.only_here or self.only_there:
            text += f"; {self.only_here:,} images only here, {self.only_there:,} only there"
        return text


def _name_labels(labels: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """Labels with a column `key` that identifies the image in every run."""
    from pipelines.decisions import find_keys

    known = samples[["sample_id", "sha256"]]
    both = labels[["sample_id", "path", "pseudo_label"]].merge(known, on="sample_id")
    return both.assign(key=find_keys(both))


def compare_labels(here: pd.DataFrame, there: pd.DataFrame) -> Comparison:
    """Compare two labellings, tables of key, path and pseudo_label; see `Comparison`."""
    import pandas as pd

    both = here[["key", "path", "pseudo_label"]].merge(
        there[["key", "pseudo_label"]], on="key", suffixes=("", "_there")
    )
    old, new = "pseudo_label", "pseudo_label_there"
    labelled = both[(both[old] != UNLABELLED) & (both[new] != UNLABELLED)]
    cells = labelled.groupby([old, new]).size().rename("images").reset_index()
    # A single image counts as moved; a merge or split needs at least two images of each part.
    parts = cells[cells.images >= 2]

    def gather(by: str, other: str) -> pd.DataFrame:
        rows = [
            (label, group[other].tolist(), group.images.tolist())
            for label, group in parts.groupby(by)
            if len(group) > 1
        ]
        return pd.DataFrame(rows, columns=[by, "clusters", "images"])

    merged = gather(new, old).rename(columns={new: "cluster_there", "clusters": "clusters_here"})
    split = gather(old, new).rename(columns={old: "cluster_here", "clusters": "clusters_there"})
    main = cells.sort_values(["images", new], ascending=[False, True]).drop_duplicates(old)
    went = dict(zip(main[old], main[new], strict=True))
    both["others_there"] = both[old].map(went).fillna(UNLABELLED).astype(np.int64)
    gone = (both[old] != UNLABELLED) & (both[new] != both["others_there"])
    came = (both[old] == UNLABELLED) & (both[new] != UNLABELLED)
    moved = both[gone | came].rename(columns={old: "cluster_here", new: "cluster_there"})
    sizes_here, sizes_there = here[old].value_counts(), there[old].value_counts()
    whole = (cells.images == cells[old].map(sizes_here)) & (
        cells.images == cells[new].map(sizes_there)
    )
    return Comparison(
        merged,
        split,
        moved[["path", "cluster_here", "cluster_there", "others_there"]].reset_index(drop=True),
        int(whole.sum()),
        len(here) - len(both),
        len(there) - len(both),
    )
