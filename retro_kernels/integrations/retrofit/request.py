"""From the arguments of a call to what the attentions need (`ModelCall`): which chunks there are, and the neighbours'
keys and values, read now or remembered."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import checks
from .attention import Chunks
from .call import Even, KeysAndValues, Laid, ModelCall, Plan, Step, Uneven
from .memory import Memory

if TYPE_CHECKING:
    from .model import Retrofit


@dataclass
class Request:
    """One call: `n` new tokens of `batch` sequences, after `past` in the cache.

    ids is int64 [b, n], or None where embeddings came in; attention_mask [b, past + n] or None; positions the rotary
    positions that were given; active the layers that look at neighbours.
    """

    retro: Retrofit
    ids: torch.Tensor | None
    batch: int
    n: int
    past: int
    device: torch.device
    positions: torch.Tensor | None
    attention_mask: torch.Tensor | None
    neighbours: Any
    mask: Any
    retriever: Any
    active: frozenset[int]

    def call(
        self,
        plan: Plan,
        mask: torch.Tensor,
        encoded: KeysAndValues | torch.Tensor,
        starts: list[int] | torch.Tensor | None,
        laid: Laid | None = None,
    ) -> ModelCall:
        """mask: which of the neighbours' tokens are seen; starts: the padding before each sequence; laid: see
        `ModelCall`."""
        retro = self.retro
        here = self.past + torch.arange(self.n, device=self.device)[None]
        place = here if starts is None else here - torch.as_tensor(starts, device=self.device)[:, None]
        row = (place - (retro.chunk_size - 1)) % retro.chunk_size
        own = here if self.positions is None else self.positions
        turn = retro.retrieved_length + (row - own if retro.positions == "chunk" else torch.zeros_like(own))
        states = encoded if isinstance(encoded, torch.Tensor) else None
        held = None if isinstance(encoded, torch.Tensor) else encoded
        watch = not (retro.checked or torch.compiler.is_compiling())
        return ModelCall(plan, mask, turn, retro.tables(), held, states, watch, self.active, laid, retro.shares)

    def chunks(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: torch.Tensor,
        numbers: torch.Tensor,
        starts: list[int] | torch.Tensor | None,
    ) -> Chunks:
        """Of the text's keys and values [b, hk, N, d], those of these sequences' chunks of these numbers, each [s], and
        the position that follows each chunk."""
        m, whole = self.retro.chunk_size, self.past + self.n
        begin = numbers * m
        if starts is not None:
            begin = begin + torch.as_tensor(starts, device=key.device)[rows]
        dropped = whole - key.shape[2]  # by a window of the cache
        if dropped and len(begin) and int(begin.min()) < dropped:
            raise ValueError(
                f'encoder: got "own+cross" where the cache of its layer keeps {key.shape[2]} tokens, expected a whole '
                f"chunk of {m}"
            )
        index = ((begin - dropped)[:, None] + torch.arange(m, device=key.device)).clamp(0, key.shape[2] - 1)
        end = begin + m
        if self.positions is not None:
            end = end + (self.positions[:, -1] - (whole - 1)).expand(self.batch)[rows]
        return key.transpose(1, 2)[rows[:, None], index], value.transpose(1, 2)[rows[:, None], index], end


def begin(
    retro: Retrofit, given: dict[str, Any], neighbours: Any, mask: Any, retriever: Any
) -> tuple[ModelCall | None, Memory | None]:
    """What the attentions of this call get (None: nothing), and the memory for its cache (None: nothing of ours runs).

    Raises TypeError or ValueError for what cannot be right.
    """
    cache = cache_of(given)
    if mask is not None and neighbours is None:
        raise ValueError("neighbour_mask: got one without neighbours, expected both or none")
    active = retro.active()
    if not active:
        return None, None
    ids = given.get("input_ids")
    x = ids if ids is not None else given.get("inputs_embeds")
    if x is None:
        raise ValueError("input_ids: got none, nor inputs_embeds, expected one of them")
    b, n = x.shape[:2]
    if neighbours is not None:
        mask = checks.neighbours(retro, neighbours, mask, b)
    if retriever is not None:
        checks.retriever(retro, retriever, ids)
    checks.attention_mask(given.get("attention_mask"), retriever)
    checks.cache(cache)
    past = 0 if cache is None else int(cache.get_seq_length())
    request = Request(
        retro,
        ids,
        b,
        n,
        past,
        x.device,
        given.get("position_ids"),
        given.get("attention_mask"),
        neighbours,
        mask,
        retriever,
        active,
    )
    if past == 0:
        return _first(request)
    memory: Memory | None = getattr(cache, "retro", None)
    if memory is None:
        raise ValueError(
            "cache: got one that holds tokens read without neighbours, expected one that was filled by this model with "
            "neighbours= or retriever=, or an empty one"
        )
    return _go_on(request, memory), memory


def cache_of(given: dict[str, Any]) -> Any:
    """The cache, by the name that this version of transformers has for it."""
    return given.get("cache") if given.get("cache") is not None else given.get("past_key_values")


def _first(request: Request) -> tuple[ModelCall | None, Memory]:
    """The call that begins the texts."""
    retro, n, b, m = request.retro, request.n, request.batch, request.retro.chunk_size
    memory = Memory(request.ids, request.attention_mask, b)
    count = n // m
    plan: Plan = Even(n, 0, m)
    starts = None
    if request.attention_mask is not None:
        # The first token that is there: argmax gives the first of equal ones.
        starts = request.attention_mask.to(request.device).bool().int().argmax(1)
        plan = Uneven(n, 0, starts, torch.zeros_like(starts), count, m)
    neighbours, mask = request.neighbours, request.mask
    if request.retriever is not None:
        retro.found.clear()
        retro.forget()
        if count:
            neighbours, mask = _of_prompts(request, memory.starts)
    if count == 0:
        return None, memory
    if neighbours.shape[1] < count:
        raise ValueError(
            f"neighbours: got l = {neighbours.shape[1]} chunks, expected at least {count} for {n} tokens in "
            f"chunks of {m}"
        )
    neighbours, mask = neighbours[:, :count].to(request.device), mask[:, :count].to(request.device)
    crossing = retro.crossing()
    if crossing is not None:
        call = request.call(plan, retro.visible(mask), {}, starts)

        def read_with_chunks(key: torch.Tensor, value: torch.Tensor) -> None:
            rows = torch.arange(b, device=request.device).repeat_interleave(count)
            chunks = request.chunks(key, value, rows, torch.arange(count, device=request.device).repeat(b), starts)
            call.held = retro.encode(neighbours, mask, request.active, chunks)  # type: ignore[assignment]

        call.later = crossing, read_with_chunks
        return call, memory
    read = retro.encode_once if request.retriever is not None else retro.encode
    return request.call(plan, retro.visible(mask), read(neighbours, mask, request.active), starts), memory


def _go_on(request: Request, memory: Memory) -> ModelCall | None:
    """A call that continues the texts of a cache."""
    retro, n, past, m = request.retro, request.n, request.past, request.retro.chunk_size
    memory.settle()
    if past != memory.length:
        raise ValueError(f"cache: holds {past} tokens, expected {memory.length}: something else has written to it")
    lacking = sorted(request.active - set(memory.held)) if memory.held else []
    if lacking:
        raise ValueError(
            f"cache: its neighbours were read while the gates of layers {lacking} were closed, which are open now; "
            "expected an empty one"
        )
    starts = memory.starts
    if memory.ids is not None and request.ids is not None:
        memory.ids = torch.cat([memory.ids, request.ids], 1)
    # Of each sequence, the chunks that its tokens look at: from `low` to `high`.
    clocks = [past - start - (m - 1) for start in starts]
    low = [max(clock, 0) // m for clock in clocks]
    high = [(clock + n - 1) // m for clock in clocks]
    wanted = [
        (row, chunk)
        for row in range(memory.batch)
        for chunk in range(low[row], high[row] + 1)
        if chunk != memory.chunk[row]
    ]
    count = max(last - first + 1 for first, last in zip(low, high))
    if not wanted and (memory.mask is None or count <= 0 < n - 1):
        return None
    rows, numbers = [row for row, _ in wanted], [chunk for _, chunk in wanted]
    seen: torch.Tensor | None = None
    if wanted:
        tokens, there = (x.to(request.device) for x in _of_chunks(request, memory, wanted))
        seen = retro.visible(there)

    def laid_out(encoded: KeysAndValues) -> tuple[KeysAndValues, torch.Tensor]:
        if n > 1:
            return _laid_out(memory, wanted, encoded, seen, low, high, count)
        if seen is not None:
            memory.put(rows, numbers, encoded, seen)
        assert memory.mask is not None
        return memory.held, memory.mask[:, None]

    plan: Plan = Step(low)
    if n > 1:
        places = torch.tensor(starts, device=request.device), torch.tensor(low, device=request.device)
        plan = Uneven(n, past, *places, count, m)
    crossing = retro.crossing() if wanted else None
    if crossing is None:
        held, visible = laid_out(retro.encode_once(tokens, there, request.active) if wanted else {})
        return request.call(plan, visible, held, starts, memory.laid if n == 1 else None)
    call = request.call(plan, torch.empty(0), {}, starts, memory.laid if n == 1 else None)

    def read_with_chunks(key: torch.Tensor, value: torch.Tensor) -> None:
        of_rows, of_numbers = (torch.tensor(x, device=key.device) for x in (rows, numbers))
        chunks = request.chunks(key, value, of_rows, of_numbers, starts)
        call.held, call.mask = laid_out(retro.encode(tokens, there, request.active, chunks))  # type: ignore[arg-type]

    call.later = crossing, read_with_chunks
    return call


def _laid_out(
    memory: Memory,
    wanted: list[tuple[int, int]],
    encoded: KeysAndValues,
    seen: torch.Tensor | None,
    low: list[int],
    high: list[int],
    count: int,
) -> tuple[KeysAndValues, torch.Tensor]:
    """Keys and values [b, count, k, r, hk, d] and mask of the chunks from `low` on, new ones and the one remembered."""
    shape = (memory.batch, count)
    like = encoded or memory.held
    held = {
        layer: (key.new_zeros(*shape, *key.shape[1:]), value.new_zeros(*shape, *value.shape[1:]))
        for layer, (key, value) in like.items()
    }
    mask: Any = memory.mask if seen is None else seen
    visible = mask.new_zeros(*shape, *mask.shape[1:])
    sources = [(row, chunk, place, encoded, seen) for place, (row, chunk) in enumerate(wanted)]
    if memory.mask is not None:
        sources += [
            (row, chunk, row, memory.held, memory.mask)
            for row, chunk in enumerate(memory.chunk)
            if low[row] <= chunk <= high[row]
        ]
    for row, chunk, place, pairs, masks in sources:
        visible[row, chunk - low[row]] = masks[place]  # type: ignore[index]
        for layer, (key, value) in held.items():
            key[row, chunk - low[row]], value[row, chunk - low[row]] = pairs[layer][0][place], pairs[layer][1][place]
    return held, visible


def _of_prompts(request: Request, starts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours and mask [b, l, k, r] of all complete chunks; masked where a sequence has fewer."""
    retro, m, ids = request.retro, request.retro.chunk_size, request.ids
    assert ids is not None
    size = (request.batch, request.n // m, retro.num_neighbours, retro.retrieved_length)
    places = [(row, chunk) for row in range(request.batch) for chunk in range((request.n - starts[row]) // m)]
    tokens, mask = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.bool)
    if places:
        chunks = torch.stack([ids[i, starts[i] + u * m : starts[i] + (u + 1) * m] for i, u in places])
        found, there = retro.retrieve(request.retriever, chunks)
        for place, (row, chunk) in enumerate(places):
            tokens[row, chunk], mask[row, chunk] = found[place], there[place]
    return tokens, mask


def _of_chunks(request: Request, memory: Memory, wanted: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours and mask [s, k, r] of these chunks: those given, or else those retrieved, or else none."""
    retro, m, starts = request.retro, request.retro.chunk_size, memory.starts
    if request.retriever is not None:
        ids = memory.ids
        if ids is None:
            raise ValueError("retriever: got one after inputs_embeds, expected input_ids: it reads tokens")
        chunks = torch.stack([ids[i, starts[i] + u * m : starts[i] + (u + 1) * m] for i, u in wanted])
        return retro.retrieve(request.retriever, chunks)
    if request.neighbours is not None:
        k, r = request.neighbours.shape[2:]
    elif memory.mask is not None:
        k, r = memory.mask.shape[1:]
    else:
        k, r = retro.num_neighbours, retro.retrieved_length
    tokens = torch.zeros(len(wanted), k, r, dtype=torch.int64)
    mask = torch.zeros(len(wanted), k, r, dtype=torch.bool)
    if request.neighbours is not None:
        for place, (row, chunk) in enumerate(wanted):
            if chunk < request.neighbours.shape[1]:
                tokens[place], mask[place] = request.neighbours[row, chunk], request.mask[row, chunk]
    return tokens, mask


def warn_if_nothing_changed(retro: Retrofit, call: ModelCall) -> None:
    """Warns, once, where open gates and neighbours change nothing at all."""
    if not call.watch or call.plan.num_chunks == 0 or not any(bool(part.opening()) for part in retro.parts()):
        return
    retro.checked = True
    if not call.changed:
        seen = int(call.mask.sum())
        why = "every token of the neighbours is masked" if seen == 0 else f"{seen} tokens of neighbours were seen"
        warnings.warn(
            "retro_kernels.retrofit: the neighbours changed nothing, not one bit, though gates are open: " + why,
            RuntimeWarning,
            stacklevel=4,
        )
