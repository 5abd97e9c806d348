"""`explain`: the cost model's view of one call of `projected_chunked_cross_attention`, as a table."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from . import backends as backend_choice
from . import checks
from .absorbed import cost_model
from .attention import common as attention_common
from .backends import ABSORBED, ATTENTION
from .projected import ProjectedArguments, absorb_refusal, prepare, work

PAIRS = ("query_rotary", "key_rotary")
TENSORS = (
    "bias_key",
    "bias_value",
    "neighbour_mask",
    "attention_bias",
    "relative_key",
    "content_bias",
    "relative_bias",
    "null_key",
    "null_value",
    "sequence_starts",
    *PAIRS,
)
FLAGS = ("neighbour_mask", "sequence_starts")
WITHOUT = "it would run as the slow reference, or its rates were not measured"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One way of computing the call. FLOPs and bytes are those of the forward, and of the backward where one is wanted;
    `bytes` counts every tensor that a phase reads or writes once. `saved_bytes` stay from the forward to the backward
    besides the arguments and the output, `key_value_bytes` of keys and values exist at a time. `seconds` is None where
    only the reference would run, or where the device's rates lack a kind. `refused`: why "auto" may not take it."""

    strategy: str
    recompute: bool
    backend: str | None
    flops: float
    bytes: float
    saved_bytes: int
    key_value_bytes: int
    seconds: float | None
    refused: str | None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `rk.explain` returns; printed, it is a table. `measured` is False where the rates come from a rule, which
    `source` states."""

    call: str
    backward: bool
    device: str
    measured: bool
    source: str
    rows: tuple[Estimate, ...]
    chosen: str
    why: str

    def __str__(self) -> str:
        head = ("strategy", "backend", "GFLOP", "MB moved", "MB saved", "MB of K, V", "predicted", "")
        cells = [
            (
                row.strategy + (", recompute" if row.recompute else ""),
                row.backend or "-",
                _number(row.flops / 1e9),
                _number(row.bytes / 1e6),
                _number(row.saved_bytes / 1e6),
                _number(row.key_value_bytes / 1e6),
                "-" if row.seconds is None else f"{_number(row.seconds * 1e3)} ms",
                self._remark(row),
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
        lines = [
            "  ".join(text.ljust(width) if i < 2 else text.rjust(width) for i, (text, width) in enumerate(columns))
            for columns in ([*zip(line[:-1], widths[:-1]), (line[-1], 0)] for line in (head, *cells))
        ]
        what = "forward and backward" if self.backward else "forward only"
        return "\n".join(
            [
                f"{self.call}; {what}",
                *(line.rstrip() for line in lines),
                f"chosen: {self.chosen}, {self.why}",
                f"{self.device}: {self.source}",
            ]
        )

    def _remark(self, row: Estimate) -> str:
        if row.refused:
            return "refused"
        if row.recompute and any(x.strategy == row.strategy and not x.recompute for x in self.rows):
            return "not asked for"
        return "<- chosen" if row.strategy == self.chosen else ""


def explain(
    query: Any,
    encoded: Any,
    w_key: Any,
    w_value: Any,
    *,
    chunk_size: int,
    strategy: str = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backward: bool | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Explanation:
    """Why `projected_chunked_cross_attention` would make keys and values, or absorb their projections: FLOPs, bytes,
    memory and predicted time of each strategy, and the choice. Nothing is computed.

    Args:
        query, encoded, w_key, w_value, chunk_size, strategy, and in `options` all others: as in
            `projected_chunked_cross_attention`. Every tensor may also be on the meta device or a shape (a tuple of
            ints), which then stands for a tensor of `dtype` on `device`.
        dtype: of the shapes; default that of the first tensor, or bf16.
        device: of the shapes and meta tensors; default that of the first other tensor, or the GPU where there is one.
        backward: whether gradients are wanted. Default: what the tensors say, and True where only shapes are given.
        return_lse: accepted and without influence.

    Returns:
        An `Explanation`: `print` it, or read its `rows`, `chosen` and `why`.

    Raises:
        What `projected_chunked_cross_attention` raises for these arguments before it computes.
    """
    given = {"query": query, "encoded": encoded, "w_key": w_key, "w_value": w_value, **options}
    names = [name for name in ("query", "encoded", "w_key", "w_value", *TENSORS) if given.get(name) is not None]
    tensors = [given[name] for name in names if isinstance(given[name], torch.Tensor)]
    real = next((x.device for x in tensors if x.device.type != "meta"), None)
    place = torch.device(device or real or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = dtype or next((x.dtype for x in tensors if x.is_floating_point()), torch.bfloat16)
    for name in names:
        if name in PAIRS:
            given[name] = tuple(_stand_in(x, kind, place, False) for x in given[name])
        else:
            given[name] = _stand_in(given[name], torch.bool if name in FLAGS else kind, place, True)
    if backward is None and not tensors:
        backward = True
    with torch.set_grad_enabled(torch.is_grad_enabled() if backward is None else backward):
        call = prepare(**given, chunk_size=chunk_size, strategy=strategy)
        return _explain(call, strategy, work(call, backward))


def _stand_in(value: Any, dtype: torch.dtype, device: torch.device, gradient: bool) -> Any:
    """A tensor of one element, expanded, for a shape or a meta tensor: it has a place and takes no memory. `gradient`:
    whether that of a shape has one."""
    if isinstance(value, torch.Tensor) and value.device.type != "meta":
        return value
    if isinstance(value, torch.Tensor):
        made = torch.zeros((), dtype=value.dtype, device=device).expand(value.shape)
        return made.requires_grad_(value.requires_grad) if made.is_floating_point() else made
    if isinstance(value, (tuple, list)) and all(isinstance(size, int) for size in value):
        made = torch.zeros((), dtype=dtype, device=device).expand(tuple(value))
        return made.requires_grad_(gradient) if made.is_floating_point() else made
    return value


def _explain(given: ProjectedArguments, strategy: str, sizes: cost_model.Work) -> Explanation:
    call = given.call
    device, dtype = call.query.device, call.query.dtype
    known = cost_model.constants(device, dtype)
    core, core_reason = _backend(ATTENTION, _core_call(given), given.backend)
    absorbing, absorbing_reason = _backend(ABSORBED, call, given.backend)
    refused = absorb_refusal(given)
    if given.query_rotary is not None:
        absorbing = None

    def estimate(name: str, backend: str | None, reason: str | None, recompute: bool) -> Estimate:
        mine = sizes._replace(recompute=recompute)
        found = cost_model.phases(name, mine)
        modelled = backend not in (None, "reference")
        return Estimate(
            name,
            recompute,
            backend,
            sum(x.flops for x in found),
            sum(x.bytes for x in found),
            cost_model.saved_bytes(name, mine),
            cost_model.memory(name, mine._replace(backward=False)),
            known.seconds(found, mine.encoder_dim) if modelled else None,
            reason,
        )

    rows = [estimate("materialise", core, core_reason, sizes.recompute)]
    if sizes.backward and not sizes.recompute:
        rows.append(estimate("materialise", core, core_reason, True))
    rows.append(estimate("absorb", absorbing, absorbing_reason if strategy == "absorb" else refused, False))
    chosen, why = _choice(strategy, rows, refused, cost_model.faster(device, dtype, sizes))
    b, n, h, d = call.query.shape
    _, l, k, r, e = call.encoded.shape
    hk = call.w_key.shape[0]
    heads = f"{h} heads of {d}" + (f" ({hk} key/value)" if hk != h else "")
    text = f"b {b}, n {n}, m {call.rows}, l {l}, k {k}, r {r}, e {e}, {heads}, {cost_model.DTYPES[dtype]}"
    return Explanation(
        text, sizes.backward, cost_model.device_name(device), known.measured, known.source, tuple(rows), chosen, why
    )


def _choice(strategy: str, rows: list[Estimate], refused: str | None, faster: str) -> tuple[str, str]:
    if strategy != "auto":
        return strategy, "asked for by name"
    if refused:
        return "materialise", f"because absorb is refused: {refused}"
    times = {row.strategy: row.seconds for row in reversed(rows)}  # the first row of a strategy is what would run
    other = next(name for name in times if name != faster)
    mine, others = times[faster], times[other]
    if mine is None or others is None:
        return faster, f"because there is no prediction of {other}: {WITHOUT}"
    if mine <= others and others / mine > cost_model.TIE:
        return faster, f"predicted {others / mine:.2f} times as fast as {other}"
    return faster, f"predicted within {cost_model.TIE - 1:.0%} of {other}, and it needs less memory"


def _backend(modules: dict, call: Any, requested: str | None) -> tuple[str | None, str | None]:
    """The backend that would run the call, or why the one asked for by name does not."""
    name, source = backend_choice.requested_backend(requested)
    if name is not None:
        reason = backend_choice.why_not(modules, name, call)
        return (name, None) if reason is None else (None, f"{source}={name!r}: {reason}")
    return backend_choice.first_fused(modules, call)[0] or "reference", None


def _core_call(given: ProjectedArguments) -> attention_common.Call:
    """The call of the core with keys and values that are stand-ins."""
    call = given.call
    places = call.encoded.shape[:4]
    key, value = (weight.new_zeros(()).expand(*places, *weight.shape[:2]) for weight in (call.w_key, call.w_value))
    query_cos, query_sin = checks.pair(given.query_rotary)
    key_cos, key_sin = checks.pair(given.key_rotary)
    return attention_common.Call(
        operation=call.operation,
        grouping=attention_common.CLOCK,
        query=call.query[:, None, None],
        key=key,
        value=value,
        mask=call.mask,
        attention_bias=call.attention_bias,
        relative_key=call.relative_key,
        content_bias=call.content_bias,
        relative_bias=call.relative_bias,
        query_cos=query_cos,
        query_sin=query_sin,
        key_cos=key_cos,
        key_sin=key_sin,
        rotary_interleaved=given.rotary_interleaved,
        null_key=call.null_key,
        null_value=call.null_value,
        chunk_spans=call.chunk_spans,
        scale=call.scale,
        dropout_p=call.dropout_p,
        rows=call.rows,
        stride=call.stride,
        first_token=call.first_token,
        return_lse=call.return_lse,
    )


def _number(value: float) -> str:
    """Three significant digits."""
    if value == 0 or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"
