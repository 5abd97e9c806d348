"""benchmarks/retrieval_gain from files of text to a document, with a tiny decoder."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from decoders import decoder
from retrieval_common import texts_of

from benchmarks.retrieval_gain import __main__ as command
from benchmarks.retrieval_gain import experiment, report
from benchmarks.retrieval_gain.texts import ABSENT, CHUNKS, LENGTH, M, NearestChunks, R


def test_the_page_says_what_was_measured():
    assert command.main(["--check"]) == 0


def test_the_nearest_chunks_are_those_of_the_largest_cosine():
    random = np.random.default_rng(0)
    tokens = random.integers(0, 40, (50, M))
    tokens[7, 20:] = ABSENT
    tokens[11] = tokens[12]
    documents = np.arange(50) // 2
    nearest = NearestChunks(tokens, documents)

    def counts(row):
        row = [int(x) for x in row if x != ABSENT]
        terms = [*row, *itertools.pairwise(row)]
        return {term: terms.count(term) for term in terms}

    have = [counts(row) for row in tokens]
    common = {term: sum(term in one for one in have) for one in have for term in one}

    def vector(of):
        found = {term: (1 + np.log(x)) * np.log(51 / (1 + common.get(term, 0))) for term, x in of.items()}
        norm = np.sqrt(sum(x * x for x in found.values()))
        return {term: x / norm for term, x in found.items()}

    keys = [vector(one) for one in have]
    for query in (3, 11, 30):
        asked = vector(counts(tokens[query]))
        cosine = np.array([sum(x * key.get(term, 0.0) for term, x in asked.items()) for key in keys])
        cosine[documents == documents[query]] = -1
        ids, found = nearest.search(tokens[query], int(documents[query]), 3)
        if query == 11:  # the same text twice counts once
            assert (ids == 12).sum() == 1
            continue
        np.testing.assert_allclose(found, np.sort(cosine)[::-1][:3], rtol=1e-4)
        np.testing.assert_allclose(cosine[ids], found, rtol=1e-4)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, text in enumerate(texts_of(40)):
        (folder / f"{i}.txt").write_text((text * 30)[: 1200 + i])

    def load(name, work):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
        made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(work / "tokenizer")
        return decoder(vocab_size=256, num_hidden_layers=2, max_position_embeddings=2048)

    monkeypatch.setattr(command, "load", load)
    monkeypatch.setattr(experiment, "STEPS", 6)
    for name, arm in experiment.ARMS.items():
        monkeypatch.setitem(experiment.ARMS, name, dataclasses.replace(arm, layers=arm.layers and 1))
    return folder


def test_a_run_that_is_stopped_goes_on_and_gives_the_same(corpus, tmp_path, monkeypatch):
    def run(work, *more):
        given = ["--work", str(tmp_path / work), "--out", str(tmp_path / work / "out"), "--texts", "6"]
        command.main([f"text={corpus}", *given, "--held-out", "3", *more])
        return json.loads((tmp_path / work / "out" / report.FILE).read_text())

    def without_times(document):
        rows = [{key: x for key, x in row.items() if key != "cpu_seconds"} for row in document["rows"]]
        return document["gates"], document["texts"], document["copying"], document["nearest"], rows

    whole = run("whole")
    appended, count = experiment.append, []

    def stops(path, line):
        appended(path, line)
        count.append(1)
        if len(count) == 7:
            with path.open("a") as stream:
                stream.write('{"corpus": "te')
            raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "append", stops)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    stopped = run("stopped", "--summary")
    assert len(stopped["rows"]) == 7
    assert stopped["cost"] is None
    assert [rows for rows, _ in report.groups(stopped, "text")] == [[0]]
    monkeypatch.setattr(experiment, "append", appended)
    assert without_times(run("stopped")) == without_times(whole)
    ((rows, figures),) = report.groups(whole, "text")
    assert rows == [0, 1, 2]
    assert {key[0] for key in figures} == {"decoder", "in-context", "copying", "nearest", *experiment.ARMS}
    assert all(x.shape == (3, CHUNKS) for x in figures.values())
    assert (figures["gates", "own", 2] != figures["gates", "others", 2]).all()
    assert (tmp_path / "whole" / "out" / report.PICTURE).stat().st_size > 0
    shown = report.block([("here", whole)])
    assert f"{figures['decoder', 'none', 0].size * M:,} tokens" in shown
    assert "in-context, k = 4" in shown
    assert "neighbours from a store, k = 2" in shown
    assert "| gates, over gates in six layers |" in shown
    assert len(whole["gates"][experiment.GATES]) == 2
    assert len(whole["gates"][experiment.FEW]) == 1


def test_in_context_is_the_neighbours_and_then_the_text(monkeypatch):
    monkeypatch.setattr(experiment, "FAST_BF16", False)  # which a processor with bf16 would compute in
    torch.manual_seed(0)
    model = decoder(vocab_size=256, num_hidden_layers=2, max_position_embeddings=2048)
    text, neighbours = torch.randint(256, (LENGTH,)), torch.randint(256, (CHUNKS, 2, R))
    neighbours[1, 0, 90:] = ABSENT
    expected = []
    for u in range(CHUNKS):
        second, first = (x[x != ABSENT] for x in neighbours[u].flip(0))
        ids = torch.cat([second, first, text[: (u + 2) * M - 1]])
        logits = model(ids[None]).logits[0, -M:]
        expected.append(torch.nn.functional.cross_entropy(logits, text[(u + 1) * M :][:M], reduction="none"))
    reader = experiment.Reader(model, "own")
    with torch.no_grad():
        found = reader.in_context(text, *reader.encode(experiment.together(neighbours)))
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)
