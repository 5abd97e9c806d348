"""`retrofit`: neighbours for a decoder that exists."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...nn.common import one_of
from ...ops import checks as validate

if TYPE_CHECKING:
    from .model import Retrofit
    from .structure import Found

INITS, JOINS, ENCODERS = ("self_attention", "random"), ("softmax", "add"), ("own", "own+cross", "fresh")
POSITIONS = ("chunk", "text")
START = {"softmax": -3.0, "add": 0.0}


class RetrofitReport:
    """What `retrofit` did.

    Attributes:
        model: the decoder, inside whatever wraps it.
        layers: the numbers of the attentions that see neighbours, by now.
        added: numbers (of parameters) that were added.
        notes: what to know about this model.

    `print(report)` shows it; `undo()` takes everything back.
    """

    def __init__(self, model: Any, notes: list[str]) -> None:
        self.model, self.notes = model, notes
        self._retro: Retrofit = model.retro

    @property
    def layers(self) -> list[int]:
        return [part.layer for part in self._retro.parts()]

    @property
    def added(self) -> int:
        return sum(x.numel() for x in self._retro.added().values())

    def undo(self) -> None:
        """The model is what it was; a second call does nothing."""
        self._retro.undo()

    def __str__(self) -> str:
        settings = self._retro.settings
        shown = ", ".join(
            f"{name}={settings[name]!r}"
            for name in ("encoder", "init", "join", "chunk_size", "num_neighbours", "retrieved_length")
        )
        lines = [f"retrofit: {len(self.layers)} layers of {type(self.model).__name__}, {self.added:,} numbers added"]
        return "\n".join([*lines, f"  {shown}", *(f"  {note}" for note in self.notes)])

    def __repr__(self) -> str:
        return f"RetrofitReport(layers={self.layers!r}, added={self.added!r})"


def retrofit(
    model: nn.Module,
    layers: Sequence[int] | str | os.PathLike[str] | None = None,
    *,
    encoder: str | nn.Module = "own",
    init: str = "self_attention",
    join: str = "softmax",
    positions: str = "chunk",
    chunk_size: int = 64,
    num_neighbours: int = 2,
    retrieved_length: int = 128,
    freeze: bool = True,
    gate: float | None = None,
    adapt: bool = False,
    tokenizer: str | None = None,
) -> RetrofitReport:
    """Makes a RETRO of a decoder of Hugging Face transformers, in place.

        report = rk.retrofit(model)
        model(input_ids, neighbours=neighbours, neighbour_mask=mask, labels=labels)     # [b, l, k, r]
        model.generate(input_ids, retriever=retriever)
        model.retro.save_pretrained(folder)
        rk.retrofit(base, folder)

    Every token from the last one of a chunk on looks at the neighbours of that chunk (RETRO, section 2.4) in the
    decoder's own self-attention: with its queries and, by `encoder="own"`, at the keys and values that the same layer
    makes when the decoder reads the neighbour. A decoder that was trained on text finds what it reads in what it has
    read; so only gates, a number a head, need training. Nothing is replaced: names, classes and state dict are the
    base's, and what is added lies under the attentions as `retro` and under the model as `retro`.

    Families are not listed. The attentions must be found, and a probe must show that with closed gates the logits are
    the base's, bit for bit, that each layer's queries are turned by positions as we turn them on, and that neighbours
    change nothing before the token that may see them; otherwise the model is left as it was and the reason raised.

    Args:
        model: a ...ForCausalLM of transformers, or PEFT's or DDP's wrapper of one.
        layers: numbers of the layers, from 0; None: all. Or a folder that `model.retro.save_pretrained` wrote: then the
            other arguments but `encoder` (where it was a module) and `freeze` come from there.
        encoder: what reads the neighbours. "own": the decoder. "own+cross": the decoder, and in the lowest of `layers`
            the tokens of a neighbour also look at the chunk that it was retrieved for (the paper's conditioning,
            section 2.3, on the decoder's activations there, which neighbours have not changed yet): with the layer's
            own attention, as if the chunk stood right before the neighbour, times a gate a head that begins closed (0)
            and learns. What is read then depends on the chunk: it cannot be kept by `db encode`, equal neighbours are
            read again for every chunk, training it goes back through the reading, gradient checkpointing and FSDP
            refuse, and torch.compile compiles nothing of it (with fullgraph=True it raises). "fresh": a new
            `rk.nn.NeighbourEncoder` over the decoder's embeddings. Or a module that takes tokens int64 [s, r] and a
            mask bool [s, r] and gives states [s, r, e], of any width e.
        init: where the neighbours' keys and values come from. "self_attention": with encoder="own", the layer's own
            projections; with other encoders of the decoder's width, two new projections a layer that begin as copies
            of these. "random": two new ones that begin anyhow, for other encoders.
        join: "softmax": the text so far and the neighbours under one softmax, the gate a bias on the neighbours'
            logits. A neighbour's first token is hidden there, being where heads look that look for nothing. "add": the
            neighbours' attention times the gate is added to the text's (the paper's residual, a gate for each head).
        positions: where the tokens of a chunk stand, which read a neighbour at 0 ... r - 1. "chunk": at r to r + m - 1,
            as if it came right before their chunk. "text": at their own positions plus r, as if it came before the
            text: heads that look at the last tokens then look at the text's, and gates may begin open (gate=0).
        chunk_size, num_neighbours, retrieved_length: m, k and r.
        freeze: only what is added is trained. False leaves every parameter of the base as it is.
        gate: the value that all gates begin with; default -3 with join="softmax" (nearly closed: closed is -inf, from
            where nothing is learned) and 0 with join="add" (closed; it learns from there).
        adapt: also add two maps a head, one of its query and one of what it finds among the neighbours (2 d^2 numbers,
            both the identity at first): what chunked cross-attention with projections of its own could learn.
        tokenizer: its name, compared with the retriever's database.

    Raises:
        TypeError, ValueError: a model that is no decoder, or for which the probe fails; wrong arguments; a folder of
        another base. The model is then as it was. ImportError: transformers is not installed.
    """
    one_of("join", join, JOINS)
    one_of("init", init, INITS)
    one_of("positions", positions, POSITIONS)
    if not isinstance(encoder, nn.Module):
        one_of("encoder", encoder, ENCODERS)
    kind = encoder if isinstance(encoder, str) else "module"
    for name, value, low in (
        ("chunk_size", chunk_size, 1),
        ("num_neighbours", num_neighbours, 1),
        ("retrieved_length", retrieved_length, 1),
    ):
        validate.integer(name, value, low)
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"retrofit needs transformers (pip install 'retro_kernels[retrofit]'): {error}") from error
    from . import files, structure

    decoder = structure.decoder_of(model)
    if hasattr(decoder, "retro"):
        raise ValueError("model: it is retrofitted already; call model.retro.undo() first")
    if "forward" in vars(decoder):
        raise ValueError("model: something else has replaced forward on this instance; take that back first")
    folder = None
    if isinstance(layers, (str, os.PathLike)):
        folder = layers
        written = files.read_settings(folder)
        files.check_base(written, decoder)
        settings = written["settings"]
        if (settings["encoder"] == "module") != (kind == "module"):
            raise ValueError(
                f"encoder: got {kind!r}, but what is in {os.fspath(folder)} was made with "
                f"encoder={settings['encoder']!r}"
            )
        if kind != "module":
            encoder = settings["encoder"]
    else:
        _check_init(kind, init)
        settings = {
            "chunk_size": chunk_size,
            "num_neighbours": num_neighbours,
            "retrieved_length": retrieved_length,
            "join": join,
            "positions": positions,
            "encoder": kind,
            "init": init,
            "layers": None if layers is None else list(layers),
            "adapt": adapt,
            "tokenizer": tokenizer,
        }
    structure.refuse_by_config(decoder, settings["join"])
    found = structure.attentions_of(decoder)
    if settings["layers"] is None:
        settings["layers"] = list(found)
    for layer in settings["layers"]:
        if layer not in found:
            raise ValueError(f"layers: got {layer!r}, expected some of {list(found)}, those with a self-attention")
    if not settings["layers"] or len(set(settings["layers"])) < len(settings["layers"]):
        raise ValueError(f"layers: got {settings['layers']}, expected at least one, and none twice")
    found = {layer: found[layer] for layer in sorted(settings["layers"])}
    retro = _install(decoder, found, settings, encoder)
    try:
        retro.set_gates(START[settings["join"]] if gate is None else gate)
        if folder is not None:
            files.load_tensors(retro, folder)
    except BaseException:
        retro.undo()
        raise
    if freeze:
        ours = set(map(id, [*retro.parameters(), *(x for part in retro.parts() for x in part.parameters())]))
        for name, parameter in decoder.named_parameters():
            if id(parameter) not in ours and parameter.requires_grad:
                retro.was_trained.append(name)
                parameter.requires_grad_(False)
    return RetrofitReport(decoder, _notes(decoder, found, retro))


def _check_init(kind: str, init: str) -> None:
    if kind in ("own", "own+cross") and init != "self_attention":
        raise ValueError(
            f'init: got "{init}" with encoder="{kind}", whose keys and values are the decoder\'s, expected '
            '"self_attention"'
        )


def _install(decoder: Any, found: dict[int, Found], settings: dict[str, Any], encoder: Any) -> Retrofit:
    """Puts all parts in place and proves them, or leaves the model as it was."""
    from . import structure
    from .attention import RetrofitAttention
    from .forward import RetroForward
    from .model import Retrofit

    join = settings["join"]
    with structure.at_rest(decoder):
        ids = _probe_tokens(decoder, settings)
        base = decoder(ids).logits
        device, dtype = ids.device, decoder.dtype
        module, width = _encoder(decoder, settings, encoder, device, dtype)
        retro = Retrofit(decoder, settings, module)
        try:
            for one in found.values():
                structure.intercept(one)
                # The attention function asks its module for the family's own; the whole part comes after a look.
                one.module.retro = _Eager(one.eager)
            retro.frequencies = structure.look(decoder, found, join)
            for layer, one in found.items():
                weight = next(one.module.parameters())
                one.module.retro = RetrofitAttention(
                    layer,
                    num_heads=one.num_heads,
                    num_kv_heads=one.num_kv_heads,
                    head_dim=one.head_dim,
                    value_head_dim=one.value_head_dim,
                    join=join,
                    eager=one.eager,
                    rotary=one.rotary,
                    encoder_dim=width,
                    adapt=settings.get("adapt", False),
                    crosses=settings["encoder"] == "own+cross" and layer == min(found),
                    device=weight.device,
                    dtype=dtype,
                ).train(one.module.training)
            if width is not None and settings["init"] == "self_attention":
                structure.copy_projections(decoder, found, width)
            decoder.retro = retro
            decoder.forward = RetroForward(decoder)
            _prove(decoder, retro, ids, base)
        except BaseException:
            for one in found.values():
                if isinstance(getattr(one.module, "retro", None), _Eager):
                    one.module.config = one.module.config.base
                    del one.module.retro
            retro.undo()
            raise
    return retro


class _Eager(nn.Module):
    def __init__(self, eager: Any) -> None:
        super().__init__()
        self.eager = eager


def _probe_tokens(decoder: Any, settings: dict[str, Any]) -> torch.Tensor:
    table = decoder.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    m = settings["chunk_size"]
    return torch.randint(table.num_embeddings, (1, m + 1), generator=generator).to(table.weight.device)


def _encoder(decoder: Any, settings: Any, encoder: Any, device: Any, dtype: Any) -> tuple[nn.Module | None, int | None]:
    """-> the module and the width of its states; nothing for the decoder's own."""
    if encoder in ("own", "own+cross"):
        return None, None
    if encoder == "fresh":
        from .encoder import FreshEncoder

        module: nn.Module = FreshEncoder(decoder, settings["chunk_size"], settings["retrieved_length"])
        module.to(device=device, dtype=dtype)
    else:
        module = encoder
    r = min(2, settings["retrieved_length"])
    states = module(
        torch.zeros(1, r, dtype=torch.int64, device=device), torch.ones(1, r, dtype=torch.bool, device=device)
    )
    if not isinstance(states, torch.Tensor) or states.dim() != 3 or states.shape[:2] != (1, r):
        got = list(states.shape) if isinstance(states, torch.Tensor) else type(states).__name__
        raise ValueError(f"encoder: gave {got} for tokens [1, {r}], expected states [1, {r}, e]")
    return module, states.shape[-1]


def _prove(decoder: Any, retro: Retrofit, ids: torch.Tensor, base: torch.Tensor) -> None:
    """Raises ValueError unless closed gates give the base's bits, and open ones change the tokens that may see."""
    name, m = type(decoder).__name__, retro.chunk_size
    generator = torch.Generator().manual_seed(1)
    size = decoder.get_input_embeddings().num_embeddings
    shape = (1, ids.shape[1] // m, 1, min(8, retro.retrieved_length))
    neighbours = torch.randint(size, shape, generator=generator).to(ids.device)
    if not torch.equal(decoder(ids).logits, base):
        raise ValueError(f"model: this {name} gives other logits when its attention is called through ours")
    # All of ours is computed, and changes nothing.
    retro.checked = True
    retro.force = True
    try:
        retro.close_gates()
        if not torch.equal(decoder(ids, neighbours=neighbours).logits, base):
            raise ValueError(f"model: this {name} gives other logits with closed gates")
    finally:
        retro.force = False
    retro.set_gates(1.0)
    opened = decoder(ids, neighbours=neighbours).logits
    if neighbours.shape[-1] > 1 and torch.equal(opened[:, m - 1 :], base[:, m - 1 :]):
        raise ValueError(f"model: neighbours change nothing in this {name}")
    if not torch.equal(opened[:, : m - 1], base[:, : m - 1]):
        raise ValueError(f"model: in this {name} neighbours change tokens before the end of their chunk")
    retro.checked = False


def _notes(decoder: Any, found: dict[int, Found], retro: Retrofit) -> list[str]:
    notes = []
    kinds = {one.rotary for one in found.values()}
    if not retro.frequencies:
        notes.append(
            "positions are in the hidden states: neighbours are read at 0 ... r - 1, queries stay where they are"
        )
    elif None in kinds:
        plain = [layer for layer, one in found.items() if one.rotary is None]
        notes.append(f"layers without rotary positions: {plain}")
    widths = {len(x) * 2 for x in (retro.tables() if retro.frequencies else [])}
    partial = [w for w in widths if any(w < one.head_dim for one in found.values())]
    if partial:
        notes.append(f"rotary positions turn {', '.join(map(str, partial))} of the head's dimensions")
    return notes
