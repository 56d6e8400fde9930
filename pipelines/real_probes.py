"""Evaluation on real probes: people enrolled from their photos, probes of them and of others.

The contract:
- The manifest's `evaluation: {gallery, probes}` names both folders. A probe whose person has no
  gallery image is unknown. Gallery people may be labelled ones: that is how a system is used.
- Probes are embedded as they came, in buckets of their shorter side; nothing reduces them further.
- Rows are `(subject, protocol, metric, value, count, low, high)`, the protocol `probes 8..12px` or
  `probes all`: rank-k of known people; TAR@FAR of a probe against one enrolled person and
  `threshold@far`, the cosine of that rate (`cdp.metrics.claims`); with unknown people TPIR@FPIR and
  `threshold@fpir`, the cosine above which at most that share of unknown people is taken for
  somebody.
- Subjects are the run's recognizers and the committee's ONNX models, which compete at each size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cdp.errors import DataError
from cdp.images.preprocessing import Preprocessing
from pipelines.data.dataset import Dataset
from pipelines.members import find_origin, find_preprocessing, open_embedder
from pipelines.stage import Work

EDGES_PX = (8, 12, 16, 24, 32, 48, 64)
PART_SIZE = 512
Row = tuple[str, str, str, float, int, float, float]
Subjects = Mapping[str, tuple[Path, Preprocessing | None]]


def name_bucket(side_px: int) -> str:
    """The bucket of a shorter side: "below 8px", "8..12px", ..., "64px and more"."""
    if side_px < EDGES_PX[0]:
        return f"below {EDGES_PX[0]}px"
    if side_px >= EDGES_PX[-1]:
        return f"{EDGES_PX[-1]}px and more"
    number = int(np.searchsorted(EDGES_PX, side_px, side="right"))
    return f"{EDGES_PX[number - 1]}..{EDGES_PX[number]}px"


def list_subjects(work: Work, models: Mapping[str, Path]) -> Subjects:
    """The recognizers of the run, and the committee's ONNX models where the settings ask for it."""
    subjects: dict[str, tuple[Path, Preprocessing | None]] = {
        name: (path, None) for name, path in models.items()
    }
    for member in work.config.committee.all if work.config.evaluate.embedders else ():
        origin = find_origin(work, member) if member.onnx is not None else None
        if origin is not None:
            subjects[member.name] = (origin, find_preprocessing(work, member, origin))
    return subjects


def score_real_probes(work: Work, samples: Any, models: Mapping[str, Path]) -> list[Row]:
    """Every metric of every subject at every size of probe.

    samples : table `ingest/samples`. models : name -> file of the run's recognizers.

    Raises
    ------
    DataError
        No probe, or no probe of a person in the gallery.
    """
    gallery, probes = _pick_images(work.dataset, samples)
    people = np.concatenate([gallery.identity, probes.identity])
    code = np.unique(people.astype(str), return_inverse=True)[1]
    names, wanted = code[: len(gallery)], code[len(gallery) :]
    if not np.isin(wanted, names).any():
        raise DataError(
            "no probe shows a person of the gallery: folders of evaluation.probes must be named as "
            "those of evaluation.gallery"
        )
    side = np.minimum(probes.width, probes.height).to_numpy()
    buckets = np.array([name_bucket(each) for each in side.tolist()])
    rows: list[Row] = []
    for subject, (path, shown) in list_subjects(work, models).items():
        enrolled = _embed(work, gallery.path.tolist(), subject, path, shown)
        seen = _embed(work, probes.path.tolist(), subject, path, shown)
        for bucket, chosen in _list_buckets(buckets, side):
            for score in _score(work, seen, wanted, chosen, enrolled, names):
                low, high = score.interval()
                rows.append((subject, f"probes {bucket}", score.metric, score.value, score.count,
                             low, high))  # fmt: skip
    return rows


def _pick_images(dataset: Dataset, samples: Any) -> tuple[Any, Any]:
    settings = dataset.manifest.evaluation
    assert settings is not None
    gallery = samples[samples.path.str.startswith(f"{settings.gallery}/")]
    gallery = gallery[gallery.identity.notna()]
    probes = samples[samples.path.str.startswith(f"{settings.root}/")]
    probes = probes[(probes.split == "evaluation") & probes.identity.notna()]
    for name, images in (("gallery", gallery), ("probes", probes)):
        if not len(images):
            raise DataError(f"evaluation.{name}: no image of a person could be used")
    return gallery, probes


def _list_buckets(buckets: np.ndarray, side: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(name, rows) of all probes, then of each bucket, small ones first."""
    yield "all", np.arange(len(buckets))
    first = np.unique(buckets, return_index=True)
    for name in sorted(first[0], key=lambda name: int(side[buckets == name].min())):
        yield str(name), np.flatnonzero(buckets == name)


def _embed(
    work: Work, paths: list[str], subject: str, path: Path, shown: Preprocessing | None
) -> np.ndarray:
    parts = [
        (work.dataset, paths[row : row + PART_SIZE], path, shown, work.runtime.device)
        for row in range(0, len(paths), PART_SIZE)
    ]
    label = f"evaluate embeds with {subject}"
    return np.concatenate(list(work.engine.map(embed_faces_part, parts, label=label)))


def embed_faces_part(
    dataset: Dataset, paths: list[str], path: Path, shown: Preprocessing | None, device: str
) -> np.ndarray:
    """Unit vectors of some faces as they are, one of a face and its mirror image."""
    vectors: np.ndarray = open_embedder(path, device, shown).embed(
        dataset.read_faces(paths), flip=True
    )[0]
    return vectors


def _score(
    work: Work,
    seen: np.ndarray,
    wanted: np.ndarray,
    chosen: np.ndarray,
    enrolled: np.ndarray,
    names: np.ndarray,
) -> Iterator[Any]:
    """The scores of one subject on some probes."""
    from cdp.metrics import protocols
    from cdp.metrics.claims import score_claims
    from cdp.metrics.identification import identify
    from cdp.metrics.verification import threshold_at_far

    settings = work.config.evaluate
    resamples = protocols.Resamples(wanted, settings.draws, work.seed)
    mated = chosen[np.isin(wanted[chosen], names)]
    if len(mated):
        closed = identify(seen[mated], wanted[mated], enrolled, names)
        yield from protocols.score_ranks(closed, mated, resamples, settings.ranks)
    yield from score_claims(
        seen[chosen], wanted[chosen], chosen, enrolled, names, resamples, settings.far
    )
    if 0 < len(mated) < len(chosen):
        opened = identify(seen[chosen], wanted[chosen], enrolled, names)
        yield from protocols.score_open_set(
            opened, chosen, resamples, settings.fpir, rank=settings.fpir_rank
        )
        unknown = opened.other[~opened.mated]
        for rate in settings.fpir:
            if rate * len(unknown) >= 1:
                threshold = threshold_at_far(unknown, rate)
                yield protocols.Score(f"threshold@fpir={rate:g}", threshold, len(unknown), None)
