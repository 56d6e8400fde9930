"""One estimate: a run, the estimator, the report's other thresholds and a review agree on it."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from known_clusters import KNOWN_K
from test_one_chain import SEED, read_labelled, read_views

import cdp
from cdp import ConsensusClusterer
from cdp.mediator.pair_scorer import PairScorer
from cdp.propagation.missed_pairs import MissedPairs
from cdp.propagation.quality import estimate_quality
from pipelines.missed_pairs import read_missed
from pipelines.review.session import ReviewSession
from pipelines.run import main
from pipelines.stages import report

pytestmark = [pytest.mark.nmslib, pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]
MISSED = MissedPairs(np.array([[2, 1 / 3], [6, 1 / 7], [20, 1 / 70]]), 5 / 3)
"""Numbers that no few digits write out."""
PARTS = ("precision", "recall", "f")


@pytest.fixture(scope="module")
def missing(known, known_run, tmp_path_factory):
    """The run with known clusters, as if held-out people had missed pairs; the report's curve.

    place : of the run. curve : precision and recall by threshold, the run's own among them.
    estimator : fitted on the views of the run.
    """
    runs = tmp_path_factory.mktemp("missing") / "runs"
    passing = shutil.ignore_patterns("logs", ".*draft*")
    shutil.copytree(known_run.parent, runs, symlinks=True, ignore=passing)
    place = runs / "known"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairScorer, "missed", MISSED)
        make_again(known, runs, "mediate", "propagate")
        curve = draw_curve(patch, known, runs)
        views, _ = read_views(place, "unlabelled")
        estimator = ConsensusClusterer(k=KNOWN_K, random_state=SEED)
        estimator.fit(views, **read_labelled(place))
    return SimpleNamespace(place=place, curve=curve, estimator=estimator)


def make_again(known, runs, *stages):
    for stage in stages:
        assert main([*known, "--runs-dir", str(runs), "--stage", stage, "--force"]) == 0


def draw_curve(patch, known, runs):
    """The curve of a report made again, with the run's own threshold among the others."""
    cut = read_facts(runs / "known", "propagate")["threshold"]
    patch.setattr(report, "THRESHOLDS", tuple(sorted({*report.THRESHOLDS, cut})))
    drawn = []

    def keep(curve, *_, **__):
        drawn.append(curve)
        return ""

    patch.setattr("pipelines.pages.figures.draw_thresholds", keep)
    make_again(known, runs, "report")
    return drawn[0].set_index("threshold")


def read_facts(place, stage):
    return cdp.open_run(place).manifest(stage)["facts"]


def list_figures(quality):
    return [getattr(quality, part) for part in PARTS]


def test_run_and_estimator_give_the_same_estimate(missing):
    facts, quality = read_facts(missing.place, "propagate"), missing.estimator.quality_
    assert [facts[f"estimated_{part}"] for part in PARTS] == [
        round(figure, 4) for figure in list_figures(quality)
    ]
    run = cdp.open_run(missing.place)
    np.testing.assert_array_equal(run.labels.confidence, quality.confidence)
    np.testing.assert_array_equal(run.clusters.expected_precision, quality.expected_precision)
    missed = read_missed(run.manifest("mediate")["facts"])
    np.testing.assert_array_equal(missed.unlisted, MISSED.unlisted)
    assert missed.log_odds == MISSED.log_odds


def test_the_report_estimates_the_runs_threshold_as_the_run_does(missing):
    facts = read_facts(missing.place, "propagate")
    row = missing.curve.loc[facts["threshold"]]
    assert round(row.estimated_precision, 4) == facts["estimated_precision"]
    assert round(row.estimated_recall, 4) == facts["estimated_recall"]
    assert row.estimated_recall < row.true_recall - 0.05, "some pairs count as missed"


def test_figures_are_shown_with_few_digits(missing):
    summary = cdp.open_run(missing.place).read("report", "summary")
    (shown,) = summary[summary.name == "missed_log_odds"].value
    assert shown == 1.66667


def test_a_review_starts_from_the_runs_estimate(missing, tmp_path):
    shutil.copytree(missing.place.parent, tmp_path / "runs", symlinks=True)
    session = ReviewSession(cdp.open_run(tmp_path / "runs" / "known"), "ada")
    assert list_figures(session._estimate()) == list_figures(missing.estimator.quality_)
    facts = read_facts(missing.place, "propagate")
    assert session.describe_progress()["estimated_f"] == facts["estimated_f"]
    rows = [np.flatnonzero(session.label == cluster)[:1] for cluster in (0, 1)]
    decided = session.decide("merge", [session.sample_id[each].tolist() for each in rows])
    expected = estimate_quality(
        session.label, session.pairs, session.settled, session.representative, missed=MISSED
    )
    assert list_figures(session._estimate()) == list_figures(expected)
    assert expected.f != missing.estimator.quality_.f
    session.undo(decided.number)
    assert session.describe_progress()["estimated_f"] == facts["estimated_f"]


def test_the_report_states_precision_where_the_run_withholds_recall_alone(
    missing, known, tmp_path, monkeypatch
):
    shutil.copytree(missing.place.parent, tmp_path / "runs", symlinks=True)
    monkeypatch.setattr("cdp.propagation.quality.are_lists_full", lambda *_: True)
    make_again(known, tmp_path / "runs", "propagate")
    curve = draw_curve(monkeypatch, known, tmp_path / "runs")
    facts = read_facts(tmp_path / "runs" / "known", "propagate")
    assert facts["estimated_recall"] is None
    row = curve.loc[facts["threshold"]]
    assert round(row.estimated_precision, 4) == facts["estimated_precision"]
    assert "estimated_recall" not in curve
