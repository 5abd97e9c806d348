"""What cannot be right in a call of a retrofitted model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ...ops import checks as validate

if TYPE_CHECKING:
    from .model import Retrofit

INTEGERS = (torch.int64, torch.int32)


def neighbours(retro: Retrofit, given: Any, mask: Any, batch: int) -> torch.Tensor:
    """-> the mask, made where there was none."""
    validate.tensor("neighbours", given, INTEGERS)
    validate.rank("neighbours", given, "b, l, k, r")
    b, _, k, r = given.shape
    if b != batch:
        raise ValueError(f"neighbours: got batch {b}, expected {batch}, the batch of input_ids")
    if k == 0 or r == 0 or r > retro.retrieved_length:
        raise ValueError(
            f"neighbours: got k = {k} neighbours of r = {r} tokens, expected at least one of 1 to retrieved_length = "
            f"{retro.retrieved_length}; mask the rest where there are fewer"
        )
    if mask is None:
        mask = torch.ones(given.shape, dtype=torch.bool, device=given.device)
    else:
        if isinstance(mask, torch.Tensor) and mask.dtype in INTEGERS:  # what a collator makes of lists
            mask = mask.bool()
        validate.tensor("neighbour_mask", mask, (torch.bool,), given.device)
        validate.shape("neighbour_mask", mask, "b, l, k, r", tuple(given.shape))
    if not torch.compiler.is_compiling() and given.device.type == "cpu":
        vocabulary(retro, "neighbours", given.masked_fill(~mask, 0))
    return mask


def vocabulary(retro: Retrofit, name: str, tokens: torch.Tensor) -> None:
    size = retro.model.get_input_embeddings().num_embeddings
    if tokens.numel() == 0:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= size:
        raise ValueError(
            f"{name}: got tokens from {low} to {high}, expected 0 to {size - 1}, the model's vocabulary: they are of "
            "another tokenizer, or padding that neighbour_mask does not mask"
        )


def retriever(retro: Retrofit, given: Any, ids: Any) -> None:
    if not callable(given):
        raise TypeError(f"retriever: got {type(given).__name__}, expected a function of chunks [s, m]")
    if ids is None:
        raise ValueError("retriever: got one with inputs_embeds, expected input_ids: it reads tokens")
    theirs, ours = getattr(given, "tokenizer", None), retro.settings.get("tokenizer")
    if isinstance(theirs, str) and ours is not None and theirs != ours:
        raise ValueError(
            f"retriever: its database was made with the tokenizer {theirs!r}, expected {ours!r}, the model's: its "
            "tokens would mean other words"
        )
    size = getattr(given, "chunk_size", retro.chunk_size)
    if size != retro.chunk_size:
        raise ValueError(
            f"retriever: its database has chunks of {size} tokens, expected chunk_size = {retro.chunk_size}"
        )


def reads_within_a_call(retro: Retrofit, shared_out: bool) -> None:
    """With encoder="own+cross" the decoder reads the neighbours within its own call."""
    model = retro.model
    if torch.compiler.is_compiling() or shared_out:
        what = "FSDP" if shared_out else "torch.compile"
        raise ValueError(f'encoder: got "own+cross" under {what}, expected "own": the decoder calls itself')
    checkpointed = any(getattr(x, "gradient_checkpointing", False) and x.training for x in model.modules())
    if torch.is_grad_enabled() and checkpointed:
        raise ValueError(
            'encoder: got "own+cross" under gradient checkpointing, expected "own", or '
            "model.gradient_checkpointing_disable(): a layer that is computed again would read the neighbours again"
        )


def cache(given: Any) -> None:
    if given is not None and getattr(given, "is_compileable", False) is True:
        raise ValueError(
            f"cache: got a {type(given).__name__}, whose size is fixed, expected one that grows, such as DynamicCache "
            "(no cache_implementation): neighbours are retrieved while it is filled"
        )


def attention_mask(given: Any, retriever: Any) -> None:
    if given is None:
        return
    if not isinstance(given, torch.Tensor) or given.dim() != 2:
        got = f"shape {list(given.shape)}" if isinstance(given, torch.Tensor) else type(given).__name__
        raise ValueError(
            f"attention_mask: got {got}, expected [b, n]: chunks are counted from each sequence's first token. "
            "(A cache of fixed size makes others; expected one that grows, no cache_implementation)"
        )
    if retriever is not None and not bool(given[:, -1].all()):
        raise ValueError(
            "attention_mask: got padding on the right with a retriever, expected it on the left: a text goes "
            "on after its last token. Set the tokenizer's padding_side to 'left'"
        )
