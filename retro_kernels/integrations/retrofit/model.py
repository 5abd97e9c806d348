"""`model.retro`: what is added to the whole model, and how neighbours are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...ops import checks as validate
from . import checks
from .attention import CALL, CLOSED, Chunks, HasRead, LayerConfig, Reader, RetrofitAttention, in_use
from .call import KeysAndValues

if TYPE_CHECKING:
    from .store import EncodedChunks

NOT_READ = object()


class Retrofit(nn.Module):
    """The submodule `retro` of a retrofitted model.

    Attributes:
        settings: chunk_size, num_neighbours, retrieved_length, join, encoder, init and layers, as `retrofit` got them.
        encoder: the encoder, where the decoder's own layers are none.
    """

    def __init__(self, model: nn.Module, settings: dict[str, Any], encoder: nn.Module | None) -> None:
        super().__init__()
        self.settings = settings
        self.chunk_size: int = settings["chunk_size"]
        self.num_neighbours: int = settings["num_neighbours"]
        self.retrieved_length: int = settings["retrieved_length"]
        self.join: str = settings["join"]
        self.positions: str = settings.get("positions", "chunk")
        self.encoder = encoder
        self.frequencies: list[tuple[str, str]] = []
        """The model's tables of frequencies: a submodule's name and a buffer's."""
        self.was_trained: list[str] = []
        """The parameters of the base that had gradients before `freeze`."""
        self._model = (model,)  # in a tuple, because the model is no part of this one
        self.found: dict[tuple[int, ...], Any] = {}
        """The sources of the neighbours of a chunk, by its tokens, since the last prompt."""
        self.checked = False
        """Whether it was seen that neighbours change something."""
        self._open: dict[int, Any] = {}
        self.store: EncodedChunks | None = None
        """What was made of the retriever's database beforehand; see `use`."""
        self._seen: Any = None
        """The database that is known to be the store's."""
        self._numbers: dict[bytes, int] = {}
        """The numbers of the chunks that were retrieved since the last prompt, by their tokens."""
        self._parts: list[RetrofitAttention] = []
        self.shares: dict[int, torch.Tensor] | None = None
        """See `ModelCall`; set while `gains` computes."""
        self.force = False
        """Computes also what closed gates leave out: the probe shows that it changes nothing."""

    @property
    def model(self) -> Any:
        return self._model[0]

    @property
    def device(self) -> torch.device:
        """Where tokens are read."""
        return self.model.get_input_embeddings().weight.device

    def attentions(self) -> Iterator[nn.Module]:
        """The self-attentions that have a part of ours."""
        for module in self.model.modules():
            if isinstance(vars(module).get("_modules", {}).get("retro"), RetrofitAttention):
                yield module

    def parts(self) -> list[RetrofitAttention]:
        if not self._parts:  # every call asks, and a walk through all modules takes a while
            self._parts = [module.retro for module in self.attentions()]  # type: ignore[misc]
        return self._parts

    # -- gates

    def gates(self) -> dict[int, torch.Tensor]:
        """Attention -> its gate [h], a copy: a bias (join="softmax", -inf: closed) or a factor (join="add", 0)."""
        return {part.layer: in_use(part.gate).weight.detach().clone() for part in self.parts()}

    def active(self) -> frozenset[int]:
        """The attentions that look at the neighbours: those with an open head, and those that learn to open one. Gates
        that were open and have not changed since are not read again (an edit of `.data` is not seen, but computing with
        closed gates is merely of no effect); all others are, in every call, and together. A compiled graph reads no
        data and takes all to be open."""
        parts = self.parts()
        if self.force or torch.compiler.is_compiling():
            return frozenset(part.layer for part in parts)
        states = {part.layer: part.state() for part in parts}
        known = {x.layer for x in parts if x.learns() or states[x.layer] == self._open.get(x.layer, NOT_READ)}
        unknown = [part for part in parts if part.layer not in known]
        if unknown:
            first = unknown[0].opening()
            flags = torch.stack([first, *(part.opening().to(first.device) for part in unknown[1:])]).tolist()
            for part, flag in zip(unknown, flags):
                if flag:
                    known.add(part.layer)
                    self._open[part.layer] = states[part.layer]
        return frozenset(known)

    def set_gates(self, value: float) -> None:
        """Gives every head of every layer this bias or factor."""
        with torch.no_grad():
            for part in self.parts():
                in_use(part.gate).weight.fill_(value)

    def close_gates(self) -> None:
        """The model computes what the base computes, to the bit."""
        self.set_gates(CLOSED[self.join])

    def gains(
        self, input_ids: torch.Tensor, neighbours: torch.Tensor, neighbour_mask: torch.Tensor | None = None
    ) -> dict[int, torch.Tensor]:
        """What neighbours take off the loss through each head: attention -> [h], nats a token, of the tokens of these
        texts [b, n] that may see some. To first order, from one pass forward and backward: by how much the loss would
        rise if that head alone looked away. For `keep_layers`."""
        m, size = self.chunk_size, self.model.get_input_embeddings().num_embeddings
        self.shares = {
            part.layer: torch.ones(part.num_heads, device=self.device, requires_grad=True) for part in self.parts()
        }
        try:
            with torch.enable_grad():
                given = {"neighbours": neighbours, "neighbour_mask": neighbour_mask, "use_cache": False}
                logits = self.model(input_ids[:, :-1], **given).logits[:, m - 1 :].float()
                loss = torch.nn.functional.cross_entropy(logits.reshape(-1, size), input_ids[:, m:].flatten())
                shares = list(self.shares.values())
                found = torch.autograd.grad(loss, shares, allow_unused=True)
            return {layer: torch.zeros_like(x) if x is None else -x for layer, x in zip(self.shares, found)}
        finally:
            self.shares = None

    def keep_layers(self, layers: Iterable[int]) -> None:
        """Takes what was added away from all attentions but these, which then cost what they cost in the base, and
        neighbours are read only up to the highest of these. For good: `retrofit` again from a folder brings the others
        back. What the others gained is lost; training the gates that are left gets some of it back.

        Raises ValueError for layers without a part of ours, and for none.
        """
        kept, there = set(layers), [part.layer for part in self.parts()]
        if not kept or not kept <= set(there):
            raise ValueError(f"layers: got {sorted(kept)}, expected some of {there}")
        if self.parts()[0].cross is not None and there[0] not in kept:
            raise ValueError(
                f"layers: got {sorted(kept)}, expected {there[0]} too, where neighbours look at their chunk"
            )
        for module in list(self.attentions()):
            if module.retro.layer not in kept:  # type: ignore[union-attr, operator]
                self._remove(module)
        self._parts = []
        self.settings["layers"] = sorted(kept)

    # -- what is added, and how it is taken away

    def added(self) -> dict[str, torch.Tensor]:
        """Name in the model's state dict -> tensor of all that was added. (Of PEFT's copies, those in use.)"""
        found = {f"retro.{name}": x for name, x in self.state_dict().items()}
        for name, part in self.model.named_modules():
            if isinstance(part, RetrofitAttention):
                for child, module in part.named_children():
                    found |= {f"{name}.{child}.{key}": x for key, x in in_use(module).state_dict().items()}
        return found

    def undo(self) -> None:
        """Takes everything added away; the model is what it was, and so is which of its parameters have gradients."""
        model = self.model
        for module in list(self.attentions()):
            self._remove(module)
        self._parts = []
        if type(vars(model).get("forward")).__name__ == "RetroForward":
            del model.forward
        for name, parameter in model.named_parameters():
            if name in self.was_trained:
                parameter.requires_grad_(True)
        if getattr(model, "retro", None) is self:
            del model.retro

    @staticmethod
    def _remove(module: Any) -> None:
        if isinstance(module.config, LayerConfig):
            module.config = module.config.base
        del module.retro

    def save_pretrained(self, folder: Any) -> None:
        """Writes what was added to `retro.safetensors` and the settings, with a hash of the base, to `retro.json` in
        the folder, which is made. `rk.retrofit(base, folder)` puts it on the base again."""
        from .files import save

        save(self, folder)

    def sources(self, sequences: torch.Tensor | Sequence[Sequence[int]], attention_mask: Any = None) -> list[dict]:
        """Where the neighbours came from that generated texts have read since the last prompt: for each sequence,
        chunk -> what the retriever gave as `sources` for it.

        Args:
            sequences: what `generate` returned.
            attention_mask: of the prompts [b, n], where they were padded on the left.
        """
        rows = sequences.tolist() if isinstance(sequences, torch.Tensor) else [list(row) for row in sequences]
        if attention_mask is not None:
            padding = (attention_mask == 0).sum(1).tolist()
            if len(padding) != len(rows):  # num_return_sequences
                padding = [x for x in padding for _ in range(len(rows) // len(padding))]
            rows = [row[start:] for row, start in zip(rows, padding)]
        m = self.chunk_size
        named = [{u: self.found.get(tuple(row[u * m : (u + 1) * m])) for u in range(len(row) // m)} for row in rows]
        return [{u: source for u, source in row.items() if source is not None} for row in named]

    def use(self, store: EncodedChunks | None) -> None:
        """Takes the keys and values of retrieved neighbours from what `encode_database` made of the retriever's
        database (None: reads them again). A retriever that does not say which chunks it found is read as ever.

        Raises ValueError for what was made by another base, or of shorter neighbours, or without a layer that looks at
        them.
        """
        if store is not None:
            from .files import fingerprint

            if store.facts["base"] != fingerprint(self.model):
                raise ValueError(f"store: {store.folder} was made by another base than this model")
            if self.settings["encoder"] != "own":
                raise ValueError(
                    f'store: got one for encoder={self.settings["encoder"]!r}, expected "own": there what the '
                    "decoder makes of a neighbour depends on nothing else and can be kept by its number"
                )
            if store.facts["retrieved_length"] != self.retrieved_length:
                raise ValueError(
                    f"store: {store.folder} has neighbours of {store.facts['retrieved_length']} tokens, expected "
                    f"retrieved_length = {self.retrieved_length}"
                )
            self._check_layers(store)
        self.store, self._seen = store, None
        self.forget()

    # -- reading neighbours

    def crossing(self) -> int | None:
        """The attention where neighbours look at their chunk, if they do: encoder="own+cross", and the gate is not
        closed (a compiled graph reads no data and takes it to be open)."""
        part = self.parts()[0]
        always = self.force or torch.compiler.is_compiling()
        return part.layer if part.cross is not None and (always or part.crosses()) else None

    def encode(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None,
        layers: Set[int] | None = None,
        chunks: Chunks | None = None,
    ) -> KeysAndValues | torch.Tensor:
        """Neighbours [..., r] -> keys and values of these layers (None: all that have a part), [..., r, hk, d] each, or
        an encoder's states [..., r, e]. The decoder reads no further than to the last of these layers. chunks: see
        `Reader`."""
        leading = tuple(tokens.shape[:-1])
        flat = tokens.reshape(-1, tokens.shape[-1])
        there = None
        if mask is not None:
            there = mask.reshape(flat.shape)
            flat = flat.masked_fill(~there, 0)
            # A neighbour that is missing altogether is read as one token, so that its rows are no softmax over nothing.
            first = torch.zeros_like(there)
            first[:, 0] = ~there.any(1)
            there = there | first
        if self.encoder is not None:
            states = self.encoder(flat, torch.ones_like(flat, dtype=torch.bool) if there is None else there)
            return states.view(*leading, *states.shape[1:])
        learns = torch.is_grad_enabled() and any(
            x.requires_grad
            for name, x in self.model.base_model.named_parameters()
            if ".retro." not in name or (chunks is not None and ".retro.cross." in name)
        )
        wanted = frozenset(part.layer for part in self.parts()) if layers is None else layers
        # What shares parameters out, or compiles, wants calls that return.
        shared_out = any(hasattr(x, "full_tensor") for x in self.model.base_model.parameters())
        may_stop = not (learns or shared_out or torch.compiler.is_compiling())
        if chunks is not None:
            checks.reads_within_a_call(self, shared_out)
        reader = Reader(wanted, learns, may_stop, chunks, self.tables())
        with torch.set_grad_enabled(learns), suppress(HasRead):
            self.model.base_model(
                input_ids=flat,
                attention_mask=None if there is None else there.long(),
                use_cache=False,
                **{CALL: reader},
            )
        return {
            layer: (key.unflatten(0, leading), value.unflatten(0, leading))
            for layer, (key, value) in reader.found.items()
        }

    def encode_once(self, tokens: torch.Tensor, mask: torch.Tensor, layers: Set[int] | None = None) -> KeysAndValues:
        """Keys and values of neighbours [..., r] of which many may be equal: each is read once."""
        flat, there = tokens.flatten(0, -2), mask.flatten(0, -2)
        both = torch.cat([flat.masked_fill(~there, 0), there.long()], -1)
        different, place = both.unique(dim=0, return_inverse=True)
        made = self._made(different, tokens.shape[-1], layers)
        return {
            layer: (key[place].unflatten(0, tokens.shape[:-1]), value[place].unflatten(0, tokens.shape[:-1]))
            for layer, (key, value) in made.items()
        }

    def _check_layers(self, store: EncodedChunks) -> None:
        lacking = sorted(self.active() - set(store.shapes))
        if lacking:
            raise ValueError(f"store: {store.folder} has no layers {lacking}, whose gates are open: close these")

    def _is_stored(self, database: Any) -> bool:
        """Whether a retriever's numbers are of what is in the store. Raises ValueError for another database."""
        if self.store is None or database is None:
            return False
        if database is not self._seen:
            if database.content_hash() != self.store.facts["database_sha256"]:
                raise ValueError(
                    f"retriever: its database is not the one that {self.store.folder} was made of; give that one, or "
                    "model.retro.use(None)"
                )
            self._seen = database
        return True

    def forget(self) -> None:
        """A new prompt begins."""
        self._numbers.clear()

    def _made(self, both: torch.Tensor, r: int, layers: Set[int] | None) -> KeysAndValues:
        """Keys and values of neighbours, tokens and mask [s, 2 r]: those of the store, and others read now."""
        store = self.store
        numbers = [] if store is None else [self._numbers.get(row.tobytes(), -1) for row in both.cpu().numpy()]
        kept = [place for place, number in enumerate(numbers) if number >= 0]
        if store is None or not kept:
            return self.projected(self.encode(both[:, :r], both[:, r:].bool(), layers))
        self._check_layers(store)  # gates may have been opened since
        known = store(torch.tensor([numbers[place] for place in kept]), self.active() if layers is None else layers)
        new = torch.tensor([place for place in range(len(both)) if place not in set(kept)], device=both.device)
        read = self.projected(self.encode(both[new, :r], both[new, r:].bool(), known.keys())) if len(new) else {}
        made: KeysAndValues = {}
        for layer, pair in known.items():
            whole = []
            for i, x in enumerate(pair):
                like = read[layer][i] if read else x.to(self.model.dtype)
                full = like.new_zeros(len(both), *x.shape[1:], device=both.device)
                full[torch.tensor(kept, device=both.device)] = x.to(full)
                if read:
                    full[new] = like
                whole.append(full)
            made[layer] = (whole[0], whole[1])
        return made

    def projected(self, encoded: KeysAndValues | torch.Tensor) -> KeysAndValues:
        if isinstance(encoded, dict):
            return encoded
        tables = self.tables()
        return {
            part.layer: part.keys_and_values(encoded, None if part.rotary is None else tables[part.rotary[0]])
            for part in self.parts()
        }

    def tables(self) -> list[torch.Tensor]:
        return [getattr(self.model.get_submodule(module), buffer) for module, buffer in self.frequencies]

    def visible(self, mask: torch.Tensor) -> torch.Tensor:
        """Which neighbour tokens are seen. Under one softmax a neighbour's first token is hidden: as the first of its
        text it is where a decoder's heads look when they look for nothing."""
        if self.join == "add":
            return mask
        seen = mask.clone()
        seen[..., 0] = False
        return seen

    def retrieve(
        self, retriever: Callable[[torch.Tensor], Any], chunks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chunks int64 [s, m] -> neighbours and mask [s, num_neighbours, retrieved_length], on the CPU."""
        k, r, s = self.num_neighbours, self.retrieved_length, chunks.shape[0]
        chunks = chunks.cpu()
        found = retriever(chunks)
        if not hasattr(found, "tokens"):
            raise TypeError(f"retriever: gave a {type(found).__name__} without tokens, expected Neighbours")
        tokens = validate.tensor("the retriever's tokens", found.tokens, checks.INTEGERS).cpu().long()
        shape = tuple(tokens.shape)
        if len(shape) != 3 or shape[0] != s or shape[1] > k or shape[2] > r:
            raise ValueError(
                f"retriever: gave tokens of shape {list(shape)} for {s} chunks, expected [{s}, k, r] with k at most "
                f"num_neighbours = {k} and r at most retrieved_length = {r}"
            )
        mask = getattr(found, "mask", None)
        mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.cpu()
        validate.tensor("the retriever's mask", mask, (torch.bool,))
        validate.shape("the retriever's mask", mask, "s, k, r", shape)
        checks.vocabulary(self, "retriever", tokens.masked_fill(~mask, 0))
        sources = getattr(found, "sources", None)
        if sources is not None:
            if len(sources) != s:
                raise ValueError(f"retriever: gave sources of {len(sources)} chunks, expected {s}")
            for i, chunk in enumerate(chunks.tolist()):
                self.found[tuple(chunk)] = sources[i]
        numbers = getattr(found, "ids", None)
        if numbers is not None and self._is_stored(getattr(retriever, "database", None)):
            padded = torch.nn.functional.pad(tokens.masked_fill(~mask, 0), (0, r - shape[2]))
            both = torch.cat([padded, torch.nn.functional.pad(mask, (0, r - shape[2])).long()], -1).flatten(0, 1)
            self._numbers.update((x.tobytes(), y) for x, y in zip(both.numpy(), numbers.flatten().tolist()))
        full_tokens, full_mask = torch.zeros(s, k, r, dtype=torch.int64), torch.zeros(s, k, r, dtype=torch.bool)
        full_tokens[:, : shape[1], : shape[2]], full_mask[:, : shape[1], : shape[2]] = tokens, mask
        return full_tokens, full_mask
