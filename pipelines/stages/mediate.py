"""mediate: neighbour graphs -> candidate pairs of unlabelled images, each with a probability.

The contract:
- The mediator is fitted on pairs of labelled images, validated on people it has not seen, and
  scores every candidate pair of unlabelled images. `vote` needs no labels: the probability of a
  pair is then its base cosine if the committee keeps it, and 0 if not.
- In joint graphs a labelled image also pairs with unlabelled ones. Nobody is in both sets, so these
  pairs are false, and they are what strangers look like at the unlabelled set's density. Every
  second one is taken: a pair of unlabelled images is found from two ends, such a pair from one.
- Pairs are made, described, scored and written in blocks; a block does not depend on the others.
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
import pyarrow.parquet as pq

from cdp.errors import DataError
from cdp.types import KnnGraph, PairTable
from pipelines.config import MediateSettings
from pipelines.stage import Stage, Work
from pipelines.stages.knn import read_graph
from pipelines.store import read_vectors, write_table

PAIRS = pa.schema(
    [
        ("source", pa.int64()),
        ("target", pa.int64()),
        ("vote", pa.int32()),
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
STRANGERS = 400


@dataclass(frozen=True)
class Split:
    """The graphs and views of images searched together, mapped.

    Rows are positions in the ascending sample_id, labelled images first.
    """

    place: Path
    members: tuple[str, ...]
    labelled: int
    count: int

    @property
    def sample_id(self) -> np.ndarray:
        return self._load("sample_id")

    @property
    def graphs(self) -> list[Any]:
        return [partial(self._load_graph, name) for name in self.members]

    @property
    def views(self) -> list[Any]:
        return [partial(self._load, f"{name}.view") for name in self.members]

    def _load(self, name: str) -> np.ndarray:
        array: np.ndarray = np.load(self.place / f"{name}.npy", mmap_mode="r")
        return array

    def _load_graph(self, name: str) -> KnnGraph:
        return KnnGraph(self._load(f"{name}.neighbour"), self._load(f"{name}.similarity"))


def run(work: Work) -> Mapping[str, Any]:
    settings = work.config.mediate
    facts: dict[str, Any] = {"method": settings.method}
    mediator, facts["mediator"] = None, {}
    groups = work.input_facts("knn")["groups"]
    split = _map_split(work, next(group for group in groups if "unlabelled" in group))
    if settings.method != "vote":
        if not work.input_facts("embed")["labelled"]:
            raise DataError(
                "the data set has no labelled image to train a mediator on. Without labels the "
                "committee votes: mediate.method=vote"
            )
        taught = split if split.labelled else _map_split(work, ["labelled"])
        mediator = _fit(work, settings, taught)
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
    parts = _list_parts(work, "scored", split.labelled, split.count)
    jobs = [(split, rows, settings, work.scratch, target) for rows, target in parts]
    for _ in work.engine.map(score_part, jobs, label="mediate scores pairs"):
        pass
    probability = np.concatenate([np.load(target)["probability"] for _, target in parts])
    if not len(probability):
        raise DataError("the neighbour graphs hold no pair of unlabelled images; raise knn.k")
    if mediator is not None:
        rate = mediator.training_rate
        if mediator.settings.correct_prior:
            from cdp.mediator import correct_prior

            corrected = correct_prior(probability, rate)
            probability, rate = corrected.probability, corrected.rate
        facts["estimated_true_share"] = round(float(rate), 4)
    sample_id, row = split.sample_id, 0
    for number, (_, target) in enumerate(parts):
        scored = np.load(target)
        count = len(scored["source"])
        columns = {
            "source": sample_id[scored["source"]],
            "target": sample_id[scored["target"]],
            "vote": scored["vote"],
            "base_similarity": scored["base_similarity"],
            "probability": probability[row : row + count],
        }
        place = work.path("pairs") / f"part-{number:05d}.parquet"
        write_table(place, columns, PAIRS)
        row += count
    return {"pairs": len(probability), **facts}


# ---------------------------------------------------------------------------------- the mediator


def _fit(work: Work, settings: MediateSettings, split: Split) -> Any:
    """Fit the mediator on the labelled pairs, publish it, and leave it for the workers."""
    from dataclasses import replace

    from safetensors.numpy import save_file

    from cdp.mediator import Mediator, MediatorSettings

    parts = _list_parts(work, "described", 0, split.labelled)
    jobs = [(split, rows, settings, work.seed, target) for rows, target in parts]
    for _ in work.engine.map(describe_part, jobs, label="mediate describes labelled pairs"):
        pass
    described = [np.load(target) for _, target in parts]
    source, target, features = (
        np.concatenate([part[name] for part in described])
        for name in ("source", "target", "features")
    )
    samples = work.read("ingest.samples", columns=["sample_id", "identity"]).to_pandas()
    known = samples.set_index("sample_id").identity[split.sample_id[: split.labelled]]
    # Unlabelled images are people of their own; a few hundred groups are enough to deal in folds.
    stranger = len(known) + np.arange(split.count - split.labelled) % STRANGERS
    identity = np.concatenate([known.factorize(sort=True)[0], stranger])
    chosen = MediatorSettings.named(settings.method)
    if settings.dropout:
        chosen = replace(chosen, dropout=settings.dropout)
    mediator = Mediator.fit(
        features,
        identity[source] == identity[target],
        identity[source],
        identity[target],
        settings=chosen,
        seed=work.seed,
    )
    save_file(mediator.state(), work.directory / "mediator.safetensors")
    curve = mediator.report.reliability
    work.write("calibration", {name: getattr(curve, name) for name in CALIBRATION.names})
    return mediator


def describe_part(
    split: Split, rows: slice, settings: MediateSettings, seed: int, target: Path
) -> None:
    """The features of the pairs whose source is a labelled image of `rows`."""
    from cdp.committee import describe_pairs, make_pairs

    if target.exists():
        return
    pairs = make_pairs(split.graphs, candidates=settings.candidates, rows=rows)
    second = np.random.default_rng([seed, rows.start]).random(len(pairs)) < 0.5
    taken = (pairs.target < split.labelled) | second
    pairs = PairTable(pairs.source[taken], pairs.target[taken])
    features = describe_pairs(
        split.views, split.graphs, pairs, variant=_find_variant(settings), threads=1
    )
    _save(target, source=pairs.source, target=pairs.target, features=features)


def score_part(
    split: Split, rows: slice, settings: MediateSettings, scratch: Path, target: Path
) -> None:
    """The candidate pairs whose source lies in `rows`, with votes and raw probabilities."""
    from cdp.committee import describe_pairs, make_pairs, measure_affinity, vote_pairs

    if target.exists():
        return
    pairs = make_pairs(split.graphs, candidates=settings.candidates, rows=rows)
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
        probability = mediator.score(features)
    _save(
        target,
        source=pairs.source,
        target=pairs.target,
        vote=vote,
        base_similarity=similarity,
        probability=probability,
    )


def _open_mediator(path: Path) -> Any:
    from safetensors.numpy import load_file

    from cdp.mediator import Mediator

    return Mediator.from_state(load_file(path))


def _find_variant(settings: MediateSettings) -> Any:
    """The feature variant has the name of the method that reads it."""
    return settings.method


# -------------------------------------------------------------------------------------- mapping


def _map_split(work: Work, splits: Sequence[str]) -> Split:
    """Lay graphs and views out for mapping by the workers."""
    counts = work.input_facts("embed")
    members = tuple(member.name for member in work.config.committee.all)
    labelled = int(counts["labelled"]) if "labelled" in splits else 0
    place = work.scratch / "+".join(splits)
    place.mkdir(exist_ok=True)
    jobs = [
        (
            [work.locate("embed.embeddings", f"{split}/{name}") for split in splits],
            [work.locate("knn.neighbours", f"{split}/{name}") for split in splits],
            place,
            name,
        )
        for name in members
    ]
    for _ in work.engine.map(map_view, jobs, label="mediate maps views"):
        pass
    return Split(place, members, labelled, sum(int(counts[split]) for split in splits))


def map_view(embeddings: list[Path], neighbours: list[Path], place: Path, name: str) -> None:
    """One view and its graph as plain arrays, neighbours as positions in the ascending ids."""
    ids = [pq.read_table(path, columns=["sample_id"])["sample_id"] for path in embeddings]
    sample_id = np.concatenate([part.to_numpy() for part in ids])
    graph = read_graph(neighbours, sample_id)
    arrays = {
        "sample_id": sample_id,
        f"{name}.view": np.concatenate([read_vectors(path, "embedding") for path in embeddings]),
        f"{name}.neighbour": graph.neighbour,
        f"{name}.similarity": graph.similarity,
    }
    for part, array in arrays.items():
        draft = place / f"{part}.{name}.draft"
        with draft.open("wb") as stream:
            np.save(stream, array)
        draft.replace(place / f"{part}.npy")


def _list_parts(work: Work, name: str, first: int, last: int) -> Sequence[tuple[slice, Path]]:
    """Blocks of the rows first .. last and the scratch file of each."""
    place = work.scratch / name
    place.mkdir(exist_ok=True)
    return [
        (slice(row, min(row + PART_SIZE, last)), place / f"{number:05d}.npz")
        for number, row in enumerate(range(first, last, PART_SIZE))
    ]


def _save(path: Path, **arrays: np.ndarray) -> None:
    draft = path.with_suffix(".draft")
    with draft.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
    draft.replace(path)


STAGE = Stage(
    name="mediate",
    version=1,
    inputs=("ingest.samples", "embed.embeddings", "knn.neighbours"),
    outputs={"pairs": PAIRS, "calibration": CALIBRATION},
    reads=("committee", "mediate"),
    run=run,
)
