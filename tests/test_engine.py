"""Parts come back in order, whatever happens to those who compute them."""

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cdp.errors import BackendError, ConfigError, DataError
from pipelines import engine as engine_module
from pipelines.engine import Engine, bound_memory

pytestmark = pytest.mark.torch


def compute(number, seconds=0.0):
    time.sleep(seconds)
    return number, number * number


def fail(number):
    if number == 1:
        raise DataError(f"part {number} is bad")
    return number


def time_out():
    raise TimeoutError("of the part's own")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def engine():
    with Engine(workers=1) as engine:
        yield engine


def find_workers():
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "spawn_main" in " ".join(process.cmdline())
    ]


def run(engine, function, parts):
    return list(engine.map(function, parts, label="test"))


def test_results_come_in_the_order_of_the_parts(engine):
    assert run(engine, compute, []) == []
    parts = [(number, 0.1 if number == 0 else 0.0) for number in range(5)]
    assert run(engine, compute, parts) == [(number, number**2) for number in range(5)]


def test_what_a_part_raises_comes_as_itself_and_others_may_follow(engine):
    with pytest.raises(DataError, match="part 1 is bad"):
        run(engine, fail, [(0,), (1,), (2,)])
    with pytest.raises(TimeoutError, match="of the part's own"):
        run(engine, time_out, [()])
    assert run(engine, compute, [(3,)]) == [(3, 9)]


def test_a_worker_killed_in_the_middle_is_replaced(engine):
    done = []
    for result in engine.map(compute, [(number, 0.05) for number in range(12)], label="test"):
        done.append(result)
        if len(done) == 3:
            for worker in find_workers():
                worker.kill()
    assert done == [(number, number**2) for number in range(12)]


@pytest.mark.long
def test_a_part_that_kills_its_worker_each_time_is_reported_once(engine):
    with pytest.raises(BackendError, match="one part killed its worker 4 times"):
        run(engine, die, [()])


def test_workers_that_do_not_come_back_are_made_anew(monkeypatch):
    monkeypatch.setattr(engine_module, "LOOK_S", 0.2)
    monkeypatch.setattr(engine_module, "PATIENCE_S", 0.5)
    with Engine(workers=1) as engine:
        done = []
        for result in engine.map(compute, [(number, 0.05) for number in range(40)], label="test"):
            if not done:
                engine._cluster.scale(0)
            done.append(result)
        assert done == [(number, number**2) for number in range(40)]


ELSEWHERE = """
import sys
from distributed import LocalCluster

if __name__ == "__main__":
    cluster = LocalCluster(n_workers=0, processes=True, dashboard_address=None)
    print(cluster.scheduler_address, flush=True)
    sys.stdin.read()
"""


@contextmanager
def scheduler_elsewhere():
    """(process, address) of a scheduler in another process, which nobody works for."""
    with subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])},
    ) as process:  # fmt: skip
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_a_scheduler_without_workers_or_lost_is_an_error_not_an_endless_wait(monkeypatch):
    monkeypatch.setattr(engine_module, "LOOK_S", 0.2)
    monkeypatch.setattr(engine_module, "PATIENCE_ELSEWHERE_S", 0.5)
    with scheduler_elsewhere() as (process, address):
        with (
            Engine(scheduler=address) as engine,
            pytest.raises(BackendError, match=f"scheduler at {address} has had no worker for"),
        ):
            run(engine, compute, [(1,)])
        monkeypatch.setattr(engine_module, "PATIENCE_ELSEWHERE_S", 60)
        with Engine(scheduler=address) as engine:
            engine._connect()
            threading.Timer(0.5, process.kill).start()
            with pytest.raises(BackendError, match=f"scheduler at {address} is lost"):
                run(engine, compute, [(1,), (2,)])


GREEDY = {
    "numpy": lambda count: np.ones(count, np.uint8),
    "torch": lambda count: torch.ones(count, dtype=torch.uint8),
    "python": lambda count: bytearray(count),
    "arrow": lambda count: pa.allocate_buffer(count),
}


def grab(kind, count):
    return len(memoryview(GREEDY[kind](count))) if kind == "arrow" else len(GREEDY[kind](count))


def read_limit():
    return resource.getrlimit(resource.RLIMIT_DATA)[0]


def test_a_part_that_wants_more_than_its_share_is_refused_and_the_next_goes_on():
    before = read_limit()
    with Engine(workers=1, memory_limit=2 << 30) as engine:
        for kind in GREEDY:
            with pytest.raises(BackendError, match="1024 MiB that this process has of --memory-l"):
                run(engine, grab, [(kind, 1 << 30)])
            assert run(engine, grab, [(kind, 1 << 28)]) == [1 << 28]
        assert run(engine, read_limit, [()]) == [1 << 30]
        with pytest.raises(BackendError, match="1024 MiB"), bound_memory(engine.own_limit):
            np.ones(1 << 30, np.uint8)
    assert read_limit() == before


def measure_reserved(path):
    before = read_status("VmData")
    pq.read_table(path)
    return read_status("VmData") - before


def read_status(name):
    """A figure of this process in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) << 10


def test_reading_a_small_table_takes_no_gibibyte_of_the_limit(tmp_path):
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "table.parquet")
    with Engine(workers=1, memory_limit=2 << 30) as engine:
        assert run(engine, measure_reserved, [(tmp_path / "table.parquet",)])[0] < 1 << 28


def test_a_worker_that_keeps_much_is_not_kept_after_a_stage(engine, monkeypatch):
    (first,) = run(engine, os.getpid, [()])
    engine.rest()
    assert run(engine, os.getpid, [()]) == [first]
    monkeypatch.setattr(engine_module, "KEPT_BYTES", 1 << 20)
    engine.rest()
    assert run(engine, os.getpid, [()]) != [first]


def test_a_limit_below_what_the_libraries_take_is_refused():
    with pytest.raises(ConfigError, match=r"2 worker\(s\) need at least 2560 MiB"):
        Engine(workers=2, memory_limit=2 << 30)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_workers_killed_again_and_again_lose_no_part(seed):
    """Longer than Dask's 15 s, after which it would give up a worker that it lost twice."""
    dice = random.Random(seed)
    ended = threading.Event()
    kills = refused = 0

    def kill():
        nonlocal kills
        while not ended.wait(dice.uniform(0.1, 6)):
            for worker in find_workers():
                worker.kill()
                kills += 1

    with Engine(workers=2) as engine:
        run(engine, compute, [(0,)])
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            started = time.monotonic()
            while time.monotonic() < started + 40 or kills < 5:
                parts = [(number, dice.uniform(0, 0.1)) for number in range(dice.randint(1, 30))]
                try:
                    found = run(engine, compute, parts)
                except BackendError:  # the same part met four kills; the next map goes on
                    refused += 1
                    continue
                assert found == [(number, number**2) for number in range(len(parts))]
        finally:
            ended.set()
            killer.join()
    print(f"killed {kills} workers, {refused} maps refused")
    assert kills >= 5
    assert refused <= 2
