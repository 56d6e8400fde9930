"""adapted: an adaptation that is killed begins anew, and leaves nothing half made."""

import functools
import signal

import pytest
import torch
from conftest import copy_run
from safetensors.torch import load_file
from test_faults import Orders

import cdp.adaptation
from cdp.adaptation import adversarial, moments
from cdp.recognizer import Recognizer
from pipelines.run import main

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.trains,
    pytest.mark.usefixtures("one_thread"),
]

SHORT = functools.partial(cdp.adaptation.AdaptationPlan, steps=4, batch_size=8)


@pytest.fixture(autouse=True)
def short_plan(monkeypatch) -> None:
    monkeypatch.setattr(cdp.adaptation, "AdaptationPlan", SHORT)


def adapt(tiny, run, kind: str) -> int:
    options = ["--workers", "1", "--stage", "retrain", f"retrain.adapt={kind}"]
    return main(["--config", str(tiny), "--runs-dir", str(run.parent), *options])


def interrupt(monkeypatch, owner, name: str, count: int) -> None:
    """A function is interrupted when it is called for the `count`-th time."""
    calls, original = [], getattr(owner, name)

    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


def check_nothing_made(run) -> None:
    assert not list(run.parent.rglob("adapted.safetensors"))


def check_whole(tiny, run, whole, kind: str) -> None:
    """The end of a run that was interrupted is that of one that was not."""
    trained = (run.parent / ".store" / "model").glob("*/*.safetensors")
    before = {path: path.stat().st_mtime_ns for path in trained}
    for each in (run, whole):
        assert adapt(tiny, each, kind) == 0
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())
    for pattern in ("*.partial", ".*.draft-*"):
        assert not list(run.parent.rglob(pattern))
    found, expected, product = (
        load_file(place / "retrain" / f"{name}.safetensors")
        for place, name in ((run, "adapted"), (whole, "adapted"), (run, "labelled_pseudo"))
    )
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert any(not torch.equal(value, product[key]) for key, value in found.items())


@pytest.mark.parametrize(
    ("kind", "owner", "name", "count"),
    [("adda", adversarial, "_step", 3), ("moments", moments, "prepare_faces", 1)],
)
def test_interrupted_it_begins_anew(
    tiny, own_run, finished_run, tmp_path, monkeypatch, kind, owner, name, count
) -> None:
    """In the adaptation itself, and while its file is written."""
    for place in ((owner, name, count), (Recognizer, "save", 1)):
        with monkeypatch.context() as patched:
            interrupt(patched, *place)
            assert adapt(tiny, own_run, kind) == 130
        check_nothing_made(own_run)
    check_whole(tiny, own_run, copy_run(finished_run, tmp_path / "whole"), kind)


@pytest.mark.long
def test_killed_it_begins_anew(tiny, own_run, finished_run, tmp_path) -> None:
    """By SIGKILL, to the whole process group, in the seventh step."""
    with Orders(tiny, own_run.parent) as orders:
        code, _ = orders.run("step", 7, "--stage", "retrain", "retrain.adapt=adda")
    assert code == -signal.SIGKILL
    check_nothing_made(own_run)
    check_whole(tiny, own_run, copy_run(finished_run, tmp_path / "whole"), "adda")
