"""embed: samples -> unit vectors, one view a member, for the labelled and the unlabelled split.

The contract:
- Each part decodes its images once and embeds them with every member, so all views of a part are of
  the same pixels. A part whose files exist is not made again.
- The labelled split holds the identities that were kept for the mediator; see train.
- Rows of a table are in the order of `sample_id`; vectors are unit length, NaN is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cdp.errors import DataError
from cdp.images.preprocessing import Preprocessing
from pipelines.config import MemberSettings, RunConfig
from pipelines.data.dataset import Dataset
from pipelines.members import find_origin, find_preprocessing, open_view, reduce_to
from pipelines.stage import Stage, Work
from pipelines.tables import SPLITS, vector_column, write_table

PART_SIZE = 512
"""Images a part."""
FEATURE_PART_SIZE = 16384
"""Ready vectors a part: they are only read and scaled."""


def describe_embeddings(dimension: int) -> pa.Schema:
    """The table of one view; dimension 0 stands for any."""
    return pa.schema(
        [
            ("sample_id", pa.int64()),
            ("embedding", pa.list_(pa.float32(), dimension)),
            ("norm", pa.float32()),
        ]
    )


def run(work: Work) -> Mapping[str, Any]:
    samples = work.read("ingest.samples").to_pandas()
    samples = samples[~samples.identity.isin(_list_trained_identities(work))]
    members = work.config.committee.all
    origins = [find_origin(work, member) for member in members]
    shown = [
        find_preprocessing(work, member, origin)
        for member, origin in zip(members, origins, strict=True)
    ]
    parts: list[tuple[Any, ...]] = []
    size = FEATURE_PART_SIZE if work.dataset.kind == "features" else PART_SIZE
    facts: dict[str, Any] = {}
    for split in SPLITS:
        chosen = samples[samples.split == split]
        facts[split] = len(chosen)
        for number, row in enumerate(range(0, len(chosen), size)):
            part = chosen.iloc[row : row + size]
            name = f"part-{number:05d}"
            targets = [
                work.path("embeddings", f"{split}/{member.name}").joinpath(f"{name}.parquet")
                for member in members
            ]
            parts.append(
                (work.dataset, split, part.row.to_numpy(), part.sample_id.to_numpy(),
                 part.path.tolist(), members,
                 origins, shown, targets, work.config.embed.reduce_px, work.config.embed.flip,
                 work.runtime.device)
            )  # fmt: skip
    found = list(work.engine.map(embed_part, parts, label="embed"))
    dimensions = {m.name: d for m, d in zip(members, found[-1], strict=True)}
    described = {m.name: way.describe() for m, way in zip(members, shown, strict=True) if way}
    return {**facts, "dimensions": dimensions, **({"shown": described} if described else {})}


def _list_trained_identities(work: Work) -> list[str]:
    """Labelled identities the committee was trained on; none when that is all of them."""
    if "train" not in work.upstream:
        return []
    people = work.read("train.people").to_pandas()
    trained = people[people.role == "committee"].identity
    return [] if len(trained) == len(people) else list(trained)


def embed_part(
    dataset: Dataset,
    split: str,
    rows: np.ndarray,
    sample_id: np.ndarray,
    paths: list[str],
    members: tuple[MemberSettings, ...],
    origins: list[Path | None],
    shown: list[Preprocessing | None],
    targets: list[Path],
    reduce_px: int | None,
    flip: bool,
    device: str,
) -> list[int]:
    """Write one part of every view that is not there yet; return the dimension of each view."""
    import pyarrow.parquet as pq

    dimensions = []
    faces = None
    for member, origin, way, target in zip(members, origins, shown, targets, strict=True):
        if target.exists():
            schema = pq.read_schema(target)
            dimensions.append(schema.field("embedding").type.list_size)
            continue
        if member.features is not None:
            features = dataset.read_features(split, member.features)[rows]
            vectors, norm = _normalise(np.asarray(features, np.float32), member.name, paths)
        else:
            if faces is None:
                faces = reduce_to(dataset.read_faces(paths), reduce_px)
            assert origin is not None
            embedder = open_view(dataset, member, origin, device, way)
            vectors, norm = embedder.embed(faces, flip=flip)
            _check_vectors(vectors, member.name, paths)
        write_table(
            target,
            {"sample_id": sample_id, "embedding": vector_column(vectors), "norm": norm},
            describe_embeddings(vectors.shape[1]),
        )
        dimensions.append(vectors.shape[1])
    return dimensions


def _normalise(features: np.ndarray, name: str, paths: list[str]) -> tuple[np.ndarray, np.ndarray]:
    norm = np.linalg.norm(features, axis=1)
    _check_vectors(norm[:, None], name, paths)
    if not norm.all():
        raise DataError(f"view {name}: the embedding of {paths[int(norm.argmin())]} is all zeros")
    return features / norm[:, None], norm


def _check_vectors(vectors: np.ndarray, name: str, paths: list[str]) -> None:
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise DataError(
            f"view {name}: the embedding of {paths[int(finite.argmin())]} holds NaN or infinity. "
            "Train that member again (--stage train --force) or check its file"
        )


def list_model_files(config: RunConfig) -> tuple[str, ...]:
    """The ONNX files, checkpoints and restorers that the committee names."""
    return tuple(
        str(file)
        for member in config.committee.all
        for file in (member.onnx or member.checkpoint, member.restore)
        if file
    )


def list_borrowed_runs(config: RunConfig) -> tuple[str, ...]:
    """The runs whose recognizers the committee names."""
    return tuple(member.recognizer for member in config.committee.all if member.recognizer)


STAGE = Stage(
    name="embed",
    version=3,
    inputs=("ingest.samples", "train.history", "train.people"),
    outputs={"embeddings": describe_embeddings(0)},
    reads=("committee", "embed"),
    files=list_model_files,
    borrows=list_borrowed_runs,
    run=run,
)
