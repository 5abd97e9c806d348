"""The cache of retrieved neighbours from which `ChunkedCrossAttention.decode` reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..ops import checks
from ..ops.attention.reference import accumulation_dtype, rotate
from ..ops.compiling import readable
from ..ops.decode import chunked_cross_attention_decode, projected_chunked_cross_attention_decode
from ..ops.decoding.common import QUANTISED
from . import common
from .chunked_cross_attention import ChunkedCrossAttention, project_neighbours, stack_projections

FORMS = ("key_value", "encoded")
NOTHING_HELD = -1

Slots = int | Iterable[int] | torch.Tensor


class NeighbourCache:
    """The neighbours that each of `num_slots` sequences attends to now, for all chunked cross-attention layers of a
    model. It is filled once when a chunk of a sequence is complete, and read by the next `chunk_size` tokens.

        cache = NeighbourCache(layers, num_slots=8, num_neighbours=2)
        cache.join([3])                              a sequence begins, in slot 3
        cache.fill([3], chunk=0, encoded=encoded)    its chunk 0 is complete: encoded [1, k, r, context_dim]
        layer.decode(hidden, cache, position)        for every layer and token: hidden [8, 1, model_dim], position [8]
        cache.leave([3])                             the slot is free

    Chunk u is complete with the token at position (u + 1) * chunk_size - 1, which is the first to attend to its
    neighbours: fill before the first layer decodes it. A sequence that joins with a prompt is filled with the last
    complete chunk of the prompt. A token whose chunk is not the one filled last is an error.

    Two forms. "key_value" holds keys (turned, with rotary positions) and values of each layer. "encoded" holds the
    encoder's states once for all heads and layers, for the paper's 7.5B model 9 times smaller than the keys and values
    of one layer; in exchange every token multiplies with W_k and W_v, and layers with rotary positions are refused.
    With `dtype` int8 or float8_e4m3fn a neighbour token's numbers are stored as codes times one fp32 scale.

    All memory is allocated here and written in place, so a CUDA graph that decodes may be replayed. On a GPU nothing
    waits for the device. The layers' tables of positions are made here, once, and what is stored is made of the weights
    of its time: after the weights have changed, make a new cache.

    Args:
        layers: the layers that will decode from it, on one device, with one dtype, `chunk_size` and `context_dim`,
            retrieving every `chunk_size` tokens. Layers that are aligned to the end decode as if the tokens that the
            prompt's first chunk lacks stood before it: for a prompt of p tokens, positions are then larger by -p
            modulo `chunk_size`, and the prompt ends a chunk.
        num_slots: sequences at a time; the batch of every `decode`.
        num_neighbours, retrieved_length: k and r; where fewer were retrieved, mask the rest. `retrieved_length` is by
            default that of the layers.
        form: "key_value" or "encoded".
        dtype: of what is stored; default that of the layers. Under autocast it must be the autocast dtype, or int8 or
            float8_e4m3fn.
        one_product: make the keys and values of all layers in one product of matrices (`project_neighbours`): fewer
            kernels to launch on a GPU, where it was not timed; on a CPU it is no faster. It keeps a copy of their
            weights side by side, takes memory for the results of all layers at a time, and on the reference is equal
            to `forward` within rounding only.

    Attributes:
        valid: bool [num_slots], False in free slots, whose tokens output 0.
        chunk: int64 [num_slots], the chunk whose neighbours are held, -1 if none.
        neighbour_mask: bool [num_slots, k, r], True = attend.

    Raises TypeError or ValueError for layers that cannot share a cache or not be decoded, and for wrong arguments.
    """

    def __init__(
        self,
        layers: Sequence[ChunkedCrossAttention],
        *,
        num_slots: int,
        num_neighbours: int,
        retrieved_length: int | None = None,
        form: str = "key_value",
        dtype: torch.dtype | None = None,
        one_product: bool = False,
    ) -> None:
        self.layers = list(layers)
        first = _check_layers(self.layers)
        weight = first.w_query.weight
        self.device, self.chunk_size, self.context_dim = weight.device, first.chunk_size, first.context_dim
        self.num_slots = checks.integer("num_slots", num_slots, 1)
        self.num_neighbours = checks.integer("num_neighbours", num_neighbours, 1)
        r = first.retrieved_length if retrieved_length is None else retrieved_length
        self.retrieved_length = checks.integer("retrieved_length", r, 1)
        self.form = common.one_of("form", form, FORMS)
        self.dtype = common.one_of("dtype", weight.dtype if dtype is None else dtype, (*checks.FLOATING, *QUANTISED))
        if form == "encoded":
            if one_product:
                raise ValueError('one_product: got True with form="encoded", which projects nothing, expected False')
            for i, layer in enumerate(self.layers):
                layer.key_and_value_weights()
                if layer.rotary is not None:
                    raise ValueError(
                        f'form: got "encoded", but layers[{i}] has rotary positions, which turn every key after W_k, '
                        'so that W_k cannot be applied to the query instead; expected form="key_value"'
                    )

        size = (self.num_slots, self.num_neighbours, self.retrieved_length)
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.valid = torch.zeros(self.num_slots, dtype=torch.bool, device=self.device)
            self.chunk = torch.full((self.num_slots,), NOTHING_HELD, dtype=torch.int64, device=self.device)
            self.neighbour_mask = torch.zeros(size, dtype=torch.bool, device=self.device)
            self._positions = [layer._position_arguments(*size[1:]) for layer in self.layers]
            # Keys are turned when they are stored.
            self._key_rotary = [arguments.pop("key_rotary", None) for arguments in self._positions]
            for arguments in self._positions:  # or every token would copy the table of distances for its product
                if "relative_key" in arguments:
                    arguments["relative_key"] = arguments["relative_key"].contiguous()
            self._stacked = stack_projections(self.layers) if one_product else None
            shapes: list[tuple[int, ...]] = [(self.context_dim,)]
            if form == "key_value":
                shapes = [
                    (layer.num_kv_heads, width)
                    for layer in self.layers
                    for width in (layer.head_dim, layer.value_head_dim)
                ]
            self._stores = [_Store((*size, *shape), self.dtype, self.device) for shape in shapes]

    @property
    def bytes(self) -> int:
        """Memory of the cache: what it stores of all slots and layers, scales and masks included. The tables of
        positions, which do not depend on the slots, are not counted."""
        tensors = [self.valid, self.chunk, self.neighbour_mask]
        for store in self._stores:
            tensors += [store.data] if store.scale is None else [store.data, store.scale]
        return sum(x.numel() * x.element_size() for x in tensors)

    @torch.no_grad()
    def join(self, slots: Slots) -> None:
        """A sequence begins in each of the slots (see `fill`), whatever was there: it holds no neighbours."""
        self._begin(slots, valid=True)

    @torch.no_grad()
    def leave(self, slots: Slots) -> None:
        """The slots are free: until a sequence joins, their tokens output 0 and nothing of them is read."""
        self._begin(slots, valid=False)

    def _begin(self, slots: Slots, valid: bool) -> None:
        target = self._target(slots, validate=False)
        target.write(self.chunk, torch.full_like(target.index, NOTHING_HELD))
        target.write(self.valid, torch.full_like(target.index, valid, dtype=torch.bool))

    @torch.no_grad()
    def fill(
        self,
        slots: Slots,
        chunk: Slots,
        encoded: torch.Tensor,
        neighbour_mask: torch.Tensor | None = None,
        *,
        validate: bool = False,
    ) -> None:
        """Puts the neighbours of a complete chunk in each of the slots, in place of those of the chunk before. (A slot
        that was free is so no longer.)

        Args:
            slots: one slot, several, or int64 [s] on the cache's device; no slot twice.
            chunk: the chunk's index in its sequence, one for all slots or one each, likewise.
            encoded: [s, k, r, context_dim], the output of the neighbour encoder.
            neighbour_mask: bool [s, k, r], True = attend; None: to everything.
            validate: wait for a GPU and check `slots` and `chunk` where these are tensors on it.

        Raises:
            TypeError, ValueError: wrong sizes, dtypes or devices, a slot out of range or given twice, a negative chunk;
            nothing is written then. Slots in a tensor on a GPU are not checked without `validate`: those out of range
            are left out.
        """
        target = self._target(slots, validate)
        s = target.index.shape[0]
        size = (s, self.num_neighbours, self.retrieved_length)
        chunk = self._chunks(chunk, s, validate)
        checks.tensor("encoded", encoded, checks.FLOATING)
        self.check_device("encoded", encoded)
        checks.shape("encoded", encoded, "slots, k, r, context_dim", (*size, self.context_dim))
        if neighbour_mask is None:
            neighbour_mask = torch.ones(size, dtype=torch.bool, device=self.device)
        else:
            checks.tensor("neighbour_mask", neighbour_mask, (torch.bool,))
            self.check_device("neighbour_mask", neighbour_mask)
            checks.shape("neighbour_mask", neighbour_mask, "slots, k, r", size)
            # NaN in a masked token must not reach a scale.
            encoded = encoded.masked_fill(~neighbour_mask[..., None], 0.0)

        if self.form == "encoded":
            self._check_dtype("encoded", encoded)
            self._stores[0].write(target, encoded)
        else:
            self._fill_keys_and_values(target, encoded)
        target.write(self.neighbour_mask, neighbour_mask)
        target.write(self.chunk, chunk)
        target.write(self.valid, torch.ones_like(chunk, dtype=torch.bool))

    def _fill_keys_and_values(self, target: _Target, encoded: torch.Tensor) -> None:
        dtype = self.layers[0].w_query.weight.dtype
        if encoded.dtype != dtype and not torch.is_autocast_enabled(self.device.type):
            raise TypeError(f"encoded: got dtype {encoded.dtype}, expected {dtype}, that of the layers")
        made: Iterable[tuple[torch.Tensor, torch.Tensor]]
        if self._stacked is not None:
            made = project_neighbours(self.layers, encoded, self._stacked)
        else:  # one layer at a time is in memory
            made = (layer.keys_and_values(encoded) for layer in self.layers)
        stores = zip(self._stores[::2], self._stores[1::2])
        for layer, rotary, (keys, values), (key, value) in zip(self.layers, self._key_rotary, stores, made):
            self._check_dtype("the layers' keys and values", key)
            if rotary is not None:
                turned = rotate(key.to(accumulation_dtype(key.dtype)), rotary, layer.rotary_interleaved)
                key = turned.to(key.dtype)
            keys.write(target, key)
            values.write(target, value)

    def attend(
        self, layer: ChunkedCrossAttention, query: torch.Tensor, position: torch.Tensor, *, validate: bool = False
    ) -> torch.Tensor:
        """The attention inside `layer.decode`: query [num_slots, t, h, head_dim] -> [num_slots, t, h, value_head_dim].

        Raises ValueError for a layer that the cache was not made for, TypeError for a query of another dtype than a
        cache that is not quantised, and what the operations raise.
        """
        i = self.place(layer)
        self._check_dtype("the layer's query", query)
        options: dict[str, Any] = {
            "chunk_size": self.chunk_size,
            "position": position,
            "valid": self.valid,
            "chunk": self.chunk,
            "neighbour_mask": self.neighbour_mask,
            "null_key": layer.null_key,
            "null_value": layer.null_value,
            "scale": layer.scale,
            "validate": validate,
            "backend": layer.backend,
            **self._positions[i],
        }
        out: Any
        if self.form == "key_value":
            key, value = self._stores[2 * i : 2 * i + 2]
            out = chunked_cross_attention_decode(
                query, key.data, value.data, key_scale=key.scale, value_scale=value.scale, **options
            )
        else:
            w_key, w_value, bias_key, bias_value = layer.key_and_value_weights()
            states = self._stores[0]
            out = projected_chunked_cross_attention_decode(
                query,
                states.data,
                w_key,
                w_value,
                bias_key=bias_key,
                bias_value=bias_value,
                encoded_scale=states.scale,
                **options,
            )
        return out

    def place(self, layer: ChunkedCrossAttention) -> int:
        """Which of the layers it is. Raises ValueError if it is none of them."""
        for i, own in enumerate(self.layers):
            if own is layer:
                return i
        raise ValueError(
            f"cache: got one of {len(self.layers)} other layers, expected one that was made with this layer "
            "(NeighbourCache([..., layer, ...], ...))"
        )

    def check_device(self, name: str, x: torch.Tensor) -> None:
        if x.device != self.device:
            raise ValueError(f"{name}: got a tensor on {x.device}, expected {self.device}, where the cache is")

    def _check_dtype(self, name: str, x: torch.Tensor) -> None:
        if self.dtype not in QUANTISED and x.dtype != self.dtype:
            raise TypeError(
                f"{name}: got dtype {x.dtype}, expected {self.dtype}, the cache's; make the cache with "
                f"dtype={x.dtype}, or quantised"
            )

    def _target(self, slots: Slots, validate: bool) -> _Target:
        index = self._indices("slots", slots)
        if self._readable(slots, index, validate):
            given = index.tolist()
            outside = [slot for slot in given if not 0 <= slot < self.num_slots]
            if outside:
                raise ValueError(f"slots: got {outside[0]}, expected 0 to num_slots - 1 = {self.num_slots - 1}")
            if len(set(given)) < len(given):
                raise ValueError(f"slots: got {given}, expected no slot twice")
            return _Target(index.to(self.device, non_blocking=True))
        return _Target.checked_on_device(index, self.num_slots)

    def _chunks(self, chunk: Slots, count: int, validate: bool) -> torch.Tensor:
        index = self._indices("chunk", chunk)
        if index.shape[0] not in (1, count):
            raise ValueError(f"chunk: got {index.shape[0]}, expected 1 or {count}, as many as slots")
        if self._readable(chunk, index, validate) and bool((index < 0).any()):
            raise ValueError(f"chunk: got {int(index.min())}, expected at least 0")
        return index.to(self.device, non_blocking=True).expand(count)

    def _indices(self, name: str, given: Slots) -> torch.Tensor:
        """int64 [s]: a tensor where it is, numbers on the CPU."""
        if isinstance(given, torch.Tensor):
            checks.tensor(name, given, (torch.int64,))
            self.check_device(name, given)
            checks.rank(name, given, "s")
            return given
        numbers = [given] if isinstance(given, int) else list(given)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name}: got {number!r} ({type(number).__name__}), expected an int")
        return torch.tensor(numbers, dtype=torch.int64, device="cpu")

    @staticmethod
    def _readable(given: Slots, index: torch.Tensor, validate: bool) -> bool:
        """Whether the numbers may be looked at: not on a GPU, which would be waited for, nor where there are none."""
        return (validate or not isinstance(given, torch.Tensor) or given.device.type == "cpu") and readable(index)

    def __repr__(self) -> str:
        return (
            f"NeighbourCache({len(self.layers)} layers, num_slots={self.num_slots}, "
            f"num_neighbours={self.num_neighbours}, retrieved_length={self.retrieved_length}, form={self.form!r}, "
            f"dtype={self.dtype}, device={self.device}, bytes={self.bytes})"
        )


class _Target:
    """The slots that a call writes to, and for slots that could not be looked at, what keeps those out of range from
    being written: they repeat the first that is in range, or, where none is, what is there."""

    def __init__(self, index: torch.Tensor, source: torch.Tensor | None = None, found: torch.Tensor | None = None):
        self.index, self.source, self.found = index, source, found

    @classmethod
    def checked_on_device(cls, slots: torch.Tensor, num_slots: int) -> _Target:
        inside = (slots >= 0) & (slots < num_slots)
        if slots.shape[0] == 0:
            return cls(slots)
        source = torch.where(inside, torch.arange(slots.shape[0], device=slots.device), inside.int().argmax())
        return cls(slots[source].clamp(0, num_slots - 1), source, inside.any())

    def write(self, into: torch.Tensor, rows: torch.Tensor) -> None:
        if into.dtype == torch.float8_e4m3fn:  # which PyTorch copies by index on no CPU
            into, rows = into.view(torch.uint8), rows.view(torch.uint8)
        if self.source is not None and self.found is not None:
            rows = torch.where(self.found, rows[self.source], into[self.index])
        into.index_copy_(0, self.index, rows)


class _Store:
    """Numbers of every neighbour token, [num_slots, k, r, ...], and where quantised their scales [num_slots, k, r]."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.scale: torch.Tensor | None = None
        if dtype in QUANTISED:
            self.scale = torch.zeros(shape[:3], dtype=torch.float32, device=device)

    def write(self, target: _Target, x: torch.Tensor) -> None:
        if self.scale is None:
            target.write(self.data, x)
            return
        codes, scale = quantise(x, self.data.dtype)
        target.write(self.data, codes)
        target.write(self.scale, scale)


def quantise(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [s, k, r, ...] -> codes of `dtype`, int8 or float8_e4m3fn, and scales fp32 [s, k, r] with x = codes * scale, to
    half a step of int8, or a sixteenth of each number in float8. The largest number of a token has the largest code."""
    x = x.float()
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = x.flatten(3).abs().amax(-1) / largest
    codes = (x / scale.where(scale > 0.0, 1.0).view(*scale.shape, *[1] * (x.dim() - 3))).clamp(-largest, largest)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def _check_layers(layers: list[ChunkedCrossAttention]) -> ChunkedCrossAttention:
    """-> the first layer. Raises unless all can decode, from one cache."""
    if not layers:
        raise ValueError("layers: got none, expected the ChunkedCrossAttention layers of a model")
    for i, layer in enumerate(layers):
        if not isinstance(layer, ChunkedCrossAttention):
            raise TypeError(f"layers: got {type(layer).__name__} at {i}, expected ChunkedCrossAttention layers")
        if layer.stride != layer.chunk_size:
            raise ValueError(
                f"layers: got stride={layer.stride} at {i}, which decoding does not have; expected stride = "
                f"chunk_size = {layer.chunk_size}"
            )
        for name, mine, wanted in (
            ("chunk_size", layer.chunk_size, layers[0].chunk_size),
            ("context_dim", layer.context_dim, layers[0].context_dim),
            ("device", layer.w_query.weight.device, layers[0].w_query.weight.device),
            ("dtype", layer.w_query.weight.dtype, layers[0].w_query.weight.dtype),
        ):
            if mine != wanted:
                raise ValueError(f"layers: got {name} {mine} at {i}, expected {wanted}, that of the first")
    return layers[0]
