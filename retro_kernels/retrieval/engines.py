"""Where the shards of a build are worked on: in this process or in a pool of processes."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from .files import DatabaseError
from .shards import Tick, Worker

Make = Callable[[], Worker]
ATTEMPTS = 3
"""Times that work is given to new processes after one died."""

_worker: Worker | None = None


def in_process(make: Make, task: str, numbers: Sequence[int], tick: Tick) -> None:
    """Does `task` ("read" or "build") for every shard of `numbers`, one after another."""
    worker = make()
    for number in numbers:
        getattr(worker, task)(number, tick)


def in_pool(make: Make, task: str, numbers: Sequence[int], tick: Tick, workers: int) -> None:
    """The same in `workers` processes. One that dies costs the shards it was at, which are done again.

    `make` is sent to the processes. Raises DatabaseError where processes keep dying."""
    left = list(numbers)
    for attempt in range(ATTEMPTS):
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(make, workers))
        try:
            waiting = {pool.submit(_work, task, number): number for number in left}
            for done in as_completed(waiting):
                for counts in done.result():
                    tick(*counts)
                left.remove(waiting[done])
            return
        except BrokenProcessPool:
            if attempt + 1 == ATTEMPTS:
                raise DatabaseError(
                    f"a worker died {ATTEMPTS} times over ({len(left)} shards left): is there memory for {workers}? "
                    "What is finished was kept: build again with fewer workers"
                ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start(make: Make, workers: int) -> None:
    """First thing in a worker's process: it ends when its parent does, so that a killed build leaves no writer."""
    global _worker
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    _worker = make()


def _end_with(sentinel: Any) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _work(task: str, number: int) -> list[tuple[int, int, int]]:
    assert _worker is not None
    counts: list[tuple[int, int, int]] = []
    getattr(_worker, task)(number, lambda *found: counts.append(found))
    return counts
