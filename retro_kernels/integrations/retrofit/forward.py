"""The model's `forward`, with neighbours."""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .attention import CALL
from .request import begin, cache_of, warn_if_nothing_changed

if TYPE_CHECKING:
    from .model import Retrofit

ARGUMENTS = ("neighbours", "neighbour_mask", "retriever")


class RetroForward:
    """What `retrofit` puts in place of one model's `forward`: an object, not a closure, so that a deep copy or a pickle
    of the model has one of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.known = frozenset(inspect.signature(type(model).forward).parameters)

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's own and three more, by name: Trainer and `generate` ask which arguments there are."""
        signature = inspect.signature(type(self.model).forward)
        own = list(signature.parameters.values())[1:]
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ARGUMENTS]
        last = [x for x in own if x.kind == inspect.Parameter.VAR_KEYWORD]
        return signature.replace(parameters=[x for x in own if x not in last] + more + last)

    def __call__(
        self, *args: Any, neighbours: Any = None, neighbour_mask: Any = None, retriever: Any = None, **given: Any
    ) -> Any:
        """As the model's own, and:

        neighbours: int64 [b, l, k, r], the neighbours of every complete chunk of `chunk_size` tokens.
        neighbour_mask: bool [b, l, k, r], True = a token that is there; None: all are.
        retriever: called with chunks, int64 [s, chunk_size], gives their neighbours (`rk.models.Neighbours`), also of
            the chunks that later calls with the same cache complete.
        """
        model: Any = self.model
        if not torch.compiler.is_compiling():  # which does not trace it
            for name in given:
                if name not in self.known:
                    refuse_misspelt(name)
        forward = type(model).forward
        if neighbours is None and neighbour_mask is None and retriever is None:
            cache = cache_of(given)
            if cache is None or getattr(cache, "retro", None) is None:
                return forward(model, *args, **given)
        if args:
            names = [x for x in self.__signature__.parameters if x not in ARGUMENTS]
            given = {**dict(zip(names, args)), **given}
        retro: Retrofit = model.retro
        call, memory = begin(retro, given, neighbours, neighbour_mask, retriever)
        output = forward(model, **given) if call is None else forward(model, **given, **{CALL: call})
        if call is not None and call.watch:
            warn_if_nothing_changed(retro, call)
        held = dict(output.items()) if hasattr(output, "items") else {}
        cache = held.get("cache", held.get("past_key_values"))
        if memory is None or cache is None:
            return output
        if call is not None and call.held is None:
            if torch.is_grad_enabled():  # training, which does not go on
                return output
            call.held = retro.projected(call.states)  # type: ignore[arg-type]
        x: Any = given.get("input_ids") if given.get("input_ids") is not None else given["inputs_embeds"]
        memory.remember(call, x.shape[1], retro.chunk_size)
        if getattr(cache, "retro", None) is not memory:
            memory.attach(cache)
        return output


def refuse_misspelt(name: str) -> None:
    """Raises TypeError for an argument that is nearly one of ours: a model that takes any would take it, and read no
    neighbours."""
    meant = difflib.get_close_matches(name, ARGUMENTS, 1, 0.8)
    if meant:
        raise TypeError(f"forward: got the argument {name!r}, expected {meant[0]!r}")
