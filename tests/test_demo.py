"""The first command a newcomer runs."""

import pytest

from cdp import open_run
from pipelines import demo
from pipelines.config import read_config


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


def test_the_table_counts_true_identities(finished_run):
    run = open_run(finished_run)
    table = demo.tabulate_clusters(run)
    assert len(table) == min(demo.ROWS, len(run.clusters))
    assert table.images.is_monotonic_decreasing
    identity_of = run.truth.set_index("sample_id").identity
    for row in table.itertuples(index=False):
        members = run.labels.sample_id[run.labels.pseudo_label == row.cluster]
        assert len(members) == row.images
        assert (identity_of[members] == row[3]).sum() == row[4]


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
