"""`retro-kernels retrofit` and what it stands on, with a tiny decoder and neighbours of a tiny database."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

import retro_kernels as rk

transformers = pytest.importorskip("transformers")
from decoders import decoder  # noqa: E402
from retrieval_common import Letters, texts_of, write_texts  # noqa: E402

from retro_kernels.cli import app  # noqa: E402
from retro_kernels.integrations.retrofit import training  # noqa: E402
from retro_kernels.integrations.retrofit.training import GateTraining, Texts, losses  # noqa: E402
from retro_kernels.retrieval import Retriever, build_database, precompute_neighbours  # noqa: E402

M = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    paths = [str(write_texts(folder / f"{i:02}.txt", [text * 8])) for i, text in enumerate(texts_of(24))]
    build_database(paths, folder / "db", tokenizer="bytes", embedder=Letters(), chunk_size=M, format="text")
    with Retriever(folder / "db", embedder=Letters(), num_neighbours=2) as retriever:
        precompute_neighbours(retriever, paths, folder / "neighbours", format="text")
    return folder / "neighbours"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    decoder(vocab_size=256).save_pretrained(folder)
    return folder


def command(model, data, out, *more):
    given = ["retrofit", model, data, "--out", out, "--steps", 12, "--length", 32, "--texts", 4, "--device", "cpu"]
    return CliRunner().invoke(app, [str(x) for x in (*given, *more)])


def test_a_stopped_run_goes_on_to_the_same_weights_and_its_folder_fits_the_base(model, data, tmp_path, monkeypatch):
    whole = command(model, data, tmp_path / "whole", "--json", "--adapt")
    assert whole.exit_code == 0, whole.output
    assert "not known whether its tokens are the data's" in whole.output
    calls = itertools.count()

    def stops(*args, **given):
        if next(calls) == 11:
            raise KeyboardInterrupt
        return losses(*args, **given)

    monkeypatch.setattr(training, "losses", stops)
    assert command(model, data, tmp_path / "parts", "--adapt").exit_code == 130
    monkeypatch.setattr(training, "losses", losses)
    assert "other settings" in command(model, data, tmp_path / "parts", "--adapt", "--batch", 2).output
    again = command(model, data, tmp_path / "parts", "--adapt")
    assert again.exit_code == 0, again.output
    assert "going on after 10 of 12 updates" in again.output
    found = []
    for name in ("whole", "parts"):
        base = transformers.AutoModelForCausalLM.from_pretrained(model)
        rk.retrofit(base, tmp_path / name)
        found.append(base.retro.added())
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())
    assert all((x != -3.0).any() for name, x in found[0].items() if ".gate." in name)
    results = json.loads(whole.stdout)
    assert results == json.loads((tmp_path / "whole" / training.EVALUATION).read_text())
    assert results == json.loads((tmp_path / "parts" / training.EVALUATION).read_text())
    texts = Texts(data, 32, 2 * M, 2)
    tokens = torch.cat([texts[[number]][0] for number in range(len(texts) - 4, len(texts))])
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_pretrained(model)(tokens[:, :-1]).logits[:, M - 1 :]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, M:].flatten()).item()
    assert results[0] == {
        "neighbours": "none",
        "max_overlap": 1.0,
        "tokens": 4 * 24,
        "nats_per_token": pytest.approx(nats, rel=1e-5),
        "bits_per_byte": pytest.approx(nats / 0.6931472, rel=1e-5),
    }
    assert {x["neighbours"] for x in results} == {"none", "others", "own"}


def test_a_run_goes_on_with_the_layers_that_gain_most(model, data, tmp_path):
    assert command(model, data, tmp_path / "all").exit_code == 0
    more = ("--start", tmp_path / "all", "--keep-layers", 2)
    result = command(model, data, tmp_path / "two", *more)
    assert result.exit_code == 0, result.output
    one, two = (transformers.AutoModelForCausalLM.from_pretrained(model) for _ in range(2))
    rk.retrofit(one, tmp_path / "all")
    kept = rk.retrofit(two, tmp_path / "two").layers
    texts, sums = Texts(data, 32, 2 * M, 2), dict.fromkeys(range(3), 0.0)
    for number in range(min(len(texts) - 4, training.JUDGED)):
        for layer, gains in one.retro.gains(*texts[[number]]).items():
            sums[layer] += gains.sum().item()
    assert kept == sorted(sorted(sums, key=sums.get)[1:])
    for layer, gate in two.retro.gates().items():
        assert 0 < (gate - one.retro.gates()[layer]).abs().max() < 2  # it went on from there
    # Stopped and begun again, it is the same run; and nothing else is.
    assert "going on after 12 of 12" in command(model, data, tmp_path / "two", *more).output
    assert "other" in command(model, data, tmp_path / "two", "--start", tmp_path / "all").output
    assert "without start" in command(model, data, tmp_path / "x", "--keep-layers", 2).output
    assert "expected 1 to 3" in command(model, data, tmp_path / "x", *more[:3], 4).output


def test_texts_lie_in_one_document_with_the_neighbours_of_their_chunks(data):
    texts = Texts(data, 32, 2 * M, 1)
    stream, ids = texts.data.tokens, texts.data.ids
    for number in (0, len(texts) - 1):
        tokens, neighbours, mask = texts[[number]]
        place = int(texts.places[number])
        assert tokens[0].tolist() == stream[place : place + 32].tolist()
        inside = (texts.data.document_starts <= place) & (place + 32 <= texts.data.document_ends)
        assert inside.sum() == 1
        assert neighbours.shape == mask.shape == (1, 3, 1, 2 * M)
        expected, there = texts.data.database.chunks(ids[place // M : place // M + 3, :1], 2 * M)
        assert torch.equal(neighbours[0].masked_fill(~mask[0], 0), expected.long().masked_fill(~there, 0))


def test_what_cannot_be_is_said_in_a_line(model, data, tmp_path, monkeypatch):
    for arguments, message in (
        (("--length", 30), "expected a multiple of the data's chunk_size = 8"),
        (("--length", 8000), "no document in"),
        (("--num-neighbours", 3), "has 2 for each chunk"),
        (("--texts", 1000), "expected fewer"),
        (("--texts", 1), "expected at least two"),
        (("--join", "sum"), "join: got 'sum'"),
        (("--precision", "fp8"), "precision: got 'fp8'"),
    ):
        result = command(model, data, tmp_path / "out", *arguments)
        assert result.exit_code == 1
        assert message in result.output.replace("\n", " "), result.output
        assert not (tmp_path / "out" / training.STATE).exists()
    assert "error:" in command(tmp_path / "nowhere", data, tmp_path / "out").output
    small = tmp_path / "small"
    decoder(vocab_size=61).save_pretrained(small)
    assert "expected 0 to 60, the model's vocabulary" in command(small, data, tmp_path / "out").output
    with training.alone(tmp_path / "out"):
        assert "another process is training there" in command(model, data, tmp_path / "out").output
    monkeypatch.setattr(training, "losses", lambda *args, **given: torch.tensor([torch.nan], requires_grad=True))
    assert "update 1: the loss is nan" in command(model, data, tmp_path / "out").output


def test_retrieval_that_changes_nothing_is_said_loudly(model, data):
    decoder = transformers.AutoModelForCausalLM.from_pretrained(model)
    rk.retrofit(decoder, chunk_size=M, retrieved_length=2 * M)
    texts, said = Texts(data, 32, 2 * M, 2), []
    training.evaluate(decoder, texts, [0, 1], say=said.append)
    assert not any("WARNING" in text for text in said)
    decoder.retro.close_gates()
    training.evaluate(decoder, texts, [0, 1], say=said.append)
    assert said[-1] == "WARNING: retrieval changes nothing here, not one bit; all gates are closed"
    decoder.retro.set_gates(0.0)
    decoder.retro.visible = torch.zeros_like
    training.evaluate(decoder, texts, [0, 1], say=said.append)
    assert "not one bit; although gates are open" in said[-1]


def test_the_settings_of_a_training():
    assert GateTraining(warmup_steps=0).fraction(0) == 1.0
    fractions = [GateTraining(steps=20).fraction(step) for step in range(20)]
    assert fractions[0] == 0.2
    assert max(fractions) == fractions[4] == pytest.approx(0.8)
    assert min(fractions[4:]) == pytest.approx(1 / 15)
    with pytest.raises(ValueError, match="steps: got 0"):
        GateTraining(steps=0)
