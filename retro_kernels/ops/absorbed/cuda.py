"""The absorbed strategy in CUDA C++ (csrc/cuda/sm90/absorbed.cuh), forward only: for compute capability 9.0.

State: the kernel compiles for sm_90a and passes its checks in the emulator (csrc/cuda/emulator). No GPU has run it yet.
A GPU takes it by default after Triton's, once it has proved it right (`ops/verification`).

What it takes: float16 and bfloat16; one head size of 64, 96 or 128 for keys and values; up to 256 slots in a chunk, of
neighbours of a multiple of 8 tokens; a width e of a multiple of 8; a mask, grouped heads, and everything that the clock
says but packed documents; rows that begin at multiples of 16 bytes. `refusal` names what it does not take. The floor,
in FLOPs, is in the kernel's header comment.

q W_k and the weighted sums of states are rounded to the query's dtype, and so are the probabilities; all sums are fp32.
One warpgroup computes a (chunk, head) in one order, without atomics: results are bitwise reproducible.
"""

from __future__ import annotations

import torch

from ... import cuda_extension
from ..attention.cuda import HEAD_DIMS, unavailable  # noqa: F401 - what ops/backends.py asks
from . import common

MOST_STATES = 256  # kMostStates in csrc/cuda/sm90/kernels.h


def refusal(call: common.Call) -> str | None:
    """Why this call cannot run here, or None."""
    return (
        cuda_extension.device_refusal(call.query)
        or _refused_device(call)
        or _refused_option(call)
        or _refused_shape(call)
    )


def _refused_device(call: common.Call) -> str | None:
    if call.query.device.type != "cuda":
        return None  # the emulator
    capability = torch.cuda.get_device_capability(call.query.device)
    if capability != (9, 0):
        return (
            f"{call.query.device} has compute capability {capability[0]}.{capability[1]}; the absorbed CUDA kernel "
            'needs 9.0: use backend="triton"'
        )
    if "9.0a" not in cuda_extension.build_metadata().get("architectures", ["9.0a"]):
        return 'the CUDA extension was built without 9.0a, which the absorbed CUDA kernel needs: use backend="triton"'
    return None


def _refused_option(call: common.Call) -> str | None:
    given = {
        "attention_bias": call.attention_bias,
        "relative_key": call.relative_key,
        "null_key": call.null_key,
        "bias_key": call.bias_key,
        "bias_value": call.bias_value,
        "sequence_starts": call.chunk_spans,
        "dropout_p": call.dropout_seed,
    }
    for name, value in given.items():
        if value is not None:
            return f'the absorbed CUDA kernel has no {name}: use backend="triton"'
    tensors = (call.query, call.encoded, call.w_key, call.w_value)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return (
            "an argument requires a gradient, and the absorbed CUDA kernel has none: call it under torch.no_grad(), or "
            'use backend="triton"'
        )
    return None


def _refused_shape(call: common.Call) -> str | None:
    query, encoded = call.query, call.encoded
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f'query is {query.dtype}; the CUDA kernels take float16 and bfloat16: use backend="triton"'
    dims = (query.shape[-1], call.w_value.shape[1])
    if dims[0] != dims[1] or dims[0] not in HEAD_DIMS:
        return (
            f"head sizes are {dims[0]} and {dims[1]}; the CUDA kernels take one of 64, 96 and 128 for keys and values: "
            'use backend="triton"'
        )
    _, l, k, r, e = encoded.shape
    if not (0 < k * r <= MOST_STATES and r % 8 == 0 and e > 0 and e % 8 == 0 and l > 0):
        return (
            f"encoded has shape {list(encoded.shape)}; the absorbed CUDA kernel takes 1 to {MOST_STATES} states in a "
            'chunk, of neighbours of a multiple of 8 tokens, and a width of a multiple of 8: use backend="triton"'
        )
    if call.stride > 64 and call.stride % 64:
        return (
            f'the stride is {call.stride}; the absorbed CUDA kernel takes 1 to 64 and multiples: use backend="triton"'
        )
    for name, x in (("query", query), ("encoded", encoded), ("w_key", call.w_key), ("w_value", call.w_value)):
        if not cuda_extension.rows_aligned(x) or 0 in x.stride():
            return (
                f"{name} has strides {tuple(x.stride())}; the absorbed CUDA kernel needs rows that begin at multiples "
                f'of 16 bytes (8 elements), and no expanded axis: use backend="triton", or pass {name}.contiguous()'
            )
    return None


def attend(call: common.Call) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = common.allocate_forward(call.query, call.w_value)
    encoded = call.encoded
    if encoded.shape[0] > 1 and encoded.stride(0) != encoded.shape[1] * encoded.stride(1):
        encoded = encoded.contiguous()  # the copy engine walks sequences and chunks as one axis
    # the shapes of what is never made
    key, value = (
        call.query.new_empty(w.shape[1]).expand(*encoded.shape[:4], *w.shape[:2]) for w in (call.w_key, call.w_value)
    )
    cuda_extension.ops(call.query).absorbed_forward(
        call.query[:, None, None],
        key,
        value,
        call.mask,
        call.scale,
        call.stride,
        call.first_token,
        encoded,
        call.w_key,
        call.w_value,
        out[:, None, None],
        lse[:, None, None],
    )
    return out, lse


def gradients(*_):
    raise RuntimeError("the absorbed CUDA kernel has no gradient: call it under torch.no_grad()")


forward, backward = common.register("cuda", attend, gradients, devices=("cpu", "cuda"))
