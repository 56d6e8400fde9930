"""Nothing lost: faults that are really injected into whole runs, and what is left of them."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import digest_run

from pipelines.run import main

ROOT = Path(__file__).parents[1]


def start(tiny, runs, *arguments, before=None, module=("pipelines.run",), **options):
    """Start a run in a process group of its own, on one worker."""
    command = [sys.executable, "-m", *module, "--config", tiny, "--runs-dir", runs]
    return subprocess.Popen(
        [str(part) for part in (*command, "--workers", "1", *arguments)],
        cwd=ROOT, start_new_session=True, preexec_fn=before, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTHONUNBUFFERED": "1"}, **options,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def run(tiny, runs, *arguments):
    return main(["--config", str(tiny), "--runs-dir", str(runs), "--workers", "1", *arguments])


@pytest.fixture(scope="module")
def whole(finished_run):
    """Digests of the tables of a run that nothing happened to."""
    return digest_run(finished_run)


# ---------------------------------------------------------------------------------------- kills


def kill_until_done(tiny, runs, draw, at_most):
    """Run, killed before the n-th change of the disk, again and again; how often it was killed."""
    for kills in range(at_most):
        process = start(tiny, runs, module=("faulty_run", str(draw())))
        _, err = process.communicate(timeout=300)
        if process.returncode == 0:
            return kills
        assert process.returncode == -signal.SIGKILL, err
    return at_most


def check_end(tiny, runs, whole):
    assert run(tiny, runs) == 0
    assert digest_run(runs / "tiny") == whole
    assert not list(runs.rglob("*.partial"))
    assert not list(runs.rglob(".*.draft-*"))


def test_killed_before_seeded_changes_of_the_disk_it_ends_the_same(tiny, whole, tmp_path):
    dice = random.Random(1)
    assert kill_until_done(tiny, tmp_path, lambda: dice.randint(40, 80), 2)
    check_end(tiny, tmp_path, whole)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_killed_before_seeded_changes_many_times_it_ends_the_same(tiny, whole, tmp_path, seed):
    dice = random.Random(seed)
    kills = kill_until_done(tiny, tmp_path, lambda: dice.randint(4, 14), 100)
    print(f"killed {kills} times")
    assert kills >= 10
    check_end(tiny, tmp_path, whole)


# --------------------------------------------------------------------------------- damaged files


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {"truncated": truncate, "flipped": flip, "missing": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_named_and_its_stage_repairs_it(own_run, tiny, whole, capsys, damage):
    runs = own_run.parent
    part = next((own_run / "embed").resolve().rglob("part-*.parquet"))
    DAMAGES[damage](part)
    assert run(tiny, runs, "--stage", "knn", "--verify") == 1
    told = capsys.readouterr().err
    assert str(part) in told
    assert "--stage embed --force" in told
    assert run(tiny, runs, "--stage", "embed", "--force") == 0
    assert run(tiny, runs, "--verify") == 0
    assert digest_run(own_run) == whole


def test_verify_repairs_what_is_damaged_and_nothing_else(own_run, tiny, whole, capsys):
    part = (own_run / "propagate" / "labels.parquet").resolve()
    flip(part)
    assert run(tiny, own_run.parent) == 0
    assert "nothing to do" in capsys.readouterr().out  # sizes alone are looked at
    assert run(tiny, own_run.parent, "--verify") == 0
    told = capsys.readouterr().out
    assert f"propagate run   damaged: {part} no longer has the SHA-256" in told
    assert "mediate   run" not in told
    assert digest_run(own_run) == whole


def test_a_manifest_cut_short_is_no_publication(own_run, tiny, whole):
    manifest = own_run / "mediate" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:40])
    assert run(tiny, own_run.parent) == 0
    assert digest_run(own_run) == whole


# ------------------------------------------------------------------------------- full, read-only


def limit_files(size):
    """Every write beyond `size` bytes of a file fails, as on a disk that is full."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_is_said_and_nothing_is_lost(own_run, tiny, whole):
    changed = ("ingest.min_px=9", "train.epochs=1")
    process = start(tiny, own_run.parent, *changed, before=limit_files(60_000))
    code, _, err = finish(process)
    assert code == 1
    assert err.count("error:") == 1
    assert "File too large" in err
    assert digest_run(own_run) == whole or all(
        digest_run(own_run)[name] == value
        for name, value in whole.items()
        if name.split("/")[0] not in ("ingest", "train", "embed")
    )
    assert run(tiny, own_run.parent) == 0
    assert digest_run(own_run) == whole


# ------------------------------------------------------------------------------------ two at once


def test_two_runs_of_one_name_one_refuses(tiny, whole, tmp_path):
    one, other = (start(tiny, tmp_path) for _ in range(2))
    first, second = finish(one), finish(other)
    assert sorted(code for code, *_ in (first, second)) == [0, 1]
    refused = first if first[0] else second
    assert "in use by process" in refused[2]
    assert digest_run(tmp_path / "tiny") == whole


def test_two_runs_sharing_the_store_wait_for_each_other(tiny, whole, tmp_path):
    one, other = start(tiny, tmp_path), start(tiny, tmp_path, "name=twin")
    assert finish(one)[0] == finish(other)[0] == 0
    assert digest_run(tmp_path / "tiny") == digest_run(tmp_path / "twin") == whole
    made = [stage.name for stage in (tmp_path / ".store").glob("*/*-*") if stage.is_dir()]
    assert len(made) == len({name[:20] for name in made})


# ------------------------------------------------------------------------------------------- dask


def find_workers(pid):
    """Worker processes of a run: those that compute parts."""
    return [
        process
        for process in psutil.Process(pid).children(recursive=True)
        if "spawn_main" in " ".join(process.cmdline())
    ]


@pytest.mark.long
def test_a_worker_that_dies_is_replaced_and_the_result_is_the_same(tiny, whole, tmp_path):
    process = start(tiny, tmp_path)
    killed = 0
    for line in process.stdout:
        if line.startswith(("embed     run", "knn       run", "evaluate  run")):
            for worker in find_workers(process.pid):
                worker.kill()
                killed += 1
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert killed >= 2
    assert digest_run(tmp_path / "tiny") == whole


@pytest.mark.long
def test_a_scheduler_that_dies_is_said_and_the_run_goes_on_later(tiny, whole, tmp_path):
    address = tmp_path / "scheduler.json"
    commands = [
        ["scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(address)],
        ["worker", "--scheduler-file", str(address), "--nworkers", "1", "--no-dashboard",
         "--local-directory", str(tmp_path / "scratch")],
    ]  # fmt: skip
    parts = [
        subprocess.Popen(
            [sys.executable, "-m", "dask", *command], start_new_session=True, cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for command in commands
    ]  # fmt: skip
    try:
        while not (address.exists() and address.read_text().endswith("}")):
            assert parts[0].poll() is None
        place = json.loads(address.read_text())["address"]
        process = start(tiny, tmp_path / "runs", "--scheduler", place)
        for line in process.stdout:
            if line.startswith("embed     run"):
                os.killpg(parts[0].pid, signal.SIGKILL)
        _, err = process.communicate(timeout=300)
    finally:
        for part in parts:
            if part.poll() is None:
                os.killpg(part.pid, signal.SIGKILL)
            part.wait()
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "scheduler" in err
    check_end(tiny, tmp_path / "runs", whole)
