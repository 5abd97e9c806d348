"""The tokenizer of a model: its bytes, or the `tokenizer.json` beside its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from .config import RetroConfig

BYTES, FILE = "bytes", "tokenizer.json"


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Text to tokens, without special ones."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens to text."""


class ByteTokenizer:
    """A token is a byte of UTF-8, 0 to 255; larger tokens are no text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


class FileTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` package, which is imported here."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        self.inner = tokenizers.Tokenizer.from_file(str(path))

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self.inner.decode(list(tokens))


def sha256_of(folder: Path) -> str:
    """What a database's manifest has of the tokenizer of the model in `folder`, by which it is recognised."""
    from ..retrieval.tokenizers import Bytes, hash_of_file

    path = folder / FILE
    return hash_of_file(path) if path.is_file() else Bytes().identity["sha256"]


def load_tokenizer(folder: Path, config: RetroConfig) -> Tokenizer:
    """The tokenizer of the model in `folder`: that file if it is there, bytes if the config says so.

    Raises FileNotFoundError where it is neither, ValueError for one with more tokens than the model.
    """
    path = folder / FILE
    if path.is_file():
        found = FileTokenizer(path)
        if found.inner.get_vocab_size() > config.vocab_size:
            raise ValueError(
                f"{path}: got {found.inner.get_vocab_size()} tokens, expected at most vocab_size = {config.vocab_size}"
            )
        return found
    if config.tokenizer != BYTES:
        raise FileNotFoundError(
            f"{path} is not there, and the model's tokenizer is {config.tokenizer!r}, not {BYTES!r}"
        )
    if config.vocab_size < 256:
        raise ValueError(f"vocab_size: got {config.vocab_size}, expected at least 256 with the tokenizer {BYTES!r}")
    return ByteTokenizer()
