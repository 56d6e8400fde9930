"""mediate: neighbour graphs -> candidate pairs of unlabelled images, each with a probability.

The contract:
- The pair scorer (`cdp.mediator.pair_scorer`) is fitted on pairs of the labelled split, validated
  on held-out identities, and scores every candidate pair of the unlabelled split. `vote` needs no
  labels: the probability of a pair is then its base cosine if the committee keeps it, else 0. Where
  no mediator can be trained on the labelled images, one is trained on the clusters that the
  committee votes for (`cdp.mediator.self_training`), with the degraded copies where embed made
  some, and where that cannot be done either the votes are final; a warning says so.
- Pairs are made, scored by the first stage and written in blocks; a block does not depend on the
  others. Prior correction and second stage then see all pairs.
- With a second stage, the threshold chosen on held-out identities and their precision by threshold
  go into the facts, for propagate's `auto`.
- Of near-equal images (`knn.near_equal`) one is scored; the others have one pair, with that one, at
  probability 1.
- `pairs` holds all candidates, whatever their probability; propagate applies the threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdp.arrays.scratch import allocate
from cdp.errors import DataError
from cdp.types import UNLABELLED, KnnGraph, PairTable
from pipelines.config import MediateSettings
from pipelines.copies import COPIES, find_originals, find_trained_split
from pipelines.files import save_arrays
from pipelines.missed_pairs import describe_missed
from pipelines.stage import Stage, Work
from pipelines.tables import JOINT, SPLITS, read_vectors, read_view, write_table
from pipelines.training.sets import describe_kept_of

if TYPE_CHECKING:
    from cdp.mediator.training_set import TrainingSet

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
SELF_TRAINING = "self_trained"
"""The fact whether the mediator was trained on voted clusters."""
SCORER = "pair_scorer.safetensors"
"""The fitted pair scorer: `PairScorer.from_state(load_file(...))`."""
PART_SIZE = 32768
"""Rows whose pairs make a block: each block reads all graphs, and holds its pairs' features."""


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
    def whitened(self) -> Path:
        """The file of the whitened rows, where the scorer has use for them."""
        return self.place / "whitened.npy"

    def _load(self, name: str) -> np.ndarray:
        array: np.ndarray = np.load(self.place / f"{name}.npy", mmap_mode="r")
        return array

    def _load_graph(self, name: str) -> KnnGraph:
        return KnnGraph(self._load(f"{name}.neighbour"), self._load(f"{name}.similarity"))


def run(work: Work) -> Mapping[str, Any]:
    split = _map_split(work, SPLITS[1:], "unlabelled")
    settings, scorer, facts, trained = _make_scorer(work, split)
    facts |= {"method": settings.method, "mediator": {}}
    if scorer.calibrated and not facts[SELF_TRAINING]:
        facts |= _describe_mediator(scorer.mediator.report)
        facts |= _describe_people(work, scorer)
        _write_calibration(work, scorer.mediator.report.reliability)
    else:  # nobody whose name is known was held out
        work.write("calibration", CALIBRATION.empty_table())
    small = None if trained is None else _search_small(work, split, trained)
    scored = split if small is None else small
    whitened = scorer.whiten(scored.views)
    if whitened is not None:
        _save_array(scored.whitened, whitened)
    parts = _list_parts(work, scored, "scored")
    jobs = [(scored, rows, settings, work.scratch, target) for rows, target in parts]
    for _ in work.engine.map(score_part, jobs, label="mediate scores pairs"):
        pass
    pairs, probability = _collect_scores(parts)
    if not len(pairs):
        raise DataError("the neighbour graphs hold no pair of unlabelled images; raise knn.k")
    scores = scorer.finish(scored.views, pairs, probability, len(scored.sample_id))
    rate = scores.rate if small is None else _average_own(split, pairs, scores.probability)
    if rate is not None:
        facts["estimated_true_share"] = round(float(rate), 4)
    odd, one_sided = _describe_odd_members(split, trained)
    facts["warnings"] = [*facts.get("warnings", []), *odd]
    unlike, few, equal = _list_doubts(work, scorer, facts, trained)
    doubts = filter(None, (unlike, one_sided, few, equal))
    facts["doubts"] = [*facts.get("doubts", []), *doubts, *scores.doubts]
    if scores.cosine is not None:
        facts["cosine"] = scores.cosine
    if scorer.precision_curve is not None:
        facts["threshold"] = scorer.threshold
        facts["precision_curve"] = scorer.precision_curve.round(5).tolist()
    links = _list_links(work, len(split.members))
    written = _write_pairs(work, split.sample_id, parts, scores.probability, links)
    return {"pairs": written, **facts}


# ------------------------------------------------------------------------------------ the scorer


def _make_scorer(
    work: Work, split: Split
) -> tuple[MediateSettings, Any, dict[str, Any], LabelledRows | None]:
    """The settings in effect, the scorer, facts: how it came to be; and what it was trained on."""
    from cdp.mediator.self_training import SELF_TRAINED, describe_fallback
    from cdp.mediator.shortage import ShortageError

    settings = work.config.mediate
    if settings.method == "vote":
        return settings, _make_voter(settings), {SELF_TRAINING: False}, None
    labelled = _open_labelled(work)
    try:
        scorer = _fit_scorer(work, settings, labelled, split)
        return settings, scorer, {SELF_TRAINING: False}, labelled
    except ShortageError as error:
        shortage = str(error)
    voting = settings.model_copy(update={"method": "vote"})
    copies = labelled.trained if labelled is not None and labelled.trained.are_copies else None
    scorer = _train_on_votes(work, split, settings, voting, copies)
    trained = scorer is not None
    facts = {
        SELF_TRAINING: trained,
        "shortage": shortage,
        "warnings": [describe_fallback(shortage, trained=trained, copies=copies is not None)],
        "doubts": [SELF_TRAINED] if trained else [],
    }
    if trained:
        return settings, scorer, facts, None
    return voting, _make_voter(voting), facts, None


def _train_on_votes(
    work: Work,
    split: Split,
    settings: MediateSettings,
    voting: MediateSettings,
    copies: TrainingSet | None,
) -> Any:
    """A pair scorer trained on the voted clusters, published; None where votes are final."""
    from cdp.mediator.self_training import fit_on_votes
    from cdp.mediator.shortage import ShortageError

    final = settings.vote.min_similarity != "auto" or settings.method != "extended"
    if final or not settings.self_training:
        return None
    try:
        scorer = fit_on_votes(
            split.views,
            split.graphs,
            _make_voter(voting),
            settings=_choose_mediator(settings),
            copies=copies,
            candidates=settings.candidates,
            second_stage=settings.second_stage,
            seed=work.seed,
        )
    except ShortageError:
        return None
    _save_scorer(work, scorer)
    return scorer


def _has_copies(work: Work) -> bool:
    """Whether degraded copies stand in place of the labelled images."""
    found = work.input_facts("embed").get(COPIES) and work.input_facts("knn")["labelled_searched"]
    return bool(found)


@dataclass(frozen=True)
class LabelledRows:
    """The rows to train on as knn chose them, mapped, and their graphs."""

    trained: TrainingSet
    graphs: list[Any]


def _open_labelled(work: Work) -> LabelledRows | None:
    """None where knn searched no labelled image."""
    from cdp.mediator.training_set import TrainingSet

    searched = work.input_facts("knn")
    if not searched["labelled_searched"]:
        return None
    spanned = SPLITS if searched["adopted_searched"] else SPLITS[:1]
    split = _map_split(work, spanned, "labelled")
    adopted = np.isin(split.sample_id, work.read("knn.adopted").to_pandas().sample_id)
    identity, copies = _list_identities(work, split), _has_copies(work)
    return LabelledRows(TrainingSet(split.views, identity, adopted, copies), split.graphs)


def _fit_scorer(
    work: Work, settings: MediateSettings, labelled: LabelledRows | None, unlabelled: Split
) -> Any:
    """Train the pair scorer on the labelled rows, and publish it."""
    from cdp.mediator.curriculum import JointSet
    from cdp.mediator.pair_scorer import PairScorer
    from cdp.mediator.shortage import ShortageError, describe_shortage

    facts, extended = work.input_facts("knn"), settings.method == "extended"
    if labelled is None:
        raise ShortageError(facts.get("shortage") or describe_shortage(_list_kept(work)))
    trained, joint = labelled.trained, None
    trained.require_fit(unlabelled.views, unlabelled.graphs[0], compared=extended, seed=work.seed)
    if extended and facts["joint"]:
        both = _map_split(work, SPLITS, JOINT)
        joint = JointSet(both.views, both.graphs, _list_identities(work, both))
        trained.require_no_gap(joint, len(unlabelled.sample_id))
    scorer = PairScorer.fit(
        trained.views,
        labelled.graphs,
        trained.identity,
        settings=_choose_mediator(settings),
        candidates=settings.candidates,
        joint=joint,
        second_stage=settings.second_stage,
        seed=work.seed,
    )
    _save_scorer(work, scorer)
    return scorer


def _choose_mediator(settings: MediateSettings) -> Any:
    from dataclasses import replace

    from cdp.mediator.settings import MediatorSettings

    chosen = MediatorSettings.named(settings.method)
    return replace(chosen, dropout=settings.dropout) if settings.dropout else chosen


def _save_scorer(work: Work, scorer: Any) -> None:
    from safetensors.numpy import save_file

    save_file(scorer.state(), work.directory / SCORER)


def _make_voter(settings: MediateSettings) -> Any:
    from cdp.committee.pairs import choose_candidates
    from cdp.mediator.pair_voter import PairVoter

    return PairVoter(
        min_similarity=settings.vote.min_similarity,
        min_votes=settings.vote.min_votes,
        candidates=settings.candidates or choose_candidates(settings.method),
    )


def _open_scorer(settings: MediateSettings, directory: Path) -> Any:
    from safetensors.numpy import load_file

    from cdp.mediator.pair_scorer import PairScorer

    if settings.method == "vote":
        return _make_voter(settings)
    return PairScorer.from_state(load_file(directory / SCORER))


def _describe_mediator(report: Any) -> dict[str, Any]:
    """Facts about the mediator on held-out identities."""
    return {
        "labelled_pairs": report.pairs,
        "calibration_error": round(report.expected_calibration_error, 4),
        "mediator": {
            "true_share": round(report.pair_rate, 4),
            "auc": round(report.auc, 4),
            "average_precision": round(report.average_precision, 4),
        },
    }


def _describe_people(work: Work, scorer: Any) -> dict[str, Any]:
    """Facts that the estimate of quality rests on: who was held out, and why they are too few."""
    from cdp.mediator.shortage import describe_few_people
    from cdp.propagation.unlisted import average_unlisted

    identity = _list_kept(work).astype(str)
    size = np.unique(identity, return_counts=True)[1]
    if few := describe_few_people(identity):
        few += describe_kept_of(work, len(size))
    return {
        "people": int((size >= 2).sum()),
        "largest_person": int(size.max()),
        **describe_missed(scorer.missed),
        "unlisted_share": round(average_unlisted(scorer.missed.unlisted, size), 4),
        "doubts": [few] if few else [],
    }


def _list_doubts(
    work: Work, scorer: Any, facts: Mapping[str, Any], labelled: LabelledRows | None
) -> tuple[str, str, str]:
    """Why no quality is estimated, by what the scorer was trained on and the stage knn found."""
    from cdp.knn.equal_rows import EQUAL_ROWS
    from cdp.mediator.self_training import DEGRADED
    from cdp.mediator.shortage import describe_few_images

    equal = EQUAL_ROWS if work.input_facts("knn")["warnings"] else ""
    if _has_copies(work) and scorer.calibrated and not facts[SELF_TRAINING]:
        return DEGRADED, "", equal
    few = "" if labelled is None else describe_few_images(labelled.trained.identity)
    return _describe_unlike(work), few, equal


def _describe_unlike(work: Work) -> str:
    from cdp.mediator.set_gap import describe_unlike

    searched = work.input_facts("knn")
    return describe_unlike(searched.get("unlike", 0), searched.get("labelled_checked", 0))


def _describe_odd_members(split: Split, labelled: LabelledRows | None) -> tuple[list[str], str]:
    """Warnings of members that share no neighbours with the others; why no quality is estimated."""
    from cdp.committee.agreement import (
        describe_disagreement,
        describe_one_sided,
        measure_agreement,
    )

    found = {"unlabelled images": measure_agreement(split.graphs)}
    if labelled is not None:
        found["labelled images"] = measure_agreement(labelled.graphs)
    warned = [describe_disagreement(each, split.members, rows) for rows, each in found.items()]
    one_sided = describe_one_sided(*found.values()) if len(found) > 1 else ""
    return [text for text in warned if text], one_sided


def _list_kept(work: Work) -> np.ndarray:
    """The identity of each labelled image that was embedded for the mediator; may be empty."""
    if not work.input_facts("embed")["labelled"]:
        return np.empty(0, np.int64)
    place = work.locate("embed.embeddings", f"{SPLITS[0]}/{work.config.committee.base.name}")
    ids = pq.read_table(place, columns=["sample_id"])["sample_id"].to_numpy()
    samples = work.read("ingest.samples", columns=["sample_id", "identity"]).to_pandas()
    return samples.set_index("sample_id").identity[ids].to_numpy()


def _list_identities(work: Work, split: Split) -> np.ndarray:
    """The identity of every row, numbered; -1 for an unlabelled one that is not adopted.

    Second labels are joined.
    """
    samples = work.read("ingest.samples", columns=["sample_id", "identity"]).to_pandas()
    name = samples.set_index("sample_id").identity
    adopted = work.read("knn.adopted").to_pandas()
    name[adopted.sample_id] = adopted.identity.to_numpy()
    issues = work.read("knn.label_issues").to_pandas()
    second = issues[issues.issue == "second_label"]
    name[second.sample_id] = second.seems.to_numpy()
    return name[find_originals(split.sample_id)].factorize(sort=True)[0].astype(np.int64)


# -------------------------------------------------------------------------------------- scoring


def score_part(
    split: Split, rows: slice, settings: MediateSettings, scratch: Path, target: Path
) -> None:
    """The candidate pairs whose source lies in `rows`, with votes and first-stage probabilities."""
    from cdp.committee.features import measure_affinity
    from cdp.committee.pairs import make_pairs, vote_pairs

    if target.exists():
        return
    scorer = _open_scorer(settings, scratch.parent)
    pairs = make_pairs(split.graphs, candidates=scorer.candidates, rows=rows)
    affinity = np.empty((len(pairs), len(split.members)), np.float32)
    for number, view in enumerate(split.views):
        measure_affinity(view, pairs, out=affinity[:, number], threads=1)
    whitened = np.load(split.whitened, mmap_mode="r") if split.whitened.exists() else None
    save_arrays(
        target,
        source=pairs.source,
        target=pairs.target,
        vote=vote_pairs(split.graphs, pairs),
        listings=np.asarray(pairs.listings),
        base_similarity=affinity[:, 0],
        probability=scorer.score_block(split.graphs, pairs, affinity, whitened, threads=1),
    )


def _collect_scores(parts: Sequence[tuple[slice, Path]]) -> tuple[PairTable, np.ndarray]:
    """The pairs of all blocks; blocks follow each other by source, so they stay sorted.

    Columns that are large lie on disk (`cdp.arrays.scratch`).
    """
    kinds: dict[str, type[np.generic]] = {"source": np.int64, "target": np.int64}
    kinds |= {"listings": np.int32, "probability": np.float32}
    found = [np.load(target) for _, target in parts]
    sizes = [len(part["probability"]) for part in found]
    columns = {name: allocate((sum(sizes),), kind) for name, kind in kinds.items()}
    row = 0
    for part, size in zip(found, sizes, strict=True):
        for name, column in columns.items():
            column[row : row + size] = part[name]
        row += size
    probability = columns.pop("probability")
    return PairTable(*columns.values()), probability


def _list_links(work: Work, members: int) -> dict[str, np.ndarray]:
    """The pair of each represented unlabelled image and its representative, as columns."""
    ids = np.load(work.scratch / "unlabelled" / "sample_id.npy")
    table = work.read("knn.near_equal").to_pandas()
    table = table[table.representative.isin(ids)]
    one, other = table.sample_id.to_numpy(), table.representative.to_numpy()
    columns = {
        "source": np.minimum(one, other),
        "target": np.maximum(one, other),
        "vote": np.full(len(table), members - 1, np.int32),
        "listings": np.full(len(table), 2 * members, np.int32),
        "base_similarity": table.similarity.to_numpy(),
        "probability": np.ones(len(table), np.float32),
    }
    order = np.lexsort((columns["target"], columns["source"]))
    return {name: column[order] for name, column in columns.items()}


def _write_pairs(
    work: Work,
    sample_id: np.ndarray,
    parts: Sequence[tuple[slice, Path]],
    probability: np.ndarray,
    links: Mapping[str, np.ndarray],
) -> int:
    """Write the pairs by source: those of each block, and the links whose source lies there.

    Pairs with rows beyond `sample_id`, which are labelled ones, are left out. Returns the number of
    pairs written.
    """
    row = written = 0
    parts = [part for part in parts if part[0].start < len(sample_id)]
    bounds = [0, *(sample_id[rows.start] for rows, _ in parts[1:]), np.iinfo(np.int64).max]
    cuts = np.searchsorted(links["source"], bounds)
    for number, (_, target) in enumerate(parts):
        scored = np.load(target)
        count, own = len(scored["source"]), scored["target"] < len(sample_id)
        columns = {
            "source": sample_id[scored["source"][own]],
            "target": sample_id[scored["target"][own]],
            "vote": scored["vote"][own],
            "listings": scored["listings"][own],
            "base_similarity": scored["base_similarity"][own],
            "probability": probability[row : row + count][own],
        }
        between = slice(cuts[number], cuts[number + 1])
        if between.start < between.stop:
            columns = {name: np.concatenate([columns[name], links[name][between]])
                       for name in columns}  # fmt: skip
            order = np.lexsort((columns["target"], columns["source"]))
            columns = {name: column[order] for name, column in columns.items()}
        place = work.path("pairs") / f"part-{number:05d}.parquet"
        write_table(place, columns, PAIRS)
        row, written = row + count, written + len(columns["source"])
    return written


def _write_calibration(work: Work, curve: Any) -> None:
    work.write("calibration", {name: getattr(curve, name) for name in CALIBRATION.names})


def _search_small(work: Work, split: Split, labelled: LabelledRows) -> Split | None:
    """The unlabelled and the labelled rows in one set of graphs, mapped; None: not a small set."""
    from cdp.mediator.small_set import SmallSet
    from cdp.types import load_graph

    k, ids = load_graph(split.graphs[0]).k, split.sample_id
    found = SmallSet.of(split.views, len(ids), labelled.trained.labelled_views, k)
    if found is None:
        return None
    mapped = Split(work.scratch / "small", split.members)
    mapped.place.mkdir(exist_ok=True)
    for name, view, graph in zip(split.members, found.views, found.graphs, strict=True):
        _save_array(mapped.place / f"{name}.view.npy", view)
        _save_array(mapped.place / f"{name}.neighbour.npy", graph.neighbour)
        _save_array(mapped.place / f"{name}.similarity.npy", graph.similarity)
    context = len(found.views[0]) - len(ids)
    _save_array(mapped.place / "sample_id.npy", np.append(ids, np.full(context, UNLABELLED)))
    return mapped


def _average_own(split: Split, pairs: PairTable, probability: np.ndarray) -> float | None:
    """The mean probability of the pairs of two unlabelled rows; None where there is none."""
    own = pairs.target < len(split.sample_id)
    return float(probability[own].mean(dtype=np.float64)) if own.any() else None


# -------------------------------------------------------------------------------------- mapping


def _map_split(work: Work, splits: tuple[str, ...], name: str) -> Split:
    """Save the graphs `name`, and the views of the splits they span, as arrays workers can map."""
    members = tuple(member.name for member in work.config.committee.all)
    mapped = Split(work.scratch / name, members)
    mapped.place.mkdir(exist_ok=True)
    trained_on = find_trained_split(work.input_facts("embed"))
    splits = tuple(trained_on if split == SPLITS[0] else split for split in splits)
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
    """One view and its graph as plain arrays, rows in the order of the graph's table.

    Neighbours are row numbers; those outside the table are numbered from its length on.
    """
    everything, vectors = read_view(embeddings)
    sample_id = pq.read_table(neighbours, columns=["sample_id"])["sample_id"].to_numpy()
    rows = np.searchsorted(everything, sample_id)
    number = len(sample_id) + np.arange(len(everything))
    number[rows] = np.arange(len(sample_id))
    named = read_vectors(neighbours, "neighbour")
    listed = np.searchsorted(everything, named)
    arrays = {
        "sample_id": sample_id,
        f"{name}.view": vectors if len(rows) == len(vectors) else vectors[rows],
        f"{name}.neighbour": np.where(named == UNLABELLED, UNLABELLED, number[listed]),
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


def _save_array(path: Path, array: np.ndarray, draft: str | None = None) -> None:
    place = path.with_name(f"{draft or path.stem}.draft")
    with place.open("wb") as stream:
        np.save(stream, array)
    place.replace(path)


STAGE = Stage(
    name="mediate",
    version=27,
    inputs=(
        "ingest.samples",
        "embed.embeddings",
        "knn.neighbours",
        "knn.label_issues",
        "knn.adopted",
        "knn.near_equal",
    ),
    outputs={"pairs": PAIRS, "calibration": CALIBRATION},
    reads=("committee", "mediate"),
    run=run,
)
