"""The engines that work on the shards of a build: this process, a pool of processes, or Ray.

Each engine does `task` ("read" or "build") of a `Worker` for every shard of `numbers` once, in any order, and reports
progress to `tick`. A shard is whole or absent, so a process that dies costs the shards it was at.
"""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from ...errors import DatabaseError
from .shards import Tick, Worker

Make = Callable[[], Worker]
Run = Callable[[Make, str, Sequence[int], Tick], None]
Counts = list[tuple[int, int, int]]
ENGINES = ("local", "ray")
ATTEMPTS = 3
"""Times that work is given to new processes after one died."""

_worker: Worker | None = None


def in_process(make: Make, task: str, numbers: Sequence[int], tick: Tick) -> None:
    """Does every shard here, one after another."""
    worker = make()
    for number in numbers:
        getattr(worker, task)(number, tick)


def in_pool(make: Make, task: str, numbers: Sequence[int], tick: Tick, *, workers: int) -> None:
    """Does every shard in `workers` processes. The shards of a process that dies are done again.

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
    _share_cores(workers)
    _worker = make()


def _end_with(sentinel: Any) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _share_cores(workers: int) -> None:
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _work(task: str, number: int) -> Counts:
    assert _worker is not None
    return _done(_worker, task, number)


def _done(worker: Worker, task: str, number: int) -> Counts:
    counts: Counts = []
    getattr(worker, task)(number, lambda *found: counts.append(found))
    return counts


class _ShardActor:
    """A Ray worker: does the shards that it is given, one at a time."""

    def __init__(self, make: Make, task: str, workers: int) -> None:
        _share_cores(workers)
        self._worker, self._task = make(), task

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["number"])
        try:
            counts = _done(self._worker, self._task, number)
        except DatabaseError as error:
            # As a value: wrapped in Ray's own exceptions its kind would be lost.
            return {"number": number, "error": str(error), "counts": []}
        return {"number": number, "error": "", "counts": [list(one) for one in counts]}


def on_ray(make: Make, task: str, numbers: Sequence[int], tick: Tick, *, workers: int, gpus: float = 0.0) -> None:
    """The same on a Ray cluster, by Ray Data, with `workers` actors of `gpus` GPUs each.

    A worker that dies is started again, and the shard it was at is done again. Raises DatabaseError where there are
    fewer cores or GPUs than workers need: Ray would wait for them without a word."""
    if not numbers:
        return
    ray = import_ray()
    nodes = max(1, sum(bool(node["Alive"]) for node in ray.nodes()))
    there = ray.cluster_resources()
    for resource, needed in {"CPU": float(workers), "GPU": workers * gpus}.items():
        if there.get(resource, 0.0) < needed:
            raise DatabaseError(
                f"workers: {workers} on Ray need {needed:g} {resource}s, the cluster has {there.get(resource, 0.0):g}: "
                "ask for fewer"
            )
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
    work = rows.map(
        _ShardActor,
        fn_constructor_args=(make, task, -(-workers // nodes)),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(numbers)), max_tasks_in_flight_per_actor=1),
        num_cpus=1,
        num_gpus=gpus,
    )
    for row in work.iter_rows():
        if row["error"]:
            raise DatabaseError(row["error"])
        for one in row["counts"]:
            tick(*map(int, one))


def import_ray() -> Any:
    """-> ray, with ray.data. Raises DatabaseError where it is not installed."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise DatabaseError(
            f"engine 'ray' needs the package {error.name}: pip install 'retro_kernels[distributed]'"
        ) from None
    return ray


@contextmanager
def start_engine(engine: str, *, device: str, workers: int, address: str | None) -> Iterator[Run]:
    """The engine of this name, ready to run for as long as the build lasts.

    device: of the embedder, as in `build_database`. address: of a Ray cluster; None starts a Ray of this machine alone,
    unless one was initialised already."""
    if engine != "ray":
        yield in_process if workers == 1 else functools.partial(in_pool, workers=workers)
        return
    ray = import_ray()
    own = not ray.is_initialized()
    if own:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        gpus = 1.0 if device != "cpu" and ray.cluster_resources().get("GPU") else 0.0
        yield functools.partial(on_ray, workers=workers, gpus=gpus)
    finally:
        if own:
            ray.shutdown()
