"""Documents to chunks of tokens, each with its place; a document of any length in bounded memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from ...tokenizers import ChunkTokenizer, Encoded

PIECE = 1 << 16
"""Characters that are tokenised as one: a longer text is cut, after a line's end if there is one."""
BATCH = 1 << 20
"""Characters that a tokenizer is given at a time, in pieces of one or many documents."""


@dataclasses.dataclass
class Text:
    """A document as it comes from a reader. `number` is the caller's."""

    number: int
    blocks: Iterable[str]


@dataclasses.dataclass
class Part:
    """Consecutive chunks of a document. All are whole but, in the `last` part, the last one. A document without a
    token is one empty last part."""

    number: int
    tokens: np.ndarray
    """Integers [n]."""
    offsets: list[int]
    """The character of the document at which each chunk begins."""
    characters: int
    """Of the document, from where the part begins to where the next one does."""
    last: bool


def pieces(blocks: Iterable[str]) -> Iterator[str]:
    """The text of `blocks` in pieces of at most PIECE characters, the same however it was cut into blocks."""
    buffer = ""
    for block in blocks:
        buffer = buffer + block if buffer else block
        start = 0
        while len(buffer) - start > PIECE:
            stop = _border(buffer, start)
            yield buffer[start:stop]
            start = stop
        buffer = buffer[start:]
    if buffer:
        yield buffer


def _border(text: str, start: int) -> int:
    middle, stop = start + PIECE // 2, start + PIECE
    line = text.rfind("\n", middle, stop)
    if line >= 0:
        return line + 1
    # Many tokenizers keep a blank with the word after it.
    blank = text.rfind(" ", middle, stop)
    return blank if blank >= 0 else stop


class _Open:
    """A document of which more is to come: the tokens that fill no chunk yet."""

    def __init__(self, number: int, chunk_size: int) -> None:
        self.number, self.chunk_size = number, chunk_size
        self.tokens = np.empty(0, np.int64)
        self.first_token = 0
        """The character at which `tokens` begins."""
        self.given = self.length = 0
        """Characters of the parts, and of all pieces so far."""

    def add(self, piece: str, encoded: Encoded, last: bool) -> Part:
        base, waiting_from = self.length, self.first_token
        self.length += len(piece)
        waiting = len(self.tokens)
        tokens = np.concatenate((self.tokens, encoded.tokens.astype(np.int64)))
        stop = len(tokens) if last else len(tokens) // self.chunk_size * self.chunk_size
        # Also where the rest begins.
        numbers = range(0, len(tokens), self.chunk_size)
        begins = [waiting_from if n < waiting else base + encoded.start(n - waiting) for n in numbers]
        count = -(-stop // self.chunk_size)
        self.first_token = begins[count] if count < len(begins) else self.length
        part = Part(self.number, tokens[:stop], begins[:count], self.first_token - self.given, last)
        self.tokens, self.given = tokens[stop:], self.first_token
        return part


def parts(documents: Iterable[Text], tokenizer: ChunkTokenizer, chunk_size: int) -> Iterator[Part]:
    """The chunks of every document, in order; every document ends with a part that is `last`."""
    batch: list[tuple[_Open, str, bool]] = []
    size = 0
    for document in documents:
        state = _Open(document.number, chunk_size)
        previous = ""
        for piece in pieces(document.blocks):
            if previous:
                batch.append((state, previous, False))
                size += len(previous)
                if size >= BATCH:
                    yield from _encode(batch, tokenizer)
                    batch, size = [], 0
            previous = piece
        batch.append((state, previous, True))
        size += len(previous)
        if size >= BATCH:
            yield from _encode(batch, tokenizer)
            batch, size = [], 0
    yield from _encode(batch, tokenizer)


def _encode(batch: list[tuple[_Open, str, bool]], tokenizer: ChunkTokenizer) -> Iterator[Part]:
    found = tokenizer.encode_batch([text for _, text, _ in batch])
    for (state, text, last), encoded in zip(batch, found):
        part = state.add(text, encoded, last)
        if last or len(part.tokens):
            yield part


def windows(found: Iterable[Part], chunks: int) -> Iterator[list[Part]]:
    """Parts in lists of at least `chunks` chunks each (the last of fewer): what an embedder is given at a time."""
    window: list[Part] = []
    size = 0
    for part in found:
        window.append(part)
        size += len(part.offsets)
        if size >= chunks:
            yield window
            window, size = [], 0
    if window:
        yield window
