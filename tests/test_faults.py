"""Nothing lost: faults that are really injected into whole runs, and what is left of them."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest
from conftest import digest_run

from pipelines.run import main
from pipelines.stages import STAGES
from pipelines.store import Store

ROOT = Path(__file__).parents[1]


def start(tiny, runs, *arguments, before=None, **options):
    """Start a run in a process group of its own, on one worker."""
    command = [sys.executable, "-m", "pipelines.run", "--config", tiny, "--runs-dir", runs]
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

FINISHED = ("embed/*.partial/**/part-*", "knn/*.partial/**/part-*", "*/*-[0-9]/**/*",
            "model/" + "[0-9a-f]" * 20 + "/*.safetensors")  # fmt: skip
"""What a killed run has finished: parts, published stages, trained models."""


class Killer:
    """Makes one run in one directory, killed again and again, and looks at what is left."""

    def __init__(self, tiny, runs, whole):
        self.tiny, self.runs, self.whole = tiny, runs, whole
        self.kills, self.stages, self.kept = Counter(), Counter(), set()
        runs.mkdir(exist_ok=True)

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "faulty_run"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )  # fmt: skip
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(60) == 0

    def run(self, kind, count):
        """One run to its end or its death; whether it came to its end."""
        out = self.runs / "out"
        options = ["--config", self.tiny, "--runs-dir", self.runs, "--workers", "1"]
        order = {"kind": kind, "count": count, "out": str(out), "arguments": [*map(str, options)]}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        told = out.read_text()
        assert "Traceback" not in told, told
        assert code in (0, -signal.SIGKILL), told
        if code:
            begun = re.findall(r"^(\w+) +run ", told, re.MULTILINE)
            self.kills[kind] += 1
            self.stages[begun[-1] if begun else "before the first stage"] += 1
        self.look()
        return code == 0

    def look(self):
        """Published tables are whole and the right ones; what was finished is not made again."""
        store = Store(self.runs)
        for stage in STAGES:
            published = store.open_run("tiny", stage.name)
            if published is not None:
                assert published.find_damage(rehash=True) is None
        found = digest_run(self.runs / "tiny")
        assert found == {name: self.whole[name] for name in found}
        finished = set()
        for pattern in FINISHED:
            for path in store.root.glob(pattern):
                stat = path.stat()
                if path.is_file() and path.name != "manifest.json":
                    finished.add((path.name, stat.st_ino, stat.st_mtime_ns))
        assert self.kept <= finished, self.kept - finished
        self.kept = finished


def kill_until_done(killer, dice, at_most):
    """Kill one run at seeded moments of all kinds until it is done or was killed often enough."""
    for _ in range(at_most):
        kind = dice.choice(["change", "change", "step", "moment"])
        most = {"change": 12, "step": 30, "moment": 6.0}[kind]
        if killer.run(kind, dice.randint(1, most) if kind != "moment" else dice.uniform(0.2, most)):
            return
    assert killer.run("never", 0)


def check_end(runs, whole):
    assert digest_run(runs / "tiny") == whole
    assert not list(runs.rglob("*.partial"))
    assert not list(runs.rglob(".*.draft-*"))


def test_killed_at_seeded_moments_it_ends_the_same_and_makes_nothing_twice(tiny, whole, tmp_path):
    with Killer(tiny, tmp_path, whole) as killer:
        for kind, count in (("change", 9), ("step", 9), ("change", 40), ("moment", 3.0)):
            killer.run(kind, count)
        assert killer.run("never", 0)
    assert killer.kills.total() == 4
    check_end(tmp_path, whole)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_killed_forty_times_and_in_every_stage_it_ends_the_same(tiny, whole, tmp_path, seed):
    dice = random.Random(seed)
    kills, stages, runs, kept = Counter(), Counter(), 0, 0
    while kills.total() < 40 or not {stage.name for stage in STAGES} <= set(stages):
        place = tmp_path / str(runs)
        with Killer(tiny, place, whole) as killer:
            kill_until_done(killer, dice, 60)
        check_end(place, whole)
        kills, stages, runs = kills + killer.kills, stages + killer.stages, runs + 1
        kept += len(killer.kept)
        print(f"seed {seed}, run {runs}: killed {kills.total()} times: {dict(kills)}, in "
              f"{dict(stages)}; {kept} finished files, none made twice", flush=True)  # fmt: skip
        shutil.rmtree(place)


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
    assert run(tiny, tmp_path / "runs") == 0
    check_end(tmp_path / "runs", whole)
