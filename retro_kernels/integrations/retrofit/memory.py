"""What a retrofitted model remembers between the calls that write one text: the tokens so far, and the keys and values
of the neighbours that each sequence reads now. It hangs on transformers' cache and follows it."""

from __future__ import annotations

from typing import Any

import torch

from .call import KeysAndValues, ModelCall, Step

FOLLOWED = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset")
NONE = -1


class Followed:
    """A method of a cache, then the same for the memory. (An object, so that copies of the cache have their own.)"""

    def __init__(self, cache: Any, method: str) -> None:
        self.cache, self.method = cache, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = getattr(type(self.cache), self.method)(self.cache, *args, **kwargs)
        self.cache.retro.follow(self.cache, self.method, *args, *kwargs.values())
        return result


class Memory:
    """Attributes:
    ids: int64 [b, tokens], padding included, or None where embeddings came in.
    starts: the padding before each sequence, or None: no padding.
    held: keys and values [b, k, r, hk, d] of the chunk that each sequence reads.
    chunk: which one that is, -1 if none.
    mask: bool [b, k, r].
    """

    def __init__(self, ids: torch.Tensor | None, attention_mask: torch.Tensor | None, batch: int) -> None:
        self.ids, self.batch, self.length = ids, batch, 0
        self._attention_mask = attention_mask
        self._starts: list[int] | None = None
        self._last: ModelCall | None = None
        self._chunk_size = 0
        self.held: KeysAndValues = {}
        self.chunk: list[int] = [NONE] * batch
        self.mask: torch.Tensor | None = None
        self._laid: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def laid(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that are held, as the products of a step read them: [b * hk, k * r, d] each. Made once a
        chunk."""
        if layer not in self._laid:
            key, value = (x.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1) for x in self.held[layer])
            self._laid[layer] = key, value
        return self._laid[layer]

    def attach(self, cache: Any) -> None:
        cache.retro = self
        for method in FOLLOWED:
            if hasattr(type(cache), method):
                setattr(cache, method, Followed(cache, method))

    @property
    def starts(self) -> list[int]:
        if self._starts is None:
            if self._attention_mask is None:
                self._starts = [0] * self.batch
            else:
                mask = self._attention_mask.bool().cpu()
                length = mask.shape[1]
                self._starts = (length - mask.sum(1)).tolist()
                if any(not bool(row[start:].all()) for row, start in zip(mask, self._starts)):
                    raise ValueError(
                        "attention_mask: got padding after or within a sequence that goes on, expected it before the "
                        "sequence: set the tokenizer's padding_side to 'left'"
                    )
                self._attention_mask = None
        return self._starts

    def remember(self, call: ModelCall | None, n: int, chunk_size: int) -> None:
        """After a call of n tokens whose chunks' keys and values are all in `call`; None where it had none."""
        self.length += n
        self._chunk_size = chunk_size
        if call is not None and call.plan.num_chunks and not isinstance(call.plan, Step):  # a step's chunk is held
            self._last = call

    def settle(self) -> None:
        """Keeps of the last call's chunks those that are read on, and lets the others go. (Put off, because most calls
        are not continued.)"""
        call, self._last = self._last, None
        if call is None:
            return
        assert call.held is not None
        self._laid.clear()
        first = call.plan.first_chunk
        firsts = first.tolist() if isinstance(first, torch.Tensor) else first
        firsts = [firsts] * self.batch if isinstance(firsts, int) else firsts
        chunks = [(self.length - start) // self._chunk_size - 1 for start in self.starts]
        self.chunk = [max(chunk, NONE) for chunk in chunks]
        place = torch.tensor([max(chunk - first, 0) for chunk, first in zip(chunks, firsts)], device=call.mask.device)
        row = torch.arange(self.batch, device=call.mask.device)
        self.held = {layer: (key[row, place], value[row, place]) for layer, (key, value) in call.held.items()}
        there = torch.tensor([chunk >= 0 for chunk in chunks], device=call.mask.device)
        self.mask = call.mask[row, place] & there[:, None, None]

    def put(self, rows: list[int], chunks: list[int], encoded: KeysAndValues, mask: torch.Tensor) -> None:
        """Keys and values [s, k, r, hk, d] and mask [s, k, r] of the chunks that these sequences read from now on."""
        index = torch.tensor(rows, device=mask.device)
        self._laid.clear()
        if self.mask is None:
            self.mask = mask.new_zeros(self.batch, *mask.shape[1:])
            self.held = {
                layer: (key.new_zeros(self.batch, *key.shape[1:]), value.new_zeros(self.batch, *value.shape[1:]))
                for layer, (key, value) in encoded.items()
            }
        self.mask = self.mask.index_copy(0, index, mask)
        for layer, (key, value) in encoded.items():
            held_key, held_value = self.held[layer]
            self.held[layer] = held_key.index_copy(0, index, key), held_value.index_copy(0, index, value)
        for row, chunk in zip(rows, chunks):
            self.chunk[row] = chunk

    def follow(self, cache: Any, method: str, *args: Any) -> None:
        if method == "reset":
            del cache.retro
            for name in FOLLOWED:
                vars(cache).pop(name, None)
        elif method == "crop":
            self.settle()
            self.length = int(cache.get_seq_length())
            if self.ids is not None:
                self.ids = self.ids[:, : self.length]
            # A chunk that is no longer complete may be completed by other tokens.
            ends = [start + (chunk + 1) * self._chunk_size for start, chunk in zip(self.starts, self.chunk)]
            self.chunk = [NONE if end > self.length else chunk for end, chunk in zip(ends, self.chunk)]
            if self.mask is not None:
                there = torch.tensor([chunk != NONE for chunk in self.chunk], device=self.mask.device)
                self.mask = self.mask & there[:, None, None]
        else:
            (given,) = args
            rows = torch.arange(self.batch)
            if method == "batch_repeat_interleave":
                rows = rows.repeat_interleave(given)
            else:
                rows = rows[given.cpu() if isinstance(given, torch.Tensor) else given]
            self._select(rows)

    def _select(self, rows: torch.Tensor) -> None:
        self.settle()
        self._laid.clear()
        listed = rows.tolist()
        self._starts = [self.starts[row] for row in listed]
        self.chunk = [self.chunk[row] for row in listed]
        self.batch = len(listed)
        if self.ids is not None:
            self.ids = self.ids[rows.to(self.ids.device)]
        if self.mask is not None:
            rows = rows.to(self.mask.device)
            self.mask = self.mask[rows]
            self.held = {layer: (key[rows], value[rows]) for layer, (key, value) in self.held.items()}
