"""Parts come back in order, whatever happens to those who compute them."""

import os
import random
import signal
import threading
import time

import psutil
import pytest

from cdp.errors import BackendError, DataError
from pipelines import engine as engine_module
from pipelines.engine import Engine


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


def test_a_part_that_kills_its_worker_each_time_is_told_once(engine):
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
            while time.monotonic() < started + 40:
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
