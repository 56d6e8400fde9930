"""Dask: where the parts of a stage are computed.

The contract:
- A part is a call of a module-level function with picklable arguments; parts do not know of each
  other, and each computes with one thread, so results do not depend on the number of workers.
- Results come back in the order of the parts. The first failure cancels the rest and is raised
  here as itself.
- The cluster starts with the first part and ends with the engine.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from cdp.errors import BackendError

Result = TypeVar("Result")


def count_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Engine:
    """A Dask client, started when first needed: a local cluster, or a scheduler by address."""

    def __init__(self, *, workers: int | None = None, scheduler: str | None = None) -> None:
        self.workers = workers or count_cores()
        self.scheduler = scheduler
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
                    part.close()
        self._client = self._cluster = None

    def map(
        self, function: Callable[..., Result], parts: Sequence[tuple[Any, ...]], *, label: str
    ) -> Iterator[Result]:
        """Call `function(*part)` for every part; yield results in order, with a progress bar."""
        from tqdm import tqdm

        if not parts:
            return
        client = self._connect()
        from distributed import as_completed

        futures = [client.submit(_run_alone, function, part, pure=False) for part in parts]
        bar = tqdm(total=len(futures), desc=label, unit="part", leave=False, delay=1.0)
        done: dict[int, Result] = {}
        position = {future.key: row for row, future in enumerate(futures)}
        expected = 0
        try:
            for future in as_completed(futures):
                done[position[future.key]] = self._collect(future, label)
                bar.update()
                while expected in done:
                    yield done.pop(expected)
                    expected += 1
        finally:
            bar.close()
            with contextlib.suppress(Exception):
                client.cancel(futures)

    def _collect(self, future: Any, label: str) -> Any:
        from distributed.scheduler import KilledWorker

        try:
            return future.result()
        except KilledWorker as error:
            raise BackendError(
                f"{label}: one part killed its worker {error.allowed_failures + 1} times, most "
                "likely for want of memory. Give fewer --workers, then run again: finished parts "
                "are kept"
            ) from error

    def _connect(self) -> Any:
        if self._client is not None:
            return self._client
        from distributed import Client, LocalCluster

        if self.scheduler:
            # A lost scheduler is told once, by what is raised, not by each of its connections.
            logging.getLogger("distributed").setLevel(logging.CRITICAL)
            try:
                self._client = Client(self.scheduler, timeout="10s")
            except (OSError, TimeoutError, ValueError) as error:
                raise BackendError(
                    f"no Dask scheduler answers at {self.scheduler}: {error}. Start one with "
                    "`dask scheduler`, or leave --scheduler out for a local cluster"
                ) from error
            return self._client
        self._cluster = LocalCluster(
            n_workers=self.workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        )
        self._client = Client(self._cluster)
        return self._client


def _run_alone(function: Callable[..., Result], part: tuple[Any, ...]) -> Result:
    """Run one part on one thread of every native library."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        return function(*part)
