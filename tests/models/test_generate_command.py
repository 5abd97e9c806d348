"""`retro-kernels generate` prints what `generate` gives, as text, and names what does not fit."""

from __future__ import annotations

import pytest
import torch
from models_common import Lookup, tiny
from typer.testing import CliRunner

from retro_kernels.cli import app, generate
from retro_kernels.models import Retro
from retro_kernels.tokenizers import ByteTokenizer, load_model_tokenizer

LOOKUP = Lookup(vocab_size=256)
PROMPT = "the chunks of a text"


@pytest.fixture
def folder(tmp_path):
    tiny(vocab_size=256, tokenizer="bytes").save_pretrained(tmp_path)
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments), "--device", "cpu"])


def test_it_prints_the_generated_text_and_its_sources(folder):
    model = Retro.from_pretrained(folder)
    result = invoke(folder, PROMPT, "--max-new-tokens", 9)
    assert result.exit_code == 0, result.output
    alone = model.generate([list(PROMPT.encode())], max_new_tokens=9)
    assert result.stdout == ByteTokenizer().decode(alone.sequences[0].tolist()) + "\n"

    options = ("--retriever", "test_generate_command:LOOKUP", "--show-neighbours", "--temperature", 2, "--seed", 3)
    result = invoke(folder, PROMPT, "--max-new-tokens", 9, *options)
    assert result.exit_code == 0, result.output
    with_it = model.generate(
        [list(PROMPT.encode())], max_new_tokens=9, retriever=LOOKUP, do_sample=True, temperature=2.0, seed=3
    )
    text = ByteTokenizer().decode(with_it.sequences[0].tolist())
    shown = "".join(f"chunk {u}: {source}\n" for u, source in with_it.sources[0].items())
    assert len(with_it.sources[0]) == 7
    assert result.stdout == text + "\n" + shown


@pytest.mark.parametrize("options", [(), ("--top-k", 5), ("--top-p", 0.9)], ids=str)
def test_temperature_0_takes_the_best_tokens(folder, options):
    """0 is a value and not the absence of one: it drew at temperature 1 once."""
    best = invoke(folder, PROMPT, "--max-new-tokens", 30)
    given = invoke(folder, PROMPT, "--max-new-tokens", 30, "--temperature", 0, "--seed", 3, *options)
    assert given.exit_code == 0, given.output
    assert given.stdout == best.stdout
    drawn = invoke(folder, PROMPT, "--max-new-tokens", 30, "--temperature", 1, "--seed", 3, *options)
    assert drawn.stdout != best.stdout


def test_a_letter_of_several_bytes_is_printed_whole(capsys):
    printer = generate.Printer(ByteTokenizer())
    seen = []
    for byte in "a→b".encode():
        printer.put(torch.tensor([byte]))
        seen.append(capsys.readouterr().out)
    assert seen == ["a", "", "", "→", "b"]


def test_a_tokenizer_beside_the_weights_is_used(folder):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "a": 1, "text": 2, "chunks": 3}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(folder / "tokenizer.json"))
    model = tiny(vocab_size=256, tokenizer="words")
    tokenizer = load_model_tokenizer(folder, model.config)
    assert tokenizer.encode("a text of chunks") == [1, 2, 0, 3]
    assert tokenizer.decode([3, 2]) == "chunks text"
    with pytest.raises(ValueError, match="got 4 tokens, expected at most vocab_size = 3"):
        load_model_tokenizer(folder, tiny(vocab_size=3).config)


def test_wrong_arguments_are_named(folder, tmp_path):
    for arguments, message in (
        ((tmp_path / "no", PROMPT), "config.json is not there"),
        ((folder, ""), "no prompt, or an empty one"),
        ((folder, PROMPT, "--retriever", "nowhere:at_all"), "expected package.module:name"),
        ((folder, PROMPT, "--retriever", "math:pi"), "expected a function"),
        ((folder, PROMPT, "--stale"), "without --db or --retriever"),
        ((folder, PROMPT, "--max-new-tokens", 0), "max_new_tokens: got 0"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert message in result.output
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is not there, and the model's tokenizer is 'words'"):
        load_model_tokenizer(folder, tiny(tokenizer="words").config)
    with pytest.raises(ValueError, match="vocab_size: got 64"):
        load_model_tokenizer(folder, tiny(tokenizer="bytes").config)
