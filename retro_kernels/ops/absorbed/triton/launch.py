"""The absorbed strategy in Triton, forward and backward: the projections are inside, keys and values never exist.

State: these kernels have run in Triton's interpreter and compile ahead of time for sm_80, sm_90 and sm_100; no GPU has
run them yet. A GPU takes them by default once it has proved them right (`ops/verification`). What was
compiled and which settings spill is in tests/ops/absorbed/aot_absorbed.py. No speed has been
measured.

Work. With X = m e d and Y = m S e multiply-adds a (chunk, head), S = k r, for d = d_value: the forward is 2 X + 2 Y,
where a tile holds all S slots; each further tile of slots takes 2 X more. It is compute-bound: the floor is its FLOPs
over the measured matrix rate. A program reads from the L2 cache S e states twice and 2 d e weights: 1.4 MB in bf16 at
S = 256, e = 896, d = 128 (1.0 MB a head where two heads share a program).
The backward stores no probabilities and makes them again in each of its two launches: `backward_heads` 5 X + 4 Y
(scores and their gradient 2 X + 2 Y, then dQ, dW_k, dW_v), `backward_states` 4 X + 4 Y; per further slot tile 2 X and
4 X more.
Their sums over chunks (of the weights) and over heads (of the states) are read and written in fp32 in scratch of each
program's own, in a fixed order: no atomics, bitwise reproducible.

In the interpreter bf16 is computed as fp32 on copies, because the interpreter multiplies bit patterns of bf16.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from ... import dropout, memory
from ...attention import common as attention_common
from ...attention.triton.arguments import Results, Rows, constants
from ...attention.triton.configs import power_of_two
from ...attention.triton.launch import (
    _compute_capability,
    _fill_with_nothing,
    _interpretable,
    _on_device_of,
    interpreting,
    planes,
    strided,
    tables,
    unavailable,  # noqa: F401 - what ops/backends.py asks
)
from ...call import allocate_gradients
from ...launching import Launch
from .. import common
from ..common import Call
from . import arguments, configs
from . import backward as triton_backward
from . import forward as triton_forward
from . import tiles as triton_tiles

_MARGIN = 512  # masked lanes of a tile lie at most this far beyond the last row or slot
SOURCES = tuple(str(module.__file__) for module in (arguments, triton_tiles, triton_forward, triton_backward))


def _groups(call: Call) -> tuple[int, int]:
    """The first chunk of a sequence that some token may attend to, and how many there are."""
    if call.chunk_spans is not None:
        return 0, call.encoded.shape[1]
    first, last = attention_common.attended_chunks(
        call.query.shape[1], call.encoded.shape[1], call.stride, call.first_token
    )
    return first, max(last - first, 0)


def _long(call: Call, grad_out: torch.Tensor | None) -> bool:
    """Whether an offset inside a chunk or a head's weights can pass 2^31."""
    _, _, k, r, e = call.encoded.shape
    _, _, h, d = call.query.shape
    width = max(d, call.w_value.shape[1])
    rows, slots = call.stride + _MARGIN, k * r + _MARGIN
    furthest = [rows * call.query.stride(1), rows * h * width, slots * e, (rows + slots) * width, rows * slots]
    furthest += [(width + _MARGIN) * x.stride(1) for x in (call.w_key, call.w_value)] + [(width + _MARGIN) * e]
    if grad_out is not None:
        furthest.append(rows * grad_out.stride(1))
    if call.attention_bias is not None:
        furthest.append(rows * call.attention_bias.stride(1))
    if call.relative_key is not None:
        furthest.append((rows + slots) * call.relative_key.stride(1))
    for x in (call.encoded, call.mask):
        if x is not None:
            furthest += [(k + _MARGIN) * x.stride(2) + (r + _MARGIN) * x.stride(3), slots * x.stride(3)]
    return max(furthest) + 2 * (e + _MARGIN) >= 2**31


def _arguments(kind: str, call: Call, results: Results, grad_out=None) -> tuple[configs.LaunchSettings, dict[str, Any]]:
    """The settings of a launch, and what every kernel takes under them."""
    _, n, h, d = call.query.shape
    _, num_chunks, k, r, e = call.encoded.shape
    hk, d_value, _ = call.w_value.shape
    beyond_a_mask = (
        call.attention_bias,
        call.relative_key,
        call.null_key,
        call.bias_key,
        call.bias_value,
        call.dropout_seed,
    )
    options = any(x is not None for x in beyond_a_mask)
    sm = _compute_capability(call.query.device)
    settings = configs.choose(kind, sm, call.query.dtype, call.stride, k * r, e, options)
    per_neighbour = call.relative_key is not None and k > 1 and r > settings.block_slots
    first_group, num_groups = _groups(call)
    moved = [(x.stride(2), x.stride(3)) for x in (call.encoded, call.mask) if x is not None]
    bias = call.attention_bias
    spec = arguments.Spec(
        GROUPING=attention_common.CLOCK,
        PER_NEIGHBOUR=per_neighbour,
        PHILOX_SLOTS=8 if not per_neighbour or r % 8 == 0 else 1,
        DIM=d,
        VALUE_DIM=d_value,
        ENCODER_DIM=e,
        FLAT_SLOTS=all(k == 1 or of_k == r * of_r for of_k, of_r in moved),
        INT64=_long(call, grad_out),
        BIAS_PER_SLOT=k > 1 and bias is not None and bias.shape[2] == k * r,
        DROPOUT=call.dropout_seed is not None,
        TWO_PLANES=bias is not None,
        BLOCK_ROWS=settings.block_rows,
        BLOCK_KEYS=settings.block_slots,
        BLOCK_ENCODER=settings.block_encoder,
        BLOCK_RUN=settings.block_run,
        BLOCK_DIM=power_of_two(d),
        BLOCK_VALUE=power_of_two(d_value),
        PRECISION=settings.precision,
    )
    return settings, {
        "query": _rows(call.query),
        "encoded": strided(arguments.States, call.encoded),
        "w_key": strided(arguments.Weight, call.w_key),
        "w_value": strided(arguments.Weight, call.w_value),
        "bias_key": strided(arguments.Vectors, call.bias_key),
        "bias_value": strided(arguments.Vectors, call.bias_value),
        **tables(call, r),
        "chunk_spans": call.chunk_spans,
        "dropout_seed": call.dropout_seed,
        "results": results,
        "scale": float(call.scale),
        "survivor_scale": dropout.survivor_scale(call.dropout_p) if call.dropout_seed is not None else 1.0,
        "threshold": dropout.threshold(call.dropout_p),
        "num_tokens": n,
        "num_neighbours": k,
        "retrieved_length": r,
        "num_heads": h,
        "heads_per_key": h // hk,
        "num_chunks": num_chunks,
        "first_group": first_group,
        "num_groups": num_groups,
        "stride": call.stride,
        "first_token": call.first_token,
        "SPEC": constants(spec),
    }


def _rows(tensor: torch.Tensor) -> Rows:
    """The query or the gradient of out, [b, n, h, d]."""
    b, n, h, _ = tensor.stride()
    return Rows(tensor, b, 0, 0, n, h)


def _row_tiles(call: Call, settings: configs.LaunchSettings) -> int:
    return -(-call.stride // settings.block_rows)


def plan_forward(out, lse, call: Call) -> Launch:
    """The forward's launch; some chunk must be attended."""
    settings, given = _arguments("forward", call, Results(out, *planes(lse, call)))
    heads = settings.heads if call.query.shape[2] % settings.heads == 0 else 1
    programs = call.query.shape[0] * given["num_groups"] * _row_tiles(call, settings) * call.query.shape[2] // heads
    return Launch("forward", triton_forward.forward_kernel, programs, {**given, "HEADS": heads}, settings)


# What is summed over chunks, in scratch of each program's own; of it, what goes through the logits' scale.
SUMMED = (
    "w_key",
    "w_value",
    "bias_key",
    "bias_value",
    "attention_bias",
    "relative_key",
    "content_bias",
    "relative_bias",
    "null_key",
    "null_value",
)
SCALED = ("w_key", "bias_key", "relative_key", "content_bias", "relative_bias", "null_key")


def plan_heads(grad_out, grad_lse, out, lse, grad_query, copies: Mapping[str, torch.Tensor], call: Call) -> Launch:
    """The launch of every gradient but the states'. `copies`: fp32 [copies, ...] and zero, of those of `SUMMED` that
    are wanted. `grad_lse` is contiguous, or None."""
    results = Results(out, *planes(lse, call), grad_lse)
    settings, given = _arguments("backward_heads", call, results, grad_out)
    wanted = list(copies.values())
    num_items = call.query.shape[0] * given["num_groups"] * _row_tiles(call, settings)
    num_copies = wanted[0].shape[0] if wanted else num_items
    given |= {
        "grad_out": _rows(grad_out),
        "grad_query": grad_query,
        "sums": arguments.Sums(*(copies.get(name) for name in SUMMED)),
        "num_items": num_items,
        "num_copies": num_copies,
        "SUMS": bool(wanted),
    }
    lanes = call.w_key.shape[0] if wanted else call.query.shape[2]
    return Launch("backward_heads", triton_backward.backward_heads_kernel, num_copies * lanes, given, settings)


def plan_states(grad_out, grad_lse, out, lse, grad_encoded, call: Call) -> Launch:
    """The launch of the states' gradient, of every chunk."""
    results = Results(out, *planes(lse, call), grad_lse)
    settings, given = _arguments("backward_states", call, results, grad_out)
    _, num_chunks, k, r, e = call.encoded.shape
    block = settings.block_slots
    key_tiles = k * -(-r // block) if given["SPEC"].PER_NEIGHBOUR.value else -(-k * r // block)
    num_items = call.query.shape[0] * num_chunks * key_tiles
    num_copies = num_items
    scratch = None
    if grad_encoded.dtype != torch.float32:
        num_copies = min(configs.STATE_PROGRAMS, num_items)
        scratch = memory.allocate((num_copies, block, e), torch.float32, grad_encoded.device)
    given |= {
        "grad_out": _rows(grad_out),
        "grad_encoded": grad_encoded,
        "scratch": scratch,
        "first_group": 0,
        "num_groups": num_chunks,
        "num_items": num_items,
        "num_copies": num_copies,
    }
    return Launch("backward_states", triton_backward.backward_states_kernel, num_copies, given, settings)


def attend(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = common.allocate_forward(call.query, call.w_value, call.attention_bias)
    with _on_device_of(out):
        nothing = out.numel() == 0 or _groups(call)[1] == 0
        if nothing or call.chunk_spans is not None:  # tokens in no span belong to no program
            _fill_with_nothing(out, lse)
        if nothing:
            return out, lse
        if interpreting() and call.query.dtype == torch.bfloat16:
            wide = torch.zeros_like(out, dtype=torch.float32)
            plan_forward(wide, lse, call.mapped(_interpretable))()
            out.copy_(wide)
        else:
            plan_forward(out, lse, call)()
    return out, lse


def gradients(
    call: Call,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    wanted: Collection[str],
) -> dict[str, torch.Tensor]:
    found = allocate_gradients(call, wanted)
    with _on_device_of(out):
        num_groups = _groups(call)[1]
        if num_groups == 0 or call.query.numel() == 0:
            for gradient in found.values():
                gradient.zero_()
            return found
        if call.chunk_spans is not None:  # tokens in no span belong to no program
            found["query"].zero_()
        if grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        results = grad_out, grad_lse, out.contiguous(), lse.contiguous()
        computed = {name: found[name] for name in ("query", "encoded") if name in found}
        widened = interpreting() and call.query.dtype == torch.bfloat16
        if widened:
            results, call = tuple(map(_interpretable, results)), call.mapped(_interpretable)
            computed = {name: torch.zeros_like(x, dtype=torch.float32) for name, x in computed.items()}

        num_copies = min(common.PARTIAL_COPIES, call.query.shape[0] * num_groups)
        copies = {
            name: memory.allocate((num_copies, *found[name].shape), torch.float32, out.device).zero_()
            for name in SUMMED
            if name in found and found[name].numel()
        }
        plan_heads(*results, computed["query"], copies, call)()
        for name in SUMMED:
            if name in copies:
                found[name].copy_(copies[name].sum(0) * (call.scale if name in SCALED else 1.0))
            elif name in found:
                found[name].zero_()
        copies.clear()  # the scratch of the states may take its place
        if "encoded" in computed and computed["encoded"].numel():
            plan_states(*results, computed["encoded"], call)()
        if widened:
            for name, wide in computed.items():
                found[name].copy_(wide)
    return found


def refusal(call) -> str | None:
    """Why this call cannot run here, or None."""
    query = call.query
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'query is {query.dtype}; the Triton kernels take float32, float16, bfloat16: use backend="reference"'
    if max(query.shape[-1], call.w_value.shape[1]) > 128:
        return (
            f"head sizes are {query.shape[-1]} and {call.w_value.shape[1]}; the absorbed Triton kernels take at most "
            '128 (wider heads spill registers): use strategy="materialise"'
        )
    if interpreting():
        return None
    if query.device.type != "cuda":
        return (
            f"query is on {query.device}; the Triton kernels need a CUDA tensor (or TRITON_INTERPRET=1 set before "
            "retro_kernels is imported)"
        )
    if _compute_capability(query.device) < 80:
        return f"{query.device} has a compute capability below 8.0, which the Triton kernels need"
    return None


forward, backward = common.register("triton", attend, gradients, devices=("cpu", "cuda"), two_planes=True)
