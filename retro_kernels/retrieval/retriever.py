"""Chunks in, neighbours out: embedded as the builder did, searched, filtered, and read from the store (RETRO, 2.1)."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, overload

import numpy as np
import torch
from torch import Tensor

from ..errors import DatabaseError
from ..hub import check_identity
from ..tokenizers import open_tokenizer
from .corpus import filters
from .database import IMPORTED, Database, Source
from .embedders import Embedder, embedded_text, load_embedder
from .index.devices import find_device
from .index.index import Index

if TYPE_CHECKING:
    from ..models.generation import Neighbours

FETCHED = (64, 200)
"""Candidates that are asked for at first, and next where too few survive the filters; then twice as many each time. On
English documentation two neighbours of other documents are among the first 64 for 99 % of the chunks."""
EMBEDDED = 4096
"""Chunks that the embedder is given at a time, to sort by length."""
HIDDEN = -2
"""The label (`Retriever.look_up`) of documents that are nobody's neighbours."""
KNOWN = 1 << 14
"""Chunks whose neighbours `Retriever.look_up` remembers."""
TOKENS_AT_ONCE = 1 << 22
"""Candidates' tokens that are looked at together."""


class Searches(Protocol):
    """What a retriever needs of an index."""

    def search(self, queries: Any, k: int) -> tuple[Any, Any]:
        """queries float32 [q, dim] -> distances [q, k] and ids [q, k] of chunks, nearest first; a missing one has id -1
        and an infinite distance."""


class Sources(Sequence[list[Source | None]]):
    """Where the neighbours of every chunk come from; files are read when one is asked for."""

    def __init__(self, database: Database, ids: Tensor) -> None:
        self._database, self._ids = database, ids

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, chunk: int) -> list[Source | None]: ...

    @overload
    def __getitem__(self, chunk: slice) -> list[list[Source | None]]: ...

    def __getitem__(self, chunk: int | slice) -> list[Source | None] | list[list[Source | None]]:
        if isinstance(chunk, slice):
            return [self._database.sources(ids) for ids in self._ids[chunk]]
        return self._database.sources(self._ids[chunk])


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """The neighbours of chunks [...], nearest first. A missing one has id -1, an infinite distance, no token that is
    there, and comes after all others."""

    tokens: Tensor
    """int64 [..., k, r]: each neighbour and its continuation, 0 where the mask is False."""
    mask: Tensor
    """bool [..., k, r], True = a token that is there."""
    ids: Tensor
    """int64 [..., k], numbers of the database's chunks."""
    distances: Tensor
    """float32 [..., k], as the index gives them: squared L2. This, like all before it, is on the retriever's device."""
    sources: Sources
    """For each chunk, in their flattened order, where its k neighbours come from (None for a missing one)."""


class CacheInfo(NamedTuple):
    """What the cache did so far."""

    hits: int
    misses: int
    size: int


class Retriever:
    """Neighbours of chunks out of a database; also the `retriever` of `Retro.generate`.

    Args:
        database: a `Database`, or its folder.
        embedder: what made the database's keys: by default the one that its manifest names. By name, or an object; it
            is checked against the manifest.
        index: an object with `search`; by default the database's own (exact search where it has none).
        num_neighbours: k.
        retrieved_length: r, tokens of a neighbour and its continuation; by default two of the database's chunks.
        max_overlap: drop a neighbour that has more than this share of the chunk's tokens in one piece: 0 to 1, None: no
            limit. It is the paper's measure of leakage (section 2.6).
        deduplicate: neighbours with the same r tokens count once: the nearest stays.
        fetch: candidates of the first searches, growing; then doubled until k survive the filters, the database ends,
            or the index finds no more.
        cache_size: chunks whose neighbours are remembered; 0: none.
        device: where the index searches, the embedder (unless it is an object) computes, and the result lies: "cpu",
            "cuda", "cuda:1", "auto". With a database whose tokens are there too, `Database(folder).to("cuda")`, nothing
            but text, tokens to embed and neighbours' numbers passes through the CPU; otherwise they are read from
            disk. No GPU has run this yet.
        precision: of the embedder; by default the one that made the keys.
        memory_map, search: given to `open_index`; `search` is a dict of its settings, as {"nprobe": 16}.

    A chunk's tokens are those of the database's tokenizer. They are decoded and embedded, as they were when the
    database was built: a chunk of the database has its own key, whatever its tokenizer loses.

    Calls from several threads take turns. `submit` and `prefetch` work in a thread of the retriever's, which `close`
    (or leaving a `with` block) ends.

    Raises DatabaseError for a database without keys, or another embedder or tokenizer than its manifest names.
    """

    def __init__(
        self,
        database: Database | str | os.PathLike[str],
        *,
        embedder: Embedder | str | None = None,
        index: Searches | None = None,
        num_neighbours: int = 2,
        retrieved_length: int | None = None,
        max_overlap: float | None = None,
        deduplicate: bool = True,
        fetch: Sequence[int] = FETCHED,
        cache_size: int = 1 << 14,
        device: str | torch.device = "cpu",
        precision: str | None = None,
        memory_map: bool | None = None,
        search: dict[str, Any] | None = None,
    ) -> None:
        self.database = database if isinstance(database, Database) else Database(Path(database))
        self.chunk_size = self.database.chunk_size
        self.retrieved_length = 2 * self.chunk_size if retrieved_length is None else retrieved_length
        for name, value, low in (
            ("num_neighbours", num_neighbours, 1),
            ("retrieved_length", self.retrieved_length, 1),
            ("cache_size", cache_size, 0),
            *(("fetch", width, 1) for width in fetch),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name}: got {value!r}; expected an integer of at least {low}")
        if max_overlap is not None and not 0.0 <= max_overlap <= 1.0:
            raise ValueError(f"max_overlap: got {max_overlap}; expected a share of a chunk's tokens, 0 to 1, or None")
        self.num_neighbours, self.max_overlap, self.deduplicate = num_neighbours, max_overlap, deduplicate
        self.fetch = tuple(sorted(fetch))
        manifest = self.database.manifest
        if self.database.dim is None:
            raise DatabaseError(
                f"{self.database.folder} holds no embeddings, so there is nothing to search: build it with an embedder"
            )
        for what in ("tokenizer", "embedder"):
            if manifest[what].get("kind") == IMPORTED:
                raise DatabaseError(
                    f"{what}: {self.database.folder} was imported, and does not know its own: import it again with "
                    f"--{what}"
                )
        self.device = find_device(device)
        self.embedder = _opened(embedder, manifest["embedder"], self.device, precision)
        if self.embedder.dim != self.database.dim:
            raise DatabaseError(f"embedder: makes {self.embedder.dim} numbers, the database's keys {self.database.dim}")
        self._tokenizer = open_tokenizer(manifest["tokenizer"])
        self.tokenizer: str = manifest["tokenizer"]["name"]
        """The name of the tokenizer whose tokens go in and come out."""
        if index is None:
            from .index.index import open_index

            index = open_index(self.database, device=self.device, memory_map=memory_map, **(search or {}))
        elif search or memory_map is not None:
            raise ValueError("search, memory_map: given with an index object; set them when you open it")
        self.index = index
        self.search_settings = dict(search or {})
        self.cache_size = cache_size
        self._cache: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self._hits = self._misses = 0
        self._turn = threading.RLock()
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    # -- what users call

    def retrieve(
        self,
        chunks: Tensor | np.ndarray,
        *,
        documents: int | Tensor | np.ndarray | None = None,
        exclude: int | Tensor | np.ndarray | None = None,
        num_neighbours: int | None = None,
    ) -> Retrieved:
        """The neighbours of chunks.

        Args:
            chunks: integers [..., m], any m; a negative token is none.
            documents: documents of the database that no neighbour may be of: one for all chunks, or [...], one for
                each, or [..., d]; -1 for none.
            exclude: chunks of the database that no neighbour may be, likewise.
            num_neighbours: k of this call.

        Raises IndexError for a document or chunk that the database does not have, ValueError for other shapes."""
        tokens = _integers("chunks", chunks)
        if tokens.dim() < 1 or tokens.shape[-1] < 1:
            raise ValueError(f"chunks: got shape {list(tokens.shape)}; expected [..., m] with m of at least 1")
        leading = tuple(tokens.shape[:-1])
        k = self.num_neighbours if num_neighbours is None else num_neighbours
        if k < 1:
            raise ValueError(f"num_neighbours: got {k}; expected at least 1")
        own = _listed("documents", documents, leading, self.database.num_documents)
        excluded = _listed("exclude", exclude, leading, len(self.database))
        flat = tokens.reshape(-1, tokens.shape[-1])
        with self._turn:
            ids, distances = self._remembered(flat, own, excluded, k)
        return self._retrieved(ids, distances, leading)

    def retrieve_tokens(self, tokens: Tensor | np.ndarray, **given: Any) -> Retrieved:
        """The neighbours of the l = n // m complete chunks, of the database's size m, of sequences: tokens [b, n] ->
        [b, l, k, r]. documents, exclude: for a sequence or for each chunk, [b], [b, l] or [b, l, d]; the rest as in
        `retrieve`."""
        found = _integers("tokens", tokens)
        if found.dim() != 2:
            raise ValueError(f"tokens: got shape {list(found.shape)}; expected [b, n]")
        b, n = found.shape
        count = n // self.chunk_size
        for name in ("documents", "exclude"):
            value = given.get(name)
            if value is not None and not isinstance(value, int) and _integers(name, value).dim() == 1:
                given[name] = _integers(name, value)[:, None].expand(-1, count)
        return self.retrieve(found[:, : count * self.chunk_size].view(b, count, self.chunk_size), **given)

    def retrieve_text(self, texts: Sequence[str], *, num_neighbours: int | None = None) -> Retrieved:
        """The neighbours of texts of any length -> [texts, k, r]. The embedder cuts what is longer than it can take.
        A text has no chunk, so that `max_overlap` is the share of the text's tokens. Nothing is remembered."""
        k = self.num_neighbours if num_neighbours is None else num_neighbours
        encoded = [self._tokenizer.encode(text) for text in texts]
        known = [embedded_text(self._tokenizer, tokens) for tokens in encoded]
        chunks = torch.full((len(texts), max(map(len, encoded), default=0)), -1, dtype=torch.int64)
        for row, tokens in zip(chunks, encoded):
            row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        none = torch.empty(len(texts), 0, dtype=torch.int64)
        with self._turn:
            ids, distances = self._search(self._embed(known), chunks, none, none, k)
        return self._retrieved(ids, distances, (len(texts),))

    def __call__(self, chunks: Tensor) -> Neighbours:
        """Of `Retro.generate`: integers [s, m] -> neighbours [s, k, r]."""
        from ..models.generation import Neighbours

        found = self.retrieve(chunks)
        return Neighbours(found.tokens, found.mask, found.sources, found.ids)

    def look_up(
        self, chunks: Tensor, own: Tensor, labels: Tensor, keys: Tensor, known: OrderedDict[bytes, Tensor]
    ) -> Tensor:
        """The neighbours of many chunks that have documents of their own, for `precompute_neighbours`. -> ids [q, k]

        chunks: int64 [q, m], -1 for no token. own: int64 [q], the label of each chunk's document. labels: int64
        [documents], of the database's documents: those of a chunk's own label are none of its neighbours, and those
        of the label HIDDEN nobody's. keys: float32 [q, dim], of each chunk where it is known, else NaN. known: what was
        found with these labels before, at most KNOWN chunks of it; it is added to. Equal chunks of one label are looked
        up once: a text that is there a thousand times takes no thousand times as long."""
        asked, first, again = np.unique(
            torch.cat([own[:, None], chunks], dim=1).numpy(), axis=0, return_index=True, return_inverse=True
        )
        names = [row.tobytes() for row in asked]
        new = [number for number, name in enumerate(names) if name not in known]
        if new:
            rows = torch.from_numpy(first[new])
            chunks, own, queries = chunks[rows], own[rows], keys[rows]
            with self._turn:
                unknown = queries.isnan().any(-1).nonzero()[:, 0]
                if len(unknown):
                    queries[unknown] = self._embed(self._texts(chunks[unknown])).cpu()
                none = torch.empty(len(new), 0, dtype=torch.int64)
                queries = queries.to(self.device)
                found, _ = self._search(queries, chunks, own[:, None], none, self.num_neighbours, labels)
            known.update(zip((names[number] for number in new), found))
        for name in names:
            known.move_to_end(name)
        ids = torch.stack([known[name] for name in names])[torch.from_numpy(again.reshape(-1))]
        while len(known) > KNOWN:
            known.popitem(last=False)
        return ids

    def embed_chunks(self, chunks: Tensor) -> Tensor:
        """int64 [q, m], -1 for no token -> float32 [q, dim]: the queries that `retrieve` searches with."""
        with self._turn:
            return self._embed(self._texts(chunks))

    def submit(self, chunks: Tensor | np.ndarray, **given: Any) -> Future[Retrieved]:
        """`retrieve` in another thread: work goes on while the neighbours are looked up."""
        if self._closed:
            raise RuntimeError("the retriever was closed")
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="retrieve")
        return self._pool.submit(self.retrieve, chunks, **given)

    def prefetch(self, batches: Iterable[Tensor | np.ndarray], *, ahead: int = 2, **given: Any) -> Iterator[Retrieved]:
        """The neighbours of each batch of chunks, in order, looked up while the ones before are used: at most `ahead`
        batches early. given: as in `retrieve`, for every batch."""
        if ahead < 1:
            raise ValueError(f"ahead: got {ahead}; expected at least 1 batch")
        waiting: deque[Future[Retrieved]] = deque()
        try:
            for chunks in batches:
                waiting.append(self.submit(chunks, **given))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Tokens of the database as text."""
        return self._tokenizer.decode(tokens.tolist() if isinstance(tokens, Tensor) else tokens)

    def cache_info(self) -> CacheInfo:
        return CacheInfo(self._hits, self._misses, len(self._cache))

    def close(self) -> None:
        """Ends the thread; what was submitted and not begun is cancelled."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Retriever:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- how it is done

    def _retrieved(self, ids: Tensor, distances: Tensor, leading: tuple[int, ...]) -> Retrieved:
        k, r = ids.shape[-1], self.retrieved_length
        # Through pinned memory where tokens go from the CPU to a GPU.
        out = None
        if self.device.type == "cuda" and self.database.device.type == "cpu":
            out = (
                torch.empty(*ids.shape, r, dtype=torch.int32, pin_memory=True),
                torch.empty(*ids.shape, r, dtype=torch.bool, pin_memory=True),
            )
        tokens, mask = (x.to(self.device, non_blocking=True) for x in self.database.chunks(ids, r, out=out))
        return Retrieved(
            tokens.long().view(*leading, k, r),
            mask.view(*leading, k, r),
            ids.to(self.device).view(*leading, k),
            distances.to(self.device).view(*leading, k),
            Sources(self.database, ids),
        )

    def _remembered(self, chunks: Tensor, own: Tensor, excluded: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """-> ids and distances [q, k], from the cache where they are there; equal chunks are looked up once."""
        ids = torch.full((len(chunks), k), -1, dtype=torch.int64)
        distances = torch.full((len(chunks), k), torch.inf)
        asked = torch.cat([torch.full((len(chunks), 1), k), _prefixed(chunks), _prefixed(own), excluded], dim=1)
        missing: dict[bytes, list[int]] = {}
        for row, key in enumerate(numbers.tobytes() for numbers in asked.numpy()):
            known = self._cache.get(key)
            if known is not None:
                self._cache.move_to_end(key)
                ids[row], distances[row] = known
                self._hits += 1
            elif key in missing:
                missing[key].append(row)
                self._hits += 1
            else:
                missing[key] = [row]
                self._misses += 1
        if missing:
            first = torch.tensor([of[0] for of in missing.values()])
            texts = self._texts(chunks[first])
            found = self._search(self._embed(texts), chunks[first], own[first], excluded[first], k)
            for (key, of), found_ids, found_distances in zip(missing.items(), *found):
                ids[of], distances[of] = found_ids, found_distances
                self._cache[key] = found_ids.clone(), found_distances.clone()
            while len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        return ids, distances

    def _texts(self, chunks: Tensor) -> list[str]:
        return [embedded_text(self._tokenizer, [x for x in row if x >= 0]) for row in chunks.tolist()]

    def _embed(self, texts: list[str]) -> Tensor:
        """-> float32 [texts, dim], rounded as the keys are, on the embedder's device if it says where that is."""
        embed = getattr(self.embedder, "embed", self.embedder)
        parts = [torch.as_tensor(embed(texts[at : at + EMBEDDED])) for at in range(0, len(texts), EMBEDDED)]
        stored = getattr(torch, self.database.manifest["embedding_dtype"])
        return torch.cat(parts).to(stored).float() if parts else torch.empty(0, self.embedder.dim)

    def _nearest(self, queries: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """-> distances and ids [q, width]. The library's indexes take queries where they are; others get arrays."""
        given = queries if isinstance(self.index, Index) else queries.cpu().numpy()
        distances, ids = self.index.search(given, width)
        return torch.as_tensor(distances), torch.as_tensor(ids)

    def _search(
        self,
        queries: Tensor,
        chunks: Tensor,
        own: Tensor,
        excluded: Tensor,
        k: int,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """-> ids and distances [q, k] of the nearest chunks that pass the filters, on the CPU. Candidates are looked at
        where the database's tokens are. labels: as in `look_up`; `own` [q, 1] is a label then, and else documents."""
        labels = None if labels is None else labels.to(self.database.device)
        ids = torch.full((len(queries), k), -1, dtype=torch.int64)
        distances = torch.full((len(queries), k), torch.inf)
        rows = torch.arange(len(queries) if len(self.database) else 0)
        for width in self._widths(k, plain=not (own.numel() or excluded.numel())):
            if not len(rows):
                break
            left = []
            # So many rows at a time as keep the candidates' tokens within bounds.
            for part in rows.split(max(1, TOKENS_AT_ONCE // (width * self.retrieved_length))):
                near, found = self._nearest(queries[part.to(queries.device)], width)
                where = self.database.device
                mine, theirs, without = (x[part].to(where, non_blocking=True) for x in (chunks, own, excluded))
                kept = self._filter(found.to(where), mine, theirs, without, labels).cpu()
                near, found = near.cpu(), found.cpu()
                rank = kept.long().cumsum(-1)
                row, column = (kept & (rank <= k)).nonzero(as_tuple=True)
                place = rank[row, column] - 1
                ids[part[row], place], distances[part[row], place] = found[row, column], near[row, column].float()
                # An index that came to an end, wherever it looks, finds no more if it is asked for more.
                left.append(part[(rank[:, -1] < k) & (found[:, -1] >= 0)])
            rows = torch.cat(left)
        return ids, distances

    def _widths(self, k: int, plain: bool) -> Iterator[int]:
        """How many candidates to ask for, time after time: all of them in the end, or what the index gives at most."""
        whole = min(len(self.database), getattr(self.index, "largest_k", None) or len(self.database))
        if plain and self.max_overlap is None and not self.deduplicate:
            yield min(k, whole)
            return
        width = k
        for wanted in self.fetch:
            if k < wanted < whole:
                width = wanted
                yield width
        while True:
            width = min(2 * width, whole)
            yield width
            if width == whole:
                return

    def _filter(
        self, found: Tensor, chunks: Tensor, own: Tensor, excluded: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """bool [q, c]: which of the candidates pass the filters. All on the database's device."""
        kept = found >= 0
        if excluded.numel():
            kept &= ~filters.listed(found, excluded)
        if labels is not None:
            of = labels[self.database.documents(found).clamp(min=0)]
            kept &= (of != own) & (of != HIDDEN)
        elif own.numel():
            kept &= ~filters.listed(self.database.documents(found), own)
        if self.max_overlap is None and not self.deduplicate:
            return kept
        tokens, mask = self.database.chunks(found, self.retrieved_length)
        tokens = tokens.masked_fill(~mask, -1)
        if self.max_overlap is not None:
            limit = self.max_overlap * (chunks >= 0).sum(-1, keepdim=True)
            kept &= filters.longest_common_stretch(chunks, tokens) <= limit
        if self.deduplicate:
            kept &= ~filters.repeated(tokens, kept)
        return kept


def _opened(
    embedder: Embedder | str | None, expected: dict[str, Any], device: torch.device, precision: str | None
) -> Embedder:
    if embedder is None or isinstance(embedder, str):
        name = expected["name"] if embedder is None else embedder
        embedder = load_embedder(name, device=str(device), precision=precision or expected.get("precision", "auto"))
    check_identity("embedder", expected, embedder.identity)
    return embedder


def _integers(name: str, value: Tensor | np.ndarray) -> Tensor:
    tensor = torch.as_tensor(value)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype is torch.bool:
        raise TypeError(f"{name}: got {tensor.dtype}; expected integers")
    return tensor.to("cpu", torch.int64)


def _listed(name: str, value: int | Tensor | np.ndarray | None, leading: tuple[int, ...], limit: int) -> Tensor:
    """-> int64 [chunks, d]."""
    count = int(np.prod(leading, dtype=np.int64))
    if value is None:
        return torch.empty(count, 0, dtype=torch.int64)
    found = torch.tensor(value) if isinstance(value, int) else _integers(name, value)
    if found.numel() and int(found.max()) >= limit:
        raise IndexError(f"{name}: got {int(found.max())}; the database has {limit}")
    if found.dim() == 0:
        return found.expand(count, 1)
    shape = tuple(found.shape)
    if shape == leading:
        return found.reshape(count, 1)
    if shape[:-1] == leading:
        return found.reshape(count, shape[-1])
    raise ValueError(f"{name}: got shape {list(shape)}; expected a number, {[*leading]} or {[*leading, 'd']}")


def _prefixed(rows: Tensor) -> Tensor:
    """[q, n] -> [q, 1 + n], n first: rows of different lengths cannot look alike when they stand side by side."""
    return torch.cat([torch.full((len(rows), 1), rows.shape[1]), rows], dim=1)
