"""The engine: computes the parts of a stage on Dask workers, local or behind a scheduler.

The contract:
- A part is a call of a module-level function with picklable arguments. Parts are independent and
  each computes with one thread, so results do not depend on the number of workers.
- Results are yielded in the order of the parts. The first failure cancels the rest and is raised
  unchanged.
- The cluster starts with the first part and ends with the engine. After a part a worker gives the
  memory it freed back to the system; a stage that left a local worker with more than `KEPT_BYTES`
  ends the cluster (`rest`), and the next part starts another.
- A worker that dies is replaced and its part is computed again. No map waits forever: a local
  cluster without a worker for `PATIENCE_S` is replaced, as long as that finishes further parts; a
  lost scheduler, or one without workers for `PATIENCE_ELSEWHERE_S`, is a BackendError.
- `memory_limit` bounds the private memory of every process: half of it is for the main process, the
  other half is divided among the workers. Mapped files do not count. A part that needs more is a
  BackendError at once and is not repeated.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cdp.errors import BackendError, ConfigError
from cdp.progress import show_progress

log = logging.getLogger("cdp")

Result = TypeVar("Result")

PATIENCE_S, PATIENCE_ELSEWHERE_S = 60.0, 300.0
"""Seconds without any worker before giving up: of a local cluster, of a scheduler."""
LOOK_S = 5.0
"""Seconds between two looks for workers."""
CLOSE_S = 5.0
ATTEMPTS = 3
"""Local clusters in a row that may fail to compute a single part."""
LEAST_BYTES = 640 << 20
"""Smallest limit of one process; the imported libraries alone take 450 MiB."""

KEPT_BYTES = 512 << 20
"""Private memory with which an idle local worker may outlive a stage."""

LOCAL = {
    # Dask never restarts a worker that is lost twice within this time.
    "distributed.deploy.lost-worker-timeout": "1000 days",
    # A worker paused for memory that a library keeps allocated would get no part again.
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.target": False,
}


def count_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Engine:
    """A Dask client, started with the first part.

    workers : local processes; None is one a core. scheduler : address of a running scheduler, used
        instead of a local cluster. memory_limit : bytes for all processes together.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        scheduler: str | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self.workers = workers or count_cores()
        self.scheduler = scheduler
        self.part_limit = self.own_limit = None
        if memory_limit is not None:
            self.own_limit = memory_limit // 2
            self.part_limit = None if scheduler else memory_limit // 2 // self.workers
            least = 2 * LEAST_BYTES * (1 if scheduler else self.workers)
            if memory_limit < least:
                raise ConfigError(
                    f"--memory-limit: {self.workers} worker(s) need at least {least >> 20} MiB "
                    f"together with the run itself, got {memory_limit >> 20} MiB. Give fewer "
                    "--workers or a larger limit"
                )
        self._client: Any = None
        self._cluster: Any = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for part in (self._client, self._cluster):
            if part is not None:
                with contextlib.suppress(Exception):
                    part.close(timeout=CLOSE_S)
        self._client = self._cluster = None

    def rest(self) -> None:
        """After a stage: give freed memory back, and end local workers that keep too much."""
        trim_memory()
        if self._cluster is None or self._client is None:
            return
        with contextlib.suppress(Exception):
            if max(self._client.run(count_private_bytes).values(), default=0) > KEPT_BYTES:
                self.close()

    def map(
        self, function: Callable[..., Result], parts: Sequence[tuple[Any, ...]], *, label: str
    ) -> Iterator[Result]:
        """Call `function(*part)` for every part; yield results in order, and show progress."""
        done: dict[int, Result] = {}
        left = set(range(len(parts)))
        expected = attempts = 0
        with show_progress(len(parts), label=label, unit="part", leave=False) as bar:
            while left:
                before = len(left)
                with contextlib.suppress(_NoWorkers):
                    for position, result in self._compute(function, parts, left, label):
                        left.remove(position)
                        done[position] = result
                        bar.update()
                        while expected in done:
                            yield done.pop(expected)
                            expected += 1
                if left:
                    attempts = 1 if len(left) < before else attempts + 1
                    self._start_anew(label, attempts)

    def _compute(
        self,
        function: Callable[..., Result],
        parts: Sequence[tuple[Any, ...]],
        wanted: set[int],
        label: str,
    ) -> Iterator[tuple[int, Result]]:
        """(position, result) of the parts at `wanted`, as they are done."""
        client = self._connect()
        futures = {
            client.submit(
                _run_part, function, parts[position], self.part_limit, pure=False
            ): position
            for position in sorted(wanted)
        }
        finished: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for future in futures:
            future.add_done_callback(finished.put)
        watch = _Watch(client, self.scheduler)
        try:
            for _ in futures:
                future = self._wait(lambda: finished.get(timeout=LOOK_S), watch)
                yield futures[future], self._collect(future, watch, label)
        finally:
            with contextlib.suppress(Exception):
                client.cancel(list(futures))

    @staticmethod
    def _wait(ask: Callable[[], Any], watch: _Watch) -> Any:
        """Repeat `ask` until it returns; after each timeout, check that there are workers."""
        while True:
            try:
                return ask()
            except (queue.Empty, TimeoutError):
                watch.look()

    def _collect(self, future: Any, watch: _Watch, label: str) -> Any:
        from distributed.client import FutureCancelledError
        from distributed.scheduler import KilledWorker

        def ask() -> Any:
            # An error of a part is passed on, even a TimeoutError, which would mean "not yet" here.
            # A result lost with its worker is computed again, however long that takes.
            if future.status == "error":
                raise _PartError(future.exception())
            return future.result(timeout=LOOK_S)

        try:
            return self._wait(ask, watch)
        except _PartError as failed:
            error = failed.args[0]
        except FutureCancelledError as lost:
            raise BackendError(
                f"{label}: the Dask scheduler{self._place()} is lost ({lost.reason}). Start it "
                "again, then run the same command again: finished parts are kept"
            ) from lost
        if isinstance(error, KilledWorker):
            raise BackendError(
                f"{label}: one part killed its worker {error.allowed_failures + 1} times, most "
                "likely for want of memory. Give fewer --workers, then run again: finished parts "
                "are kept"
            ) from error
        raise error

    def _place(self) -> str:
        return f" at {self.scheduler}" if self.scheduler else ""

    def _start_anew(self, label: str, attempts: int) -> None:
        """Drop a local cluster without workers; the next part starts another."""
        if attempts >= ATTEMPTS:
            raise BackendError(
                f"{label}: {attempts} local Dask clusters in a row lost all their workers and "
                "computed nothing. Find out why they die (memory, a full /tmp), then run the "
                "same command again: finished parts are kept"
            )
        log.info("          no worker is left; starting a new local cluster")
        self.close()

    def _connect(self) -> Any:
        if self._client is not None:
            return self._client
        import dask
        from distributed import Client, LocalCluster

        # A lost worker or scheduler is reported once, by the error raised, not per connection.
        for name in ("asyncio", "distributed", "distributed.client"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if self.scheduler:
            try:
                self._client = Client(self.scheduler, timeout="10s")
            except (OSError, TimeoutError, ValueError) as error:
                raise BackendError(
                    f"no Dask scheduler answers at {self.scheduler}: {error}. Start one with "
                    "`dask scheduler`, or leave --scheduler out for a local cluster"
                ) from error
            return self._client
        dask.config.set(LOCAL)
        _hide_missing_main()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._cluster = LocalCluster(
                    n_workers=self.workers,
                    threads_per_worker=1,
                    processes=True,
                    memory_limit="auto" if self.part_limit is None else 0,
                    dashboard_address="127.0.0.1:0",
                    silence_logs=logging.CRITICAL,
                )
                break
            except (OSError, RuntimeError, TimeoutError) as error:
                if attempt == ATTEMPTS:
                    raise BackendError(
                        f"no local Dask workers could be started ({error}). A script that starts "
                        'a run must do so below `if __name__ == "__main__":`. Else check free '
                        "memory and the space in the folder for temporary files, then run the same "
                        "command again: finished parts are kept"
                    ) from error
        self._client = Client(self._cluster)
        return self._client


def _hide_missing_main() -> None:
    """Let workers start where the main program came by a pipe: it has no file they could import."""
    main = sys.modules.get("__main__")
    named = getattr(main, "__file__", None)
    if named is not None and not os.path.isfile(named):
        del main.__file__  # type: ignore[union-attr]


class _NoWorkers(Exception):  # noqa: N818 - a state, not an error
    """A local cluster had no worker for `PATIENCE_S`."""


class _PartError(Exception):
    """Wraps the exception of a part, so that waiting does not take it for a timeout."""


class _Watch:
    """Checks how long the cluster has been without workers."""

    def __init__(self, client: Any, scheduler: str | None) -> None:
        self._client, self._scheduler = client, scheduler
        self._seen = time.monotonic()

    def look(self) -> None:
        """Raise _NoWorkers (local) or BackendError (scheduler) after too long without workers."""
        try:
            alive = self._client.sync(self._client.scheduler.ncores, callback_timeout=LOOK_S)
        except (OSError, TimeoutError):
            alive = {}
        if alive:
            self._seen = time.monotonic()
            return
        absent_s = time.monotonic() - self._seen
        if self._scheduler is None and absent_s > PATIENCE_S:
            raise _NoWorkers
        if self._scheduler is not None and absent_s > PATIENCE_ELSEWHERE_S:
            raise BackendError(
                f"the Dask scheduler at {self._scheduler} has had no worker for {absent_s:.0f} s. "
                f"Start some with `dask worker {self._scheduler}`, then run the same command "
                "again: finished parts are kept"
            )


def _run_part(function: Callable[..., Result], part: tuple[Any, ...], limit: int | None) -> Result:
    """Run one part with one thread in every native library, within its memory limit."""
    from threadpoolctl import threadpool_limits

    try:
        with threadpool_limits(1), bound_memory(limit):
            return function(*part)
    finally:
        trim_memory()


def trim_memory() -> None:
    """Give memory that this process freed back to the system, where its libraries can."""
    import ctypes

    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def count_private_bytes() -> int:
    """Memory of this process that no file backs; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


@contextlib.contextmanager
def bound_memory(limit: int | None) -> Iterator[None]:
    """Limit this process to `limit` bytes of private memory; BackendError when it needs more."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    if limit is not None:
        import pyarrow as pa

        pa.set_cpu_count(1)  # Arrow would wait for threads it cannot start
        pa.set_io_thread_count(1)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_memory_short(error):
            raise
        lines = str(error).strip().splitlines()
        reason = f" ({lines[0][:160]})" if lines else ""
        if limit is None:
            raise BackendError(
                f"out of memory{reason}. Give fewer --workers, or free some, then run the same "
                "command again: finished parts are kept"
            ) from error
        raise BackendError(
            f"more memory wanted than the {limit >> 20} MiB that this process has of "
            f"--memory-limit{reason}. Raise it or give fewer --workers, then run again: finished "
            "parts are kept"
        ) from error
    finally:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, before)


def _is_memory_short(error: BaseException) -> bool:
    """Also for RuntimeErrors of torch, ONNX Runtime and C++, known by their messages."""
    phrases = ("allocate memory", "bad_alloc", "bad allocation", "out of memory")
    return isinstance(error, MemoryError) or any(each in str(error).lower() for each in phrases)
