"""Nothing lost: faults that are really injected into whole runs, and what is left of them."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml
from conftest import digest_run, digest_tables
from PIL import Image

from pipelines import stages
from pipelines.run import main
from pipelines.store import Published, Store

pytestmark = [pytest.mark.torch, pytest.mark.slow]

STAGES = tuple(stage for stage in stages.STAGES if not stage.needs_align)
"""Drawn faces are aligned: the stage detect takes no part. Its faults are in test_detect."""

ROOT = Path(__file__).parents[1]


def start(tiny, runs, *arguments, errors=subprocess.PIPE):
    """Start a run in a process group of its own, on one worker."""
    command = [sys.executable, "-m", "pipelines.run", "--config", tiny, "--runs-dir", runs]
    return subprocess.Popen(
        [str(part) for part in (*command, "--workers", "1", *arguments)],
        cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=errors,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTHONUNBUFFERED": "1"},
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


class Orders:
    """Runs in one directory that are made to fail, see `faulty_run`."""

    def __init__(self, tiny, runs, own_disk=()):
        self.tiny, self.runs, self.own_disk = tiny, runs, own_disk

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "faulty_run", *map(str, self.own_disk)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )  # fmt: skip
        self.out = Path(f"{self.runs}.out")
        self.ready = self.process.stdout.readline().strip()
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(60) == 0

    def order(self, kind, count, *arguments):
        """(exit code, what was printed) of one run; no fault may show a traceback."""
        order = {"kind": kind, "count": count, "arguments": arguments, "out": str(self.out)}
        return self.answer(order), self.read(self.out)

    def answer(self, order):
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    @staticmethod
    def read(out):
        output = out.read_text() if out.exists() else ""
        assert "Traceback" not in output, output
        return output

    def list_options(self, *arguments):
        options = ["--config", self.tiny, "--runs-dir", self.runs, "--workers", "1", *arguments]
        return [str(option) for option in options]

    def run(self, kind, count=0, *arguments):
        return self.order(kind, count, *self.list_options(*arguments))

    def run_both(self, *more):
        """(exit code, what was printed) of each of two runs at the same time; `more` is for one."""
        outs = [Path(f"{self.out}-{number}") for number in range(2)]
        orders = [
            {"kind": "never", "count": 0, "arguments": self.list_options(*added), "out": str(out)}
            for out, added in zip(outs, ((), more), strict=True)
        ]
        codes = self.answer(orders)
        return [(code, self.read(out)) for code, out in zip(codes, outs, strict=True)]


# ---------------------------------------------------------------------------------------- kills

FINISHED = ("embed/*.partial/**/part-*", "knn/*.partial/**/part-*", "*/*-[0-9]/**/*",
            "model/" + "[0-9a-f]" * 20 + "/*.safetensors")  # fmt: skip
"""What a killed run has finished: parts, published stages, trained models."""


class Killer(Orders):
    """Makes one run in one directory, killed again and again, and looks at what is left."""

    def __init__(self, tiny, runs, whole):
        super().__init__(tiny, runs)
        self.whole = whole
        self.kills, self.stages, self.kept = Counter(), Counter(), set()
        self.looked = set()

    def kill(self, kind, count):
        """One run to its end or its death; whether it came to its end."""
        code, output = self.run(kind, count)
        assert code in (0, -signal.SIGKILL), output
        if code:
            begun = re.findall(r"^(\w+) +run ", output, re.MULTILINE)
            self.kills[kind] += 1
            self.stages[begun[-1] if begun else "before the first stage"] += 1
        self.look()
        return code == 0

    def look(self):
        """Published tables are whole and the right ones; what was finished is not made again."""
        store = Store(self.runs)
        for stage in STAGES:
            published = store.open_run("tiny", stage.name)
            if published is not None and published.directory not in self.looked:
                assert published.find_damage(rehash=True) is None
                for table, digest in digest_tables(published.directory).items():
                    assert digest == self.whole[f"{stage.name}/{table}"]
                self.looked.add(published.directory)
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
        moments = {"change": (1, 2, 3, 4, 6, 8, 12), "step": range(1, 13), "moment": (0.5, 1, 2, 4)}
        if killer.kill(kind, dice.choice(moments[kind])):
            return
    assert killer.kill("never", 0)


def check_end(runs, whole):
    assert digest_run(runs / "tiny") == whole
    assert not list(runs.rglob("*.partial"))
    assert not list(runs.rglob(".*.draft-*"))


def test_killed_at_seeded_moments_it_ends_the_same_and_makes_nothing_twice(tiny, whole, tmp_path):
    with Killer(tiny, tmp_path, whole) as killer:
        for kind, count in (("change", 9), ("step", 9), ("change", 40), ("moment", 1.0)):
            killer.kill(kind, count)
        assert killer.kill("never", 0)
    assert killer.kills.total() == 4
    check_end(tmp_path, whole)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_killed_seventy_times_and_in_every_stage_it_ends_the_same(tiny, whole, tmp_path, seed):
    dice = random.Random(seed)
    kills, stages, runs, kept = Counter(), Counter(), 0, 0
    while kills.total() < 70:
        place = tmp_path / str(runs)
        with Killer(tiny, place, whole) as killer:
            for count in (1, *[2] * (len(STAGES) - 1)) if not runs else ():
                killer.kill("publish", count)  # each meets the next stage
            kill_until_done(killer, dice, 40)
        check_end(place, whole)
        kills, stages, runs = kills + killer.kills, stages + killer.stages, runs + 1
        kept += len(killer.kept)
        print(f"seed {seed}, run {runs}: killed {kills.total()} times: {dict(kills)}, in "
              f"{dict(stages)}; {kept} finished files, none made twice", flush=True)  # fmt: skip
        shutil.rmtree(place)
    assert {stage.name for stage in STAGES} <= set(stages)


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
    output = capsys.readouterr().err
    assert str(part) in output
    assert "--stage embed --force" in output
    assert run(tiny, runs, "--stage", "embed", "--force") == 0
    assert run(tiny, runs, "--verify") == 0
    assert digest_run(own_run) == whole


def test_verify_repairs_what_is_damaged_and_nothing_else(own_run, tiny, whole, capsys):
    part = (own_run / "propagate" / "labels.parquet").resolve()
    flip(part)
    assert run(tiny, own_run.parent) == 0
    assert "nothing to do" in capsys.readouterr().out  # sizes alone are looked at
    assert run(tiny, own_run.parent, "--verify") == 0
    output = capsys.readouterr().out
    assert f"propagate run   damaged: {part} no longer has the SHA-256" in output
    assert "mediate   run" not in output
    assert digest_run(own_run) == whole


def list_cuts(text):
    """Lengths around both ends and, in steps that meet every kind of place, between them."""
    size = len(text)
    return sorted({*range(64), *range(size - 64, size), *range(0, size, 97)})


def test_a_manifest_cut_anywhere_is_none_or_the_whole(finished_run, tmp_path):
    copy, cuts = tmp_path / "manifest.json", 0
    for manifest in finished_run.glob("*/manifest.json"):
        text = manifest.read_bytes()
        whole = json.loads(text)
        for cut in list_cuts(text):
            copy.write_bytes(text[:cut])
            found = Published.open("any", tmp_path)
            assert found is None or (found.manifest == whole and cut == len(text) - 1)
            cuts += 1
    print(f"cut {cuts} times")
    assert cuts > 1000


def test_a_manifest_cut_short_is_named_and_its_stage_repairs_it(own_run, tiny, whole, capsys):
    runs = own_run.parent
    manifest = (own_run / "mediate" / "manifest.json").resolve()
    manifest.write_bytes(manifest.read_bytes()[:40])
    assert run(tiny, runs, "--stage", "propagate") == 1
    assert f"{manifest} is cut short. Repair it with --stage mediate --force" in (
        capsys.readouterr().err
    )
    assert run(tiny, runs, "--until", "mediate") == 0
    assert f"mediate   run   damaged: {manifest} is cut short" in capsys.readouterr().out
    assert digest_run(own_run) == whole


@pytest.mark.long
@pytest.mark.parametrize("stage", [stage.name for stage in STAGES])
def test_the_manifest_of_any_stage_cut_short_is_made_again(own_run, tiny, whole, stage):
    manifest = (own_run / stage / "manifest.json").resolve()
    text = manifest.read_bytes()
    for cut in (0, 1, len(text) // 2, len(text) - 3):
        manifest = (own_run / stage / "manifest.json").resolve()
        manifest.write_bytes(text[:cut])
        assert run(tiny, own_run.parent) == 0
        assert digest_run(own_run) == whole


def test_a_manifest_that_says_something_else_is_found_by_verify(own_run, tiny, whole, capsys):
    manifest = (own_run / "propagate" / "manifest.json").resolve()
    record = json.loads(manifest.read_text())
    record["facts"]["clusters"] += 1
    manifest.write_text(json.dumps(record))
    assert run(tiny, own_run.parent, "--verify", "--until", "propagate") == 0
    assert f"propagate run   damaged: {manifest} differs from" in capsys.readouterr().out
    assert digest_run(own_run) == whole


# ---------------------------------------------------------------- full, read-only, not permitted

CHANGED = ("ingest.min_px=9", "train.epochs=1", "--until", "embed")


def check_refusal(code, output, *words):
    """One message, without a traceback, that says what could not be written and what to do."""
    assert code == 1, output
    assert len(re.findall("^error: ", output, re.MULTILINE)) == 1, output
    for word in words:
        assert word in output, output


def check_tables(run, whole):
    """Every table is the old one, or of a stage that the changed run had published before."""
    found = digest_run(run)
    changed = {name for name in whole if name.split("/")[0] in ("ingest", "train", "embed")}
    assert set(found) == set(whole)
    assert all(found[name] == whole[name] for name in set(whole) - changed)


@contextmanager
def own_disk(tiny, finished_run, place, size):
    """(orders, run directory) on a small file system that holds a copy of the finished run."""
    place.mkdir()
    with Orders(tiny, place / "runs", (size, place)) as orders:
        if orders.ready != "ready":
            pytest.skip(f"{orders.ready}; a limit on the size of files stands for a full disk")
        orders.out = place.with_name("out")
        inside = Path(f"/proc/{orders.process.pid}/root{place}")
        passing = shutil.ignore_patterns("logs", ".*draft*")
        shutil.copytree(finished_run.parent, inside / "runs", symlinks=True, ignore=passing)
        yield orders, inside / "runs" / "tiny"


def fill(run, left):
    """Fill the file system of a run but for `left` bytes; the file that does it."""
    ballast = run.parents[1] / "ballast"
    space = os.statvfs(run)
    with ballast.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(1, space.f_bavail * space.f_frsize - left))
    return ballast


def check_full_disk(tiny, finished_run, place, whole, rooms):
    """The number of rooms in which the changed run was refused, from the least up."""
    refused = []
    with own_disk(tiny, finished_run, place, "24m") as (orders, run):
        for left in rooms:
            ballast = fill(run, left)
            code, output = orders.run("never", 0, *CHANGED)
            if code == 0:  # so much room was enough
                print(f"refused with {', '.join(str(each) for each in refused)} bytes left")
                break
            check_refusal(code, output, "No space left on device", str(place))
            refused.append(left)
            check_tables(run, whole)
            ballast.unlink()
            assert orders.run("never")[0] == 0
            assert digest_run(run) == whole
        return len(refused)


def test_a_full_disk_is_said_and_nothing_is_lost(tiny, finished_run, whole, tmp_path):
    assert check_full_disk(tiny, finished_run, tmp_path / "disk", whole, (0, 120_000)) == 2


@pytest.mark.long
def test_a_disk_full_at_any_moment_is_said_and_nothing_is_lost(tiny, finished_run, whole, tmp_path):
    rooms = [4096 * pages for pages in (1, 2, 4, 8, 12, 20, 30, 40, 50, 60, 70, 80, 100, 130)]
    assert check_full_disk(tiny, finished_run, tmp_path / "disk", whole, rooms) >= 8


def test_a_file_that_may_not_grow_is_said_and_nothing_is_lost(own_run, tiny, whole):
    with Orders(tiny, own_run.parent) as orders:
        check_refusal(*orders.run("limit", 60_000, *CHANGED), "File too large", str(own_run.parent))
        check_tables(own_run, whole)
        assert orders.run("never")[0] == 0
    assert digest_run(own_run) == whole


def test_a_disk_that_became_read_only_is_said(tiny, finished_run, whole, tmp_path):
    with own_disk(tiny, finished_run, tmp_path / "disk", "24m") as (orders, run):
        place = str(tmp_path / "disk")
        assert orders.order("mount", 0, "-o", "remount,ro", place)[0] == 0
        check_refusal(*orders.run("never", 0, *CHANGED), "Read-only file system", "--runs-dir")
        code, output = orders.run("never", 0, "--dry-run")
        assert code == 0
        assert "run" not in {line.split()[1] for line in output.splitlines()}
        assert digest_run(run) == whole


REFUSED = {
    ".store/lock": (0o555, 1),
    ".store/propagate": (0o555, 1),
    "tiny/logs": (0o555, 2),
    "tiny": (0o555, 1),
    "tiny/mediate/pairs.parquet/part-00000.parquet": (0o000, 1),
    "tiny/mediate/manifest.json": (0o000, 1),
}
"""What may not be written or read, and the exit code of a run that has to."""


def test_what_is_not_permitted_is_named_and_nothing_is_lost(own_run, tiny, whole):
    runs = own_run.parent
    with Orders(tiny, runs) as orders:
        assert orders.run("unprivileged", 0, "--until", "ingest")[0] == 0
        for name, (mode, expected) in REFUSED.items():
            place = (runs / name).resolve()
            for log in (own_run / "logs").iterdir():  # a run in the same second writes to it
                log.unlink()
            before = place.stat().st_mode
            place.chmod(mode)
            code, output = orders.run(
                "unprivileged", 0, "--stage", "propagate", "propagate.max_size=7"
            )
            place.chmod(before)
            assert code == expected, (name, output)
            assert output.count("error:") == 1, output
            assert "Permission denied" in output, output
            assert digest_run(own_run) == whole
        assert orders.run("never")[0] == 0
    assert digest_run(own_run) == whole


def test_an_image_that_may_not_be_read_costs_itself_only(tiny, tmp_path):
    for split, colours in (("labelled/ada", "red green"), ("unlabelled", "blue white grey")):
        for colour in colours.split():
            (tmp_path / "data" / split).mkdir(parents=True, exist_ok=True)
            picture = Image.new("RGB", (20, 20), colour)
            picture.paste("black", (5, 5, 15, 15))
            picture.save(tmp_path / "data" / split / f"{colour}.png")
    data = {"name": "mine", "kind": "images", "size_px": 20, "labelled": {"root": "labelled"},
            "unlabelled": {"root": "unlabelled", "layout": "pile"}}  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    hidden = tmp_path / "data" / "unlabelled" / "blue.png"
    hidden.chmod(0)
    options = (f"data={tmp_path / 'mine.yaml'}", "--data-root", tmp_path / "data", "--until",
               "ingest")  # fmt: skip
    with Orders(tiny, tmp_path / "runs") as orders:
        assert orders.run("unprivileged", 0, *options)[0] == 0
        rejected = pd.read_parquet(tmp_path / "runs" / "tiny" / "ingest" / "rejected.parquet")
        assert list(rejected.path) == ["unlabelled/blue.png"]
        assert list(rejected.reason) == ["cannot be read: Permission denied"]
        hidden.chmod(0o644)
        code, output = orders.run("unprivileged", 0, *options)
        assert code == 0
        assert "the data set changed" in output
    samples = pd.read_parquet(tmp_path / "runs" / "tiny" / "ingest" / "samples.parquet")
    assert len(samples) == 5


# ------------------------------------------------------------------------------------ two at once


def check_two_of_one_name(tiny, runs, whole):
    with Orders(tiny, runs) as orders:
        first, second = orders.run_both()
    assert sorted(code for code, _ in (first, second)) == [0, 1]
    refused = first if first[0] else second
    assert "in use by process" in refused[1]
    assert digest_run(runs / "tiny") == whole


def check_two_sharing_the_store(tiny, runs, whole):
    with Orders(tiny, runs) as orders:
        assert [code for code, _ in orders.run_both("name=twin")] == [0, 0]
    assert digest_run(runs / "tiny") == digest_run(runs / "twin") == whole
    made = [stage.name for stage in (runs / ".store").glob("*/*-*") if stage.is_dir()]
    assert len(made) == len({name[:20] for name in made})


def test_two_runs_of_one_name_one_refuses(tiny, whole, tmp_path):
    check_two_of_one_name(tiny, tmp_path, whole)


def test_two_runs_sharing_the_store_wait_for_each_other(tiny, whole, tmp_path):
    check_two_sharing_the_store(tiny, tmp_path, whole)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("check", [check_two_of_one_name, check_two_sharing_the_store])
def test_two_runs_at_once_many_times(tiny, whole, tmp_path, check, seed):
    check(tiny, tmp_path, whole)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5))
def test_of_two_runs_sharing_the_store_one_is_killed_the_other_goes_on(tiny, whole, tmp_path, seed):
    """The lock of the dead is taken over while somebody waits for it."""
    dice = random.Random(seed)
    one, other = start(tiny, tmp_path), start(tiny, tmp_path, "name=twin")
    time.sleep(dice.uniform(4, 20))
    os.killpg(one.pid, signal.SIGKILL)
    one.communicate()
    assert finish(other)[0] == 0
    assert digest_run(tmp_path / "twin") == whole
    assert run(tiny, tmp_path) == 0
    assert digest_run(tmp_path / "tiny") == whole


# ------------------------------------------------------------------------------------------- dask


def find_workers(pid):
    """Worker processes of a run: those that compute parts."""
    return [
        process
        for process in psutil.Process(pid).children(recursive=True)
        if "spawn_main" in " ".join(process.cmdline())
    ]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_workers_killed_in_every_stage_are_replaced_and_it_ends_the_same(
    tiny, whole, tmp_path, seed
):
    """A stage's first kill comes as it begins, twelve others while they run.

    A part that meets four of them is given up with one message; the next run goes on.
    """
    dice = random.Random(seed)
    killed, left, output, codes = 0, 12, [], []

    def kill(pid):
        nonlocal killed
        for worker in find_workers(pid):
            with suppress(psutil.NoSuchProcess):
                worker.kill()
                killed += 1

    def kill_again(pid, ended):
        nonlocal left
        while left and not ended.wait(dice.uniform(2, 12)):
            left -= 1
            with suppress(psutil.NoSuchProcess):
                kill(pid)

    while 0 not in codes and len(codes) < 5:
        process, ended = start(tiny, tmp_path, errors=subprocess.STDOUT), threading.Event()
        killer = threading.Thread(target=kill_again, args=(process.pid, ended))
        killer.start()
        with process:
            for line in process.stdout:
                output.append(line)
                if re.match(r"(embed|knn|mediate|retrain|evaluate|thumbnails) +run", line):
                    kill(process.pid)
        ended.set()
        killer.join()
        codes.append(process.returncode)
        assert process.returncode == 0 or "killed its worker 4 times" in "".join(output[-6:])
    assert codes[-1] == 0
    assert not [line for line in output if "Traceback" in line]
    print(f"seed {seed}: killed {killed} workers, {len(codes) - 1} runs refused to go on")
    assert killed >= 2
    assert digest_run(tmp_path / "tiny") == whole


@pytest.mark.long
@pytest.mark.parametrize("stage", ["ingest", "embed", "knn", "evaluate"])
def test_a_scheduler_that_dies_is_said_and_the_run_goes_on_later(tiny, whole, tmp_path, stage):
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
    output = []
    try:
        while not (address.exists() and address.read_text().endswith("}")):
            assert parts[0].poll() is None
        place = json.loads(address.read_text())["address"]
        process = start(tiny, tmp_path / "runs", "--scheduler", place, errors=subprocess.STDOUT)
        with process:
            for line in process.stdout:
                output.append(line)
                if line.startswith(f"{stage} ") and " run " in line:
                    os.killpg(parts[0].pid, signal.SIGKILL)
        assert process.returncode == 1
    finally:
        for part in parts:
            if part.poll() is None:
                os.killpg(part.pid, signal.SIGKILL)
            part.wait()
    assert not [line for line in output if "Traceback" in line]
    assert len([line for line in output if line.startswith("error: ")]) == 1
    expected = {f"the Dask scheduler at {place} is lost"}
    if stage == "ingest":  # killed as the first stage begins, it may be gone before it was reached
        expected.add(f"no Dask scheduler answers at {place}")
    assert any(each in "".join(output) for each in expected)
    assert run(tiny, tmp_path / "runs") == 0
    check_end(tmp_path / "runs", whole)
