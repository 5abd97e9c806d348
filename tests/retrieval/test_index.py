"""Exact search and FAISS indexes of a database: what is found, how they are built, and what goes wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from retrieval_common import CHUNK, Letters, database_of
from typer.testing import CliRunner

from retro_kernels.cli.db import app
from retro_kernels.retrieval import Database, DatabaseError, Retriever, ShardWriter, finish_database, open_index
from retro_kernels.retrieval.index import evaluation, exact
from retro_kernels.retrieval.index import index as index_module
from retro_kernels.retrieval.index.choice import EXACT, choose, lists_of
from retro_kernels.retrieval.index.evaluation import evaluate_search, plot
from retro_kernels.retrieval.index.index import build_index, replace_index, save_settings

DIM, SPEC = 32, "IVF64,SQ8"


def database_with(folder: Path, keys: np.ndarray, shards: int = 3, dtype: str = "float32", **options) -> Database:
    """A database with these embeddings, one chunk a document."""
    for number, part in enumerate(np.array_split(keys, shards)):
        writer = ShardWriter(folder, number, chunk_size=CHUNK, dim=keys.shape[1], embedding_dtype=dtype)
        for row in part:
            writer.add(np.ones(CHUNK, np.int64), np.zeros(1, np.int64), path="a", embeddings=row[None])
        writer.commit()
    embedder = {"name": "random", "kind": "test", "sha256": "0"}
    return finish_database(
        folder,
        shards,
        chunk_size=CHUNK,
        tokenizer=embedder,
        embedder=embedder,
        dim=keys.shape[1],
        embedding_dtype=dtype,
        **options,
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """FAISS's threads wait for each other by spinning, which takes minutes where tests run side by side."""
    faiss = pytest.importorskip("faiss")
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(evaluation, "LEAST_SECONDS", 1e-9)


@pytest.fixture(scope="module")
def keys() -> np.ndarray:
    """Clusters, so that lists and codes have something to learn."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((64, DIM))
    return (centres[random.integers(0, 64, 4000)] + 0.4 * random.standard_normal((4000, DIM))).astype(np.float32)


@pytest.fixture(scope="module")
def queries(keys: np.ndarray) -> np.ndarray:
    return keys[::37] + 0.1 * np.random.default_rng(1).standard_normal((len(keys[::37]), DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def plain(keys: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Database:
    return database_with(tmp_path_factory.mktemp("plain") / "db", keys)


@pytest.fixture
def copy(plain: Database, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain.folder, tmp_path / "db"))


def brute_force(keys: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    distances = ((queries[:, None].astype(np.float64) - keys) ** 2).sum(-1)
    ids = distances.argsort(1, kind="stable")[:, :k]
    return np.take_along_axis(distances, ids, 1), ids


def recall(found: torch.Tensor, true: np.ndarray) -> float:
    return float((found[:, :, None].numpy() == true[:, None]).sum() / true.size)


@pytest.mark.parametrize("k", [1, 2, 64, 700])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("held", [True, False])
def test_exact_search_is_brute_force(keys, queries, k, dtype, held, monkeypatch):
    """Through every path: many and few keys a block, a rest beside the groups, several blocks of keys and queries;
    queries that are almost a key, whose distance is a small difference of large numbers."""
    queries = np.concatenate([queries, keys[:60] + np.float32(1e-4)])
    monkeypatch.setattr(exact, "KEYS", 1500)
    monkeypatch.setattr(exact, "QUERIES", 50)
    stored = keys.astype(dtype)
    blocks = exact.Keys([(0, stored[:1234]), (1234, stored[1234:])])
    distances, ids = exact.search(blocks.hold() if held else blocks, torch.from_numpy(queries), k)
    true = brute_force(stored, queries, k)
    np.testing.assert_allclose(distances.numpy(), true[0], rtol=1e-5)
    # Keys whose distances differ by rounding may change places; each is there once, and where its distance says.
    assert all(len(set(row)) == k for row in ids.tolist())
    of_found = ((queries[:, None].astype(np.float64) - stored[ids.numpy()]) ** 2).sum(-1)
    np.testing.assert_allclose(of_found, true[0], rtol=1e-5)


@pytest.fixture(scope="module")
def repeated_keys() -> np.ndarray:
    """4,000 keys, only 40 of them different: more equal ones than candidates are looked at."""
    random = np.random.default_rng(2)
    return random.standard_normal((40, 33)).astype(np.float32)[random.integers(0, 40, 4000)]


@pytest.mark.parametrize("block", [16384, 700, 64])
def test_of_equal_keys_the_first_are_found_for_every_k(repeated_keys, block, monkeypatch):
    monkeypatch.setattr(exact, "KEYS", block)
    keys = exact.Keys([(0, repeated_keys[:1234]), (1234, repeated_keys[1234:])])
    queries = repeated_keys[::200]
    distances, ids = exact.search(keys, torch.from_numpy(queries), len(repeated_keys))
    np.testing.assert_array_equal(ids.numpy(), brute_force(repeated_keys, queries, len(repeated_keys))[1])
    for k in (1, 2, 5, 64, 700):
        found = exact.search(keys, torch.from_numpy(queries), k)
        assert torch.equal(found[0], distances[:, :k])
        assert torch.equal(found[1], ids[:, :k])


def test_equal_distances_come_in_the_order_of_faiss_s_exact_index():
    """Small integers: both compute every distance without rounding, and a hundred keys are equally far."""
    faiss, random = pytest.importorskip("faiss"), np.random.default_rng(0)
    keys = random.integers(-2, 3, (3000, 6)).astype(np.float32)
    flat = faiss.IndexFlatL2(6)
    flat.add(keys)
    for count in (3, 40):
        queries = random.integers(-2, 3, (count, 6)).astype(np.float32)
        for k in (1, 2, 7, 150):
            distances, ids = exact.search(exact.Keys([(0, keys)]), torch.from_numpy(queries), k)
            expected = flat.search(queries, k)
            np.testing.assert_array_equal(distances.numpy(), expected[0])
            np.testing.assert_array_equal(ids.numpy(), expected[1])


def test_what_the_product_loses_does_not_change_what_is_found(keys, queries, monkeypatch):
    """With factors rounded to TF32's eleven bits, as torch does on a GPU where it is allowed to."""
    given = torch.from_numpy(np.concatenate([queries, keys[:40]]))
    expected = exact.search(exact.Keys([(0, keys)]), given, 5)
    scores = exact._scores

    def rounded(x: torch.Tensor) -> torch.Tensor:
        bits = x.contiguous().view(torch.int32)
        return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)

    monkeypatch.setattr(exact, "_scores", lambda q, x, half, space: scores(rounded(q), rounded(x), half, space))
    monkeypatch.setattr(exact, "SPARE", 0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = exact.search(exact.Keys([(0, keys)]), given, 5)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dim", [0, 1, 2, 7, 96, 384])
def test_a_distance_has_the_same_bits_in_every_shape(dim):
    """Against the sum written out, one query and one key at a time."""
    random = np.random.default_rng(dim)
    queries, keys = (random.standard_normal((n, dim)).astype(np.float32) for n in (3, 50))
    found = exact.squared_distances(torch.from_numpy(queries)[:, None], torch.from_numpy(keys))
    for row, query in enumerate(queries):
        for column, key in enumerate(keys):
            terms = list((query - key) ** 2)
            while len(terms) > 1:
                first = (len(terms) + 1) // 2
                terms = [a + b for a, b in zip(terms, terms[first:])] + terms[len(terms) - first : first]
            assert found[row, column] == (terms[0] if terms else 0.0)


@pytest.mark.parametrize("rerank", [0, 4])
def test_an_index_gives_equal_keys_in_their_order(tmp_path, repeated_keys, rerank):
    keys = np.concatenate([repeated_keys, np.zeros((4000, 31), np.float32)], axis=1)
    index = open_index(replace_index(database_with(tmp_path / "db", keys).folder, "IVF16,SQ8"), nprobe=16)
    whole = index.search(keys[::200], 50, rerank=rerank)[1]
    for k in (1, 2, 5, 20):
        assert torch.equal(index.search(keys[::200], k, rerank=rerank)[1], whole[:, :k])
    assert (whole.diff(dim=-1) > 0).sum() > 0.9 * whole.numel() * 49 / 50


def test_the_least_of_each_row_is_found_by_groups(monkeypatch):
    """Where the least values crowd into one group, and where they lie in the rest that fills no group."""
    scores = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0))
    scores[0, 320:330] -= 2
    scores[1, 995:] -= 2
    for k in (1, 5, 9):
        values, places = exact.nearest(scores, k)
        assert torch.equal(values, scores.topk(k, largest=False).values)
        assert torch.equal(scores.gather(-1, places), values)


def test_fewer_keys_than_asked_for_are_missing(tmp_path):
    database = database_with(tmp_path / "db", np.eye(4, DIM, dtype=np.float32), shards=2)
    distances, ids = open_index(database).search(np.eye(4, DIM, dtype=np.float32)[:2], 6)
    assert ids[0, 0] == 0
    assert ids[1, 0] == 1
    assert (ids[:, 4:] == -1).all()
    assert distances[:, 4:].isinf().all()
    assert (ids[:, :4] >= 0).all()


def test_a_database_without_an_index_is_searched_exactly(plain, queries, keys):
    found = open_index(plain).search(queries, 3)
    assert recall(found[1], brute_force(keys, queries, 3)[1]) == 1.0
    assert "exact" in open_index(plain).description


@pytest.mark.parametrize("spec", [SPEC, "OPQ8,IVF64,PQ8", "HNSW16", "PQ16", "IVF64,PQ16x4fs", "SQ8"])
def test_faiss_finds_what_brute_force_finds(copy, keys, queries, spec):
    database = replace_index(copy, spec)
    index = open_index(database)
    true = brute_force(keys, queries, 2)
    assert recall(index.search(queries, 2, rerank=16)[1], true[1]) > 0.95
    # What is compared again has the distance of the stored key.
    distances, ids = index.search(queries, 2, rerank=16)
    np.testing.assert_allclose(distances, ((queries[:, None] - keys[ids]) ** 2).sum(-1), rtol=1e-5)
    assert database.verify() == []


def test_comparing_again_finds_more(copy, keys, queries):
    index = open_index(replace_index(copy, "IVF64,PQ4"), nprobe=64)
    true = brute_force(keys, queries, 2)[1]
    without, some, many = (recall(index.search(queries, 2, rerank=n)[1], true) for n in (0, 4, 64))
    assert without < some < many
    assert many > 0.9


def test_parts_are_one_index(copy, plain, queries):
    """Built at once, or in six parts that are merged on disk: the same numbers at the same distances, loaded or mapped,
    and after the folder has moved."""
    whole = open_index(replace_index(copy, SPEC)).search(queries, 5)
    database = Database(plain.folder)
    folder = copy / "index.other"
    entry = build_index(Database(copy), SPEC, folder=folder, part_bytes=700 * (DIM + 8))
    assert [Path(file["path"]).name for file in entry["files"]] == ["index.faiss", "lists.ivfdata"]
    assert len(list(folder.glob("part-*.faiss"))) == 6
    index_module.write_manifest(copy, {**Database(copy).manifest, "index": entry})
    index_module.remove_parts(copy, entry)
    moved = copy.with_name("moved")
    copy.rename(moved)
    for mapped in (False, True):
        merged = open_index(Database(moved), memory_map=mapped).search(queries, 5)
        assert torch.equal(merged[0], whole[0])
        assert torch.equal(merged[1], whole[1])
    assert Database(moved).verify() == []
    assert database.manifest["index"] is None


KILLED = """
import sys
from pathlib import Path
from retro_kernels.retrieval import Database
from retro_kernels.retrieval.index.index import build_index
folder = Path(sys.argv[1])
build_index(Database(folder), sys.argv[2], part_bytes=int(sys.argv[3]))
"""


@pytest.mark.parametrize("after", [0, 2, 5])
def test_a_killed_build_goes_on_to_the_same_bytes(copy, after):
    """Killed by SIGKILL after some parts; what was finished is not done again."""
    part_bytes = 700 * (DIM + 8)
    given = [sys.executable, "-c", KILLED, str(copy), SPEC, str(part_bytes)]
    process = subprocess.Popen(given)
    while len(list((copy / "index").glob("part-*.faiss"))) < after:
        time.sleep(0.001)
        assert process.poll() is None or len(list((copy / "index").glob("part-*"))) >= after
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in (copy / "index").glob("part-*.faiss")}
    resumed = build_index(Database(copy), SPEC, part_bytes=part_bytes)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    shutil.rmtree(copy / "index")
    fresh = build_index(Database(copy), SPEC, part_bytes=part_bytes)
    assert fresh == resumed


def test_another_index_replaces_one_and_nothing_is_left(copy, queries, keys):
    first = replace_index(copy, SPEC)
    assert first.manifest["index"]["files"][0]["path"] == "index/index.faiss"
    second = replace_index(copy, "IVF32,SQ8")
    assert second.manifest["index"]["files"][0]["path"] == "index.other/index.faiss"
    assert sorted(path.name for path in copy.iterdir()) == ["index.other", "manifest.json", "shards"]
    assert second.verify() == []
    third = replace_index(copy, "exact")
    assert sorted(path.name for path in copy.iterdir()) == ["manifest.json", "shards"]
    assert recall(open_index(third).search(queries, 2)[1], brute_force(keys, queries, 2)[1]) == 1.0


def test_what_an_interrupted_build_of_another_index_left_is_thrown_away(copy, queries):
    build_index(Database(copy), "IVF16,SQ8", part_bytes=700 * (DIM + 8))
    replaced = replace_index(copy, SPEC)
    assert open_index(replaced).index.nlist == 64
    assert replaced.verify() == []


@pytest.mark.parametrize(
    ("count", "dim", "spec"),
    [
        (1, 384, EXACT),
        (100_000, 384, EXACT),
        (194_503, 384, "IVF4096,SQ8"),
        (1_000_000, 384, "IVF16384,SQ8"),
        (10_000_000, 384, "OPQ48,IVF65536_HNSW32,PQ48"),
        (100_000_000, 384, "OPQ48,IVF262144_HNSW32,PQ48"),
        (1_000_000_000, 768, "OPQ64_128,IVF1048576_HNSW32,PQ64"),
        (30_000_000_000, 768, "OPQ32_256,IVF4194304_HNSW32,PQ32"),
        (10_000_000, 20, None),
    ],
)
def test_auto_goes_by_size(count, dim, spec):
    choice = choose("auto", count, dim)
    spec = spec or choice.spec  # of an odd width it matters that FAISS takes it
    assert choice.spec == spec
    assert choice.why.startswith("auto: ")
    assert choice.settings == ({} if spec == EXACT else {"nprobe": 64, "rerank": 4})
    lists = lists_of(spec)
    assert lists is None or choice.sample >= 39 * lists
    if spec != EXACT:
        import faiss

        assert faiss.index_factory(dim, spec).d == dim


def test_too_few_keys_for_their_lists_get_fewer_lists():
    choice = choose("IVF4096,SQ8", 4000, DIM)
    assert choice.spec == "IVF64,SQ8"
    assert "4,000 keys are too few to train 4,096 lists" in choice.why
    assert choose("OPQ8,IVF4096_HNSW32,PQ8", 100, DIM).spec == EXACT
    assert choose("IVF64,SQ8,RFlat", 4000, DIM).settings == {"nprobe": 64, "rerank": 4}


def test_the_builder_makes_the_index(tmp_path):
    """A handful of chunks under "auto" is exact; an IVF for too few is said to be smaller, and works."""
    small = database_of(tmp_path / "small", index="auto")
    assert small.manifest["index"]["spec"] == EXACT
    large = database_of(tmp_path / "large", documents=120, index="IVF256,SQ8")
    assert large.manifest["index"]["spec"] == f"IVF{lists_of(large.manifest['index']['spec'])},SQ8"
    assert "too few" in large.manifest["index"]["why"]
    keys = np.concatenate([np.asarray(block, np.float32) for _, block in large.embeddings()])
    distances, _ = open_index(large, nprobe=256).search(keys, 1, rerank=8)
    assert float(distances.max()) < 1e-6
    assert large.verify() == []


def test_a_damaged_index_is_not_opened(copy):
    database = replace_index(copy, SPEC)
    path = copy / "index" / "index.faiss"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatabaseError, match="altered"):
        open_index(database)
    assert any("altered" in line for line in database.verify())
    path.write_bytes(content[:-1])
    with pytest.raises(DatabaseError, match=r"index\.faiss"):
        Database(copy)


def test_an_index_of_another_database_is_not_searched(copy, tmp_path, keys):
    smaller = replace_index(database_with(tmp_path / "smaller", keys[:3000]).folder, SPEC)
    shutil.copytree(smaller.folder / "index", copy / "index")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "index": smaller.manifest["index"]}))
    with pytest.raises(DatabaseError, match="3000 vectors"):
        open_index(Database(copy))


def test_bad_input_is_named(plain, copy, tmp_path):
    index = open_index(plain)
    good = np.zeros((2, DIM), np.float32)
    for queries, message in (
        (np.zeros((2, DIM + 1), np.float32), r"queries: got .*\[2, 33\]; expected floating \[q, 32\]"),
        (np.zeros(DIM, np.float32), "queries: got"),
        (np.zeros((2, DIM), np.int64), "queries: got torch.int64"),
        (np.full((2, DIM), np.nan, np.float32), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(queries, 1)
    with pytest.raises(ValueError, match="k: got 0"):
        index.search(good, 0)
    with pytest.raises(ValueError, match="nprobe: exact search has no such setting"):
        index.search(good, 1, nprobe=4)
    faiss_index = open_index(replace_index(copy, SPEC))
    with pytest.raises(ValueError, match="ef_search: FAISS search has no such setting"):
        faiss_index.search(good, 1, ef_search=4)
    with pytest.raises(ValueError, match="nprobe: got 0"):
        faiss_index.search(good, 1, nprobe=0)
    with pytest.raises(DatabaseError, match="FAISS refuses 'IVF64,Nothing'"):
        replace_index(copy, "IVF64,Nothing")
    assert Database(copy).manifest["index"]["spec"] == SPEC
    with pytest.raises(DatabaseError, match="'IVF64,PQ7'"):
        replace_index(copy, "IVF64,PQ7")
    without = database_of(tmp_path / "none", embedder=None)
    assert without.manifest["index"] is None
    with pytest.raises(DatabaseError, match="no embeddings"):
        open_index(without)
    with pytest.raises(DatabaseError, match="no embeddings"):
        build_index(without)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_faiss_on_it_is_refused(copy):
    with pytest.raises(DatabaseError, match="no GPU"):
        open_index(replace_index(copy, SPEC), device="cuda")


def test_without_faiss_exact_search_works_and_others_name_the_extra(copy, queries, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert open_index(replace_index(copy, "auto")).search(queries, 1)[1].shape == (len(queries), 1)
    with pytest.raises(DatabaseError, match=r"retro_kernels\[cpu\]"):
        replace_index(copy, SPEC)


def test_settings_are_measured_recommended_and_kept(copy, tmp_path):
    """The recommended setting reaches what was asked for, is the fastest of those that do, and becomes the default."""
    database = replace_index(copy, "IVF64,PQ4")
    found = evaluate_search(database, num_queries=300, recall=0.9)
    by_settings = {json.dumps(point.settings): point for point in found.points}
    assert by_settings['{"nprobe": 64, "rerank": 16}'].recall > by_settings['{"nprobe": 1, "rerank": 0}'].recall
    best = by_settings[json.dumps(found.recommended)]
    assert best.recall >= 0.9
    rates = [point.queries_per_second for point in found.points if point.recall >= 0.9]
    assert best.queries_per_second == max(rates)
    saved = save_settings(copy, **found.recommended)
    assert open_index(saved).settings == found.recommended
    assert saved.verify() == []
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_of_an_exact_database_every_query_is_found(plain):
    found = evaluate_search(plain, num_queries=50)
    assert found.points == []
    assert "exact" in found.reason


def test_recall_is_not_flattered_by_the_query_itself(copy):
    """One list of 64, and k = 1: had the query itself counted, every setting would reach 1."""
    database = replace_index(copy, "IVF64,PQ4")
    points = evaluate_search(database, k=1, num_queries=400).points
    assert points[0].settings == {"nprobe": 1, "rerank": 0}
    assert points[0].recall < 0.7


def test_the_commands(copy, tmp_path):
    runner = CliRunner()
    made = runner.invoke(app, ["index", str(copy), "--index", "IVF64,SQ8"])
    assert made.exit_code == 0, made.output
    assert "IVF64,SQ8 over 4,000 keys (asked for)" in made.output
    shown = runner.invoke(app, ["evaluate", str(copy), "--queries", "100", "--save"])
    assert shown.exit_code == 0, shown.output
    assert "recommended" in shown.output
    assert "asked with stored keys" in shown.stderr  # its embedder is none that can be loaded
    report = runner.invoke(app, ["evaluate", str(copy), "--queries", "100", "--json"])
    assert json.loads(report.stdout)["num_queries"] == 100
    np.save(tmp_path / "q.npy", np.zeros((3, DIM + 1), np.float32))
    wrong = runner.invoke(app, ["evaluate", str(copy), "--query-file", str(tmp_path / "q.npy")])
    assert wrong.exit_code == 1
    assert "expected floating [q, 32]" in wrong.output
    refused = runner.invoke(app, ["index", str(copy), "--index", "Nonsense"])
    assert refused.exit_code == 1
    assert "FAISS refuses 'Nonsense'" in refused.output
    assert "IVF64,SQ8" in runner.invoke(app, ["info", str(copy)]).output


def test_codes_of_few_keys_are_trained_in_silence(tmp_path, capfd):
    """FAISS says for every sub-quantiser that it wants more; the index's own facts say it once."""
    keys = np.random.default_rng(0).standard_normal((600, DIM)).astype(np.float32)
    for spec in ("IVF8,PQ16", "OPQ16,IVF8,PQ16", "PQ16"):
        database = database_with(tmp_path / spec.replace(",", "-"), keys)
        entry = build_index(database, spec)
        assert "600 keys are few to train its codes, FAISS asks for 9,984" in entry["why"]
    said = capfd.readouterr()
    assert "WARNING" not in said.err + said.out


def test_ties_come_by_the_smallest_chunk_whatever_k_is(tmp_path):
    """240 keys, each 100 times: the first k of any k are the first of a larger one, and FAISS's flat index has the same
    sets where all equal keys fit."""
    import faiss

    keys = np.random.default_rng(0).integers(-3, 4, (240, DIM)).astype(np.float32)
    database = database_with(tmp_path / "db", np.tile(keys, (100, 1)))
    index = open_index(database)
    _, most = index.search(keys[:20], 400)
    order = [list(range(row, 24_000, 240)) for row in range(20)]
    assert most[:, :100].tolist() == order
    for k in (1, 2, 8, 64, 200):
        assert torch.equal(index.search(keys[:20], k)[1], most[:, :k])
    flat = faiss.IndexFlatL2(DIM)
    flat.add(np.tile(keys, (100, 1)))
    found = flat.search(keys[:20], 100)[1]
    assert [sorted(row) for row in found.tolist()] == order


def test_an_evaluation_asks_with_what_a_retriever_embeds(tmp_path):
    """Keys that are not what the embedder makes of the chunks' tokens are told by it; stored keys would hide them."""
    database = database_of(tmp_path / "db", 40)
    retriever = Retriever(database, embedder=Letters())
    found = evaluate_search(database, num_queries=100, embed=retriever.embed_chunks)
    assert found.embedded_recall == 1.0
    other = evaluate_search(database, num_queries=100, embed=lambda tokens: retriever.embed_chunks(tokens).flip(-1))
    assert other.embedded_recall < 0.9
    assert evaluate_search(database, num_queries=100).embedded_recall is None
