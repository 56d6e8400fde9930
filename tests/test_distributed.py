"""distributed: two processes end where one does, and without torchrun nothing changes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_extension_points import list_losses, make_seeing
from test_training import PLAN, train

from cdp.training.distillation import fit_target
from cdp.training.distributed import Team, find_team, gather_rows, join_team, share_moments

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
sys.path.insert(0, "tests")
import torch
from safetensors.torch import save_file
from test_distributed import train_everything
from cdp.training.distributed import join_team

torch.set_num_threads(1)
with join_team() as team:
    assert team.size == 2
    states = []
    state, history = train_everything(on_epoch=states.append)
    assert len(states) == (2 if team.leads else 0)
    state["losses"] = torch.tensor([record["loss"] for record in history])
    save_file(state, f"{sys.argv[1]}/{team.rank}.safetensors")
"""


def train_everything(**options):
    """Every moving part of a training: heads, moments, a teacher, a neck, losses that see maps,
    twins and parts; two sets of unequal share that moves.

    Two steps: after more, a difference of 1e-8 in the start of one process is magnified to 1e-4
    where a maximum or the sign of a difference of 0 turns over, as that of a second process is.
    """
    backbone, training_sets = make_seeing("subdecisions", list_losses("subdecisions"))
    target = fit_target(np.random.default_rng(0).normal(size=(25, 16)), 16)
    training_sets[1] = replace(training_sets[1], share=(0.2, 0.6), teacher=target)
    plan = replace(PLAN, epochs=2, batch_size=51, learning_rate=0.05, ema_decay=0.9)
    history = train(backbone, training_sets, plan, **options)
    state = {key: value.clone().contiguous() for key, value in backbone.state_dict().items()}
    for number, training_set in enumerate(training_sets):
        state |= {f"{number}.{k}": v.clone() for k, v in training_set.head.state_dict().items()}
    return state, history


def test_two_processes_end_where_one_does(tmp_path) -> None:
    path = tmp_path / "job.py"
    path.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(path), str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone, history = train_everything()
    for rank in (0, 1):
        together = load_file(tmp_path / f"{rank}.safetensors")
        losses = [record["loss"] for record in history]
        np.testing.assert_allclose(together.pop("losses"), losses, rtol=1e-5)
        for key, value in alone.items():
            np.testing.assert_allclose(
                together[key].float(), value.float(), atol=5e-6, rtol=1e-5, err_msg=key
            )


@pytest.mark.parametrize("count", [1, 7, 8])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_thing_is_in_one_part(count: int, size: int) -> None:
    parts = [range(*Team(rank, size).part(count)) for rank in range(size)]
    assert [row for part in parts for row in part] == list(range(count))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


RUN = """
import sys
import torch
torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False
from pipelines.run import main
if __name__ == "__main__":  # workers import this file
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_a_run_by_two_processes_is_the_run_of_one(tiny, tmp_path, monkeypatch) -> None:
    """The whole command line under torchrun: the second process helps to train, and leaves.

    In float32: in bfloat16 parts of a batch are rounded otherwise than the whole, by percents.
    """
    import pandas as pd

    from pipelines.run import main

    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    path = tmp_path / "run.py"
    path.write_text(RUN)
    options = ["--config", str(tiny), "--workers", "1", "--until", "train"]
    assert main([*options, "--runs-dir", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(path), *options, "--runs-dir", str(tmp_path / "two")],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (
        pd.read_parquet(tmp_path / n / "tiny/train/history.parquet") for n in ("one", "two")
    )
    assert list(one.model) == list(two.model)
    # A separable network on some dozens of images magnifies a perturbation of 1e-7 to percents
    # within a few steps, whoever trains it: only the base can be compared.
    base = one.model == "base"
    np.testing.assert_allclose(one.loss[base], two.loss[base], rtol=1e-3)
    assert "Traceback" not in done.stderr


def test_a_team_of_one_is_no_team() -> None:
    with join_team() as team:
        assert team == Team(0, 1) == find_team()
        rows = torch.ones(3, 2, requires_grad=True)
        assert gather_rows(rows, 3, team) is rows
        norm = torch.nn.BatchNorm1d(2)
        with share_moments(norm, team):
            assert "forward" not in vars(norm)
