"""`retro-kernels generate` prints what `generate` gives, as text, and names what does not fit."""

from __future__ import annotations

import json

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


def test_many_prompts_from_a_file_or_standard_input_as_json_with_sources(folder, tmp_path):
    texts = ["the chunks", "of a text", "and more of it"]
    (tmp_path / "prompts.txt").write_text("\n".join(texts) + "\n\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    options = ("--max-new-tokens", 9, "--retriever", "test_generate_command:LOOKUP", "--json", "--batch", 2)
    result = invoke(folder, "--prompts", tmp_path / "prompts.txt", *options)
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in result.stdout.splitlines()]
    made = Retro.from_pretrained(folder).generate(
        [list(text.encode()) for text in texts], max_new_tokens=9, retriever=LOOKUP
    )
    assert [one["prompt"] for one in found] == texts
    for i, one in enumerate(found):
        assert one["text"] == ByteTokenizer().decode(made.new_tokens(i))
        assert [entry["neighbours"] for entry in one["sources"]] == list(made.sources[i].values())
        assert (one["tokens"], one["ended"]) == (9, False)
    assert invoke(folder, "--prompts", tmp_path / "prompts.jsonl", *options).stdout == result.stdout
    piped = CliRunner().invoke(
        app, ["generate", str(folder), "--prompts", "-", *map(str, options)], input="\n".join(texts)
    )
    assert piped.stdout == result.stdout
    (tmp_path / "prompts.jsonl").write_text("{}\n")
    result = invoke(folder, "--prompts", tmp_path / "prompts.jsonl")
    assert (result.exit_code, "line 1: expected an object with 'prompt'" in result.output) == (2, True)
    assert "got both or neither" in invoke(folder).output


def test_what_is_generated_does_not_command_the_terminal(capsys):
    printer = generate.Printer(ByteTokenizer())
    printer.put(torch.tensor(list(b"a\x1b]0;title\x07b")))
    printer.end()
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07b\n"


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
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is not there, .* is 'words', .* copy there the"):
        load_model_tokenizer(folder, tiny(tokenizer="words").config)
    with pytest.raises(ValueError, match="vocab_size: got 64"):
        load_model_tokenizer(folder, tiny(tokenizer="bytes").config)
