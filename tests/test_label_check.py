"""The check of labels: wrong names, second labels and labelled people among unlabelled images."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import yaml

from cdp import ConsensusClusterer
from cdp.arrays.cosine import make_unit
from cdp.knn.graph import build_knn_graph
from cdp.label_check import LabelledPeople, check_labels, list_issues
from cdp.label_check.people import FoundPeople
from cdp.mediator.believed_rows import choose_believed
from cdp.metrics.clustering import score_pairwise
from pipelines.decisions import CorrectionTable, find_keys
from pipelines.graphs.label_check import divide_people
from pipelines.run import main
from pipelines.tables import read_vectors

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]
PEOPLE, IMAGES, OTHERS = 60, 6, 90


def draw_images(person, *, people=400, seed=0):
    """Three views of one image of each `person`, who are points in a space of 32 dimensions."""
    models = [np.random.default_rng(1).normal(size=(32, d)) for d in (48, 40, 24)]
    centre = np.random.default_rng(2).normal(size=(people, 32))
    random = np.random.default_rng([3, seed])
    spread = random.uniform(0.45, 0.8, (len(person), 1))
    face = centre[person] + spread * random.normal(size=(len(person), 32))
    return [
        ((face + 0.3 * random.normal(size=face.shape)) @ model).astype(np.float32)
        for model in models
    ]


@pytest.fixture(scope="module")
def labelled():
    person = np.repeat(np.arange(PEOPLE), IMAGES)
    return draw_images(person), person


def swap_labels(person, share):
    """The labels with a share of them drawn at random, and which are wrong then."""
    random = np.random.default_rng(5)
    label = person.copy()
    rows = random.permutation(len(label))[: round(share * len(label))]
    label[rows] = random.integers(0, PEOPLE, len(rows))
    return label, label != person


def test_right_labels_are_all_believed(labelled):
    views, person = labelled
    check = check_labels(views, person)
    assert check.trained.all()
    assert check.wrong_share < 1e-3
    np.testing.assert_array_equal(check.person, person)
    others = draw_images(np.arange(PEOPLE, 400), seed=1)
    assert (check.people.find(others).probability < 0.05).all()


@pytest.mark.parametrize("share", [0.02, 0.1, 0.2])
def test_wrong_names_are_found(labelled, share):
    views, person = labelled
    label, wrong = swap_labels(person, share)
    check = check_labels(views, label)
    doubted = ~check.believed
    assert wrong[doubted].mean() >= 0.9
    assert doubted[wrong].mean() >= 0.9
    assert check.wrong_share == pytest.approx(wrong.mean(), abs=0.02)
    named = doubted & wrong & (check.seems >= 0)
    assert named.sum() >= 0.8 * wrong.sum()
    np.testing.assert_array_equal(check.seems[named], person[named])


def test_two_labels_of_one_person_are_joined(labelled):
    views, person = labelled
    label = person.copy()
    for each in range(0, PEOPLE, 4):
        label[np.flatnonzero(person == each)[::2]] = 1000 + each
    check = check_labels(views, label)
    joined = check.person != label
    assert check.believed.all()
    assert (check.person[joined] % 1000 == person[joined]).all()
    assert len(np.unique(label[joined])) >= 0.9 * len(range(0, PEOPLE, 4))
    issues = list_issues(check, label, np.arange(len(label)), np.arange(2000))
    assert set(issues.issue) == {"second_label"}
    assert (issues.seems.astype(int) % 1000 == issues.label % 1000).all()


def test_labelled_people_are_found_among_others(labelled):
    views, person = labelled
    people = check_labels(views, person).people
    truth = np.concatenate([np.repeat(np.arange(20), 4), np.arange(PEOPLE, 400)])
    label = np.where(truth < 20, truth, -1)
    seen = draw_images(truth, seed=2)
    known = truth < 20
    found = people.find(seen)
    right, alone = found.label == truth, found.probability
    assert (alone > 0.5)[known].mean() >= 0.8
    assert right[alone > 0.5].mean() >= 0.95
    assert alone.sum() == pytest.approx(known.sum(), rel=0.15)
    assert found.share == pytest.approx(known.mean(), abs=0.02)
    shown, together = people.find_clusters(seen, label, found)
    assert (together > 0.5)[known].mean() >= 0.9
    assert (shown == truth)[together > 0.5].mean() >= 0.98
    mixed = np.where(truth < 20, truth // 2, np.arange(len(truth)) % 10)  # others in every cluster
    cluster = np.where(np.arange(len(truth)) % 3, label, mixed)
    belongs = np.where(np.arange(len(truth)) % 3, 1, 0.4)
    shown, likely = people.assign(seen, cluster, belongs)
    assert (shown == truth)[likely > 0.5].mean() >= 0.97
    assert (likely > 0.5)[known].mean() >= 0.7
    restored = LabelledPeople.from_state(people.state())
    again = restored.find(seen)
    np.testing.assert_array_equal(again.label, found.label)
    np.testing.assert_array_equal(again.probability, found.probability)
    kept = FoundPeople.from_state(found.state(), restored)
    for one, other in zip(
        restored.assign(seen, cluster, belongs, kept), (shown, likely), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    everybody = people.extend(views, person, np.ones(len(person), bool))
    np.testing.assert_array_equal(everybody.label, people.label)
    np.testing.assert_allclose(everybody.find(seen).probability, alone, atol=0.05)


def test_nobody_is_found_where_nobody_is_shown(labelled):
    """The fit of the open set holds without any image of a labelled person, and with them alone."""
    people = check_labels(*labelled).people
    found = people.find(draw_images(np.arange(PEOPLE, 400), seed=7))
    assert found.share < 0.01
    assert found.open_set.slope > 0
    everyone = people.find(draw_images(np.repeat(np.arange(PEOPLE), 3), seed=8))
    assert everyone.share > 0.9
    assert people.find([view[:0] for view in labelled[0]]).share == 0


@pytest.mark.parametrize("people", [1, 2, 9])
def test_few_people_are_believed(labelled, people):
    views, person = labelled
    rows = person < people
    check = check_labels([view[rows] for view in views], person[rows])
    assert check.trained.all()
    assert check.people is None
    assert not len(list_issues(check, person[rows], np.flatnonzero(rows), np.arange(people)))


def make_world(share_wrong, shared, *, others=OTHERS, images=4, alone=200):
    """Labelled views and labels, unlabelled views and truth: `shared` labelled people in both.

    others : unlabelled people of as many images. alone : people of one image.
    """
    person = np.repeat(np.arange(PEOPLE), IMAGES)
    several = np.repeat(np.arange(PEOPLE, PEOPLE + others), images)
    single = np.arange(400 - alone, 400)
    truth = np.concatenate([several, single, np.repeat(np.arange(shared), images)])
    label = swap_labels(person, share_wrong)[0] if share_wrong else person
    return draw_images(person), label, draw_images(truth, seed=3), truth


def test_the_estimator_on_wrong_names_and_shared_people():
    """Quality and estimate stay those of right labels of people who are not shared."""
    found = []
    for share_wrong, shared in ((0, 0), (0.1, 0), (0, PEOPLE // 2)):
        views, label, unlabelled, truth = make_world(share_wrong, shared)
        clusterer = ConsensusClusterer(backend="exact", k=15)
        clusterer.fit(unlabelled, labelled_views=views, labelled_ids=label)
        f = score_pairwise(truth, clusterer.labels_)[2]
        assert clusterer.quality_.f == pytest.approx(f, abs=0.08)
        found.append(f)
        assert (len(clusterer.label_issues_) > 0) == (share_wrong > 0)
        assigned = clusterer.assignments_
        if shared:
            known = truth < PEOPLE
            assert len(assigned) >= 0.8 * known.sum()
            assert (truth[assigned.row] == assigned.label).mean() >= 0.92
        else:
            assert len(assigned) <= 4
    assert min(found[1:]) >= found[0] - 0.06, found


def choose(views, person, others, **options):
    graph = build_knn_graph(others[0], 10, backend="exact")
    return choose_believed(views, person, others, graph, **options)


def test_images_of_labelled_people_are_adopted_where_sizes_match():
    """Where people have many unlabelled images, those are trained on; where they have few, not."""
    person = np.repeat(np.arange(PEOPLE), 3)
    views = [make_unit(view)[0] for view in draw_images(person)]
    for images, others, adopts in ((6, 6, True), (3, 2, False)):
        truth = np.repeat(np.arange(PEOPLE + OTHERS), images)
        truth = truth[(truth < PEOPLE) | (np.arange(len(truth)) % images < others)]
        found = choose(views, person, draw_images(truth, seed=4))
        assert bool(len(found.adopted)) == adopts
        known = truth < PEOPLE
        assert found.left_out[known].mean() > 0.8
        assert found.left_out[~known].mean() < 0.25
        np.testing.assert_array_equal(found.labelled, np.arange(len(person)))
        if adopts:
            assert len(found.adopted) > 0.7 * known.sum()
            assert (truth[found.adopted] == found.identity[len(person) :]).mean() > 0.95


def test_copies_of_labelled_images_are_not_adopted(labelled):
    views, person = ([make_unit(view)[0] for view in labelled[0]], labelled[1])
    truth = np.repeat(np.arange(PEOPLE + OTHERS), 12)
    others = draw_images(truth, seed=5)
    both = [np.concatenate([view, other]) for view, other in zip(views, others, strict=True)]
    found = choose(views, person, both)
    assert len(found.adopted) > 0
    copied = np.isin(found.adopted, found.labelled)  # row i of both is labelled row i
    assert not copied.any()
    assert len(np.unique(found.identity)) == PEOPLE


def test_an_assignment_needs_the_cluster_and_the_image(labelled):
    views, person = labelled
    people = check_labels(views, person).people
    truth = np.concatenate([np.repeat(np.arange(20), 5), np.arange(200, 300)])
    images = draw_images(truth, seed=6)
    label = np.where(truth < 20, truth, -1)
    sure = np.ones(len(truth))
    found, probability = people.assign(images, label, sure)
    known = truth < 20
    right = (found == truth) & (probability > 0.5)
    assert right[known].mean() > 0.9
    assert (probability[~known] > 0.5).sum() <= 3
    mixed = label.copy()
    mixed[100:110] = np.arange(10)  # images of others in the clusters of labelled people
    found, probability = people.assign(images, mixed, sure)
    assert (probability[100:110] > 0.5).sum() <= 1
    alone = people.assign(images, np.full(len(truth), -1), sure)[1]
    assert ((alone > 0.5) == (people.find(images).probability > 0.5)).all()


def test_people_are_divided_whole(monkeypatch):
    monkeypatch.setattr("cdp.mediator.curriculum.LABELLED_ROWS", 10)
    number = np.random.default_rng(0).permutation(np.repeat(np.arange(12), 4))
    chosen = np.flatnonzero(number < 3)
    parts = divide_people(number, chosen)
    assert len(parts) > 1
    np.testing.assert_array_equal(np.sort(np.concatenate([chosen, *parts])), np.arange(48))
    people = [set(number[part]) for part in parts]
    assert sum(map(len, people)) == 9
    assert max(map(len, parts)) <= 14
    assert divide_people(number, np.arange(48)) == []


def test_pipeline_and_estimator_adopt_the_same_images_and_give_the_same_labels(tmp_path):
    views, label, unlabelled, truth = make_world(0.1, 20, others=30, images=12, alone=0)
    names = np.array([f"labelled/{number}" for number in range(400)])
    root = tmp_path / "data"
    for split, vectors, people in (("l", views, label), ("u", unlabelled, truth)):
        folder = root / split / "features"
        folder.mkdir(parents=True)
        for number, view in enumerate(vectors):
            view.tofile(folder / f"view{number}.bin")
        lines = [f"{each}/{row:04d}.jpg" for row, each in enumerate(people)]
        (root / split / "list.txt").write_text("\n".join(lines) + "\n")
        (root / split / "meta.txt").write_text("\n".join(map(str, people)) + "\n")
    manifest = {"name": "m", "kind": "features", "labelled": {"root": "l"},
                "unlabelled": {"root": "u"}}  # fmt: skip
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(manifest))
    members = [{"name": f"view{number}", "features": f"view{number}"} for number in range(3)]
    committee = {"base": members[0], "members": members[1:]}
    config = tmp_path / "m.yaml"
    config.write_text(yaml.safe_dump({"data": "data.yaml", "committee": committee}))
    options = ["--config", str(config), "--data-root", str(root)]
    run = tmp_path / "runs" / "m"
    assert main([*options, "--runs-dir", str(run.parent), "--until", "propagate"]) == 0

    issues = pd.read_parquet(run / "knn/label_issues.parquet")
    row = issues.path.str.extract(r"/(\d+)\.jpg")[0].astype(int).to_numpy()
    person = np.repeat(np.arange(PEOPLE), IMAGES)
    assert (issues.issue == "wrong_name").all()
    assert (label != person)[row].mean() >= 0.9
    assert len(issues) >= 0.9 * (label != person).sum()
    seems = issues.seems.notna().to_numpy()
    assert (issues.seems[seems].to_numpy() == names[person[row[seems]]]).all()

    adopted = pd.read_parquet(run / "knn/adopted.parquet")
    samples = pd.read_parquet(run / "ingest/samples.parquet").set_index("sample_id")
    assert (samples.split[adopted.sample_id] == "unlabelled").all()
    row = samples.path[adopted.sample_id].str.extract(r"/(\d+)\.jpg")[0].astype(int).to_numpy()
    assert len(adopted) >= 0.8 * (truth < 20).sum()
    assert (adopted.identity.to_numpy() == names[truth[row]]).mean() >= 0.95

    assigned = pd.read_parquet(run / "propagate/assignments.parquet")
    row = assigned.path.str.extract(r"/(\d+)\.jpg")[0].astype(int).to_numpy()
    assert (assigned.identity.to_numpy() == names[truth[row]]).mean() >= 0.95
    assert len(assigned) >= 0.7 * (truth < 20).sum()

    tables = {
        split: [run / f"embed/embeddings/{split}/view{number}.parquet" for number in range(3)]
        for split in ("labelled", "unlabelled")
    }
    read = {split: [read_vectors(t, "embedding") for t in tables[split]] for split in tables}
    clusterer = ConsensusClusterer().fit(
        read["unlabelled"], labelled_views=read["labelled"], labelled_ids=names[label]
    )
    published = pd.read_parquet(run / "propagate/labels.parquet").pseudo_label.to_numpy()
    np.testing.assert_array_equal(clusterer.labels_, published)
    np.testing.assert_array_equal(clusterer.assignments_.label, assigned.identity)

    kept = int(issues.sample_id[0])
    table = run / "knn/neighbours/labelled/view0.parquet"
    assert kept not in pd.read_parquet(table).sample_id.to_numpy()
    keys = find_keys(samples.loc[[kept]].reset_index())
    CorrectionTable(run).append("ada", "keep", [keys])
    assert main([*options, "--runs-dir", str(run.parent), "--stage", "knn"]) == 0
    assert kept in pd.read_parquet(table).sample_id.to_numpy()
    asked = pd.read_parquet(run / "knn/label_issues.parquet").sample_id
    assert set(asked) == set(issues.sample_id) - {kept}
