"""What every operation must give: a loop over tokens and heads in fp64, written from sections 2 and 3 of the design.

It shares no code with the library, imports nothing of it, and does not depend on the torch operations that the library
is built of: a row is a few dot products and `torch.softmax`. Every function takes the keyword arguments of the public
operation of its name, in any floating dtype, and returns out and lse in fp64.

Autograd differentiates it. A row picks, by index, the slots that it sees, and computes with nothing else: no masked
value is ever multiplied, so that NaN in what a row does not see reaches nothing by construction. Of what a row does
see, NaN and infinity do what they do in PyTorch's softmax attention; a row that sees nothing, or whose logits are all
-inf, is a constant: 0 with lse -inf.

Dropout: `kept`, bool [*query.shape[:-1], 1 + slots], says which probabilities stay, the null slot's first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

# One slot that a row sees: its neighbour (0 where there is none), its token, and its token's place in its document.
Slot = tuple[int, int, int]


class Options:
    """The options of one call that a row's logits depend on, in fp64."""

    def __init__(self, given: dict[str, Any], slots_of_a_neighbour: int, head_dim: int):
        self.r = slots_of_a_neighbour
        self.scale = head_dim**-0.5 if given.get("scale") is None else given["scale"]
        self.softcap = given.get("logit_softcap")
        self.interleaved = given.get("rotary_interleaved", False)
        self.survivor_scale = survivor_scale(given.get("dropout_p", 0.0))
        names = ("attention_bias", "relative_key", "content_bias", "relative_bias", "null_key", "null_value")
        for name in names:  # one tensor for each head
            setattr(self, name, None if given.get(name) is None else given[name].double().unbind(0))
        for name in ("query_rotary", "key_rotary"):
            tables = given.get(name)
            setattr(self, name, None if tables is None else tuple(table.detach().double() for table in tables))

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def survivor_scale(p: float) -> float:
    """p is rounded to a multiple of 2^-16."""
    return 1.0 / (1.0 - round(p * 65536) / 65536)


def turn(x: torch.Tensor, tables: Any, places: Any, interleaved: bool) -> torch.Tensor:
    """x [..., d], its first 2 w dimensions turned by the angles at `places` of the tables [.., w]."""
    if tables is None:
        return x
    cos, sin = (table[places] for table in tables)
    width = cos.shape[-1]
    pairs = [(2 * j, 2 * j + 1) if interleaved else (j, j + width) for j in range(width)]
    first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    a, c = x[..., first], x[..., second]
    turned = torch.cat([a * cos - c * sin, c * cos + a * sin, x[..., 2 * width :]], dim=-1)
    order = [*first, *second, *range(2 * width, x.shape[-1])]
    return turned[..., [order.index(j) for j in range(x.shape[-1])]]


def attend(
    options: Options,
    head: int,
    query: torch.Tensor,
    row: int,
    rotary_row: int,
    slots: list[Slot],
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of one head: query [d], the keys [s, d] and values [s, d_value] of the slots that it sees -> out
    [d_value], lse []."""

    def plus(bias: torch.Tensor | None) -> torch.Tensor:
        return query if bias is None else query + bias[head]

    content = turn(plus(options.content_bias), options.query_rotary, rotary_row, options.interleaved)
    columns = [j * options.r + t for j, t, _ in slots]
    logits = []
    if options.null_key is not None:
        logits.append(options.capped(options.scale * (content * options.null_key[head]).sum(-1, keepdim=True)))
        values = torch.cat([options.null_value[head][None], values])
    if slots:
        turned = turn(keys, options.key_rotary, [place for _, _, place in slots], options.interleaved)
        of_slots = options.scale * (turned * content).sum(-1)
        if options.relative_key is not None:
            distances = [row - t + options.r - 1 for _, t, _ in slots]
            position = options.relative_key[head][distances]
            of_slots = of_slots + options.scale * (position * plus(options.relative_bias)).sum(-1)
        of_slots = options.capped(of_slots)
        if options.attention_bias is not None:
            bias = options.attention_bias[head]
            places = [t for _, t, _ in slots] if bias.shape[-1] == options.r else columns
            of_slots = of_slots + bias[[row] * len(places), places]
        logits.append(of_slots)
    nothing = torch.zeros(values.shape[-1], dtype=torch.float64), torch.tensor(-math.inf, dtype=torch.float64)
    if not logits:
        return nothing
    logit = torch.cat(logits)
    if bool((logit == -math.inf).all()):
        return nothing
    probabilities = torch.softmax(logit, 0)
    if kept is not None:
        stays = kept[[*([0] if options.null_key is not None else []), *(1 + column for column in columns)]]
        probabilities = probabilities * stays.double() * options.survivor_scale
    return (probabilities[:, None] * values).sum(0), torch.logsumexp(logit, 0)


class Rows:
    """The rows of a query [..., d], and of its results, which are 0 and -inf until they are put."""

    def __init__(self, query: torch.Tensor, d_value: int):
        shape = tuple(query.shape[:-1])
        self.shape, self.d_value = shape, d_value
        self.query = query.double().reshape(-1, query.shape[-1]).unbind(0)
        self.out = [torch.zeros(d_value, dtype=torch.float64)] * math.prod(shape)
        self.lse = [torch.tensor(-math.inf, dtype=torch.float64)] * math.prod(shape)

    def _flat(self, place: tuple[int, ...]) -> int:
        flat = 0
        for index, size in zip(place, self.shape):
            flat = flat * size + index
        return flat

    def __getitem__(self, place: tuple[int, ...]) -> torch.Tensor:
        return self.query[self._flat(place)]

    def __setitem__(self, place: tuple[int, ...], result: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.out[self._flat(place)], self.lse[self._flat(place)] = result

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.out:
            return torch.zeros(*self.shape, self.d_value).double(), torch.zeros(self.shape).double()
        return torch.stack(self.out).view(*self.shape, self.d_value), torch.stack(self.lse).view(self.shape)


def documents(starts: torch.Tensor | None, sequence: int, tokens: int) -> list[int]:
    """The first token of the document of every token of a sequence. Its first token begins one, marked or not."""
    first: list[int] = []
    for token in range(tokens):
        begins = token == 0 or (starts is not None and bool(starts[sequence, token]))
        first.append(token if begins else first[-1])
    return first


def retrieving_tokens(given: dict[str, Any], sequence: int, n: int) -> Iterator[tuple[int, int, int]]:
    """Every token of a sequence that has a chunk, with that chunk (of `key`) and its row in it."""
    m, s = given["chunk_size"], given.get("stride") or given["chunk_size"]
    first = documents(given.get("sequence_starts"), sequence, n)
    chunks_before = 0  # of the documents before this one
    for token in range(n):
        if token > 0 and first[token] != first[token - 1]:
            length = token - first[token - 1]
            chunks_before += (length - m) // s + 1 if length >= m else 0
        if given.get("align", "start") == "end":
            clock = token - (n - 1) % m
        else:
            clock = token - first[token] + given.get("query_offset", 0) - (m - 1)
        if clock >= 0:
            yield token, chunks_before + clock // s - given.get("chunk_offset", 0), clock % s


def visible(mask: torch.Tensor | None, k: int, r: int) -> list[Slot]:
    """The slots of a chunk that its mask [k, r] lets be seen."""
    return [(j, t, t) for j in range(k) for t in range(r) if mask is None or bool(mask[j, t])]


def at(x: torch.Tensor, slots: list[Slot], *rest: int) -> torch.Tensor:
    """x [k, r, ...] at the slots: [s, ...]."""
    neighbour = torch.tensor([j for j, _, _ in slots], dtype=torch.int64)
    token = torch.tensor([t for _, t, _ in slots], dtype=torch.int64)
    return x[(neighbour, token, *rest)]


def given_keys(given: dict[str, Any], *place: int):
    """What makes the keys and values of one chunk's slots and one key/value head, where they are given."""

    def make(slots: list[Slot], head: int) -> tuple[torch.Tensor, torch.Tensor]:
        made = []
        for name in ("key", "value"):
            x = at(given[name][place], slots, head).double()
            scale = given.get(f"{name}_scale")
            made.append(x if scale is None else x * at(scale[place], slots).double()[:, None])
        return made[0], made[1]

    return make


def projected_keys(given: dict[str, Any], *place: int):
    """The same where they are projected from the states of the slots."""

    def make(slots: list[Slot], head: int) -> tuple[torch.Tensor, torch.Tensor]:
        states = at(given["encoded"][place], slots).double()
        if given.get("encoded_scale") is not None:
            states = states * at(given["encoded_scale"][place], slots).double()[:, None]
        made = []
        for name in ("key", "value"):
            x = (states[:, None] * given[f"w_{name}"][head].double()).sum(-1)
            bias = given.get(f"bias_{name}")
            made.append(x if bias is None else x + bias[head].double())
        return made[0], made[1]

    return make


class Once:
    """`make(slots, head)`, computed once for the same slots and key/value head."""

    def __init__(self, make):
        self.make, self.made = make, {}

    def __call__(self, slots: list[Slot], head: int) -> tuple[torch.Tensor, torch.Tensor]:
        key = (*slots, head)
        if key not in self.made:
            self.made[key] = self.make(slots, head)
        return self.made[key]


def _chunked(given: dict[str, Any], keys_of, sizes: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    b, n, h, d = given["query"].shape
    k, r, kv_heads, d_value = sizes
    options, rows, mask = Options(given, r, d), Rows(given["query"], d_value), given.get("neighbour_mask")
    for sequence in range(b):
        made: dict[int, Once] = {}
        for token, chunk, row in retrieving_tokens(given, sequence, n):
            if chunk not in made:
                made[chunk] = Once(keys_of(given, sequence, chunk))
            slots = visible(None if mask is None else mask[sequence, chunk], k, r)
            for head in range(h):
                place = (sequence, token, head)
                keys, values = made[chunk](slots, head // (h // kv_heads))
                rows[place] = attend(options, head, rows[place], row, row, slots, keys, values, kept(given, place))
    return rows.stacked()


def kept(given: dict[str, Any], place: tuple[int, ...]) -> torch.Tensor | None:
    return given["kept"][place] if "kept" in given else None


def chunked_cross_attention(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[b, n, h, d_value], [b, n, h]"""
    return _chunked(given, given_keys, (*given["key"].shape[2:5], given["value"].shape[-1]))


def projected_chunked_cross_attention(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[b, n, h, d_value], [b, n, h], whatever the strategy."""
    return _chunked(given, projected_keys, (*given["encoded"].shape[2:4], *given["w_value"].shape[:2]))


def neighbour_self_attention(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[b, l, k, r, h, d_value], [b, l, k, r, h]"""
    mask, causal = given.get("neighbour_mask"), given.get("causal", False)
    b, l, k, r, h, d = given["query"].shape
    group = h // given["key"].shape[-2]
    options, rows = Options(given, r, d), Rows(given["query"], given["value"].shape[-1])
    for sequence, chunk, neighbour in itertools.product(range(b), range(l), range(k)):
        first = documents(given.get("sequence_starts"), sequence, r)
        shown = [mask is None or bool(mask[sequence, chunk, neighbour, t]) for t in range(r)]
        alone = {name: given[name][:, :, neighbour : neighbour + 1] for name in ("key", "value")}
        made = Once(given_keys(alone, sequence, chunk))
        for token in range(r):
            slots = [
                (0, t, t - first[t])
                for t in range(r)
                if shown[t] and first[t] == first[token] and (t <= token or not causal)
            ]
            for head in range(h):
                place = (sequence, chunk, neighbour, token, head)
                rotary_row = token - first[token]
                keys, values = made(slots, head // group)
                rows[place] = attend(
                    options, head, rows[place], token, rotary_row, slots, keys, values, kept(given, place)
                )
    return rows.stacked()


def neighbour_cross_attention(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[b, l, k, r, h, d_value], [b, l, k, r, h]"""
    mask = given.get("activation_mask")
    b, l, k, r, h, d = given["query"].shape
    m, kv_heads = given["key"].shape[2:4]
    options, rows = Options(given, m, d), Rows(given["query"], given["value"].shape[-1])
    alone = {name: given[name][:, :, None] for name in ("key", "value")}  # the activations as those of one neighbour
    for sequence, chunk in itertools.product(range(b), range(l)):
        slots = visible(None if mask is None else mask[sequence, chunk][None], 1, m)
        made = Once(given_keys(alone, sequence, chunk))
        for neighbour, token, head in itertools.product(range(k), range(r), range(h)):
            place = (sequence, chunk, neighbour, token, head)
            keys, values = made(slots, head // (h // kv_heads))
            rows[place] = attend(options, head, rows[place], token, token, slots, keys, values, kept(given, place))
    return rows.stacked()


def _decode(given: dict[str, Any], keys_of, sizes: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    m, mask = given["chunk_size"], given.get("neighbour_mask")
    b, tokens, h, d = given["query"].shape
    k, r, kv_heads, d_value = sizes
    options, rows = Options(given, r, d), Rows(given["query"], d_value)
    for sequence in range(b):
        if given.get("valid") is not None and not bool(given["valid"][sequence]):
            continue
        slots = visible(None if mask is None else mask[sequence], k, r)
        held = None if given.get("chunk") is None else int(given["chunk"][sequence])
        made = Once(keys_of(given, sequence))
        for token in range(tokens):
            position = int(given["position"][sequence]) + token
            assert position >= 0, f"token {token} of sequence {sequence} is at {position}"
            chunk, row = divmod(position - (m - 1), m)
            if chunk < 0:
                continue
            held = chunk if held is None else held
            assert chunk == held, f"token {token} of sequence {sequence} attends to {chunk}, the cache holds {held}"
            for head in range(h):
                place = (sequence, token, head)
                keys, values = made(slots, head // (h // kv_heads))
                rows[place] = attend(options, head, rows[place], row, row, slots, keys, values, None)
    return rows.stacked()


def chunked_cross_attention_decode(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[b, t, h, d_value], [b, t, h]; tokens past the border of their chunk are an error."""
    return _decode(given, given_keys, (*given["key"].shape[1:4], given["value"].shape[-1]))


def projected_chunked_cross_attention_decode(**given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """[b, t, h, d_value], [b, t, h]"""
    return _decode(given, projected_keys, (*given["encoded"].shape[1:3], *given["w_value"].shape[:2]))
