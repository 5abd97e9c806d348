"""Chunked cross-attention on the CPU: the kernels of csrc/cpu.

Speed is bounded by multiply-adds: per (chunk, head) the forward does 4 m S d FLOPs on 4 bytes x 2 S d of fp32 keys and
values, 32 FLOP per byte at m = 64. csrc/README.md says how far from the measured limit the kernels are.

Memory: the outputs, and for the gradients of the bias and the null slot `_copies` fp32 partial sums of each. Besides,
each thread keeps a scratch buffer (about 1 MiB, whatever the size of the call) between calls.

Each level of instructions gives bitwise the same result on every run and for every number of threads: a (batch, chunk,
kv head) is computed by one thread in one order, and partial sums are assigned to them by a rule that knows only shapes.
"""

from __future__ import annotations

import torch

from ... import extension
from .. import common as ops_common
from . import common


def unavailable() -> str | None:
    """Why the compiled kernels cannot be used in this process, with the remedy, or None."""
    return extension.why_not()


def refusal(call) -> str | None:
    """Why this call cannot run here, or None."""
    query, dims = call.query, (call.query.shape[-1], call.value.shape[-1])
    if query.device.type != "cpu":
        return f"query is on {query.device}; the CPU kernels need CPU tensors"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'query is {query.dtype}; the CPU kernels take float32, float16 and bfloat16: use backend="reference"'
    if call.relative_key is not None:
        return 'relative_key is not supported by the CPU kernels yet: use backend="reference"'
    if call.dropout_p > 0:
        return f'dropout_p is {call.dropout_p}; the CPU kernels have no dropout yet: use backend="reference"'
    if not 1 <= min(dims) <= max(dims) <= 256:
        return f'head sizes are {dims[0]} and {dims[1]}; the CPU kernels take 1 to 256: use backend="reference"'
    return None


def _copies(key: torch.Tensor) -> int:
    """Partial sums of each parameter gradient. Tasks are (copy, range of kv heads): few heads get more."""
    batch, num_chunks, kv_heads = key.shape[0], key.shape[1], key.shape[4]
    most = min(common.PARTIAL_COPIES, 8 if kv_heads >= 8 else 32)
    return max(1, min(batch * num_chunks, most))


def _forward(query, key, value, neighbour_mask, attention_bias, query_cos, query_sin, key_cos, key_sin,
             null_key, null_value, rotary_interleaved, scale, stride, first_token):  # fmt: skip
    out, lse = common.allocate_forward(query, value)
    torch.ops.retro_kernels_cpu.cca_forward(
        query, key, value, neighbour_mask, attention_bias, query_cos, query_sin, key_cos, key_sin,
        null_key, null_value, rotary_interleaved, scale, stride, first_token, out, lse,
    )  # fmt: skip
    return out, lse


def _backward(grad_out, query, key, value, neighbour_mask, attention_bias, query_cos, query_sin, key_cos, key_sin,
              null_key, null_value, out, lse, rotary_interleaved, scale, stride, first_token,
              bias_gradient, null_gradient):  # fmt: skip
    gradients = common.allocate_backward(
        query, key, value, attention_bias, null_key, null_value, bias_gradient, null_gradient
    )
    wanted = (bias_gradient and attention_bias is not None, *(2 * (null_gradient and null_key is not None,)))
    parameters = [gradient if flag else None for gradient, flag in zip(gradients[3:], wanted)]
    copies = _copies(key)
    partial = [
        None if total is None else ops_common.allocate((copies, *total.shape), torch.float32, query.device)
        for total in parameters
    ]
    if grad_out.dim() and grad_out.shape[-1] > 1 and grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    torch.ops.retro_kernels_cpu.cca_backward(
        grad_out, query, key, value, neighbour_mask, attention_bias, query_cos, query_sin, key_cos, key_sin,
        null_key, null_value, out.contiguous(), lse.contiguous(), rotary_interleaved, scale, stride, first_token,
        *gradients[:3], *parameters, *partial,
    )  # fmt: skip
    return gradients


forward, backward = common.register("cpu", _forward, _backward, devices=("cpu",))
