"""The real-text part: chunks, neighbours and continuations are what they are said to be, and a missing package gets a
stand-in with a name."""

import pytest
import torch

from benchmarks import real_text, text_database


@pytest.fixture
def without_packages(monkeypatch, tmp_path):
    """As where no tokenizer, embedder or FAISS is installed, with a cache of its own."""
    find = text_database.importlib.util.find_spec
    hidden = {"faiss", "tokenizers", "transformers", text_database.EMBEDDER_PACKAGE}
    monkeypatch.setattr(text_database.importlib.util, "find_spec", lambda name: None if name in hidden else find(name))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_text_ships_whole():
    texts = text_database.documents()
    assert len(texts) == 8
    assert sum(map(len, texts)) > 1_000_000
    assert texts[0].startswith("THE TRAGEDY OF KING RICHARD THE SECOND")
    assert "gutenberg" not in " ".join(texts).lower()


def test_stand_ins_are_named_and_neighbours_are_of_other_documents(without_packages):
    corpus = text_database.build(vocabulary=300, chunk_size=64, length=256, k=2)
    assert "stand-in" in corpus.description["tokenizer"]
    assert "stand-in" in corpus.description["embedder"]
    assert "stand-in" in corpus.description["index"]
    assert corpus.neighbours.shape == (4, 2)
    own = corpus.document[corpus.first_chunk]
    assert bool((corpus.document[corpus.neighbours] != own).all())
    sequence = corpus.sequence(256)
    assert sequence.shape == (1, 257)
    assert torch.equal(sequence[0, :64], corpus.chunks[corpus.first_chunk])
    assert int(corpus.chunks.max()) < 300


def test_neighbours_are_followed_by_their_own_continuation():
    chunks, owner = text_database.cut([torch.arange(1, 11), torch.arange(11, 16)], 4)
    assert chunks.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0], [11, 12, 13, 14], [15, 0, 0, 0]]
    assert owner.tolist() == [0, 0, 0, 1, 1]
    corpus = text_database.Corpus(chunks, owner, torch.tensor([[0, 2], [4, 3]]), 3, {})
    assert corpus.retrieved()[0].tolist() == [
        [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 0, 0, 0, 0, 0, 0]],
        [[15, 0, 0, 0, 0, 0, 0, 0], [11, 12, 13, 14, 15, 0, 0, 0]],
    ]


def test_nearest_drops_the_same_document():
    database = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 0.0], [9.0, 0.0]])
    owner = torch.tensor([0, 0, 1, 2])
    found, _ = text_database.nearest(database, torch.arange(4), owner, torch.zeros(1, 2), torch.tensor([0]), 2)
    assert found.tolist() == [[2, 3]]
    with pytest.raises(RuntimeError, match="of another document"):
        text_database.nearest(database, torch.arange(4), owner, torch.zeros(1, 2), torch.tensor([0]), 3)


def test_cached_embeddings_are_verified(tmp_path):
    path, embeddings = tmp_path / "cache" / "e.pt", torch.randn(3, 4)
    text_database._save(path, embeddings)
    assert torch.equal(text_database._load(path), embeddings)
    path.write_bytes(path.read_bytes()[:-1])
    assert text_database._load(path) is None
    assert text_database._load(tmp_path / "none.pt") is None


def comparison(change, dtype):
    truth = {"logits": torch.tensor([1.0, 2.0]), "loss": torch.tensor(3.0)}
    noisy = {"logits": truth["logits"] + 0.01, "loss": truth["loss"]}
    original = truth if dtype == "fp32" else noisy
    swapped = {"logits": original["logits"] + change, "loss": original["loss"]}
    return real_text.compare(original, swapped, truth, dtype)


def test_models_that_differ_get_no_time():
    assert comparison(1e-6, "fp32").passed
    assert not comparison(1e-3, "fp32").passed
    assert comparison(0.005, "bf16").passed
    assert not comparison(0.05, "bf16").passed
    assert not comparison(float("nan"), "fp32").passed
    worst = comparison(float("nan"), "fp32")
    assert "logits" in worst.worst


def test_a_missing_retro_pytorch_is_a_reason_not_a_traceback(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "retro_pytorch.retro_pytorch", None)
    with pytest.raises(real_text.Unavailable, match="retro-pytorch cannot be imported"):
        real_text.load_model(torch.device("cpu"))
