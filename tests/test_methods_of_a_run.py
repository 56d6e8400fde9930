"""methods of a run: each is on by a line of a config, and resumes in the middle of a training."""

import pytest
import torch
from conftest import copy_run
from safetensors.torch import load_file

from cdp.progress import Progress
from cdp.training import loop
from pipelines.run import main

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.trains,
    pytest.mark.usefixtures("one_thread"),
]

DOMAIN_BALANCE = "retrain.head=domain_balance"
LINES = {
    "ccl": ["retrain.head=ccl"],
    "domain_balance": [DOMAIN_BALANCE],
    "subspheres": ["retrain.head=subspheres", "retrain.head_options={parts: 4}"],
    "subdecisions": ["retrain.neck=subdecisions"],
    "trunk_branch": ["retrain.neck=trunk_branch"],
    "bbn": ["retrain.neck=twofold", "retrain.sampling=bilateral"],
    "reversed": ["retrain.sampling=reversed"],
    "moving share": ["retrain.pseudo_share=[0.7, 0.3]"],
    "consistency": ["retrain.neck=subdecisions", "retrain.auxiliary={consistency: {weight: 0.1}}"],
    "gate": [
        "retrain.neck=balanced", DOMAIN_BALANCE, "retrain.auxiliary={gate: {weight: 0.01}}",
    ],
    "mutual_channel": ["retrain.auxiliary={mutual_channel: {weight: 0.1}}"],
    "construction": ["retrain.auxiliary={construction: {}}"],
    "spatial_diversity": ["retrain.auxiliary={spatial_diversity: {channels: 8}}"],
    "feature_diversity": ["retrain.auxiliary={feature_diversity: {}}"],
    "decorrelation": ["retrain.auxiliary={decorrelation: {parts: 4}}"],
    "domain": ["retrain.auxiliary={domain: {weight: 0.1}}"],
    "map_distillation": ["retrain.auxiliary={map_distillation: {}}"],
    "relation_distillation": ["retrain.auxiliary={relation_distillation: {}}"],
    "promotion": ["retrain.head=softmax", "retrain.auxiliary={promotion: {rare: 8}}"],
    "batch_triplet": [
        "retrain.sampling=identity", "retrain.images_per_identity=2",
        "retrain.auxiliary={batch_triplet: {}}",
    ],
}  # fmt: skip
"""Method -> its settings, beside others."""


def retrain(tiny, run, lines: list[str]) -> int:
    options = ["--config", str(tiny), "--runs-dir", str(run.parent), "--workers", "1"]
    return main([*options, "--stage", "retrain", *lines])


def interrupt_in_epoch_two(monkeypatch) -> None:
    """Every training is interrupted after its first epoch, as by Ctrl-C."""
    original = loop._Trainer.run_epoch

    def run_epoch(trainer, bar: Progress) -> None:
        if trainer.epoch == 1:
            raise KeyboardInterrupt
        original(trainer, bar)

    monkeypatch.setattr(loop._Trainer, "run_epoch", run_epoch)


@pytest.mark.long
@pytest.mark.parametrize("name", LINES)
def test_a_method_is_on_by_its_lines_and_resumes(
    tiny, finished_run, tmp_path, monkeypatch, name: str
) -> None:
    whole = copy_run(finished_run, tmp_path / "whole")
    again = copy_run(finished_run, tmp_path / "again")
    assert retrain(tiny, whole, LINES[name]) == 0
    with monkeypatch.context() as patched:
        interrupt_in_epoch_two(patched)
        assert retrain(tiny, again, LINES[name]) == 130
    assert retrain(tiny, again, LINES[name]) == 0
    for subject in ("labelled_only", "labelled_pseudo"):
        one, other, plain = (
            load_file(run / "retrain" / f"{subject}.safetensors")
            for run in (whole, again, finished_run)
        )
        assert all(torch.equal(value, other[key]) for key, value in one.items())
        same = subject == "labelled_only" and name == "moving share"  # it has one set
        assert same == all(key in plain and torch.equal(one[key], plain[key]) for key in one)
