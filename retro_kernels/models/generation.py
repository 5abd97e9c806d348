"""Generation with retrieval: every token is computed once, and every chunk's neighbours are retrieved, encoded and
projected once, when the chunk is complete."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..nn import NeighbourCache, SelfAttentionCache
from ..nn.retro_decoder_block import product_dtype
from ..ops import checks

if TYPE_CHECKING:
    from .retro import Retro


class Neighbours(NamedTuple):
    """The neighbours that a retriever returns for s chunks."""

    tokens: torch.Tensor
    """int64 [s, k, r]; any k, and r at most the model's `retrieved_length`."""
    mask: torch.Tensor | None = None
    """bool [s, k, r], True = a token that is there; None: all are."""
    sources: Sequence[Any] | None = None
    """The origin of each of the s chunks' neighbours, in whatever form the retriever wants shown."""
    ids: torch.Tensor | None = None
    """int64 [s, k], numbers of the database's chunks, -1 where there is none; None: not known."""


Retriever = Callable[[torch.Tensor], Neighbours]
"""Chunks' tokens, int64 [s, chunk_size] on the CPU -> their neighbours. It is called from another thread, one call at a
time. If it has an attribute `tokenizer`, that name must be the model's. (A model with align="end" has an incomplete
first chunk, which comes with zeros in front.)"""


@dataclass
class Generated:
    """The sequences that `generate` returns, and their sources."""

    sequences: torch.Tensor
    """int64 [b, longest], on the model's device: prompts and new tokens, filled up with `pad_token_id`."""
    lengths: list[int]
    """Tokens of each sequence."""
    prompt_lengths: list[int]
    """Of which the prompt."""
    sources: list[dict[int, Any]] = field(default_factory=list)
    """For each sequence, chunk -> the `sources` of the neighbours that it was given."""

    def new_tokens(self, i: int) -> list[int]:
        """The tokens that sequence i was given."""
        return self.sequences[i, self.prompt_lengths[i] : self.lengths[i]].tolist()


@dataclass(frozen=True)
class Sampling:
    """The rule by which the next token is chosen; see `generate`."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not checks.number("temperature", self.temperature) >= 0.0:
            raise ValueError(f"temperature: got {self.temperature}, expected 0 (the best token) or more")
        if self.top_k is not None:
            checks.integer("top_k", self.top_k, 1)
        if self.top_p is not None and not 0.0 < checks.number("top_p", self.top_p) <= 1.0:
            raise ValueError(f"top_p: got {self.top_p}, expected more than 0 and at most 1")
        if not checks.number("repetition_penalty", self.repetition_penalty) > 0.0:
            raise ValueError(f"repetition_penalty: got {self.repetition_penalty}, expected more than 0")
        idle = [
            name
            for name, unset in (("temperature", (0.0, 1.0)), ("top_k", (None,)), ("top_p", (None,)))
            if getattr(self, name) not in unset
        ]
        if idle and not self.do_sample:
            raise ValueError(
                f"{', '.join(idle)}: got a value with do_sample=False, which ignores it; give do_sample=True"
            )

    def choose(self, logits: torch.Tensor, past: list[list[int]], generators: list[torch.Generator]) -> list[int]:
        """logits [b, vocab_size]; what each sequence holds; a generator for each -> a token for each."""
        logits = logits.float()
        if bool(logits.isnan().any()):
            raise ValueError(
                "model: its logits are NaN, expected numbers: are its weights finite, and do they fit its dtype?"
            )
        if self.repetition_penalty != 1.0:
            logits = logits.clone()
            for row, tokens in zip(logits, past):
                seen = torch.tensor(sorted(set(tokens)), device=logits.device)
                score = row[seen]
                row[seen] = torch.where(score > 0, score / self.repetition_penalty, score * self.repetition_penalty)
        if not self.do_sample or self.temperature == 0.0:
            return logits.argmax(-1).tolist()
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            lowest = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, -torch.inf)
        if self.top_p is not None and self.top_p < 1.0:
            ranked, order = logits.sort(dim=-1, descending=True)
            probability = ranked.softmax(-1)
            before = probability.cumsum(-1) - probability
            logits = logits.masked_fill((before >= self.top_p).scatter(1, order, before >= self.top_p), -torch.inf)
        # Each sequence draws on the CPU from a generator of its own: its tokens do not depend on the batch or device.
        probability = logits.softmax(-1).cpu()
        return [int(torch.multinomial(p, 1, generator=generator)) for p, generator in zip(probability, generators)]


@torch.no_grad()
def generate(
    model: Retro,
    input_ids: torch.Tensor | Sequence[Sequence[int]],
    *,
    retriever: Retriever | None = None,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    streamer: Any = None,
    seed: int = 0,
    num_neighbours: int | None = None,
    retrieval_stride: int | None = None,
    stale: bool = False,
    cache_form: str = "key_value",
) -> Generated:
    """New tokens after each prompt. A name that Hugging Face's `generate` has means here what it means there.

    With a retriever, a chunk's neighbours are looked up when its last token is known, in another thread, while the
    layers before min(P) run; encoded, conditioned on the chunk, when that layer is reached; and put into the cache from
    which every later token of the chunk reads.

    With align="end" the prompt ends a chunk, whatever its length, so that its neighbours serve the first new token
    already (the left padding of Wang et al. 2023, arXiv 2304.06762): borders are then every m tokens from there, where
    a call of the model over the whole would move them with every token.

    Args:
        model: in evaluation mode, or without dropout.
        input_ids: the prompts: integers [b, n], or a list of lists of different lengths. At least one token each;
            may be shorter than a chunk.
        retriever: see `Retriever`; None: the decoder alone.
        attention_mask: [b, n], 1 = a token of the prompt, where a tensor of prompts is padded, left or right.
        max_new_tokens: at least 1.
        do_sample, temperature, top_k, top_p: draw from the distribution, sharpened and cut; otherwise, and at
            temperature 0, the best token.
        repetition_penalty: divides positive and multiplies negative logits of tokens that are there already.
        eos_token_id: one or several that end a sequence; default the config's.
        pad_token_id: fills up shorter sequences in the result.
        stop_strings, tokenizer: strings that end a sequence once its new text (by `tokenizer.decode`) has one.
        streamer: an object with `put(tokens)` and `end()`, given the prompt and then each token, of one sequence only.
        seed: sequence i draws from a generator seeded with `seed + i`, so that it does not depend on the others.
        num_neighbours: the most that the retriever returns; default the config's.
        retrieval_stride: tokens between retrievals, a multiple of the chunk size (the default): the chunks between are
            given the neighbours of the last retrieval, encoded anew.
        stale: give a chunk the neighbours that were retrieved for the chunk before it (the first chunk gets none): the
            retriever then has a whole chunk's time.
        cache_form: "key_value" or "encoded"; see `NeighbourCache`.

    Returns: `Generated`.

    Raises TypeError or ValueError for wrong arguments, for tokens outside the vocabulary, for a retriever with another
    tokenizer, and for neighbours that do not fit; and whatever the retriever raises.
    """
    config = model.config
    sampling = Sampling(do_sample, temperature, top_k, top_p, repetition_penalty)
    prompts = _prompts(input_ids, attention_mask)
    model.check_vocabulary("input_ids", torch.tensor([token for prompt in prompts for token in prompt]))
    pad = config.pad_token_id
    if isinstance(input_ids, torch.Tensor) and attention_mask is None and any(pad in (x[0], x[-1]) for x in prompts):
        warnings.warn(
            f"input_ids: got rows that begin or end with pad_token_id = {pad}, which are read as text: give "
            "attention_mask, or a list of lists",
            stacklevel=3,
        )
    for name, value, low in (("max_new_tokens", max_new_tokens, 1), ("pad_token_id", pad_token_id, 0)):
        checks.integer(name, value, low)
    checks.integer("seed", seed, 0)
    if model.training and (config.dropout or config.hidden_dropout):
        raise ValueError("model: got a model with dropout in training mode, expected evaluation mode: call .eval()")
    longest = max(map(len, prompts)) + max_new_tokens
    if config.hard_limit is not None and longest > config.hard_limit:
        raise ValueError(
            f"max_new_tokens: got {max_new_tokens}, with which a sequence may have {longest} tokens, expected at most "
            f"max_length = {config.max_length}"
        )
    if streamer is not None and len(prompts) != 1:
        raise ValueError(f"streamer: got one with {len(prompts)} prompts, expected a single prompt")
    if not isinstance(stale, bool):
        raise TypeError(f"stale: got {stale!r}, expected a bool")
    stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
    if stops and tokenizer is None:
        raise ValueError("stop_strings: got some without a tokenizer, expected one with decode(tokens)")
    eos_token_id = config.eos_token_id if eos_token_id is None else eos_token_id
    ends = set(eos_token_id) if isinstance(eos_token_id, Iterable) else {eos_token_id} - {None}
    for end in ends:
        checks.integer("eos_token_id", end, 0, config.vocab_size - 1, "vocab_size - 1")

    retrieval = None
    if retriever is not None:
        retrieval = Retrieval(model, retriever, prompts, num_neighbours, retrieval_stride, stale)
    elif stale or retrieval_stride is not None or num_neighbours is not None:
        raise ValueError("stale, retrieval_stride, num_neighbours: got one without a retriever, expected None")
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    sequences = [list(prompt) for prompt in prompts]
    running = set(range(len(prompts)))
    try:
        decoder = Decoder(model, sequences, longest, retrieval, cache_form)
        logits = decoder.prefill()
        if streamer is not None:
            streamer.put(torch.tensor(prompts))
        for _ in range(max_new_tokens):
            chosen = sampling.choose(logits, sequences, generators)
            for i in sorted(running):
                sequences[i].append(chosen[i])
                if streamer is not None:
                    streamer.put(torch.tensor([chosen[i]]))
                new = sequences[i][len(prompts[i]) :]
                if chosen[i] in ends or _has_stopped(new, stops, tokenizer) or len(new) == max_new_tokens:
                    running.discard(i)
                    decoder.leave(i)
            if not running:
                break
            logits = decoder.step()
        if streamer is not None:
            streamer.end()
    finally:
        if retrieval is not None:
            retrieval.close()
    lengths = [len(sequence) for sequence in sequences]
    padded = [sequence + [pad_token_id] * (max(lengths) - len(sequence)) for sequence in sequences]
    return Generated(
        torch.tensor(padded, device=model.embedding.weight.device),
        lengths,
        [len(prompt) for prompt in prompts],
        [{} for _ in prompts] if retrieval is None else retrieval.sources,
    )


class Decoder:
    """The sequences' caches: `prefill` runs the prompts, `step` the token that each sequence was last given. Both
    return the logits of the next one, [b, vocab_size]. `sequences` is the caller's, who appends to each before a
    step."""

    def __init__(
        self, model: Retro, sequences: list[list[int]], max_length: int, retrieval: Retrieval | None, cache_form: str
    ) -> None:
        self.model, self.sequences, self.retrieval = model, sequences, retrieval
        config = model.config
        self.first = config.cross_attention_layers[0] - 1 if config.cross_attention_layers else -1
        self.device = model.embedding.weight.device
        # How many tokens the first chunk of each lacks, where chunks are aligned to the end of the prompt.
        m, ends = config.chunk_size, config.align == "end"
        self.lead = [-len(sequence) % m if ends else 0 for sequence in sequences]
        attentions = [block.self_attention for block in model.blocks]
        self.cache = SelfAttentionCache(attentions, num_slots=len(sequences), max_length=max_length)  # type: ignore[arg-type]
        self.running = [True] * len(sequences)
        self.neighbours: NeighbourCache | None = None
        if retrieval is not None:
            layers = [model.blocks[p - 1].cross_attention for p in config.cross_attention_layers]
            self.neighbours = NeighbourCache(
                layers,  # type: ignore[arg-type]
                num_slots=len(sequences),
                num_neighbours=retrieval.k,
                retrieved_length=retrieval.r,
                form=cache_form,
                dtype=product_dtype(layers[0].w_query.weight),  # type: ignore[union-attr,arg-type]
            )
            self.neighbours.join(range(len(sequences)))
            weight = model.embedding.weight
            # What the encoder is conditioned on: the activations of the tokens of the chunk that is being written.
            self.chunk = weight.new_zeros(len(sequences), config.chunk_size, config.model_dim)

    def leave(self, i: int) -> None:
        """Sequence i is complete: its row is computed on, and ignored."""
        self.running[i] = False
        if self.neighbours is not None:
            self.neighbours.leave(i)

    def prefill(self) -> torch.Tensor:
        config, lengths = self.model.config, [len(sequence) for sequence in self.sequences]
        if config.align == "end":  # the chunks of a call end where its rows do
            kinds = lengths
        elif config.norm_position == "post":  # without a chunk there is no norm after chunked cross-attention
            kinds = [int(length >= config.chunk_size) for length in lengths]
        else:
            kinds = [0] * len(lengths)
        logits = self.model.embedding.weight.new_zeros(len(lengths), config.vocab_size)
        for kind in sorted(set(kinds)):
            rows = [i for i, other in enumerate(kinds) if other == kind]
            logits[rows] = self._prefill(rows).to(logits.dtype)
        return logits

    def _prefill(self, rows: list[int]) -> torch.Tensor:
        """Runs the sequences `rows` from their first token to their last -> logits [rows, vocab_size]."""
        model, m = self.model, self.model.config.chunk_size
        lengths = [len(self.sequences[i]) for i in rows]
        counts = [model.config.num_chunks(length) for length in lengths]
        tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for row, i in zip(tokens, rows):
            row[: len(self.sequences[i])] = torch.tensor(self.sequences[i])
        neighbours = mask = None
        if self.retrieval is not None:
            found = self.retrieval.retrieve_for_prompts(self.sequences, rows, counts, self.lead)
            neighbours, mask = (x.to(self.device) for x in found)

        def encode(activations: torch.Tensor) -> torch.Tensor | None:
            for row, (i, length) in enumerate(zip(rows, lengths)):
                begun = (length + self.lead[i]) % m
                self.chunk[i, :begun] = activations[row, length - begun : length]
            return model.encode(neighbours, activations, mask) if neighbours is not None and max(counts) else None

        hidden: torch.Tensor = model.embed(tokens.to(self.device))
        encoded: Any = None
        self.cache.slots = rows
        for i, block in enumerate(model.blocks):
            if neighbours is not None and i == self.first:
                encoded = encode
            hidden, encoded = block(hidden, encoded, mask, None, self.cache)
        if self.neighbours is not None and encoded is not None and mask is not None:
            complete = [(row, i, count - 1) for row, (i, count) in enumerate(zip(rows, counts)) if count]
            at, slots, chunks = (list(x) for x in zip(*complete))
            self.neighbours.fill(slots, chunks, encoded[at, chunks], mask[at, chunks])
        last = torch.tensor(lengths, device=self.device) - 1
        hidden = hidden[torch.arange(len(lengths), device=self.device), last]
        return model.read(model.final_norm(hidden))

    def step(self) -> torch.Tensor:
        model, m = self.model, self.model.config.chunk_size
        places = [len(sequence) - 1 for sequence in self.sequences]
        completed: list[tuple[int, int]] = []
        by_clock = [p + lead for p, lead in zip(places, self.lead)]
        if self.retrieval is not None:
            completed = [(i, p // m) for i, p in enumerate(by_clock) if self.running[i] and (p + 1) % m == 0]
            if model.config.norm_position == "post":
                # With its first chunk a sequence passes through norms that all its tokens so far went without.
                begun = [i for i, u in completed if u == 0]
                completed = [(i, u) for i, u in completed if u > 0]
                if begun:
                    self._prefill(begun)
            self.retrieval.begin(self.sequences, completed, self.lead)
        position, clock = (torch.tensor(x, device=self.device) for x in (places, by_clock))

        def conditioned(activations: torch.Tensor) -> None:
            newest = activations[:, 0].to(self.chunk.dtype)
            self.chunk[torch.arange(len(places), device=self.device), clock % m] = newest
            if completed:
                self._fill(completed)

        tokens = torch.tensor([sequence[-1:] for sequence in self.sequences], device=self.device)
        hidden = model.embed(tokens, position)
        for i, block in enumerate(model.blocks):
            hook = conditioned if self.retrieval is not None and i == self.first else None
            hidden = block.decode(  # type: ignore[operator]
                hidden, self.cache, self.neighbours, position, max(places) + 1, hook, clock
            )
        return model.read(model.final_norm(hidden[:, 0]))

    def _fill(self, completed: list[tuple[int, int]]) -> None:
        if self.retrieval is None or self.neighbours is None:
            return
        tokens, mask = (x.to(self.device) for x in self.retrieval.finish(completed))
        slots, chunks = (list(x) for x in zip(*completed))
        encoded = self.model.encode(tokens[:, None], self.chunk[slots], mask[:, None])
        self.neighbours.fill(slots, chunks, encoded[:, 0], mask)


class Retrieval:
    """Calls the retriever in another thread, and knows which retrieval serves which chunk."""

    def __init__(
        self,
        model: Retro,
        retriever: Retriever,
        prompts: list[list[int]],
        num_neighbours: int | None,
        retrieval_stride: int | None,
        stale: bool,
    ) -> None:
        config = model.config
        if model.encoder is None:
            raise ValueError("retriever: got one, expected None: this model has no chunked cross-attention")
        if not callable(retriever):
            raise TypeError(
                f"retriever: got {type(retriever).__name__}, expected a Retriever or a function of chunks [s, m]"
            )
        theirs = getattr(retriever, "tokenizer", None)
        if isinstance(theirs, str) and config.tokenizer is not None and theirs != config.tokenizer:
            raise ValueError(
                f"retriever: its database was made with the tokenizer {theirs!r}, expected {config.tokenizer!r}, the "
                "model's: its tokens would mean other words"
            )
        self.model, self.retriever, self.stale = model, retriever, stale
        self.m, self.r = config.chunk_size, config.retrieved_length or 0
        self.k = checks.integer(
            "num_neighbours", config.num_neighbours if num_neighbours is None else num_neighbours, 1
        )
        stride = checks.integer("retrieval_stride", self.m if retrieval_stride is None else retrieval_stride, 1)
        if stride % self.m:
            raise ValueError(
                f"retrieval_stride: got {stride}, expected a multiple of chunk_size = {self.m}: the cache holds the "
                "neighbours of whole chunks"
            )
        self.every = stride // self.m
        self.counts_on = config.cross_num_buckets is not None
        self.sources: list[dict[int, Any]] = [{} for _ in prompts]
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="retriever")
        self.found: dict[tuple[int, int], tuple[Future, int]] = {}

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def origin(self, chunk: int) -> int:
        """The chunk with whose tokens the neighbours of `chunk` are retrieved; negative where there are none."""
        return chunk - chunk % self.every - self.stale

    def retrieve_for_prompts(
        self, sequences: list[list[int]], rows: list[int], counts: list[int], lead: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Neighbours of the sequences `rows`, of which each has `counts` chunks: tokens and mask [rows, l, k, r];
        masked where a sequence has fewer. `lead`: the tokens that the first chunk of each sequence lacks."""
        wanted = [(i, self.origin(u)) for i, count in zip(rows, counts) for u in range(count)]
        self._request(sequences, wanted, lead)
        size = (len(rows), max(counts), self.k, self.r)
        tokens, mask = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.bool)
        for row, (i, count) in enumerate(zip(rows, counts)):
            for u in range(count):
                self._take(i, u, tokens[row, u], mask[row, u])
        self._look_ahead(sequences, [(i, count - 1) for i, count in zip(rows, counts) if count], lead)
        return tokens, mask

    def begin(self, sequences: list[list[int]], completed: list[tuple[int, int]], lead: list[int]) -> None:
        """The last token of these chunks is known: (sequence, chunk)."""
        self._request(sequences, [(i, self.origin(u)) for i, u in completed], lead)
        self._look_ahead(sequences, completed, lead)

    def finish(self, completed: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Waits for their neighbours: tokens and mask [s, k, r]."""
        size = (len(completed), self.k, self.r)
        tokens, mask = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.bool)
        for row, (i, u) in enumerate(completed):
            self._take(i, u, tokens[row], mask[row])
        return tokens, mask

    def _look_ahead(self, sequences: list[list[int]], completed: list[tuple[int, int]], lead: list[int]) -> None:
        if self.stale:
            self._request(sequences, [(i, self.origin(u + 1)) for i, u in completed], lead)

    def _request(self, sequences: list[list[int]], wanted: list[tuple[int, int]], lead: list[int]) -> None:
        new = [pair for pair in dict.fromkeys(wanted) if pair[1] >= 0 and pair not in self.found]
        if not new:
            return
        rows = [([0] * lead[i] + sequences[i])[u * self.m : (u + 1) * self.m] for i, u in new]
        chunks = torch.tensor(rows)
        future = self.pool.submit(self._retrieve, chunks)
        self.found.update({pair: (future, row) for row, pair in enumerate(new)})

    def _take(self, i: int, chunk: int, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        origin = self.origin(chunk)
        if origin < 0:
            return
        future, row = self.found[i, origin]
        found = future.result()
        k, r = found.tokens.shape[1:]
        tokens[:k, :r] = found.tokens[row]
        if found.mask is not None:
            mask[:k, :r] = found.mask[row]
        else:
            pad = self.model.config.pad_token_id
            mask[:k, :r] = True if pad is None else found.tokens[row] != pad
        if found.sources is not None:
            self.sources[i][chunk] = found.sources[row]
        for older in [pair for pair in self.found if pair[0] == i and pair[1] < origin]:
            del self.found[older]

    def _retrieve(self, chunks: torch.Tensor) -> Neighbours:
        found = self.retriever(chunks)
        for name in Neighbours._fields:
            if not hasattr(found, name):
                raise TypeError(f"retriever: got {type(found).__name__} without {name}, expected Neighbours")
        found = Neighbours(found.tokens, found.mask, found.sources)
        checks.tensor("the retriever's tokens", found.tokens, (torch.int64, torch.int32))
        tokens = found.tokens.cpu()
        shape, s = tuple(tokens.shape), chunks.shape[0]
        if len(shape) != 3 or shape[0] != s or shape[1] > self.k or shape[2] > self.r:
            raise ValueError(
                f"retriever: got tokens of shape {list(shape)} for {s} chunks, expected [{s}, k, r] with k at most "
                f"num_neighbours = {self.k} and r at most retrieved_length = {self.r}: give generate num_neighbours=, "
                "and Retro.from_peer, or a swap's report.generate, retrieved_length="
            )
        if self.counts_on and shape[2] != self.r:
            raise ValueError(
                f"retriever: got neighbours of {shape[2]} tokens, expected retrieved_length = {self.r}: the bias by "
                "distance counts on through all neighbours of a chunk"
            )
        self.model.check_vocabulary("the retriever's tokens", tokens)
        mask = None if found.mask is None else found.mask.cpu()
        if mask is not None:
            checks.tensor("the retriever's mask", mask, (torch.bool,))
            checks.shape("the retriever's mask", mask, "s, k, r", shape)
        if found.sources is not None and len(found.sources) != s:
            raise ValueError(f"retriever: got sources of {len(found.sources)} chunks, expected {s}")
        return Neighbours(tokens, mask, found.sources)


def _are_rows(given: Any) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, str)


def _prompts(input_ids: Any, attention_mask: torch.Tensor | None) -> list[list[int]]:
    if isinstance(input_ids, torch.Tensor):
        checks.tensor("input_ids", input_ids, (torch.int64, torch.int32))
        checks.rank("input_ids", input_ids, "b, n")
        rows = input_ids.tolist()
        if attention_mask is not None:
            checks.shape("attention_mask", attention_mask, "b, n", tuple(input_ids.shape))
            rows = [[t for t, there in zip(row, mask) if there] for row, mask in zip(rows, attention_mask.tolist())]
    else:
        if attention_mask is not None:
            raise ValueError("attention_mask: got one with a list of prompts, expected None: they have their lengths")
        if not _are_rows(input_ids) or not all(map(_are_rows, input_ids)):
            raise TypeError(f"input_ids: got {input_ids!r:.60}, expected tokens [b, n] or a list of lists of tokens")
        try:
            rows = [[operator.index(token) for token in row] for row in input_ids]
        except TypeError as error:
            raise TypeError(f"input_ids: got {input_ids!r:.60}, expected tokens, which are integers") from error
    if not rows or not all(rows):
        raise ValueError("input_ids: got no prompt, or an empty one, expected at least one token in each")
    return rows


def _has_stopped(new: list[int], stops: list[str], tokenizer: Any) -> bool:
    if not stops:
        return False
    text = tokenizer.decode(new)
    return any(stop in text for stop in stops)
