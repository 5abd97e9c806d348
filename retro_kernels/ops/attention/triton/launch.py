"""Attention within groups in Triton, forward and backward, for NVIDIA GPUs from compute capability 8.0 on.

State: these kernels have run in Triton's interpreter and compile ahead of time; no GPU has run them yet. A GPU takes
them by default once it has proved them right (`ops/verification`). What was compiled for which GPU stands in
docs/gpu.md, and which settings spill in tests/ops/attention/aot.py: mostly the backward with relative positions.

Floor. A group of Lq rows and Lk slots takes 4 Lq Lk d FLOPs a head forward and moves 2 d (Lq + Lk) elements; a
backward in one pass takes 10 Lq Lk d and moves 4 d (Lq + Lk). All three operations are memory-bound: an H100 needs some
295 FLOPs a byte to be busy, so the time cannot be less than the bytes over the measured bandwidth. In bf16, at batch 8,
n = 2048 (256 chunks), k = 2, r = 128, with 16 heads of 128 and 3.35 TB/s:

    operation                   rows x slots   FLOP a byte   GFLOP       forward            backward
    chunked cross-attention     64 x 256       51 / 64       34 / 86     0.67 GB, 0.20 ms   1.34 GB, 0.40 ms
    neighbour self-attention    128 x 128      64 / 80       69 / 172    1.07 GB, 0.32 ms   2.15 GB, 0.64 ms
    neighbour cross-attention   2 * 128 x 64   51 / 64       34 / 86     0.67 GB, 0.20 ms   1.34 GB, 0.40 ms

Relative positions multiply twice the tile again, five products more in the backward, and move their small table. How
close the kernels come is unmeasured.

Programs. Forward (forward.py): one a row tile and query head, keys in tiles under an online softmax; programs
that read the same keys run side by side and find them in the L2 cache. Backward (backward.py): a single pass of
five products where one tile holds all rows of a group (CLOCK up to a stride of 64, NEIGHBOUR up to 128 rows) or all its
keys (CHUNK up to 64); NEIGHBOUR up to 512 rows in two sweeps of one program; everything else in two launches, dQ by row
tile and dK, dV by key tile. Parameters (parameters.py): launches of their own with at most 32 private fp32
copies a head, summed in a fixed order. No atomics, nothing depends on timing: results are bitwise reproducible.

Precision. Dots accumulate in fp32, the softmax is fp32. fp32 inputs are multiplied as IEEE fp32 (`input_precision`),
outside the tensor cores: exact and slow. Rotated queries and keys, q + content_bias, q + relative_bias and relative_key
are rounded to the input's dtype before the products.

In the interpreter bf16 is computed as fp32 on copies, because the interpreter multiplies bit patterns of bf16.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch

from ... import dropout, memory, tuning
from ...call import allocate_gradients
from ...launching import Launch, launch_all, launched
from .. import common
from ..common import CHUNK, CLOCK, NEIGHBOUR, Call
from . import arguments, configs
from . import backward as triton_backward
from . import forward as triton_forward
from . import parameters as triton_parameters
from . import tiles as triton_tiles
from .arguments import triton

_MARGIN = 256  # masked lanes of a tile lie at most this far beyond the last row or slot


def strided(kind: Any, tensor: torch.Tensor | None) -> Any:
    """A tensor as a kernel takes it: the NamedTuple `kind` of its pointer and the strides of all axes but the last."""
    return None if tensor is None else kind(tensor, *tensor.stride()[:-1])


def stride_of(tensor: torch.Tensor | None) -> int:
    """Of the first axis; 0 for an absent tensor."""
    return 0 if tensor is None else tensor.stride(0)


@lru_cache(maxsize=64)
def _compute_capability(device: torch.device) -> int:
    """90 for sm_90. The interpreter takes the settings of sm_90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _needs_long_offsets(call: Call, grad_out: torch.Tensor | None) -> bool:
    """Whether an offset from the first element of a group can pass 2^31, so that 32-bit products would overflow.
    Offsets of groups, batches, neighbours' rows and heads are 64-bit always."""
    _, _, k, r, hk, d = call.key.shape
    h, d_value = call.query.shape[4], call.value.shape[-1]
    rows, slots = call.stride + _MARGIN, (k if call.grouping == CLOCK else 1) * r + _MARGIN
    width = max(d, d_value)
    furthest = [rows * call.query.stride(3), rows * h * width, slots * hk * width, (rows + slots) * width]
    if grad_out is not None:
        furthest.append(rows * grad_out.stride(3))
    if call.attention_bias is not None:
        furthest += [rows * call.attention_bias.stride(1), rows * slots]
    if call.relative_key is not None:
        furthest.append((rows + slots) * call.relative_key.stride(1))
    for tensor in (call.key, call.value, call.mask):
        if tensor is not None:
            if call.grouping == CLOCK:
                furthest.append((k + _MARGIN) * tensor.stride(2) + (r + _MARGIN) * tensor.stride(3))
            furthest.append(slots * tensor.stride(3))
    return max(furthest) + 2 * width >= 2**31


def _rows(tensor: torch.Tensor, call: Call) -> arguments.Rows:
    """The query or the gradient of out. By the clock, the chunk is not an axis of it: rows are tokens from the group's
    first on."""
    rows = strided(arguments.Rows, tensor)
    return rows._replace(l=0, k=0) if call.grouping == CLOCK else rows


def tables(call: Any, r: int) -> dict[str, Any]:
    """The mask and what is added to logits, of a call on neighbours of r tokens, and the rows of its tables."""
    bias, relative, nulls = call.attention_bias, call.relative_key, (call.null_key, call.null_value)
    table_rows = 0
    if bias is not None:
        table_rows = bias.shape[1]
    elif relative is not None:
        table_rows = relative.shape[1] - r + 1
    biases = (call.content_bias, call.relative_bias)
    return {
        "mask": None if call.mask is None else arguments.Mask(call.mask.view(torch.uint8), *call.mask.stride()),
        "attention_bias": strided(arguments.Table, bias),
        "relative": None
        if relative is None
        else arguments.Relative(relative, *biases, *relative.stride()[:2], *map(stride_of, biases)),
        "null": None if call.null_key is None else arguments.Null(*nulls, *map(stride_of, nulls)),
        "table_rows": table_rows,
    }


def _shared_arguments(call: Call) -> dict[str, Any]:
    """What every kernel takes, apart from results and the groups it covers."""
    num_chunks, k, r, hk = call.key.shape[1:5]
    kq, n, h = call.query.shape[2:5]
    rotary = (call.query_cos, call.query_sin, call.key_cos, call.key_sin)
    return {
        "query": _rows(call.query, call),
        "key": strided(arguments.Slots, call.key),
        "value": strided(arguments.Slots, call.value),
        **tables(call, r),
        "rotary": None if call.query_cos is None else arguments.Rotary(*rotary, *map(stride_of, rotary)),
        "chunk_spans": call.chunk_spans,
        "first_visible": call.first_visible,
        "dropout_seed": call.dropout_seed,
        "scale": float(call.scale),
        "softcap": float(call.logit_softcap) if call.logit_softcap > 0.0 else None,
        "survivor_scale": dropout.survivor_scale(call.dropout_p),
        "threshold": dropout.threshold(call.dropout_p),
        "num_tokens": n,
        "num_neighbours": k if call.grouping == CLOCK else kq,
        "retrieved_length": r,
        "num_heads": h,
        "heads_per_key": h // hk,
        "num_chunks": num_chunks,
        "stride": call.stride,
        "first_token": call.first_token,
    }


def _spec(
    call: Call, settings: configs.LaunchSettings, per_neighbour: bool, grad_out: torch.Tensor | None = None
) -> arguments.Spec:
    """`per_neighbour`: whether key tiles are cut neighbour by neighbour, where there are several."""
    k, r = call.key.shape[2:4]
    d, d_value = call.query.shape[-1], call.value.shape[-1]
    by_clock = call.grouping == CLOCK
    per_neighbour = per_neighbour and by_clock and k > 1
    moved = [(x.stride(2), x.stride(3)) for x in (call.key, call.value, call.mask) if x is not None]
    width = 0 if call.query_cos is None else call.query_cos.shape[1]
    return arguments.Spec(
        GROUPING=call.grouping,
        CAUSAL=bool(call.causal),
        PER_NEIGHBOUR=per_neighbour,
        PHILOX_SLOTS=8 if not per_neighbour or r % 8 == 0 else 1,
        DIM=d,
        VALUE_DIM=d_value,
        WIDTH=width,
        INTERLEAVED=bool(call.rotary_interleaved),
        FLAT_SLOTS=all(k == 1 or of_k == r * of_r for of_k, of_r in moved),
        INT64=_needs_long_offsets(call, grad_out),
        BIAS_PER_SLOT=_bias_per_slot(call),
        SOFTCAP=call.logit_softcap > 0.0,
        DROPOUT=call.dropout_seed is not None,
        DOCUMENTS=call.first_visible is not None,
        TWO_PLANES=call.attention_bias is not None,
        BLOCK_ROWS=settings.block_rows,
        BLOCK_KEYS=settings.block_keys,
        BLOCK_RUN=configs.power_of_two(settings.block_rows + settings.block_keys),
        BLOCK_PAIR=configs.power_of_two(width),
        BLOCK_REST=configs.power_of_two(d - 2 * width),
        BLOCK_VALUE=configs.power_of_two(d_value),
        PRECISION=settings.precision,
    )


def _bias_per_slot(call: Call) -> bool:
    """Whether every slot of a group has a column of the bias to itself."""
    k, r = call.key.shape[2:4]
    bias = call.attention_bias
    return call.grouping == CLOCK and k > 1 and bias is not None and bias.shape[2] == k * r


def planes(lse: torch.Tensor, call: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The log-sum-exp, where there is a bias in two planes (common.py)."""
    return (lse, None) if call.attention_bias is None else (lse[0], lse[1])


def _fill_with_nothing(out: torch.Tensor, lse: torch.Tensor) -> None:
    """What rows have that see nothing."""
    out.zero_()
    if lse.dim() == out.dim():  # with a bias: two planes
        lse[0].fill_(float("-inf"))
        lse[1].zero_()
    else:
        lse.fill_(float("-inf"))


def _key_tiles(call: Call, spec: arguments.Spec) -> int:
    """Key tiles of a group."""
    k, r = call.key.shape[2:4]
    if spec.PER_NEIGHBOUR:
        return k * -(-r // spec.BLOCK_KEYS)
    return -(-(k * r if call.grouping == CLOCK else r) // spec.BLOCK_KEYS)


def _row_tiles(call: Call, settings: configs.LaunchSettings) -> int:
    """Row tiles of a group; no tile holds rows of two neighbours."""
    return -(-call.stride // settings.block_rows) * (call.query.shape[2] if call.grouping == CHUNK else 1)


def _groups(call: Call, attended: bool) -> tuple[int, int]:
    """The first group of a sequence and how many there are: all, or those that some token attends to."""
    if call.grouping == CLOCK:
        if not attended or call.chunk_spans is not None:
            return 0, call.key.shape[1]
        first, last = common.attended_chunks(call.query.shape[3], call.key.shape[1], call.stride, call.first_token)
        return first, max(last - first, 0)
    return 0, call.query.shape[1] * (call.query.shape[2] if call.grouping == NEIGHBOUR else 1)


def _choice(kind: str, call: Call) -> tuple:
    """What launch settings depend on: the arguments of `configs.choose`."""
    width = 0 if call.query_cos is None else call.query_cos.shape[1]
    width = configs.tile_width(call.query.shape[-1], call.value.shape[-1], width)
    others = (call.attention_bias, call.query_cos, call.null_key)
    features = configs.features(
        relative=call.relative_key is not None,
        dropout=call.dropout_seed is not None,
        options=any(x is not None for x in others),
    )
    return kind, _compute_capability(call.query.device), call.query.dtype, width, features, call.stride


def _choose(kind: str, call: Call) -> Any:
    return configs.choose(*_choice(kind, call))


def plan_forward(out, lse, call: Call, settings: configs.LaunchSettings | None = None) -> Launch:
    """The forward's launch; there must be groups that some row attends to."""
    settings = settings or _choose("forward", call)
    first_group, num_groups = _groups(call, attended=True)
    given = {
        **_shared_arguments(call),
        "results": arguments.Results(out, *planes(lse, call)),
        "first_group": first_group,
        "num_groups": num_groups,
        "SPEC": arguments.constants(_spec(call, settings, per_neighbour=call.relative_key is not None)),
    }
    programs = call.query.shape[0] * num_groups * _row_tiles(call, settings) * call.query.shape[4]
    return Launch("forward", triton_forward.forward_kernel, programs, given, settings)


SWEPT_ROWS = 512  # NEIGHBOUR: up to so many rows one program makes all gradients of a neighbour and head


def backward_kinds(call: Call) -> tuple[str, ...]:
    """The launches that make the gradients of query, key and value: one where a tile holds all rows or all keys of a
    group, or two sweeps of one program do, else two. (Causal attention has few and long groups: two.)"""
    h, hk, r = call.query.shape[4], call.key.shape[4], call.key.shape[3]
    settings = _choose("backward", call)
    if settings is not None and call.grouping != CHUNK and call.stride <= settings.block_rows and h == hk:
        return ("backward",)
    settings = _choose("backward_shared", call)
    if settings is not None and call.grouping != CLOCK and r <= settings.block_keys:
        return ("backward_shared",)
    if call.grouping == NEIGHBOUR and r <= SWEPT_ROWS and not call.causal and _choose("backward_sweeps", call):
        return ("backward_sweeps",)
    return ("backward_queries", "backward_keys")


_SWEEPS = {"backward": 0, "backward_queries": 0, "backward_shared": 1, "backward_keys": 1, "backward_sweeps": 2}


def plan_backward(grad_out, grad_lse, out, lse, gradients: tuple, copies: tuple, call: Call) -> list[Launch]:
    """The backward's launches: those of `backward_kinds`, and one each for the parameters wanted. `copies` are the
    partial sums of the gradients of attention_bias, relative_key, content_bias, relative_bias, null_key, null_value,
    [copies, ...] fp32, None where not wanted; those of attention_bias and relative_key are zero. `grad_lse` is
    contiguous, or None."""
    b, h, hk = call.query.shape[0], call.query.shape[4], call.key.shape[4]
    shared = {
        **_shared_arguments(call),
        "grad_out": _rows(grad_out, call),
        "results": arguments.Results(out, *planes(lse, call), grad_lse),
    }
    launches = []
    for kind in backward_kinds(call):
        settings = _choose(kind, call)
        first_group, num_groups = _groups(call, attended=kind == "backward_queries")
        spec = _spec(call, settings, per_neighbour=call.relative_key is not None, grad_out=grad_out)
        given = {
            **shared,
            "gradients": arguments.Gradients(*gradients),
            "first_group": first_group,
            "num_groups": num_groups,
            "SWEEP": _SWEEPS[kind],
            "SINGLE_PASS": kind in ("backward", "backward_shared"),
            "SPEC": arguments.constants(spec),
        }
        tiles = (_row_tiles(call, settings) * h, max(_key_tiles(call, spec), 1) * hk, hk)[_SWEEPS[kind]]
        launches.append(Launch(kind, triton_backward.backward_kernel, b * num_groups * tiles, given, settings))

    d_bias, d_relative_key, d_content_bias, _, d_null_key, _ = copies
    first_group, num_groups = _groups(call, attended=True)
    k, r = call.key.shape[2:4]
    wanted = {
        "backward_bias": d_bias is not None,
        "backward_relative": d_relative_key is not None,
        "backward_null": d_null_key is not None or (d_content_bias is not None and call.null_key is not None),
    }
    for parameter, kind in enumerate(wanted):
        if not wanted[kind]:
            continue
        settings = _choose(kind, call)
        row_tiles = -(-call.stride // settings.block_rows)
        apart = kind == "backward_bias" and _bias_per_slot(call)  # every slot of a group has elements of its own
        # Relative positions need tiles that lie within a neighbour, and so do neighbours that share elements.
        per_neighbour = kind != "backward_null" and not (apart and call.relative_key is None)
        # Neighbours of a group that add to the same elements: those of its rows, or of its slots.
        sharing = call.query.shape[2] if call.grouping == CHUNK else 1
        if call.grouping == CLOCK and kind != "backward_null" and not apart:
            sharing = k
        num_copies = next(x for x in (d_bias, d_relative_key, d_null_key, d_content_bias) if x is not None).shape[0]
        spec = _spec(call, settings, per_neighbour, grad_out)
        own_tiles = 1
        if kind == "backward_bias":
            own_tiles = row_tiles * (_key_tiles(call, spec) if apart else -(-r // settings.block_keys))
        given = {
            **shared,
            "copies": arguments.Copies(*copies),
            "first_group": first_group,
            "num_groups": num_groups,
            "num_items": b * num_groups * sharing * (1 if kind == "backward_bias" else row_tiles),
            "num_copies": num_copies,
            "PARAMETER": parameter,
            "SPEC": arguments.constants(spec),
        }
        launches.append(Launch(kind, triton_parameters.parameters_kernel, num_copies * own_tiles * h, given, settings))
    return launches


def _tune(kinds: tuple[str, ...], call: Call, run: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    """Times the candidates of each kind of launch that has not been tuned yet, and uses the fastest from then on.
    `run` executes the operation under the settings in force and returns what it computed."""
    if call.query.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    for kind in kinds:
        choice = _choice(kind, call)
        if choice in configs.tuned or kind in configs.overrides:
            continue
        key = tuning.key_of(
            operation="attention",
            choice=choice,
            triton=triton.__version__,
            code=_code(),
            device=torch.cuda.get_device_name(call.query.device) if call.query.is_cuda else "interpreter",
        )
        settings = _remembered(key)
        if settings is None:

            def with_settings(settings, kind=kind):
                with configs.override(**{kind: settings}):
                    return run()

            settings, record = tuning.tune(configs.candidates(*choice), with_settings)
            tuning.save(key, {"settings": asdict(settings), "milliseconds": record})
        configs.tuned[choice] = settings


def _remembered(key: str) -> configs.LaunchSettings | None:
    """The settings in the tuning cache; an entry that makes none is ignored with a warning."""
    entry = tuning.load().get(key)
    try:
        return None if entry is None else configs.LaunchSettings(**entry["settings"])
    except (TypeError, KeyError) as error:
        warnings.warn(
            f"retro_kernels: an entry of the tuning cache {tuning.cache_file()} is not understood "
            f"({type(error).__name__}: {error}) and is tuned again",
            stacklevel=2,
        )
        return None


KERNELS = (triton_forward.forward_kernel, triton_backward.backward_kernel, triton_parameters.parameters_kernel)
SOURCES = tuple(
    str(module.__file__) for module in (arguments, triton_tiles, triton_forward, triton_backward, triton_parameters)
)


@lru_cache(maxsize=1)
def _code() -> str:
    return tuning.source_hash(__file__, configs.__file__, *SOURCES)


# Asked once: torch.compile, which traces the choice of a backend, refuses to ask a kernel for its type.
_INTERPRETING = triton is not None and not isinstance(KERNELS[0], triton.JITFunction)


def interpreting() -> bool:
    """Whether the kernels were made for Triton's interpreter (TRITON_INTERPRET=1 when this module was imported)."""
    return _INTERPRETING


def _interpretable(x: Any) -> Any:
    """bf16 tensors as fp32: in the interpreter, tl.dot multiplies the bit patterns of bf16."""
    return x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x


_HERE = nullcontext()


def _on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def attend(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = common.allocate_forward(call.query, call.value, call.attention_bias)
    with _on_device_of(out):
        settled = _settled()
        if not (settled and launched(call, "forward", _results_by_name(out, lse, call))):
            _attend(call, out, lse, settled)
    return out, lse


def _results_by_name(out: torch.Tensor, lse: torch.Tensor, call: Call) -> dict[str, torch.Tensor | None]:
    """What the backend makes, by the names of the kernels' arguments."""
    return dict(zip(("out", "lse", "log_sum"), (out, *planes(lse, call))))


def _settled() -> bool:
    """Whether launch settings are a matter of the call alone."""
    return not configs.overrides and not tuning.enabled()


def _attend(call: Call, out: torch.Tensor, lse: torch.Tensor, settled: bool) -> None:
    nothing = out.numel() == 0 or _groups(call, attended=True)[1] == 0
    if nothing or call.chunk_spans is not None:  # tokens in no span belong to no program
        _fill_with_nothing(out, lse)
    if nothing:
        return
    if interpreting() and call.query.dtype == torch.bfloat16:
        wide = torch.zeros_like(out, dtype=torch.float32)
        plan_forward(wide, lse, call.mapped(_interpretable))()
        out.copy_(wide)
        return

    def run() -> tuple[torch.Tensor, ...]:
        launch_all(call, "forward", [plan_forward(out, lse, call)], keep=settled)
        return out, lse

    if tuning.enabled():
        _tune(("forward",), call, run)
    run()


PARAMETERS = ("attention_bias", "relative_key", "content_bias", "relative_bias", "null_key", "null_value")


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
        groups = _groups(call, attended=True)[1]
        if groups == 0 or call.query.numel() == 0:
            for gradient in found.values():
                gradient.zero_()
            return found
        if call.chunk_spans is not None:  # tokens in no span belong to no program
            found["query"].zero_()
        if grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        _differentiate(call, grad_out, grad_lse, out.contiguous(), lse.contiguous(), found, groups)
    return found


def _differentiate(
    call: Call,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    found: dict[str, torch.Tensor],
    groups: int,
) -> None:
    num_copies = min(common.PARTIAL_COPIES, call.query.shape[0] * groups)
    copies = {
        name: memory.allocate((num_copies, *found[name].shape), torch.float32, out.device)
        for name in PARAMETERS
        if name in found and found[name].numel()
    }
    computed = {name: found[name] for name in ("query", "key", "value")}
    backward = (grad_out, grad_lse, out, lse)
    widened = interpreting() and call.query.dtype == torch.bfloat16
    if widened:
        computed = {name: torch.zeros_like(x, dtype=torch.float32) for name, x in computed.items()}
        backward, call = tuple(map(_interpretable, backward)), call.mapped(_interpretable)
    key = ("backward", tuple(found), grad_out.stride(), grad_lse is None)

    def run(settled: bool = False) -> tuple[torch.Tensor, ...]:
        for name in ("attention_bias", "relative_key"):
            if name in copies:
                copies[name].zero_()
        made = {"grad_out": grad_out, "grad_lse": grad_lse, **_results_by_name(out, lse, call)}
        made |= {f"grad_{name}": x for name, x in computed.items()}
        made |= {f"{name}_copies": x for name, x in copies.items()}
        if not (settled and launched(call, key, made)):
            results = tuple(computed.values()), tuple(copies.get(name) for name in PARAMETERS)
            launch_all(call, key, plan_backward(*backward, *results, call), keep=settled)
        return (*computed.values(), *copies.values())

    if tuning.enabled():
        launches = plan_backward(*backward, tuple(computed.values()), tuple(map(copies.get, PARAMETERS)), call)
        _tune(tuple(launch.kind for launch in launches), call, run)
    run(_settled())
    if widened:
        for name, result in computed.items():
            found[name].copy_(result)
    for name in PARAMETERS:
        if name in copies and found[name].dtype == torch.float32:
            torch.sum(copies[name], 0, out=found[name])
        elif name in copies:
            found[name].copy_(copies[name].sum(0))
        elif name in found:
            found[name].zero_()


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why this backend cannot run in this process, with the remedy, or None."""
    if triton is None:
        reason = f"Triton cannot be imported ({arguments.import_error})"
        return f"{reason}: install it with `pip install triton` (Linux, 3.6 or newer)"
    if interpreting():
        return None
    if torch.version.hip is not None:
        return 'this PyTorch is built for ROCm, and the kernels are written for NVIDIA GPUs: use backend="reference"'
    if not torch.cuda.is_available():
        return (
            "no CUDA device is usable: install a CUDA build of PyTorch on a machine with an NVIDIA GPU, or set "
            "TRITON_INTERPRET=1 before retro_kernels is imported to run the kernels, very slowly, on the CPU"
        )
    best = max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if best < (8, 0):
        return f"the GPU has compute capability {best[0]}.{best[1]} and the kernels need 8.0 (Ampere) or newer"
    return None


SMALL_SHARED = ((8, 6), (8, 9), (12, 0), (12, 1))  # compute capabilities with 99 KiB of shared memory a block


def refusal(call) -> str | None:
    """Why this call cannot run here, or None."""
    query = call.query
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'query is {query.dtype}; the Triton kernels take float32, float16, bfloat16: use backend="reference"'
    if max(query.shape[-1], call.value.shape[-1]) > 256:
        return f"head sizes are {query.shape[-1]} and {call.value.shape[-1]}; the Triton kernels take at most 256"
    if interpreting():
        return None
    if query.device.type != "cuda":
        return (
            f"query is on {query.device}; the Triton kernels need a CUDA tensor (or TRITON_INTERPRET=1 set before "
            "retro_kernels is imported)"
        )
    major, minor = torch.cuda.get_device_capability(query.device)
    if major < 8:
        return f"{query.device} has compute capability {major}.{minor}; the Triton kernels need 8.0 or newer"
    wide = configs.tile_width(query.shape[-1], call.value.shape[-1], 0) > 128
    if wide and call.relative_key is not None and query.dtype == torch.float32 and (major, minor) in SMALL_SHARED:
        return (
            f"relative positions with float32 heads of {max(query.shape[-1], call.value.shape[-1])} take 114 KiB of "
            f"shared memory in the backward, and {query.device} (compute capability "
            f"{major}.{minor}) has 99: use float16, bfloat16, or heads of up to 128"
        )
    return None


forward, backward = common.register("triton", attend, gradients, devices=("cpu", "cuda"), two_planes=True)
