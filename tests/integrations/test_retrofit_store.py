"""Keys and values of a database's chunks, made once: `retro-kernels db encode` and `model.retro.use`."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch
from typer.testing import CliRunner

import retro_kernels as rk
from retro_kernels.errors import DatabaseError

transformers = pytest.importorskip("transformers")
from decoders import decoder  # noqa: E402
from retrieval_common import Letters, texts_of, write_texts  # noqa: E402

from retro_kernels.cli import app  # noqa: E402
from retro_kernels.integrations.retrofit import store as storing  # noqa: E402
from retro_kernels.integrations.retrofit.store import EncodedChunks, encode_database, size_of  # noqa: E402
from retro_kernels.retrieval import Retriever, build_database  # noqa: E402

M, R = 8, 16
SETTINGS = {"chunk_size": M, "num_neighbours": 2, "retrieved_length": R, "gate": 0.0}


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    paths = [str(write_texts(folder / f"{i:02}.txt", [text * 4])) for i, text in enumerate(texts_of(9))]
    return build_database(paths, folder / "db", tokenizer="bytes", embedder=Letters(), chunk_size=M, format="text")


def model_of(**changes):
    model = decoder(vocab_size=256, seed=changes.pop("seed", 0))
    rk.retrofit(model, **{**SETTINGS, **changes})
    return model


def test_a_stopped_encoding_goes_on_to_the_same_bytes_and_holds_what_the_decoder_makes(database, tmp_path):
    model = model_of()
    size = size_of(model, database)
    whole = encode_database(model, database, tmp_path / "whole", batch_size=5)
    assert size == sum((tmp_path / "whole" / name).stat().st_size for name in (storing.CODES, storing.SCALES))

    def stops(done, total):
        if done >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_database(model, database, tmp_path / "parts", batch_size=3, progress=stops)
    with pytest.raises(DatabaseError, match=r"has [\d,]+ of [\d,]+ chunks: run the same"):
        EncodedChunks(tmp_path / "parts")
    encode_database(model, database, tmp_path / "parts", batch_size=5)
    ids = torch.tensor([len(database) - 1, 0, 4])
    tokens, mask = database.chunks(ids, R)
    found = whole(ids)
    again = EncodedChunks(tmp_path / "parts")(ids)
    for layer, pair in model.retro.encode(tokens.long(), mask).items():
        for x, y, z in zip(found[layer], pair, again[layer]):
            largest = y.abs().amax((-1, -2), keepdim=True)
            assert ((x - y).abs() <= largest / 127 * 0.51).all()  # half a step of int8
            torch.testing.assert_close(x, z, rtol=1e-3, atol=1e-3)


def test_generation_takes_neighbours_from_the_store(database, tmp_path, monkeypatch):
    model = model_of()
    store = encode_database(model, database, tmp_path / "store")
    retriever = Retriever(database, embedder=Letters())
    ids = database.chunks(torch.arange(3), 2 * M)[0].long()
    given = {"retriever": retriever, "max_new_tokens": 2 * M + 2, "pad_token_id": 0, "do_sample": False}
    with torch.no_grad():
        expected = model(ids, retriever=retriever).logits
        read = model.generate(ids, **given)
        model.retro.use(store)
        reads = []
        encode = model.retro.encode
        monkeypatch.setattr(model.retro, "encode", lambda *args: reads.append(args[0].shape) or encode(*args))
        assert (model(ids, retriever=retriever).logits - expected).abs().max() < 0.1
        out = model.generate(ids, **given)
        assert reads == []
        assert out.shape == read.shape
        assert torch.equal(out, model.generate(ids, use_cache=False, **given))
        # A retriever that does not say which chunks it found, and one that finds some others too.
        found = retriever(ids[:, :M])
        lookups = itertools.cycle([found._replace(ids=None)])
        model(ids[:, :M], retriever=lambda chunks: next(lookups))
        assert len(reads) == 1
        partly = retriever(ids[:, :M])
        partly.ids[1:] = -1

        class Partly:
            def __init__(self):
                self.database = database

            def __call__(self, chunks):
                return partly

        mixed = model(ids[:, :M], retriever=Partly()).logits
        assert len(reads) == 2
        model.retro.use(None)
        torch.testing.assert_close(mixed[2], model(ids[:, :M], retriever=Partly()).logits[2], rtol=1e-4, atol=1e-4)


def test_the_command_says_the_size_first_and_encodes_the_open_layers(database, tmp_path):
    decoder(vocab_size=256).save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    rk.retrofit(model, **SETTINGS)
    with torch.no_grad():
        model.retro.parts()[1].gate.weight.fill_(-torch.inf)
    model.retro.save_pretrained(tmp_path / "retro")
    given = ["--model", tmp_path / "model", "--retro", tmp_path / "retro", "--out", tmp_path / "out", "--device", "cpu"]
    result = CliRunner().invoke(app, [str(x) for x in ("db", "encode", database.folder, *given)])
    assert result.exit_code == 0, result.output
    size = size_of(model, database, [0, 2])
    assert f"{len(database):,} chunks in 2 layers: {size:,} bytes" in result.output
    assert set(EncodedChunks(tmp_path / "out").shapes) == {0, 2}
    result = CliRunner().invoke(app, [str(x) for x in ("db", "encode", database.folder, *given, "--layers", 9)])
    assert result.exit_code == 1
    assert "layers: got 9" in result.output


def test_what_does_not_fit_is_named(database, tmp_path, monkeypatch):
    model = model_of()
    encode_database(model, database, tmp_path / "two", layers=[0, 2])
    store = EncodedChunks(tmp_path / "two")
    with pytest.raises(ValueError, match=r"no layers \[1\], whose gates are open"):
        model.retro.use(store)
    with torch.no_grad():
        model.retro.parts()[1].gate.weight.fill_(-torch.inf)
    model.retro.use(store)
    model.retro.set_gates(0.0)
    with pytest.raises(ValueError, match=r"no layers \[1\], whose gates are open"):
        model(database.chunks(torch.arange(1), 2 * M)[0].long(), retriever=Retriever(database, embedder=Letters()))
    with torch.no_grad():
        model.retro.parts()[1].gate.weight.fill_(-torch.inf)
    with pytest.raises(ValueError, match="another base"):
        model_of(seed=1).retro.use(store)
    with pytest.raises(ValueError, match="neighbours of 16 tokens, expected retrieved_length = 12"):
        model_of(retrieved_length=12, layers=[0, 2]).retro.use(store)
    with pytest.raises(ValueError, match="layers: got 7"):
        encode_database(model, database, tmp_path / "x", layers=[7])
    with pytest.raises(DatabaseError, match="of another model, database or other layers"):
        encode_database(model, database, tmp_path / "two")
    for encoder in ("fresh", "own+cross"):
        with pytest.raises(ValueError, match=re.escape(f"encoder: got '{encoder}', expected \"own\"")):
            encode_database(model_of(encoder=encoder), database, tmp_path / "x")
    with pytest.raises(ValueError, match="store: got one for encoder='own\\+cross'"):
        model_of(encoder="own+cross", layers=[0, 2]).retro.use(store)
    with pytest.raises(ValueError, match="expected chunk_size = 4"):
        encode_database(model_of(chunk_size=4), database, tmp_path / "x")
    path = write_texts(tmp_path / "other.txt", texts_of(4, seed=5))
    build_database([str(path)], tmp_path / "other", tokenizer="bytes", embedder=Letters(), chunk_size=M, format="text")
    other = Retriever(tmp_path / "other", embedder=Letters())
    ids = database.chunks(torch.arange(1), 2 * M)[0].long()
    with pytest.raises(ValueError, match=r"its database is not the one that .*two was made of"):
        model(ids, retriever=other)
    codes = tmp_path / "two" / storing.CODES
    codes.write_bytes(codes.read_bytes()[:-1])
    with pytest.raises(DatabaseError, match=r"codes\.bin: .* bytes, expected"):
        EncodedChunks(tmp_path / "two")
    (tmp_path / "two" / storing.FACTS).write_text(json.dumps({"format": 9}))
    with pytest.raises(DatabaseError, match="not of format 1"):
        EncodedChunks(tmp_path / "two")
    monkeypatch.setattr(storing, "RESERVE", 1e12)
    with pytest.raises(ValueError, match=r"bytes are needed and .* are free; choose fewer layers"):
        encode_database(model, database, tmp_path / "full")
