"""Gain of review decisions in pairwise F: the product's order of questions against a random one.

    python -m tests.benchmarks.bench_review [--decisions 100] [--draws 3]

The data is `lfw_features` under `CDP_DATA_ROOT` (or `../shared/data`): real faces at 24 px, five
networks. Answers are simulated from the truth: a reviewer joins two groups when most faces of both
are of one identity; of a cluster, all faces but those of its most frequent identity are split off.
After every decision the labels are made to satisfy all of them and the questions are ranked
anew, as the review page does. Random draws are from all questions of the first ranking (nearly all
of them about two clusters that merely have a pair between them), or from its clusters alone, as by
a reviewer who opens clusters at random; those with an answer already are left out.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from cdp.metrics.clustering import score_pairwise
from cdp.propagation.average_linkage import agglomerate
from cdp.review.constraints import Constraints, apply_constraints, find_conflict, settle_pairs
from cdp.review.questions import Kind, Question, filter_answered, rank_questions
from cdp.types import PairTable
from tests.benchmarks.bench_pseudo_labels import judge_pairs, read_release

SHOWN = (0, 10, 25, 50, 75, 100)


def answer(
    question: Question, truth: np.ndarray, constraints: Constraints, checked: set[frozenset[int]]
) -> Constraints:
    """The decision of a reviewer who knows the truth."""

    def find_most(rows: np.ndarray) -> int:
        return int(np.bincount(truth[rows]).argmax())

    if question.kind == "cluster":
        rest = question.one[truth[question.one] == find_most(question.one)]
        out = np.setdiff1d(question.one, rest)
        checked |= {frozenset(rest.tolist()), frozenset(out.tolist())}
        if len(out):
            return replace(constraints, apart=(*constraints.apart, (out, rest)))
        return replace(constraints, same=(*constraints.same, rest))
    if find_most(question.one) == find_most(question.other):
        return replace(
            constraints, same=(*constraints.same, np.concatenate([question.one, question.other]))
        )
    return replace(constraints, apart=(*constraints.apart, (question.one, question.other)))


def name(question: Question) -> tuple[int, ...]:
    """A name that the same question has in every ranking."""
    return (int(question.one[0]), *question.other[:1].tolist())


def review(
    pairs: PairTable,
    probability: np.ndarray,
    threshold: float,
    truth: np.ndarray,
    decisions: int,
    random: np.random.Generator | None,
    kinds: tuple[Kind, ...] = ("bridge", "merge", "cluster"),
) -> tuple[list[float], dict[str, int], float]:
    """Pairwise F after every decision, the count of each kind asked, and the seconds a decision."""
    count = len(truth)
    published = agglomerate(pairs, probability, count, threshold=threshold).label
    constraints, checked, label, settled = Constraints(count), set(), published, probability
    figures, asked = [score_pairwise(truth, published)[2]], dict.fromkeys(
        ("bridge", "merge", "cluster"), 0
    )  # fmt: skip
    refused: set[tuple[int, ...]] = set()
    started = time.perf_counter()
    pool = [] if random is None else rank_questions(published, pairs, probability, kinds=kinds)
    while len(figures) <= decisions:
        if random is None:
            pool = rank_questions(label, pairs, settled, limit=800)
            pool = filter_answered(pool, constraints, checked=checked)
            pool = [question for question in pool if name(question) not in refused]
            at = 0
        else:
            at = int(random.integers(len(pool)))
        if not pool:
            break
        question = pool.pop(at)
        if not filter_answered([question], constraints, checked=checked):
            continue
        asked[question.kind] += 1
        more = answer(question, truth, constraints, checked)
        if find_conflict(more):  # the page rejects it, and the decision counts all the same
            refused.add(name(question))
        else:
            constraints = more
        settled = settle_pairs(pairs, probability, constraints)
        label = apply_constraints(published, pairs, settled, constraints, threshold=threshold)
        figures.append(score_pairwise(truth, label)[2])
    return figures, asked, (time.perf_counter() - started) / decisions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--decisions", type=int, default=100)
    parser.add_argument("--draws", type=int, default=3, help="random orders, averaged")
    arguments = parser.parse_args()
    root = Path(os.environ.get("CDP_DATA_ROOT", "../shared/data")) / "lfw_features"
    views, identity, mark = read_release(root)
    truth = identity[~mark]
    split = ([view[mark] for view in views], identity[mark], [view[~mark] for view in views], truth)
    pairs, _, again, second = judge_pairs(split, 0, "all")
    probability, threshold = again.probability, second.threshold
    print(f"{len(pairs):,} pairs of {len(truth):,} images")
    steps = [step for step in SHOWN if step <= arguments.decisions]
    print(f"{'pairwise F after':24}" + "".join(f"{step:>8}" for step in steps))
    every: tuple[Kind, ...] = ("bridge", "merge", "cluster")
    orders: list[tuple[str, int | None, tuple[Kind, ...]]] = [("the product's order", None, every)]
    for draw in range(arguments.draws):
        orders.append((f"random questions {draw}", draw, every))
        orders.append((f"random clusters {draw}", draw, ("cluster",)))
    for name, seed, kinds in orders:
        random = None if seed is None else np.random.default_rng(seed)
        figures, asked, seconds = review(
            pairs, probability, threshold, truth, arguments.decisions, random, kinds
        )
        row = "".join(f"{100 * figures[min(step, len(figures) - 1)]:8.2f}" for step in steps)
        kinds = ", ".join(f"{number} {kind}" for kind, number in asked.items())
        print(f"{name:24}{row}   {kinds}; {seconds:.2f} s a decision", flush=True)


if __name__ == "__main__":
    main()
