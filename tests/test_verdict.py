"""The verdict: what each judge finds, in a run and on facts made for it."""

import shlex
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml

from cdp.errors import StageError
from pipelines.export.__main__ import main as export
from pipelines.results import open_run
from pipelines.review.session import ReviewSession
from pipelines.run import main
from pipelines.verdict import JUDGES, Finding, compose_verdict, reach_verdict

pytestmark = [pytest.mark.torch, pytest.mark.slow]

GOOD = {
    "ingest": {"images": 1000, "rejected": 3, "labelled_people": 200},
    "train": {"models": 3},
    "knn": {"lowest_recall": 0.999, "k": 20},
    "mediate": {"method": "extended", "people": 60, "calibration_error": 0.01,
                "unlisted_share": 0.001, "mediator": {}},
    "propagate": {"clusters": 40, "labelled": 300, "unlabelled": 200, "estimated_precision": 0.98,
                  "estimated_recall": 0.95, "estimated_f": 0.965, "withheld": [], "warnings": []},
    "retrain": {"pseudo_identities": 40},
}  # fmt: skip
CLUSTERS = {"size": [40, 31, 12], "expected_precision": [0.99, 0.97, 0.2]}


def judge(**changed):
    """The verdict on a good run with other facts of a stage, clusters, target or reasons."""
    clusters = pd.DataFrame(changed.pop("clusters", CLUSTERS))
    target = changed.pop("target", None)
    reasons = changed.pop("reasons", ["blank"])
    tables = {
        "clusters": pa.Table.from_pandas(clusters),
        "rejected": pa.table({"reason": reasons}),
        "labels": pa.table({"pseudo_label": [-1, -1, 0]}),
    }
    config = {"propagate": {"target_precision": target}}
    published = {
        stage: types.SimpleNamespace(
            facts={**facts, **changed.get(stage, {})},
            manifest={"ingredients": {"config": config}},
            read=lambda name, columns=None: tables[name],
        )
        for stage, facts in GOOD.items()
    }
    return reach_verdict(published, Path("runs/mine"))


def doubts(**changed):
    return [str(finding) for finding in judge(**changed) if finding.level == "doubt"]


def test_a_good_run_has_results_and_no_doubt():
    assert doubts() == []
    first, second = judge()
    assert "estimated pairwise F 0.96 (precision 0.98, recall 0.95), by 60 labelled" in str(first)
    assert str(second) == "40 clusters hold 60% of 500 images"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ingest": {"labelled_people": 21}}, "21 people are few to train 3 models on. Use ready"),
        ({"knn": {"lowest_recall": 0.8}}, "80% of the true neighbours only. Set knn.backend=exact"),
        ({"knn": {"wrong_names": 7}}, "7 labelled images seem to have a wrong name"),
        ({"knn": {"second_labels": 1}}, "1 labelled identity seems to be the person of another"),
        ({"propagate": {"corrected_images_gone": 2}},
         "name 2 images that are no longer among the unlabelled ones: for them they do nothing"),
        ({"mediate": {"unlisted_share": 0.2}}, "20% of the true pairs .* Raise knn.k above 20"),
        ({"mediate": {"calibration_error": 0.1}}, "off by 0.10 on average on held-out people"),
        ({"retrain": {"pseudo_identities": 0}}, "1 images have one, .* retrain.min_cluster_size"),
        ({"target": 0.99}, "target precision 0.99 is missed: 0.980"),
        ({"mediate": {"warnings": ["the committee voted instead"]}}, "voted instead"),
        (
            {"clusters": {"size": [90, 40, 9], "expected_precision": [0.4, 0.1, 0.1]}},
            "2 clusters above 30 images with expected precision below 0.5, the largest of 90 "
            "images. Review these first: .*review --run runs/mine$",
        ),
        (
            {"ingest": {"rejected": 200}, "reasons": ["same bytes as a", "same bytes as b", "x"]},
            "200 of 1,000 images were rejected, 2 of them because: same bytes as another",
        ),
        (
            {"ingest": {"rejected": 200},
             "reasons": [*["left out: a hidden file"] * 5, "empty file",
                         "corrupt image: cut (3 bytes)", "corrupt image: cut (4 bytes)"]},
            "rejected, 2 of them because: corrupt image. Table",
        ),
        (
            {"ingest": {"rejected": 200}, "reasons": ["empty file", "blank: one", "blank: one"]},
            "rejected, 2 of them because: blank: one. Table",
        ),
        (
            {"ingest": {"warnings": ["of 100 unlabelled images sampled, 35 show no face"]}},
            "35 show no face",
        ),
        (
            {"propagate": {"estimated_f": None, "estimated_recall": None,
                           "withheld": ["too few people", "lists are full"]}},
            "no quality is stated: too few people; lists are full; estimated precision 0.98, "
            "recall unknown. Judge the clusters by eye: .*review --run runs/mine$",
        ),
    ],
)  # fmt: skip
def test_each_doubt_names_its_reason_and_what_to_do(changed, said):
    (found,) = doubts(**changed)
    assert pd.Series([found]).str.contains(said).all(), found


def test_stages_that_are_missing_are_not_judged():
    assert reach_verdict({}, Path("runs/mine")) == []
    assert len(JUDGES) >= 10


def test_lines_name_results_and_doubts():
    lines = compose_verdict([Finding("result", "good"), Finding("doubt", "bad", "Mend it")])
    assert lines == ["Verdict   good", "Distrust  bad. Mend it"]


# ------------------------------------------------------------------------------------- in a run


def write_features(place, rows, labelled=(), names=()):
    """A data set of ready features of one model, and a config that reads it."""
    for split, vectors in (("pile", rows), ("labelled", labelled)):
        if len(vectors):
            (place / split / "features").mkdir(parents=True)
            np.asarray(vectors, np.float32).tofile(place / split / "features" / "a.bin")
            listed = "".join(f"{row}.jpg\n" for row in range(len(vectors)))
            (place / split / "list.txt").write_text(listed)
    manifest = {"name": "made", "kind": "features", "unlabelled": {"root": "pile"}}
    if len(labelled):
        (place / "labelled" / "meta.txt").write_text("".join(f"{name}\n" for name in names))
        manifest["labelled"] = {"root": "labelled"}
    (place / "data.yaml").write_text(yaml.safe_dump(manifest))
    config = {"data": "data.yaml", "committee": {"base": {"name": "a", "features": "a"}}}
    (place / "made.yaml").write_text(yaml.safe_dump(config))


def go(place, *arguments):
    return main(["--config", str(place / "made.yaml"), "--data-root", str(place), "--runs-dir",
                 str(place / "runs"), "--workers", "1", *arguments])  # fmt: skip


def draw(people, each, noise=0.4, seed=0):
    generator = np.random.default_rng(seed)
    identity = np.repeat(np.arange(people), each)
    centre = generator.normal(size=(people, 64))
    return centre[identity] + noise * generator.normal(size=(len(identity), 64)), identity


def test_commands_name_the_run_and_its_options(tmp_path, capsys):
    rows, _ = draw(12, 6)
    write_features(tmp_path, rows)
    assert go(tmp_path, "mediate.method=vote", "name=mine", "knn.k=8", "--until", "propagate") == 0
    place = tmp_path / "runs" / "mine"
    assert f"review --run {place}" in capsys.readouterr().out
    run = open_run(place)
    assert any(f"review --run {place}" in str(finding) for finding in run.verdict)
    with pytest.raises(StageError) as caught:
        _ = run.metrics
    command = str(caught.value).partition("Make it with: ")[2]
    assert command.endswith("name=mine knn.k=8 --until evaluate")
    given = shlex.split(command)[3:]
    assert main([*given[:-2], "--until", "knn", "--dry-run"]) == 0
    assert "run" not in {line.split()[1] for line in capsys.readouterr().out.splitlines()}
    (place / "run.json").write_text("[")
    assert run.compose_command() == "python -m pipelines.run, with the options of this run"


def test_two_labelled_people_are_not_enough_and_votes_train_the_mediator(tmp_path, capsys):
    write_features(tmp_path, draw(20, 12)[0], *draw(2, 3, seed=1))
    assert go(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "check     warning: 2 labelled people, 2 of them with two images or more" in printed
    assert "mediate   warning: 2 labelled people, 2 of them" in printed
    run = open_run(tmp_path / "runs" / "made")
    assert len(run.clusters) == 20
    facts = run.manifest("propagate")["facts"]
    assert facts["estimated_precision"] is facts["estimated_f"] is None
    assert run.clusters.expected_precision.isna().all()
    assert "precision" not in repr(run.cluster(0))
    exported = ["labels", "--run", str(run.directory), "--to", "csv", "--out", "x.csv"]
    assert export([*exported, "--min-precision", "0.5"]) == 2
    assert "no expected precision: the mediator was trained" in capsys.readouterr().err
    session = ReviewSession(run, "ada")
    assert session.list_clusters(order="precision")["clusters"][0]["precision"] is None
    assert all(session.describe_question(each)["chance"] is None for each in session.questions)
    summary = (run.directory / "report" / "summary.txt").read_text()
    assert "estimated precision" not in summary
    for text in ("no quality is stated: the mediator was trained on clusters", "2 labelled people",
                 "Label 24 people or more of the unlabelled images"):  # fmt: skip
        assert text in summary
        assert text in (run.directory / "report" / "report.html").read_text()
    assert [str(finding) for finding in run.verdict if "2 labelled people" in finding.text]


def test_a_vote_that_joins_the_whole_pile_stops(tmp_path, capsys):
    write_features(tmp_path, draw(20, 12)[0])
    assert go(tmp_path, "--until", "propagate", "mediate.method=vote") == 0
    assert "Distrust  the committee voted: pairs above the cosine 0.4" in capsys.readouterr().out
    low = ["mediate.method=vote", "mediate.vote.min_similarity=0.1", "--until", "propagate"]
    assert go(tmp_path, *low) == 2
    said = capsys.readouterr().err
    assert "voting joined 240 of 240 images into one cluster, at the cosine 0.10" in said
    assert "propagate.max_size=240" in said
    assert go(tmp_path, *low, "propagate.max_size=240") == 0
    printed = capsys.readouterr().out
    assert "one cluster holds 240 of 240 images" in printed
    assert "not all alike" in printed


def test_what_is_known_at_the_start_fails_there(tmp_path, capsys):
    write_features(tmp_path, draw(4, 5)[0], *draw(8, 5, seed=1))
    assert go(tmp_path) == 2
    assert "20 unlabelled images are too few for knn.k=20, which needs at least 21" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "runs" / "made" / "ingest").exists()
