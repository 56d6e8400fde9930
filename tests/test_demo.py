"""The first command a newcomer runs."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from cdp import open_run
from pipelines import demo
from pipelines.config import read_config

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]


def test_the_results_are_described(finished_run, tiny, monkeypatch, capsys):
    """On a run that is finished already: the demo makes nothing again and prints its results."""
    monkeypatch.setattr(demo, "CONFIG", tiny)
    assert demo.main(["--runs-dir", str(finished_run.parent)]) == 0
    printed = capsys.readouterr().out
    assert "nothing to do, everything is up to date" in printed
    run = open_run(finished_run)
    metric = run.metrics[run.metrics.subject == "pseudo_labels"].set_index("metric").value
    assert f"{len(run.clusters)} clusters of unlabelled faces" in printed
    assert f"F {metric['pairwise_f']:.2f} over all clusters" in printed
    assert (finished_run / "report" / "report.html").as_uri() in printed
    assert f"python -m pipelines.review --run {finished_run}" in printed


def make_results(identities):
    """Clusters with these true identities, as a run holds them; an image without a cluster last."""
    sizes = [len(names) for names in identities]
    label = np.append(np.repeat(np.arange(len(sizes)), sizes), -1)
    names = [*(name for each in identities for name in each), "alone"]
    sample_id = np.arange(len(label)) * 3 + 100
    return SimpleNamespace(
        labels=pd.DataFrame({"sample_id": sample_id, "pseudo_label": label}),
        truth=pd.DataFrame({"sample_id": sample_id, "identity": names})[::-1],
        clusters=pd.DataFrame({"pseudo_label": range(len(sizes)), "size": sizes,
                               "expected_precision": np.full(len(sizes), 0.756)}),
    )  # fmt: skip


def test_the_table_counts_true_identities():
    table = demo.tabulate_clusters(make_results([["ada", "ada", "bob"], ["bob"] * 4, ["eve"] * 3]))
    assert list(table.columns) == demo.COLUMNS
    assert table.values.tolist() == [
        [1, 4, "76%", "bob", 4],
        [0, 3, "76%", "ada", 2],
        [2, 3, "76%", "eve", 3],
    ]


def test_a_precision_that_nobody_knows_is_no_number():
    run = make_results([["ada", "ada"], ["bob"] * 3])
    assert demo.explain_unknown(run) == ""
    run.clusters["expected_precision"] = np.nan
    run.manifest = lambda stage: {"facts": {"withheld": ["nobody was held out"]}}
    assert demo.tabulate_clusters(run)["expected precision"].tolist() == ["not known"] * 2
    assert demo.explain_unknown(run) == "No expected precision is known: nobody was held out.\n"


def test_the_table_holds_the_largest_clusters():
    table = demo.tabulate_clusters(make_results([["ada"] * size for size in range(1, 30)]))
    assert table.images.tolist() == list(range(29, 29 - demo.ROWS, -1))


def test_a_run_without_clusters_has_an_empty_table():
    table = demo.tabulate_clusters(make_results([]))
    assert table.empty
    assert list(table.columns) == demo.COLUMNS


def test_a_mistake_has_the_exit_code_of_a_run(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo.main(["--runs-dir", str(tmp_path / "file")]) == 1
    assert "--runs-dir" in capsys.readouterr().err


def test_the_config_is_that_of_the_package():
    assert read_config(demo.CONFIG, []).name == "demo"


@pytest.mark.long
def test_the_demo_finds_the_people(tmp_path):
    assert demo.main(["--runs-dir", str(tmp_path)]) == 0
    metrics = open_run(tmp_path / "demo").metrics.set_index("metric").value
    assert metrics["pairwise_f"] > 0.8
