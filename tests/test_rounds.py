"""Two rounds: the first recognizer joins the committee of the second."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from pipelines.config import read_config
from pipelines.run import main

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]


def test_the_second_committee_has_the_first_recognizer(tiny):
    one = read_config(tiny, []).list_rounds()
    assert [each.name for each in one] == ["tiny"]
    first, second = read_config(tiny, ["rounds=2"]).list_rounds()
    assert (first.name, second.name) == ("tiny_round1", "tiny")
    assert [m.name for m in first.committee.all] == ["base", "other"]
    assert [m.name for m in second.committee.all] == ["base", "other", "round1"]
    assert second.committee.members[-1].recognizer == "tiny_round1"
    assert first.rounds == second.rounds == 1


def test_a_recognizer_nobody_made_is_named(tiny, tmp_path, capsys):
    member = "committee.members=[{name: student, recognizer: nobody}]"
    command = ["--config", str(tiny), "--runs-dir", str(tmp_path), "--workers", "1"]
    assert main([*command, "--until", "embed", member]) == 2
    printed = capsys.readouterr().err
    assert "recognizer of run 'nobody'" in printed
    assert "--until retrain" in printed


@pytest.mark.long
def test_two_rounds_end_to_end(tiny, tmp_path):
    command = ["--config", str(tiny), "--runs-dir", str(tmp_path), "--workers", "1", "rounds=2"]
    assert main(["--until", "propagate", *command]) == 0
    labels = pd.read_parquet(tmp_path / "tiny" / "propagate" / "labels.parquet")
    before = pd.read_parquet(tmp_path / "tiny_round1" / "propagate" / "labels.parquet")
    assert labels.sample_id.tolist() == before.sample_id.tolist()
    manifest = json.loads((tmp_path / "tiny" / "embed" / "manifest.json").read_text())
    assert list(manifest["ingredients"]["recognizers"]) == ["tiny_round1"]
    # a first round that changes makes the second stale
    assert main(["--until", "retrain", *command, "retrain.epochs=1"]) == 0
    again = json.loads((tmp_path / "tiny" / "embed" / "manifest.json").read_text())
    assert again["fingerprint"] != manifest["fingerprint"]
