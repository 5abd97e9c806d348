"""The index over a database's embeddings: exact search, or FAISS by any factory string, built in parts and resumable.

`build_index` writes below the database's folder, and everything that it finished is kept when it is killed:

    plan.json            what is built: another plan throws away what is there
    trained.faiss        the trained, empty index
    part-000000.faiss    the index of some of the embeddings; the parts can be any number
    index.faiss          all of them; with more than one part the inverted lists lie in lists.ivfdata beside it

The last one or two files are the index; the others are deleted by `remove_parts` once a manifest names the index.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DatabaseError
from ...files import move, replaced, sync, write_json
from ..database import INDEX_FOLDER, Database, write_manifest
from ..manifest import describe, lock_folder, name_full_disk, problem_with, read_json
from . import exact
from .choice import EXACT, Choice, choose, lists_of
from .devices import check_memory, find_device

GPU_LARGEST_K = 2048
"""Of FAISS's own GPU code, for k and for nprobe."""
PLAN, TRAINED, WHOLE, LISTS = "plan.json", "trained.faiss", "index.faiss", "lists.ivfdata"
OTHER_FOLDER = INDEX_FOLDER + ".other"
PART_BYTES = 256 << 20
"""Codes and numbers of a part: what building holds in memory, beside the training sample."""
SAMPLE_BYTES = 1 << 30
BLOCK = 1 << 15
MAPPED_FROM = 2 << 30
"""Bytes from which an index is memory-mapped unless it is said otherwise."""
SETTINGS = {"nprobe": "nprobe", "ef_search": "efSearch", "rerank": None}
"""Settings of a search -> FAISS's parameter. `rerank`: so many candidates for every key that is asked for are compared
again by their stored embeddings; 0: none."""

Report = Callable[[int, int], None]
"""Called with the number of embeddings that are in the index, and of all."""


class Index:
    """Finds the nearest keys. Made by `open_index`."""

    kind = EXACT
    num_lists = 0
    largest_k: int | None = None
    """What `search` takes at most; None: any number."""

    def __init__(self, database: Database, device: torch.device, settings: dict[str, int]) -> None:
        searched = self.kind == EXACT
        self.count, self.dim = len(database), database.dim or 0
        blocks = list(database.embeddings(1 << 62))
        # Beside a FAISS index the keys are only for `rerank`: the CPU does that unless they are small.
        where = device if searched or self.count * self.dim * 4 <= exact.HELD_BYTES else torch.device("cpu")
        check_memory(
            where,
            sum(block.nbytes for _, block in blocks),
            f"the embeddings of {database.folder}",
            "search on the CPU, or give the database a smaller index (`retro-kernels db index`)",
        )
        self.keys = exact.Keys(blocks, where)
        if searched:
            self.keys.hold()
        self.device = device
        self.settings = self._checked(settings)
        self.description = f"exact search of {self.count:,} keys on {device}"

    def search(self, queries: Any, k: int, **settings: int) -> tuple[Tensor, Tensor]:
        """The k nearest keys under squared L2.

        queries: floating [q, dim], an array or a tensor. settings: instead of the index's own for this call (see
        `open_index`). -> distances float32 [q, k], ascending, and ids int64 [q, k], the chunks' numbers, on the CPU;
        where there are fewer, or the index found fewer, distance inf and id -1. Distances are exact with exact search
        and where `rerank` is at least 1, else those of the compressed keys.

        Raises ValueError for queries of another shape, that are not floating or not finite, for k < 1 or above
        `largest_k`, and for a setting that the index does not have. May be called from several threads.
        """
        given = torch.as_tensor(queries)
        if given.ndim != 2 or given.shape[1] != self.dim or not given.dtype.is_floating_point:
            raise ValueError(
                f"queries: got {given.dtype} {list(given.shape)}; expected floating [q, {self.dim}], the width of the "
                "database's embeddings"
            )
        if k < 1:
            raise ValueError(f"k: got {k}; expected at least 1")
        if self.largest_k is not None and k > self.largest_k:
            raise ValueError(f"k: got {k}; FAISS finds at most {self.largest_k:,} keys on a GPU: ask for fewer there")
        given = given.detach().float()
        if not bool(given.isfinite().all()):
            raise ValueError("queries: got NaN or infinity; expected finite numbers (look at the embedder)")
        distances, ids = self._search(given, k, {**self.settings, **self._checked(settings)})
        return distances.to(given.device), ids.to(given.device)

    def _search(self, queries: Tensor, k: int, settings: dict[str, int]) -> tuple[Tensor, Tensor]:
        return exact.search(self.keys, queries, k)

    def _checked(self, settings: dict[str, int]) -> dict[str, int]:
        known = self.known_settings()
        for name, value in settings.items():
            if name not in known:
                raise ValueError(
                    f"{name}: {self.kind} search has no such setting; expected one of {known or 'none at all'}"
                )
            if not isinstance(value, int) or value < (0 if name == "rerank" else 1):
                raise ValueError(f"{name}: got {value!r}; expected a positive integer")
        return dict(settings)

    def known_settings(self) -> tuple[str, ...]:
        """The settings that `search` takes."""
        return ()


class _FaissIndex(Index):
    kind = "FAISS"

    def __init__(
        self, database: Database, device: torch.device, memory_map: bool | None, shard: bool, settings: dict[str, int]
    ) -> None:
        self.faiss = import_faiss()
        entry = database.manifest["index"]
        self.spec = entry["spec"]
        path = database.folder / entry["files"][0]["path"]
        size = sum(file["bytes"] for file in entry["files"])
        mapped = size >= MAPPED_FROM if memory_map is None else memory_map
        self.index = read_index(database.folder, entry, mapped)
        if self.index.ntotal != len(database) or self.index.d != database.dim:
            raise DatabaseError(
                f"{path} holds {self.index.ntotal} vectors of {self.index.d}, the database {len(database)} of "
                f"{database.dim}: make it anew with `retro-kernels db index {database.folder} --index auto`"
            )
        if device.type == "cuda":
            self.index = on_gpu(self.faiss, self.index, device, shard)
            self.largest_k = GPU_LARGEST_K
        self.num_lists = lists_of(self.spec) or 0
        self._lock = threading.Lock()
        super().__init__(database, device, {**entry["settings"], **settings})
        held = "memory-mapped" if mapped else "in memory"
        self.description = f"FAISS {self.spec} over {self.count:,} keys on {device}, {held}"

    def known_settings(self) -> tuple[str, ...]:
        names = ["rerank"]
        if "IVF" in self.spec or "IMI" in self.spec:
            names.insert(0, "nprobe")
        if self.spec.startswith("HNSW") or ",HNSW" in self.spec:
            names.insert(0, "ef_search")
        return tuple(names)

    def _search(self, queries: Tensor, k: int, settings: dict[str, int]) -> tuple[Tensor, Tensor]:
        factor = settings.get("rerank", 0)
        wanted = min(k * max(factor, 1), max(self.count, 1), self.largest_k or self.count + 1)
        with self._lock:  # FAISS keeps the parameters in the index
            for name, value in settings.items():
                if SETTINGS[name] is not None:
                    self._set(SETTINGS[name], value)
            if queries.is_cuda and hasattr(self.index, "getDevice"):
                distances, ids = self.index.search(queries.contiguous(), wanted)  # see `on_gpu`
            else:
                found = self.index.search(np.ascontiguousarray(queries.cpu().numpy()), wanted)
                distances, ids = (torch.from_numpy(x) for x in found)
        if factor:
            return exact.rescored(self.keys, queries, ids, k)
        return exact.padded(*exact.in_order(distances, ids), k)

    def _set(self, name: str | None, value: int) -> None:
        on_a_gpu = self.device.type == "cuda"
        space = self.faiss.GpuParameterSpace() if on_a_gpu else self.faiss.ParameterSpace()
        space.set_index_parameter(self.index, name, value)


def open_index(
    database: Database,
    *,
    device: str | torch.device = "cpu",
    memory_map: bool | None = None,
    shard: bool = False,
    **settings: int,
) -> Index:
    """The index of `database`, ready to search; exact search over its embeddings where it has none.

    Args:
        device: "cpu"; "cuda:1": on that GPU; "cuda": exact search on the current GPU, a FAISS index on all GPUs that
            can be seen; "auto": on a GPU where there is one. (This project has run neither on a GPU yet.)
        memory_map: leave the index on disk and read what a search touches; None: from 2 GiB on. Exact search on a
            CPU maps its embeddings unless they are below 1 GiB in fp32.
        shard: on several GPUs, a part of the index on each; otherwise a copy on each.
        settings: `nprobe` (lists that are looked into), `ef_search` (of HNSW), `rerank` (so many times k candidates are
            compared again by their stored embeddings), instead of those in the manifest.

    Raises DatabaseError for a database without embeddings, an index that is damaged or was made with a FAISS that this
    one cannot read, and where FAISS or the GPU is not there; ValueError for a setting that the index does not have.
    """
    if database.dim is None:
        raise DatabaseError(
            f"{database.folder} holds no embeddings, so nothing can be searched: build it with an embedder"
        )
    entry = database.manifest["index"]
    where = find_device(device)
    if entry is None or entry["kind"] == EXACT:
        if shard:
            raise ValueError("shard: exact search holds all keys on one device; expected False")
        return Index(database, where, settings)
    return _FaissIndex(database, where, memory_map, shard, settings)


def build_index(
    database: Database,
    spec: str = "auto",
    *,
    folder: Path | None = None,
    device: str | torch.device = "cpu",
    part_bytes: int = PART_BYTES,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Makes the index of the database's embeddings, or goes on with one that was begun. -> its entry in the manifest.

    Memory: the training sample (at most 1 GiB), the trained index and a part (`part_bytes`); an index without inverted
    lists ("HNSW32", "PQ64") is built whole in memory, and not resumed.

    Args:
        spec: "auto" (see `index.choice.choose`), "exact", or a FAISS factory string.
        folder: where; the database's `index` folder by default. device: on "cuda" (all GPUs) or "cuda:1" k-means trains
            the lists; the rest is done on the CPU.

    Raises DatabaseError for a database without embeddings, a string that FAISS refuses, a full disk, or without FAISS.
    """
    if database.dim is None:
        raise DatabaseError(f"{database.folder} holds no embeddings to index: build it with an embedder, or index=None")
    where = find_device(device)
    choice = choose(spec, len(database), database.dim)
    folder = database.index_folder if folder is None else folder
    entry = {
        "asked": spec,
        "spec": choice.spec,
        "why": choice.why,
        "settings": choice.settings,
        "metric": "l2",
        "kind": EXACT if choice.spec == EXACT else "faiss",
    }
    if choice.spec == EXACT:
        if progress is not None:
            progress(len(database), len(database))
        return {**entry, "files": []}
    builder = _Builder(database, choice, folder, where, part_bytes, progress)
    with name_full_disk(folder):
        files = builder.run()
    return {**entry, "faiss": builder.faiss.__version__, "files": [describe(database.folder, file) for file in files]}


def replace_index(
    root: str | Path, spec: str = "auto", *, device: str | torch.device = "cpu", progress: Report | None = None
) -> Database:
    """Gives a finished database another index. The old one serves until the new one is whole, and is then deleted.

    Raises DatabaseError as `build_index` does, and where another process is at work on the database."""
    with lock_folder(Database(root).folder):
        return give_index(Database(root), spec, device=device, progress=progress)


def give_index(
    database: Database, spec: str, *, device: str | torch.device = "cpu", progress: Report | None = None
) -> Database:
    """`replace_index` for who has locked the database's folder."""
    old = database.manifest["index"]
    used = {Path(file["path"]).parts[0] for file in (old["files"] if old else [])}
    name = OTHER_FOLDER if INDEX_FOLDER in used else INDEX_FOLDER
    entry = build_index(database, spec, folder=database.folder / name, device=device, progress=progress)
    write_manifest(database.folder, {**database.manifest, "index": entry})
    remove_parts(database.folder, entry)
    return Database(database.folder)


def check_spec(spec: str, dim: int | None, count: int = 0) -> None:
    """Checks before there is a key that an index can be made: `spec` over embeddings of `dim` numbers (None: there will
    be none), at least about `count` of them.

    Raises DatabaseError for a string that FAISS refuses, and without a FAISS that will be needed."""
    if dim is None:
        raise DatabaseError(f"index: got {spec!r} for a database without an embedder; expected none, nothing to index")
    if spec == EXACT:
        return
    if spec == "auto":
        if choose(spec, count, dim).spec != EXACT:
            import_faiss(f"about {count:,} chunks by its size; ")
        return
    if re.search(r"[A-Za-z]0+(?!\d)", spec):
        raise DatabaseError(f"index: got {spec!r}; expected lists and codes of a size of at least 1")
    make_index(import_faiss(), choose(spec, 1 << 40, dim).spec, dim)


def save_settings(root: str | Path, **settings: int) -> Database:
    """Makes `settings` those that `open_index` takes by default."""
    with lock_folder(Path(root)):
        database = Database(root)
        checked = open_index(database, device="cpu", memory_map=True, shard=False, **settings).settings
        entry = database.manifest["index"]
        if entry is None or entry["kind"] == EXACT:
            raise ValueError("settings: exact search has none to save")
        write_manifest(database.folder, {**database.manifest, "index": {**entry, "settings": checked}})
    return Database(root)


def remove_parts(root: Path, entry: dict[str, Any] | None) -> None:
    """Deletes what building left beside the index of `entry`, once the manifest names it."""
    kept = {root / file["path"] for file in (entry["files"] if entry else [])}
    for name in (INDEX_FOLDER, OTHER_FOLDER):
        folder = root / name
        if not folder.is_dir():
            continue
        for path in folder.iterdir():
            if path not in kept:
                path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def import_faiss(why: str = "") -> ModuleType:
    """Raises DatabaseError, naming the extras, where FAISS is not there."""
    try:
        import faiss
    except ImportError as error:
        raise DatabaseError(
            f"index: {why}this one needs FAISS ({error}): pip install 'retro_kernels[cpu]' (or [gpu]), or take exact "
            "search, which needs nothing: --index exact"
        ) from error
    return faiss


def read_index(root: Path, entry: dict[str, Any], mapped: bool) -> Any:
    """Opens the files of an index. What is loaded is checked against its checksum first; what is mapped, by size when
    the database is opened, and by `Database.verify`."""
    faiss = import_faiss()
    if not mapped:
        for file in entry["files"]:
            problem = problem_with(root, file)
            if problem:
                raise DatabaseError(f"{problem}: make the index anew with `retro-kernels db index {root} --index auto`")
    merged = len(entry["files"]) > 1
    # Merged lists are always mapped (FAISS crashes when told so again), and the folder may have been moved.
    flags = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY if merged else faiss.IO_FLAG_MMAP if mapped else 0
    path = root / entry["files"][0]["path"]
    try:
        with _stdout_to_stderr():
            index = faiss.read_index(str(path), flags)
        if merged and not mapped:
            _load_lists(faiss, index)
        return index
    except RuntimeError as error:
        raise DatabaseError(
            f"{path} was made with FAISS {entry.get('faiss')}, and {faiss.__version__} cannot read it "
            f"({_last_line(error)}): make the index anew with `retro-kernels db index {root} --index auto`"
        ) from error


def _load_lists(faiss: ModuleType, index: Any) -> None:
    """Copies the mapped inverted lists of `index` into memory."""
    ivf = faiss.extract_index_ivf(index)
    lists = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
    ivf.invlists.copy_subset_to(lists, faiss.InvertedLists.SUBSET_TYPE_ID_RANGE, 0, index.ntotal)
    ivf.replace_invlists(lists, True)
    lists.this.disown()


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """FAISS prints that a merged index was moved on the standard output, where a command's answer belongs."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def on_gpu(faiss: ModuleType, index: Any, device: torch.device, shard: bool = False) -> Any:
    """The index on the GPU that `device` names, or on all of them where it names none: copied to each, or, with
    `shard`, a part on each.

    A coarse quantizer that has no GPU code (HNSW) stays on the CPU. What is on one GPU as a whole takes torch's tensors
    there (FAISS's `contrib.torch_utils`); an index behind a rotation (OPQ), or on several, takes arrays.

    Raises DatabaseError for a FAISS without GPUs, and for an index that has no GPU code."""
    count = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    if not count or not hasattr(faiss, "StandardGpuResources"):
        raise DatabaseError(
            f"device: got {str(device)!r}, but this FAISS sees no GPU: pip install 'retro_kernels[gpu]' on a machine "
            "with one, or search on the CPU"
        )
    one = count == 1 or device.index is not None
    options = faiss.GpuClonerOptions() if one else faiss.GpuMultipleClonerOptions()
    options.allowCpuCoarseQuantizer = True
    # Tables of product codes fit into shared memory as halves. What is stored as it is stays in fp32.
    lists = faiss.try_extract_index_ivf(index)
    options.useFloat16 = lists is not None and isinstance(faiss.downcast_index(lists), faiss.IndexIVFPQ)
    try:
        if not one:
            options.shard = shard
            return faiss.index_cpu_to_all_gpus(index, options)
        importlib.import_module("faiss.contrib.torch_utils")  # teaches `search` about tensors
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index, options)
    except RuntimeError as error:
        raise DatabaseError(
            f"device: FAISS cannot put this index on a GPU ({_last_line(error)}): search it on the CPU, or make one of "
            "lists with SQ8 or PQ codes (`retro-kernels db index`)"
        ) from None


class _Builder:
    """See the module's text. `run` -> the files of the index, the one to open first."""

    def __init__(
        self,
        database: Database,
        choice: Choice,
        folder: Path,
        device: torch.device,
        part_bytes: int,
        progress: Report | None,
    ) -> None:
        self.faiss = import_faiss()
        self.keys = list(database.embeddings(1 << 62))
        self.count, self.dim = len(database), int(database.dim or 0)
        self.choice, self.folder, self.device, self.progress = choice, folder, device, progress
        index = make_index(self.faiss, self.choice.spec, self.dim)
        lists = self._lists(index)
        rows = self.count
        if lists is not None:
            rows = max(1, part_bytes // (lists.code_size + 8))
        self.starts = range(0, self.count, rows)
        self.plan = {
            "spec": choice.spec,
            "sample": choice.sample,
            "part": rows,
            "faiss": self.faiss.__version__,
            "embeddings": [shard["files"]["embeddings"]["sha256"] for shard in database.manifest["shards"]],
        }

    def run(self) -> list[Path]:
        self.folder.mkdir(exist_ok=True)
        plan = self.folder / PLAN
        if not plan.exists() or read_json(plan) != self.plan:
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            write_json(plan, self.plan)
        whole, lists = self.folder / WHOLE, self.folder / LISTS
        if not whole.exists():
            self._train()
            parts = [self._part(number, start) for number, start in enumerate(self.starts)]
            if len(parts) == 1:
                move(parts[0], whole)
            else:
                self._merge(parts, whole, lists)
            sync(self.folder)
        self._report(self.count)
        return [whole, lists] if lists.exists() else [whole]

    def _lists(self, index: Any) -> Any:
        """The IVF whose lists can be merged, or None: those that cannot (fast scan packs them) are built as a whole."""
        lists = self.faiss.try_extract_index_ivf(index)
        if lists is None or not isinstance(
            self.faiss.downcast_InvertedLists(lists.invlists), self.faiss.ArrayInvertedLists
        ):
            return None
        return lists

    def _train(self) -> None:
        path = self.folder / TRAINED
        if path.exists():
            return
        index = make_index(self.faiss, self.choice.spec, self.dim)
        if not index.is_trained:
            lists = self.faiss.try_extract_index_ivf(index)
            if lists is not None and self.device.type == "cuda":
                lists.clustering_index = on_gpu(self.faiss, self.faiss.IndexFlatL2(lists.d), self.device)
            try:
                with _few_points_allowed(self.faiss, index):
                    index.train(self._sample())
            except RuntimeError as error:
                raise DatabaseError(f"index: FAISS cannot train {self.choice.spec!r} ({_last_line(error)})") from None
            if lists is not None:
                lists.clustering_index = None
        self._write(index, path)

    def _sample(self) -> np.ndarray:
        """Some of the embeddings, the same in every run, float32."""
        size = min(self.count, self.choice.sample, max(1, SAMPLE_BYTES // (4 * self.dim)))
        rows = np.sort(np.random.default_rng(0).choice(self.count, size, replace=False))
        sample = np.empty((size, self.dim), np.float32)
        for first, keys in self.keys:
            inside = np.flatnonzero((rows >= first) & (rows < first + len(keys)))
            sample[inside] = keys[rows[inside] - first]
        return sample

    def _part(self, number: int, start: int) -> Path:
        path = self.folder / f"part-{number:06d}.faiss"
        stop = min(start + self.starts.step, self.count)
        if not path.exists():
            index = self.faiss.read_index(str(self.folder / TRAINED))
            numbered = self._lists(index) is not None
            for first, keys in self.keys:
                for at in range(max(start, first), min(stop, first + len(keys)), BLOCK):
                    block = np.asarray(keys[at - first : min(at + BLOCK, stop) - first], np.float32)
                    try:
                        if numbered:
                            index.add_with_ids(block, np.arange(at, at + len(block), dtype=np.int64))
                        else:
                            index.add(block)
                    except RuntimeError as error:
                        raise DatabaseError(
                            f"index: FAISS cannot fill {self.choice.spec!r} ({_last_line(error)})"
                        ) from None
                    self._report(at + len(block))
            self._write(index, path)
        self._report(stop)
        return path

    def _merge(self, parts: Sequence[Path], whole: Path, lists: Path) -> None:
        from faiss.contrib.ondisk import merge_ondisk

        index = self.faiss.read_index(str(self.folder / TRAINED))
        merge_ondisk(index, [str(path) for path in parts], str(lists))
        with lists.open("rb") as file:
            os.fsync(file.fileno())
        self._write(index, whole)

    def _write(self, index: Any, path: Path) -> None:
        with replaced(path) as temporary:
            try:
                self.faiss.write_index(index, str(temporary))
            except RuntimeError as error:
                # FAISS says no more than that a write fell short; what it wanted decides whether the disk is full.
                if shutil.disk_usage(self.folder).free < 1 << 20:
                    raise OSError(28, "No space left on device", str(temporary)) from error
                raise DatabaseError(f"{temporary} could not be written ({_last_line(error)})") from error

    def _report(self, done: int) -> None:
        if self.progress is not None:
            self.progress(done, self.count)


def make_index(faiss: ModuleType, spec: str, dim: int) -> Any:
    """An empty index. Raises DatabaseError for a string that FAISS refuses."""
    try:
        index = faiss.index_factory(dim, spec, faiss.METRIC_L2)
    except RuntimeError as error:
        if "bad_cast" in str(error):
            raise DatabaseError(
                f"index: this build of FAISS ({faiss.__version__}) makes no index in a process that has loaded torch "
                "before it (std::bad_cast): `import faiss` before torch and retro_kernels, or install another build of "
                "FAISS"
            ) from None
        raise DatabaseError(
            f"index: FAISS refuses {spec!r} for embeddings of {dim} numbers ({_last_line(error)})"
        ) from None
    inner = faiss.downcast_index(index.index) if hasattr(index, "chain") else index
    if hasattr(inner, "do_polysemous_training"):
        inner.do_polysemous_training = False  # takes most of the training of product codes, and is never used here
    return index


@contextmanager
def _few_points_allowed(faiss: ModuleType, index: Any) -> Iterator[None]:
    """While an index is trained: `choose` has said where keys are few, and FAISS would say it once for every part of
    every code."""
    inner = faiss.downcast_index(index.index) if hasattr(index, "chain") else index
    if hasattr(inner, "pq"):
        inner.pq.cp.min_points_per_centroid = 1
    rotations = (
        [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
        if (hasattr(index, "chain"))
        else []
    )
    codes = []  # kept as long as the rotations point to them
    for rotation in rotations:
        if isinstance(rotation, faiss.OPQMatrix):
            codes.append(faiss.ProductQuantizer(rotation.d_out, rotation.M, 8))
            codes[-1].cp.min_points_per_centroid = 1
            rotation.pq = codes[-1]
    try:
        yield
    finally:
        for rotation in rotations:
            if isinstance(rotation, faiss.OPQMatrix):
                rotation.pq = None


def _last_line(error: Exception) -> str:
    """FAISS's errors begin with the place in its source; what went wrong stands at the end."""
    return str(error).strip().splitlines()[-1].split(": ", 1)[-1]
