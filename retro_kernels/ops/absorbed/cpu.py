"""The absorbed strategy on the CPU: the kernels of csrc/cpu/absorbed.h and absorbed_backward.h.

A chunk's states are packed once for all heads that a thread computes of it (256 slots at a time, 128 beyond e = 4096),
a head's weights once for all its rows. FLOPs per (chunk, head) of m rows and S slots, with d_value = d: forward
4 m e (d + S), against 4 S d (e + m) with keys and values made; backward 12 m e S + 10 m e d.

Memory of the forward: the outputs, and with relative positions a packed copy of `relative_key`. The backward allocates
the gradients it returns, one fp32 sum of each weight's and each parameter's gradient, and at most 8 partial sums of the
states' gradient of up to 1024 slots of one chunk. Besides, each thread keeps a scratch buffer between calls, which does
not grow with batch, chunks, slots or heads.

In bf16, delta comes from the rounded output, as in the core: where `bias_value` makes the output large beside the
differences of its values, the query's gradient loses accuracy to it.

Each level of instructions gives bitwise the same result on every run and for every number of threads: in the forward a
(batch, chunk, kv head) is computed by one thread in one order; in the backward a range of kv heads, of which there are
at most 8, and the ranges' sums are added up in order.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from ... import extension
from .. import memory
from ..attention import common as attention_common
from ..attention.cpu import PARAMETERS, _packed_table
from ..call import allocate_gradients
from . import common

MOST_WIDTH = 8192
MOST_STATES = 1 << 20  # of a partial sum of the states' gradient


def unavailable() -> str | None:
    """Why the compiled kernels cannot be used in this process, with the remedy, or None."""
    return extension.why_not()


def refusal(call: common.Call) -> str | None:
    """Why this call cannot run here, or None."""
    query, dims, e = call.query, (call.query.shape[-1], call.w_value.shape[1]), call.encoded.shape[-1]
    if query.device.type != "cpu":
        return f"query is on {query.device}; the CPU kernels need CPU tensors"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'query is {query.dtype}; the CPU kernels take float32, float16 and bfloat16: use backend="reference"'
    if not 1 <= min(dims) <= max(dims) <= 256:
        return f'head sizes are {dims[0]} and {dims[1]}; the CPU kernels take 1 to 256: use backend="reference"'
    if not 1 <= e <= MOST_WIDTH:
        return f'e is {e}; the absorbed CPU kernel takes 1 to {MOST_WIDTH}: use strategy="materialise"'
    return None


def _core(call: common.Call) -> tuple[Any, ...]:
    """The tensors of the core's problem; key and value are the shapes of what is never made."""
    key, value = (
        w.new_empty(w.shape[1]).expand(*call.encoded.shape[:4], *w.shape[:2]) for w in (call.w_key, call.w_value)
    )
    absent = None
    return (
        call.query[:, None, None],
        key,
        value,
        call.mask,
        call.attention_bias,
        call.relative_key,
        call.content_bias,
        call.relative_bias,
        absent,
        absent,
        absent,
        absent,
        call.null_key,
        call.null_value,
        call.chunk_spans,
        absent,
        call.dropout_seed,
    )


def _settings(call: common.Call) -> tuple[Any, ...]:
    packed = None if call.relative_key is None else _packed_table(call.relative_key, call.query.dtype)
    softcap = 0.0
    return (
        attention_common.CLOCK,
        False,
        False,
        call.scale,
        softcap,
        call.dropout_p,
        call.stride,
        call.first_token,
        packed,
    )


def attend(call: common.Call) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = common.allocate_forward(call.query, call.w_value, call.attention_bias)
    torch.ops.retro_kernels_cpu.absorbed_forward(
        *_core(call),
        *_settings(call),
        call.encoded,
        call.w_key,
        call.w_value,
        call.bias_key,
        call.bias_value,
        out[:, None, None],
        lse[..., None, None, :, :],
    )
    return out, lse


def gradients(
    call: common.Call,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    wanted: Collection[str],
) -> dict[str, torch.Tensor]:
    made = dict.fromkeys(wanted)
    if "bias_key" in wanted and call.null_key is not None:  # found in null_key's
        made |= dict.fromkeys(("null_key", "null_value"))
    found = allocate_gradients(call, made)

    def allocate(*shape: int) -> torch.Tensor:
        return memory.allocate(shape, torch.float32, call.query.device)

    def padded(size: int) -> int:
        return -(-size // 16) * 16

    heads, d, e = call.w_key.shape
    _, _, k, r, _ = call.encoded.shape
    slots, key_block = k * r, 256 if e <= 4096 else 128
    width = padded(e + 2 * (call.bias_key is not None or call.bias_value is not None))
    blocks = min(4, max(1, -(-slots // key_block)), max(1, MOST_STATES // (width * key_block)))
    columns = padded(slots) if slots <= key_block else blocks * key_block
    partial = {name: allocate(1, *found[name].shape) for name in PARAMETERS if name in found}
    if "relative_key" in partial:  # summed in whole vectors, which reach past the table's columns
        partial["relative_key"] = allocate(1, *found["relative_key"].shape[:2], padded(d))
    many = slots > key_block or call.relative_key is not None
    torch.ops.retro_kernels_cpu.absorbed_backward(
        grad_out[:, None, None],
        None if grad_lse is None else grad_lse[:, None, None],
        *_core(call),
        out.contiguous()[:, None, None],
        lse.contiguous()[..., None, None, :, :],
        *_settings(call),
        call.encoded,
        call.w_key,
        call.w_value,
        call.bias_key,
        call.bias_value,
        found["query"][:, None, None],
        *map(found.get, ("encoded", "w_key", "w_value", "bias_value")),
        *map(found.get, PARAMETERS),
        *map(partial.get, PARAMETERS),
        allocate(min(heads, 8), width, columns + 16) if "encoded" in found else None,
        *(allocate(heads, width, padded(w.shape[1])) if "w_key" in found else None for w in (call.w_key, call.w_value)),
        allocate(call.query.shape[2], call.stride, padded(d)) if many else None,
        blocks,
    )
    if "bias_key" in found:
        # It moves all logits of a row but the null slot's, and the gradients of a row's logits add up to zero.
        if call.null_key is None:
            found["bias_key"].zero_()  # or NaN, where a row of NaN is: then w_key's gradient has it in every column
            found["bias_key"].masked_fill_(found["w_key"][..., :1].isnan().any(-1), float("nan"))
        else:
            found["bias_key"].copy_(-partial["null_key"].view(heads, -1, d).sum(1))
        if grad_lse is not None:  # but to the gradient of the row's log-sum-exp
            of_lse = _sum_queries_by_lse(call, lse, grad_lse).view(heads, -1, d).sum(1) * call.scale
            if call.null_key is not None:
                of_lse = of_lse - partial["null_key"].view(heads, -1, d).sum(1)
            found["bias_key"].copy_(of_lse)
    return {name: found[name] for name in wanted}


def _sum_queries_by_lse(call: common.Call, lse: torch.Tensor, grad_lse: torch.Tensor) -> torch.Tensor:
    """fp32 [h, d], the sum of grad_lse * q' over the rows that see something."""
    alive = (lse if lse.dim() == grad_lse.dim() else lse[0]) != float("-inf")
    rows = call.query.float() if call.content_bias is None else call.query.float() + call.content_bias.float()
    rows, weights = torch.where(alive[..., None], rows, 0.0), torch.where(alive, grad_lse, 0.0)
    return torch.einsum("bnh,bnhd->hd", weights, rows)


forward, backward = common.register("cpu", attend, gradients, devices=("cpu",), two_planes=True)
