"""Where the shards of a build are worked on: in this process, in a pool of processes, under torchrun or on Ray.

All do the same: `task` ("read" or "build") of a `Worker` for every shard of `numbers`, each shard once, in any order,
telling `tick` what was done. A shard is whole or absent, so a process that dies costs the shards it was at.
"""

from __future__ import annotations

import datetime
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

from .files import DatabaseError
from .shards import Tick, Worker

Make = Callable[[], Worker]
Run = Callable[[Make, str, Sequence[int], Tick], None]
Counts = list[tuple[int, int, int]]
ENGINES = ("local", "torchrun", "ray")
ATTEMPTS = 3
"""Times that work is given to new processes after one died."""
PATIENCE = datetime.timedelta(days=30)
"""How long a process under torchrun waits for the others: the slowest's shards, or the index."""

_worker: Worker | None = None


def in_process(make: Make, task: str, numbers: Sequence[int], tick: Tick) -> None:
    """Does every shard here, one after another."""
    worker = make()
    for number in numbers:
        getattr(worker, task)(number, tick)


def in_pool(make: Make, task: str, numbers: Sequence[int], tick: Tick, *, workers: int) -> None:
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


class Processes:
    """The processes that torchrun started. The first one builds and calls `run`; the others `serve` it.

    They speak over torch.distributed's gloo, a few messages a stage; shards go through the file system they share."""

    def __init__(self) -> None:
        import torch.distributed as distributed

        if "RANK" not in os.environ:
            raise DatabaseError(
                "engine 'torchrun': RANK is not set in the environment; start the build as "
                "torchrun --nproc-per-node N --no-python retro-kernels db build ... --engine torchrun"
            )
        self._own = not distributed.is_initialized()
        if self._own:
            distributed.init_process_group("gloo", timeout=PATIENCE)
        self._distributed = distributed
        self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def run(self, make: Make, task: str, numbers: Sequence[int], tick: Tick) -> None:
        """Of the first process: every process does its share. Raises DatabaseError where one of them did."""
        self._tell((task, list(numbers)))
        self._share(make, task, numbers, tick)

    def serve(self, make: Make) -> None:
        """Of the others: works until the first process is done. Raises its DatabaseError where it failed."""
        while True:
            what, given = self._tell(None)
            if what == "end":
                if given is not None:
                    raise DatabaseError(given)
                return
            self._share(make, what, given, lambda *_: None)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Round all that the first process does: however it ends, the others hear of it."""
        message = None
        try:
            yield
        except BaseException as error:
            message = f"the first process failed: {error}"
            raise
        finally:
            self._tell(("end", message))

    def close(self) -> None:
        if self._own:
            self._distributed.destroy_process_group()

    def _tell(self, message: tuple[str, Any] | None) -> tuple[str, Any]:
        """The first process's message, in every process."""
        box = [message]
        self._distributed.broadcast_object_list(box, src=0, group=self._group)
        assert box[0] is not None
        return box[0]

    def _share(self, make: Make, task: str, numbers: Sequence[int], tick: Tick) -> None:
        error: DatabaseError | None = None
        counts: Counts = []
        try:
            mine = numbers[self.rank :: self.size]
            if self.rank == 0:
                in_process(make, task, mine, tick)
            else:
                in_process(make, task, mine, lambda *found: counts.append(found))
        except DatabaseError as failed:
            error = failed
        found: list[tuple[Counts, str | None]] = [([], None)] * self.size
        self._distributed.all_gather_object(found, (counts, None if error is None else str(error)), group=self._group)
        for theirs, failure in found:
            # The others hear of a failure when the first process ends; then all of them end alike.
            if self.rank == 0 and failure is not None:
                raise DatabaseError(failure)
            for one in theirs:
                tick(*one)


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
def started(
    engine: str, serving: Callable[[str], Make], *, device: str, workers: int, address: str | None
) -> Iterator[Run | None]:
    """The engine of this name, ready to run for as long as the build lasts; None in a process of torchrun that is not
    the first, when it has `serve`d the build.

    serving: given the device, makes workers that load by name what they need. device: as in `build_database`.
    address: of a Ray cluster; None starts a Ray of this machine alone, unless one was initialised already."""
    if engine == "torchrun":
        processes = Processes()
        try:
            if processes.rank:
                processes.serve(serving(_own_device(device)))
                yield None
            else:
                with processes.leading():
                    yield processes.run
        finally:
            processes.close()
    elif engine == "ray":
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
    else:
        yield in_process if workers == 1 else functools.partial(in_pool, workers=workers)


def _own_device(device: str) -> str:
    """Each of a machine's processes takes a GPU of its own."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
