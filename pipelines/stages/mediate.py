"""mediate: neighbour graphs -> candidate pairs of unlabelled images, each with a probability.

The contract:
- The mediator is fitted on pairs of the labelled split, validated on people it has not seen, and
  scores every candidate pair of the unlabelled split. `vote` needs no labels: the probability of a
  pair is then its base cosine if the committee keeps it, and 0 if not.
- Pairs are made, described, scored and written in blocks; a block does not depend on the others.
- With a second reading, each pair is judged again by what is known of the pairs around it; the cut
  that served the held-out people best goes into the facts, for propagate's `auto`.
- `pairs` holds all candidates, whatever their probability; the threshold is propagate's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cdp.errors import DataError
from cdp.types import KnnGraph, PairTable
from pipelines.config import MediateSettings
from pipelines.stage import Stage, Work
from pipelines.tables import JOINT, SPLITS, read_vectors, read_view, write_table

PAIRS = pa.schema(
    [
        ("source", pa.int64()),
        ("target", pa.int64()),
        ("vote", pa.int32()),
        ("listings", pa.int32()),
        ("base_similarity", pa.float32()),
        ("probability", pa.float32()),
    ]
)
CALIBRATION = pa.schema(
    [
        ("lower", pa.float64()),
        ("mean_probability", pa.float64()),
        ("observed_rate", pa.float64()),
        ("weight", pa.float64()),
    ]
)
PART_SIZE = 16384
"""Rows whose pairs make a block."""


@dataclass(frozen=True)
class Split:
    """The graphs and views of one split, mapped: rows are positions in the ascending sample_id."""

    place: Path
    members: tuple[str, ...]

    @property
    def sample_id(self) -> np.ndarray:
        return np.load(self.place / "sample_id.npy")

    @property
    def graphs(self) -> list[Any]:
        return [partial(self._load_graph, name) for name in self.members]

    @property
    def views(self) -> list[Any]:
        return [partial(self._load, f"{name}.view") for name in self.members]

    @property
    def even(self) -> np.ndarray:
        """What the mediator's wccn makes of the views; see `cdp.committee.wccn`."""
        return self._load("even")

    def _load(self, name: str) -> np.ndarray:
        array: np.ndarray = np.load(self.place / f"{name}.npy", mmap_mode="r")
        return array

    def _load_graph(self, name: str) -> KnnGraph:
        return KnnGraph(self._load(f"{name}.neighbour"), self._load(f"{name}.similarity"))


def run(work: Work) -> Mapping[str, Any]:
    settings = work.config.mediate
    facts: dict[str, Any] = {"method": settings.method}
    mediator, reading, facts["mediator"] = None, None, {}
    if settings.method != "vote":
        if not work.input_facts("embed")["labelled"]:
            raise DataError(
                "the data set has no labelled image to train a mediator on. Without labels the "
                "committee votes: mediate.method=vote"
            )
        mediator, reading = _teach(work, settings)
        report = mediator.report
        facts["labelled_pairs"] = report.pairs
        facts["calibration_error"] = round(report.expected_calibration_error, 4)
        facts["mediator"] = {
            "true_share": round(report.pair_rate, 4),
            "auc": round(report.auc, 4),
            "average_precision": round(report.average_precision, 4),
        }
    else:
        work.write("calibration", CALIBRATION.empty_table())
    split = _map_split(work, SPLITS[1:], "unlabelled")
    if mediator is not None and mediator.wccn is not None:
        found = mediator.wccn
        _save_array(split.place / "even.npy", found.whiten(found.project(split.views)))
    parts = _list_parts(work, split, "scored")
    jobs = [(split, rows, settings, work.scratch, target) for rows, target in parts]
    for _ in work.engine.map(score_part, jobs, label="mediate scores pairs"):
        pass
    probability = np.concatenate([np.load(target)["probability"] for _, target in parts])
    if not len(probability):
        raise DataError("the neighbour graphs hold no pair of unlabelled images; raise knn.k")
    if mediator is not None:
        corrected = mediator.correct(probability)
        probability = corrected.probability
        facts["estimated_true_share"] = round(float(corrected.rate), 4)
    if reading is not None:
        from cdp.mediator.second_stage import score_second_stage

        pairs = _collect_pairs(parts)
        count = len(split.sample_id)
        again = score_second_stage(reading, split.views, pairs, probability, count)
        probability, facts["estimated_true_share"] = again.probability, round(again.rate, 4)
        facts["threshold"] = reading.threshold
        facts["precision_curve"] = reading.precision_curve.round(5).tolist()
    sample_id, row = split.sample_id, 0
    for number, (_, target) in enumerate(parts):
        scored = np.load(target)
        count = len(scored["source"])
        columns = {
            "source": sample_id[scored["source"]],
            "target": sample_id[scored["target"]],
            "vote": scored["vote"],
            "listings": scored["listings"],
            "base_similarity": scored["base_similarity"],
            "probability": probability[row : row + count],
        }
        place = work.path("pairs") / f"part-{number:05d}.parquet"
        write_table(place, columns, PAIRS)
        row += count
    return {"pairs": len(probability), **facts}


# ---------------------------------------------------------------------------------- the mediator


def _teach(work: Work, settings: MediateSettings) -> tuple[Any, Any]:
    """Fit the mediator and its second reading on the labelled split; publish both."""
    from dataclasses import replace

    from safetensors.numpy import save_file

    from cdp.committee.pairs import choose_candidates
    from cdp.mediator.curriculum import JointSet
    from cdp.mediator.pair_scorer import teach_mediator
    from cdp.mediator.settings import MediatorSettings

    split = _map_split(work, SPLITS[:1], "labelled")
    joint = None
    if settings.method == "extended" and work.input_facts("knn")["joint"]:
        everyone = _map_split(work, SPLITS, JOINT)
        joint = JointSet(everyone.views, everyone.graphs, _list_identities(work, everyone))
    chosen = MediatorSettings.named(settings.method)
    if settings.dropout:
        chosen = replace(chosen, dropout=settings.dropout)
    mediator, reading = teach_mediator(
        split.views,
        split.graphs,
        _list_identities(work, split),
        settings=chosen,
        candidates=settings.candidates or choose_candidates(settings.method),
        joint=joint,
        second_stage=settings.second_stage,
        seed=work.seed,
    )
    save_file(mediator.state(), work.directory / "mediator.safetensors")
    if reading is not None:
        save_file(reading.state(), work.directory / "second_stage.safetensors")
    curve = mediator.report.reliability
    work.write("calibration", {name: getattr(curve, name) for name in CALIBRATION.names})
    return mediator, reading


def _collect_pairs(parts: Sequence[tuple[slice, Path]]) -> PairTable:
    """The pairs of all blocks; blocks follow each other by source, so they stay sorted."""
    found = [np.load(target) for _, target in parts]
    names = ("source", "target", "listings")
    return PairTable(*(np.concatenate([part[name] for part in found]) for name in names))


def _list_identities(work: Work, split: Split) -> np.ndarray:
    """The person of every row, numbered; -1 for an unlabelled one."""
    samples = work.read("ingest.samples", columns=["sample_id", "identity"]).to_pandas()
    identity = samples.set_index("sample_id").identity[split.sample_id].factorize(sort=True)[0]
    return identity.astype(np.int64)


def score_part(
    split: Split, rows: slice, settings: MediateSettings, scratch: Path, target: Path
) -> None:
    """The candidate pairs whose source lies in `rows`, with votes and raw probabilities."""
    from cdp.committee.features import describe_pairs, measure_affinity
    from cdp.committee.pairs import choose_candidates, make_pairs, vote_pairs
    from cdp.committee.wccn import measure_cosines

    if target.exists():
        return
    candidates = settings.candidates or choose_candidates(settings.method)
    pairs = make_pairs(split.graphs, candidates=candidates, rows=rows)
    vote = vote_pairs(split.graphs, pairs)
    similarity = measure_affinity(split.views[0], pairs, threads=1)
    if settings.method == "vote":
        kept = (similarity > settings.vote.min_similarity) & (vote >= settings.vote.min_votes)
        probability = np.where(kept, np.clip(similarity, 0, 1), 0).astype(np.float32)
    else:
        mediator = _open_mediator(scratch.parent / "mediator.safetensors")
        features = describe_pairs(
            split.views, split.graphs, pairs, variant=_find_variant(settings), threads=1
        )
        if mediator.wccn is not None:
            features = np.column_stack([features, measure_cosines(split.even, pairs)])
        probability = mediator.score(features)
    _save(
        target,
        source=pairs.source,
        target=pairs.target,
        vote=vote,
        listings=np.asarray(pairs.listings),
        base_similarity=similarity,
        probability=probability,
    )


def _open_mediator(path: Path) -> Any:
    from safetensors.numpy import load_file

    from cdp.mediator.ensemble import Mediator

    return Mediator.from_state(load_file(path))


def _find_variant(settings: MediateSettings) -> Any:
    """The feature variant has the name of the method that reads it."""
    return settings.method


# -------------------------------------------------------------------------------------- mapping


def _map_split(work: Work, splits: tuple[str, ...], name: str) -> Split:
    """Lay the graphs `name`, and the views of the splits they span, out for mapping by workers."""
    members = tuple(member.name for member in work.config.committee.all)
    mapped = Split(work.scratch / name, members)
    mapped.place.mkdir(exist_ok=True)
    jobs = [
        (
            [work.locate("embed.embeddings", f"{split}/{member}") for split in splits],
            work.locate("knn.neighbours", f"{name}/{member}"),
            mapped.place,
            member,
        )
        for member in members
    ]
    for _ in work.engine.map(map_view, jobs, label=f"mediate maps {name} views"):
        pass
    return mapped


def map_view(embeddings: list[Path], neighbours: Path, place: Path, name: str) -> None:
    """One view and its graph as plain arrays, neighbours as positions in the ascending ids."""
    sample_id, vectors = read_view(embeddings)
    neighbour = np.searchsorted(sample_id, read_vectors(neighbours, "neighbour"))
    arrays = {
        "sample_id": sample_id,
        f"{name}.view": vectors,
        f"{name}.neighbour": neighbour.astype(np.int64),
        f"{name}.similarity": read_vectors(neighbours, "similarity"),
    }
    for part, array in arrays.items():
        _save_array(place / f"{part}.npy", array, f"{part}.{name}")


def _list_parts(work: Work, split: Split, name: str) -> Sequence[tuple[slice, Path]]:
    """Blocks of rows and the scratch file of each."""
    count = len(split.sample_id)
    place = work.scratch / name
    place.mkdir(exist_ok=True)
    return [
        (slice(row, min(row + PART_SIZE, count)), place / f"{number:05d}.npz")
        for number, row in enumerate(range(0, count, PART_SIZE))
    ]


def _save_array(path: Path, array: np.ndarray, draft: str = "even") -> None:
    place = path.with_name(f"{draft}.draft")
    with place.open("wb") as stream:
        np.save(stream, array)
    place.replace(path)


def _save(path: Path, **arrays: np.ndarray) -> None:
    draft = path.with_suffix(".draft")
    with draft.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
    draft.replace(path)


STAGE = Stage(
    name="mediate",
    version=9,
    inputs=("ingest.samples", "embed.embeddings", "knn.neighbours"),
    outputs={"pairs": PAIRS, "calibration": CALIBRATION},
    reads=("committee", "mediate"),
    run=run,
)
