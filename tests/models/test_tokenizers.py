"""A trained tokenizer gives every text back, one that does not is named, and text is never a special token."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from retro_kernels.cli import app
from retro_kernels.errors import DatabaseError
from retro_kernels.tokenizers import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer, lost_by, train_tokenizer

tokenizers = pytest.importorskip("tokenizers")
TEXTS = ["Of capitals\n\nand  blanks,\tof →, 中文 and é.\n", "and of <|endoftext|> [SEP]\r\n", "and and and"]


def words(path, *special):
    """A tokenizer of lower-case words, with special tokens."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "text": 2}, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(list(special))
    made.save(str(path))
    return HuggingFaceTokenizer(path, "words")


def test_a_trained_one_loses_nothing_and_is_the_same_again(tmp_path):
    made = train_tokenizer(TEXTS, tmp_path / "one", vocab_size=300)
    for text in [*TEXTS, "Ωmega\x00\x1b[0m 🙂 ", "<|endoftext|>"]:
        assert made.decode(made.encode(text)) == text
        assert made.eos_token_id not in made.encode(text)
    assert (made.vocabulary_size, made.eos_token_id, lost_by(made)) == (300, 0, [])
    train_tokenizer(TEXTS, tmp_path / "two", vocab_size=300)
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (tmp_path / "two" / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="vocab_size: got 256, expected an integer of at least 257"):
        train_tokenizer(TEXTS, tmp_path, vocab_size=256)


def test_what_one_loses_is_named(tmp_path):
    assert lost_by(ByteTokenizer()) == []
    assert lost_by(words(tmp_path / "words.json"))[:2] == ["capitals", "line ends"]


def test_text_is_no_special_token_and_the_end_of_a_document_is_found(tmp_path):
    plain = words(tmp_path / "plain.json")
    assert (plain.vocabulary_size, plain.eos_token_id) == (3, 3)
    ending = words(tmp_path / "ending.json", "[CLS]", "[SEP]")
    assert (ending.vocabulary_size, ending.eos_token_id) == (5, 4)
    assert not {3, 4} & set(ending.encode("a [SEP] text [CLS]"))
    assert not {3, 4} & set(ending.encode_batch(["a [SEP] text [CLS]"])[0].tokens.tolist())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "[CLS]"}}))
    assert words(tmp_path / "ending.json", "[CLS]", "[SEP]").eos_token_id == 3
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DatabaseError, match=r"tokenizer_config\.json cannot be read"):
        load_tokenizer(str(tmp_path / "ending.json"))


def test_the_commands(tmp_path):
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(app, ["tokenizer", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result.output

    train = ("train", tmp_path / "texts", "--out", tmp_path / "own", "--vocab-size", 300)
    assert "300 tokens; 0 ends a document" in invoke(*train)
    assert "never overwritten" in invoke(*train, code=1)
    assert "loses: nothing" in invoke("check", tmp_path / "own")
    words(tmp_path / "words.json")
    assert "loses: capitals, line ends" in invoke("check", tmp_path / "words.json", code=1)
    (tmp_path / "empty").mkdir()
    assert "no text" in invoke("train", tmp_path / "empty", "--out", tmp_path / "other", code=1)
    build = ["db", "build", str(tmp_path / "texts"), "--out", str(tmp_path / "db"), "--embedder", "none"]
    result = CliRunner().invoke(app, [*build, "--tokenizer", str(tmp_path / "words.json")])
    assert result.exit_code == 0, result.output
    assert "loses capitals, line ends" in result.output
