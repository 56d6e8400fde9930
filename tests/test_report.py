"""The report page: whole, self-contained, harmless, and honest about what a run does not have."""

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from cdp.types import PairTable
from pipelines.pages import render_report
from pipelines.pages.face_sheets import FARTHEST, NEAREST, make_sheets
from pipelines.pages.figures import draw_recognizers, draw_sizes, draw_thresholds
from pipelines.verdict import Finding

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]

SECTIONS = ("funnel", "labels", "recognizers", "training", "graphs", "cost", "clusters", "merges",
            "bridges")  # fmt: skip


class Reader(HTMLParser):
    """What a browser would fetch, run or show."""

    def __init__(self):
        super().__init__()
        self.ids, self.fetched, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.append(found.get("id"))
        self.fetched += [
            found[name]
            for name in ("src", "href", "xlink:href", "srcset", "data", "action")
            if found.get(name) and not found[name].startswith(("#", "data:"))
        ]

    def handle_data(self, data):
        self.text += data


def read_page(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def read_data(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


@pytest.fixture(scope="module")
def page(known_run):
    return known_run / "report" / "report.html"


def test_the_page_needs_no_network_and_no_other_file(page):
    reader = read_page(page)
    assert reader.fetched == []
    assert set(SECTIONS) <= set(reader.ids)
    named = [each for each in reader.ids if each]
    assert len(named) == len(set(named))
    assert "default-src 'none'" in html.unescape(page.read_text())
    assert not re.search(r"@import|url\((?!#)", page.read_text())


SPREADS = ("accuracy_std", "accuracy_standard_error")
"""Figures shown beside others, not as rows of their own."""


def test_the_page_shows_the_figures_of_the_tables(page, known_run):
    text = re.sub(r"\s+", " ", read_page(page).text)
    metrics = pd.read_parquet(known_run / "evaluate" / "metrics.parquet")
    for row in metrics[metrics.subject == "labelled_pseudo"].itertuples():
        assert f"{row.value:.3f}" in text or row.metric in SPREADS
    data = read_data(page.read_text())
    clusters = pd.read_parquet(known_run / "propagate" / "clusters.parquet")
    assert sorted(each["label"] for each in data["clusters"]) == list(range(len(clusters)))
    shown = {each["label"]: each["size"] for each in data["clusters"]}
    assert [shown[label] for label in clusters.pseudo_label] == list(clusters["size"])
    assert all(face[3] for face in data["faces"])
    for cluster in data["clusters"]:
        distance = [data["faces"][face][2] for face in cluster["faces"]]
        assert distance == sorted(distance)
        assert distance[0] < 0.002


def test_the_page_compares_sets_and_shows_inputs_and_a_map(page, known_run):
    text = page.read_text()
    reader = read_page(page)
    assert {"sets", "inputs", "map"} <= set(reader.ids)
    assert "Every image is square." in reader.text
    assert "Sets compared by sharpness" in text
    for member in ("base", "other"):
        for split in ("labelled", "unlabelled", "held out"):
            assert f'alt="5 {split} images as {member} sees them"' in text
    labels = pd.read_parquet(known_run / "propagate" / "labels.parquet")
    data = read_data(text)
    names = [data["faces"][face][0] for face in data["mapped"]]
    assert names == labels.path.tolist()
    assert text.count("data-point=") == len(labels)


def test_every_stage_has_its_cost(page, known_run):
    text = read_page(page).text
    for stage in ("ingest", "train", "mediate", "propagate", "retrain", "evaluate", "thumbnails"):
        manifest = json.loads((known_run / stage / "manifest.json").read_text())
        assert f"{manifest['peak_memory_mib']:,} MiB" in text


HOSTILE = '<img src=x onerror="alert(1)">&"\'</script><script>alert(2)</script>.jpg'


def make_page(name=HOSTILE, **changes):
    labels = pd.DataFrame(
        {"sample_id": [3, 5, 8], "path": [name] * 3, "pseudo_label": [0, 0, -1],
         "confidence": [0.9, 0.8, 0.0]}
    )  # fmt: skip
    clusters = pd.DataFrame(
        {"pseudo_label": [0], "size": [2], "expected_precision": [0.9], "weakest_edge": [0.7],
         "mean_probability": [0.9], "medoid_sample_id": [3]}
    )  # fmt: skip
    pairs = PairTable(np.array([0, 1]), np.array([1, 2]))
    sheets = make_sheets(labels, clusters, pairs, np.array([0.9, 0.2]), None, {})

    class Manifest:
        title, kind = name, "features"

    given = {
        "name": name,
        "dataset": Manifest,
        "facts": {
            "embed": {"dimensions": {"one": 4}},
            "propagate": {"clusters": 1, "labelled": 2, "largest": 2, "estimated_f": 0.9},
            "knn": {"recall": {name: 0.9}, "k": 3, "backend": "exact"},
        },
        "costs": [{"stage": "ingest", "seconds": 1.0, "memory_mib": 10}],
        "funnel": [("images", 3, "files")],
        "rejected": pd.DataFrame({"reason": [name, "same bytes as x", "same bytes as y"]}),
        "verdict": [Finding("doubt", name, name)],
        "issues": pd.DataFrame(
            {
                "path": [name],
                "identity": [name],
                "seems": [None],
                "issue": ["wrong_name"],
                "probability": [0.9],
            }
        ),
        "figures": {},
        "compared": {},
        "seen": [],
        "metrics": pd.DataFrame(
            {"subject": [], "protocol": [], "metric": [], "value": [], "count": []}
        ),
        "recognizers": [],
        "sheets": sheets,
    }
    return render_report(**{**given, **changes})


def test_names_never_become_markup():
    page = make_page()
    assert page.count("<script") == 2  # the data and the code
    assert page.count("<img") == 0
    assert "onerror=" not in re.sub(r'id="data">.*?</script>', "", page).replace(
        "onerror=&#34;", ""
    )
    data = read_data(page)
    assert data["faces"][0][0] == HOSTILE
    assert "same bytes as another" in page


def test_words_between_backticks_are_code():
    page = make_page(
        verdict=[Finding("doubt", "few `<b>` people", "give an `onnx` file, ` or not")]
    )
    assert "few <code>&lt;b&gt;</code> people." in page
    assert "give an <code>onnx</code> file, ` or not." in page


def test_what_a_run_does_not_have_is_said():
    text = re.sub(r"\s+", " ", make_page("plain"))
    for sentence in (
        "the data set brings features and no images",
        "The true identities of the unlabelled images are unknown",
        "No mediator was trained",
        "No member was trained here",
        "This run has no images",
        "there is no size, shape or sharpness to compare",
        "no model is shown any here",
        "too few for a map",
    ):
        assert sentence in text


def test_intervals_are_shown_where_they_are_measured():
    row = {"protocol": "verification 24px", "metric": "accuracy", "gap": 0.5, "count": 10,
           "subjects": {"labelled_only": (0.9, 0.8, 0.95)}}  # fmt: skip
    assert "0.800–0.950" in make_page("plain", recognizers=[row])


def test_four_figures_stand_before_the_table():
    metrics = ["accuracy", "tar@far=0.01", "rank-1", "tpir20@fpir=0.1", "rank-5"]
    rows = [
        {"protocol": f"probe {px}px", "metric": metric, "gap": None, "count": 10,
         "headline": metric != "rank-5",
         "subjects": {"labelled_only": (0.4, 0.3, 0.5), "labelled_pseudo": (px / 100, 0.4, 0.6)}}
        for px in (32, 16) for metric in metrics
    ]  # fmt: skip
    page = make_page("plain", recognizers=rows)
    tiles = page.partition('tiles headlines">')[2].partition("</section>")[0]
    tiles = tiles.partition('class="card"')[0]
    shown = re.findall(r"<b>(.*?)</b>(.*?),", tiles)
    assert shown == [("0.320", metric) for metric in metrics[:4]]
    assert tiles.count("0.400 without pseudo-labels") == 4
    assert "tiles headlines" not in make_page("plain")


def test_a_large_cluster_shows_its_middle_and_its_edge():
    count = 200
    labels = pd.DataFrame(
        {"sample_id": np.arange(count), "path": "x", "pseudo_label": 0, "confidence": 0.5}
    )
    clusters = pd.DataFrame(
        {"size": [count], "expected_precision": [0.9], "mean_probability": [0.9],
         "weakest_edge": [0.7], "medoid_sample_id": [100]}
    )  # fmt: skip
    angle = np.abs(np.arange(count) - 100) / 100
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    pairs = PairTable(np.arange(count - 1), np.arange(1, count))
    pictures = dict.fromkeys(range(count), b"x" * 100)
    probability = np.full(count - 1, 0.9)
    found = make_sheets(labels, clusters, pairs, probability, vectors, pictures)
    shown = [found.faces[face][2] for face in found.clusters[0]["faces"]]
    assert len(shown) == NEAREST + FARTHEST
    assert shown == sorted(shown)
    assert shown[0] == 0
    assert shown[-1] == pytest.approx(1 - np.cos(1), abs=1e-3)
    small = make_sheets(labels, clusters, pairs, probability, vectors, pictures, budget=1000)
    assert (len(small.clusters), small.left_out) == (0, 1)


@pytest.mark.parametrize(("precision", "chance"), [(0.9, 0.2), (np.nan, None)])
def test_no_chance_is_shown_where_no_precision_is_known(precision, chance):
    labels = pd.DataFrame({"sample_id": [0, 1, 2], "path": "x", "pseudo_label": [0, 0, -1],
                           "confidence": 0.5})  # fmt: skip
    clusters = pd.DataFrame(
        {"size": [2], "expected_precision": [precision], "mean_probability": [0.9],
         "weakest_edge": [0.7], "medoid_sample_id": [0]}
    )  # fmt: skip
    pairs = PairTable(np.array([0, 1]), np.array([1, 2]))
    found = make_sheets(labels, clusters, pairs, np.array([0.9, 0.2]), None, {})
    assert found.merges
    assert found.bridges
    assert (found.merges[0]["chance"] is None) == (chance is None)
    assert (found.bridges[0]["chance"] is None) == (chance is None)
    assert found.clusters[0]["precision"] == (None if chance is None else precision)


def test_figures_are_the_same_every_time_and_follow_the_page():
    size = np.array([2, 3, 3, 40])
    assert draw_sizes(size) == draw_sizes(size)
    assert "var(--c1)" in draw_sizes(size)
    assert "#0102" not in draw_sizes(size)
    assert "#0103" not in draw_sizes(size)
    drawn = draw_recognizers(["<b>"], {"one": [(0.5, np.nan, np.nan)]})
    assert "<b>" not in drawn
    assert "&lt;b&gt;" in drawn


@pytest.mark.parametrize("cut", [0.0, 0.3, 1.0])
def test_a_cut_beyond_the_axis_of_log_odds_is_drawn_at_its_edge(cut):
    curve = pd.DataFrame({"threshold": [0.02, 0.5, 0.999], "estimated_precision": [0.5, 0.8, 1.0]})
    assert f"cut {cut:.3g}" in draw_thresholds(curve, cut, odds=True)


def test_curves_of_error_versus_reject_start_where_nothing_is_rejected() -> None:
    from pipelines.pages.rejection import collect_curves, draw_rejection

    rows = [
        ("ours", "identification 16px surveillance", "rank-1", 0.6),
        ("ours", "identification 16px surveillance", "rank-5", 0.9),
        ("ours", "rejecting 16px surveillance", "rank-1, 50% rejected", 0.9),
        ("ours", "rejecting 16px surveillance", "rank-1, 10% rejected", 0.7),
        ("ours", "rejecting by consistency 16px surveillance", "rank-1, 10% rejected", 0.65),
        ("ours", "rejecting 16px", "rank-1, 10% rejected", 0.95),
    ]
    metrics = pd.DataFrame(rows, columns=["subject", "protocol", "metric", "value"])
    found = collect_curves(metrics)
    hard = found[found.probe == "16px surveillance"]
    norm = hard[hard.quality == ""]
    assert norm.rejected.tolist() == [0, 10, 50]
    np.testing.assert_allclose(norm.error, [40, 30, 10])
    assert hard[hard.quality == " by consistency"].rejected.tolist() == [0, 10]
    figure = str(draw_rejection(metrics, ["ours"]))
    assert "16px surveillance" in figure  # the harder kind alone
    assert "by norm" in figure
    assert "by consistency" in figure
    assert draw_rejection(metrics, ["nobody"]) is None


@pytest.mark.parametrize("width", [4.0, 8.0])
def test_a_legend_stays_within_its_figure(width: float) -> None:
    """However many lines there are, and however long their names."""
    from pipelines.pages.figures import Canvas

    canvas = Canvas("Many lines", width, 3)
    with canvas as axes:
        for number in range(10):
            axes.plot([0, 1], [number, 2], label=f"labelled pseudo by consistency {number}")
        canvas.add_legend(*axes.get_legend_handles_labels())
        canvas._figure.draw_without_rendering()
        box = canvas._figure.legends[0].get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= canvas._figure.bbox.x1


def test_the_report_shows_what_recognizers_reject_and_where_they_look(page) -> None:
    text = page.read_text()
    assert 'aria-label="Error versus reject"' in text
    assert 'alt="Rows of faces coloured by where each model looks: ' in text
