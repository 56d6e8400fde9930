"""embed: samples -> unit vectors, one view a member, for the labelled and the unlabelled split.

The contract:
- Each part decodes its images once and embeds them with every member, so all views of a part are of
  the same pixels. A part whose files exist is not made again.
- The labelled split holds the identities that were kept for the mediator; see train.
- Where the labelled pictures are sharper than the pile's, copies of them, degraded until they look
  like the pile's, are embedded as the split `copies` (`pipelines.copies`).
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
from pipelines.copies import (
    APPEARANCE_TABLE,
    COPIES,
    COPY_STEP,
    choose_pictures,
    compare_pictures,
    degrade_copies,
    tabulate_gap,
)
from pipelines.data.dataset import Dataset
from pipelines.members import (
    find_origin,
    find_preprocessing,
    open_view,
    pack_preprocessing,
    reduce_to,
)
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
    facts |= _embed_copies(work, samples, members, origins, shown)
    dimensions = {m.name: d for m, d in zip(members, found[-1], strict=True)}
    ways = {m.name: way for m, way in zip(members, shown, strict=True) if way}
    if ways:
        facts["shown"] = {name: way.describe() for name, way in ways.items()}
        facts["preprocessing"] = {name: pack_preprocessing(way) for name, way in ways.items()}
    return {**facts, "dimensions": dimensions}


def _embed_copies(
    work: Work,
    samples: Any,
    members: tuple[MemberSettings, ...],
    origins: list[Path | None],
    shown: list[Preprocessing | None],
) -> dict[str, Any]:
    """Compare labelled pictures with the pile's; embed degraded copies where these are poorer."""
    compared = compare_pictures(work, samples)
    gap = compared[0] if compared else None
    work.write("appearance", tabulate_gap(gap))
    if compared is None or gap is None:
        return {}
    facts: dict[str, Any] = {
        "sharpness_gap": round(gap.sharpness, 3),
        "sharper_share": round(gap.sharper, 3),
        "gap": gap.describe(),
    }
    settings = work.config.embed
    if not (gap.is_wide or settings.degrade_labelled == "always"):
        return facts
    chosen, count = choose_pictures(samples, work.seed)
    jobs: list[tuple[Any, ...]] = []
    for copy in range(1, count + 1):
        for row in range(0, len(chosen), PART_SIZE):
            part = chosen.iloc[row : row + PART_SIZE]
            name = f"part-{len(jobs):05d}.parquet"
            targets = [
                work.path("embeddings", f"{COPIES}/{member.name}") / name for member in members
            ]
            jobs.append(
                (work.dataset, part.sample_id.to_numpy(), part.path.tolist(), copy, work.seed,
                 compared[1], members, origins, shown, targets, settings.reduce_px, settings.flip,
                 work.runtime.device)
            )  # fmt: skip
    for _ in work.engine.map(embed_copies_part, jobs, label="embed degraded copies"):
        pass
    return {**facts, COPIES: len(chosen) * count, "copies_of_each": count}


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
        _write_view(target, sample_id, vectors, norm)
        dimensions.append(vectors.shape[1])
    return dimensions


def embed_copies_part(
    dataset: Dataset,
    sample_id: np.ndarray,
    paths: list[str],
    copy: int,
    seed: int,
    appearance: np.ndarray,
    members: tuple[MemberSettings, ...],
    origins: list[Path | None],
    shown: list[Preprocessing | None],
    targets: list[Path],
    reduce_px: int | None,
    flip: bool,
    device: str,
) -> None:
    """Write one part of every view of the degraded copies that is not there yet."""
    if all(target.exists() for target in targets):
        return
    faces = degrade_copies(dataset, paths, sample_id, copy, seed, appearance, reduce_px)
    for member, origin, way, target in zip(members, origins, shown, targets, strict=True):
        assert origin is not None
        vectors, norm = open_view(dataset, member, origin, device, way).embed(faces, flip=flip)
        _check_vectors(vectors, member.name, paths)
        _write_view(target, sample_id + copy * COPY_STEP, vectors, norm)


def _write_view(target: Path, sample_id: np.ndarray, vectors: np.ndarray, norm: np.ndarray) -> None:
    columns = {"sample_id": sample_id, "embedding": vector_column(vectors), "norm": norm}
    write_table(target, columns, describe_embeddings(vectors.shape[1]))


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
    version=4,
    inputs=("ingest.samples", "train.history", "train.people"),
    outputs={"embeddings": describe_embeddings(0), "appearance": APPEARANCE_TABLE},
    reads=("committee", "embed"),
    files=list_model_files,
    borrows=list_borrowed_runs,
    run=run,
)
