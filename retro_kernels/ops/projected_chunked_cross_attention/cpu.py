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

import torch

from ... import extension
from .. import common as ops_common
from ..attention import common as attention_common
from ..attention.cpu import _packed_table
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


def _core(query, encoded, w_key, w_value, mask, attention_bias, relative_key, content_bias, relative_bias, null_key,
          null_value, chunk_spans, dropout_seed):  # fmt: skip
    """The slots of the core's problem; key and value are the shapes of what is never made."""
    key, value = (w.new_empty(w.shape[1]).expand(*encoded.shape[:4], *w.shape[:2]) for w in (w_key, w_value))
    return (
        query[:, None, None], key, value, mask, attention_bias, relative_key, content_bias, relative_bias,
        None, None, None, None, null_key, null_value, chunk_spans, None, dropout_seed,
    )  # fmt: skip


def _settings(query, relative_key, scale, dropout_p, stride, first_token):
    packed = _packed_table(relative_key, query.dtype)
    return attention_common.CLOCK, False, False, scale, dropout_p, stride, first_token, packed


def _forward(
    query, encoded, w_key, w_value, bias_key, bias_value, mask, attention_bias, relative_key, content_bias,
    relative_bias, null_key, null_value, chunk_spans, dropout_seed, scale, dropout_p, stride, first_token,
):  # fmt: skip
    out, lse = common.allocate_forward(query, w_value, attention_bias)
    torch.ops.retro_kernels_cpu.absorbed_forward(
        *_core(query, encoded, w_key, w_value, mask, attention_bias, relative_key, content_bias, relative_bias,
               null_key, null_value, chunk_spans, dropout_seed),
        *_settings(query, relative_key, scale, dropout_p, stride, first_token),
        encoded, w_key, w_value, bias_key, bias_value, out[:, None, None], lse[..., None, None, :, :],
    )  # fmt: skip
    return out, lse


def _backward(
    grad_out, grad_lse, query, encoded, w_key, w_value, bias_key, bias_value, mask, attention_bias, relative_key,
    content_bias, relative_bias, null_key, null_value, chunk_spans, dropout_seed, out, lse, scale, dropout_p, stride,
    first_token, *flags,
):  # fmt: skip
    given = (query, encoded, w_key, w_value, bias_key, bias_value, attention_bias, relative_key, content_bias,
             relative_bias, null_key, null_value)  # fmt: skip
    encoded_gradient, weight_gradient, bias_gradient, relative_gradient, null_gradient = flags
    gradients = list(common.allocate_backward(*given, *flags))
    # bias_key's gradient is found in null_key's
    with_null = null_gradient or (weight_gradient and bias_key is not None)
    computed = gradients
    if with_null and not null_gradient:
        computed = list(common.allocate_backward(
            *given, encoded_gradient, weight_gradient, bias_gradient, relative_gradient, True
        ))  # fmt: skip
    asked = (True, encoded_gradient, *2 * (weight_gradient,), False, weight_gradient, bias_gradient,
             *3 * (relative_gradient,), *2 * (with_null,))  # fmt: skip
    wanted = [x if flag and like is not None else None for x, flag, like in zip(computed, asked, given)]

    def allocate(*shape):
        return ops_common.allocate(shape, torch.float32, query.device)

    def padded(size):
        return -(-size // 16) * 16

    heads, d, e = w_key.shape
    _, _, k, r, _ = encoded.shape
    slots, key_block = k * r, 256 if e <= 4096 else 128
    width = padded(e + 2 * (bias_key is not None or bias_value is not None))
    blocks = min(4, max(1, -(-slots // key_block)), max(1, MOST_STATES // (width * key_block)))
    columns = padded(slots) if slots <= key_block else blocks * key_block
    partial = [None if x is None else allocate(1, *x.shape) for x in wanted[6:]]
    if partial[1] is not None:  # summed in whole vectors, which reach past the table's columns
        partial[1] = allocate(1, *relative_key.shape[:2], padded(d))
    torch.ops.retro_kernels_cpu.absorbed_backward(
        grad_out[:, None, None], None if grad_lse is None else grad_lse[:, None, None],
        *_core(query, encoded, w_key, w_value, mask, attention_bias, relative_key, content_bias, relative_bias,
               null_key, null_value, chunk_spans, dropout_seed),
        out.contiguous()[:, None, None], lse.contiguous()[..., None, None, :, :],
        *_settings(query, relative_key, scale, dropout_p, stride, first_token),
        encoded, w_key, w_value, bias_key, bias_value, computed[0][:, None, None], *wanted[1:4], *wanted[5:], *partial,
        allocate(min(heads, 8), width, columns + 16) if encoded_gradient else None,
        *(allocate(heads, width, padded(w.shape[1])) if weight_gradient else None for w in (w_key, w_value)),
        allocate(query.shape[2], stride, padded(d)) if slots > key_block or relative_key is not None else None, blocks,
    )  # fmt: skip
    gradients[:10] = computed[:10]
    if weight_gradient and bias_key is not None:
        # It moves all logits of a row but the null slot's, and the gradients of a row's logits add up to zero.
        of_null = partial[4]
        if of_null is None:
            gradients[4].zero_()  # or NaN, where a row of NaN is: then w_key's gradient has it in every column
            gradients[4].masked_fill_(gradients[2][..., :1].isnan().any(-1), float("nan"))
        else:
            gradients[4].copy_(-of_null.view(heads, -1, d).sum(1))
        if grad_lse is not None:  # but to the gradient of the row's log-sum-exp
            of_lse = _of_lse(query, content_bias, lse, grad_lse).view(heads, -1, d).sum(1) * scale
            gradients[4].copy_(of_lse if of_null is None else of_lse - of_null.view(heads, -1, d).sum(1))
    return tuple(gradients)


def _of_lse(query, content_bias, lse, grad_lse) -> torch.Tensor:
    """fp32 [h, d], the sum of grad_lse * q' over the rows that see something."""
    alive = (lse if lse.dim() == grad_lse.dim() else lse[0]) != float("-inf")
    rows = query.float() if content_bias is None else query.float() + content_bias.float()
    rows, weights = torch.where(alive[..., None], rows, 0.0), torch.where(alive, grad_lse, 0.0)
    return torch.einsum("bnh,bnhd->hd", weights, rows)


forward, backward = common.register("cpu", _forward, _backward, devices=("cpu",), two_planes=True)
