"""The cases that every backend must get right, and how their results are compared.

A case is a shape and the names of the options that are on; `make` draws its tensors. The same cases run on the
reference (against a per-token loop in fp64) and on every fused backend (against the reference in fp64).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import retro_kernels as rk
from retro_kernels.ops.attention import reference


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `options` are names that `make` knows; sizes are the letters of design section 1. n, stride, align and
    the offsets are of chunked cross-attention only, and m is not of neighbour self-attention."""

    name: str
    operation: str = "cca"
    b: int = 2
    n: int = 21
    m: int = 8
    l: int | None = None  # None: exactly the chunks needed, or 3 in the encoder
    k: int = 2
    r: int = 16
    h: int = 2
    hk: int | None = None  # None: h
    d: int = 16
    d_value: int | None = None  # None: d
    stride: int | None = None
    align: str = "start"
    query_offset: int = 0
    chunk_offset: int = 0
    causal: bool = False
    documents: tuple[int, ...] | None = None  # lengths of the documents packed into each row
    dropout_p: float = 0.0
    scale: float | None = None
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def chunks(self) -> int:
        """l: the chunks given, by default those needed (design section 3, exact conventions)."""
        if self.l is not None:
            return self.l
        if self.operation != "cca":
            return 3
        if self.align == "end":
            return -(-self.n // self.m)
        s = self.stride or self.m
        if self.documents is not None:
            return sum((length - self.m) // s + 1 for length in self.documents if length >= self.m)
        if self.n == 0 or self.query_offset + self.n < self.m:
            return 0
        return (self.query_offset + self.n - self.m) // s + 1 - self.chunk_offset

    @property
    def query_shape(self) -> tuple[int, ...]:
        if self.operation == "cca":
            return (self.b, self.n, self.h, self.d)
        return (self.b, self.chunks, self.k, self.r, self.h, self.d)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.query_shape[:-1], self.d_value or self.d)

    @property
    def tables(self) -> tuple[int, int]:
        """Rows and slots of a table of positions."""
        return {"cca": (self.m, self.r), "self": (self.r, self.r), "cross": (self.r, self.m)}[self.operation]


ALL = ("mask", "bias", "rotary", "null")

# Options that every fused backend honours.
CASES = (
    Case("plain"),
    Case("one_chunk", n=8),
    Case("last_token_only", n=8, m=8, l=1),
    Case("no_token_attends", n=5, l=2),
    Case("whole_chunks", n=24),
    Case("incomplete_chunk", n=30),
    Case("surplus_chunks", n=21, l=5),
    Case("one_neighbour", k=1),
    Case("many_neighbours", k=7, r=5),
    Case("chunk_of_one", m=1, n=5, r=3),
    Case("one_key", k=1, r=1),
    Case("odd_sizes", n=29, m=7, k=3, r=11, h=3, d=20, d_value=12),
    Case("wider_value", d=8, d_value=40),
    Case("head_of_one", d=1, d_value=1),
    Case("long_rows", n=150, m=70, k=1, r=9, b=1),
    Case("long_keys", n=9, m=4, k=3, r=150, b=1, h=1),
    Case("grouped", h=6, hk=2),
    Case("multi_query", h=4, hk=1, options=("mask", "null")),
    Case("mask", options=("mask",)),
    Case("mask_rows_empty", options=("mask", "empty_chunk")),
    Case("mask_rows_empty_null", options=("mask", "empty_chunk", "null")),
    Case("bias_shared", options=("bias",)),
    Case("bias_per_neighbour", options=("bias_per_neighbour",)),
    Case("bias_fp32", options=("bias", "fp32_parameters", "null")),
    Case("null", options=("null",)),
    Case("rotary", options=("rotary",)),
    Case("rotary_interleaved", options=("rotary_interleaved",)),
    Case("rotary_partial", d=24, options=("rotary_partial",)),
    Case("rotary_partial_interleaved", d=24, options=("rotary_partial", "rotary_interleaved")),
    Case("scale", scale=-0.7, options=("null", "bias")),
    Case("scale_zero", scale=0.0, options=("mask",)),
    Case("stride", n=40, m=8, stride=3, options=("bias", "rotary")),
    Case("stride_one", n=12, m=4, stride=1, k=1, r=5),
    Case("end", n=21, align="end", options=ALL),
    Case("end_whole", n=24, align="end"),
    Case("end_short", n=3, align="end"),
    Case("offset", n=21, query_offset=11, options=ALL),
    Case("offset_chunks", n=21, query_offset=37, chunk_offset=3, options=ALL),
    Case("offset_skips_chunks", n=13, query_offset=37, chunk_offset=1),
    Case("offset_one_token", n=1, query_offset=20, chunk_offset=1, options=("null",)),
    Case("offset_stride", n=21, m=8, stride=5, query_offset=22, chunk_offset=2, options=("bias",)),
    Case("everything", n=45, m=10, k=3, r=9, h=4, hk=2, d=12, d_value=20, stride=7, l=9, options=ALL),
    Case("everything_per_neighbour", n=45, k=3, r=9, h=4, hk=2, options=("mask", "bias_per_neighbour", "null")),
    Case("empty_batch", b=0),
    Case("empty_sequence", n=0, l=1),
    Case("no_neighbours", k=0),
    Case("no_neighbours_null", k=0, options=("null", "bias")),
    Case("no_tokens_retrieved_null", r=0, options=("null",)),
    Case("no_chunks", n=5, l=0),
    Case("strided", n=29, options=(*ALL, "strided")),
    Case("broadcast", options=("mask", "bias", "expanded")),
    Case("relative", options=("relative",)),
    Case("relative_u_v", options=("relative", "relative_biases")),
    Case("relative_u_only", options=("relative", "content_bias", "null")),
    Case("relative_odd", n=29, m=7, k=3, r=11, h=3, d=20, d_value=12, options=("relative", "relative_biases")),
    Case("relative_long_rows", n=150, m=70, k=1, r=9, b=1, options=("relative", "relative_biases")),
    Case("relative_long_keys", n=9, m=4, k=2, r=150, b=1, h=1, options=("relative", "relative_biases")),
    Case(
        "relative_all",
        n=45,
        m=10,
        k=3,
        r=9,
        h=4,
        hk=2,
        stride=7,
        options=("relative", "relative_biases", "mask", "null", "bias"),
    ),
    Case("relative_end", align="end", options=("relative", "relative_biases")),
    Case("relative_offset", query_offset=11, options=("relative", "relative_biases", "mask", "empty_chunk")),
    Case("relative_strided", n=29, options=("relative", "relative_biases", "strided")),
    Case("dropout", dropout_p=0.3),
    Case("dropout_odd", n=29, m=7, k=3, r=11, h=3, d=20, d_value=12, dropout_p=0.5, options=("mask", "null")),
    Case(
        "dropout_all",
        n=45,
        m=10,
        k=3,
        r=9,
        h=4,
        hk=2,
        stride=7,
        dropout_p=0.2,
        options=("relative", "relative_biases", "mask", "null", "bias"),
    ),
    Case("dropout_long_keys", n=9, m=4, k=3, r=150, b=1, h=1, dropout_p=0.9),
    Case("packed", n=45, documents=(17, 3, 8, 17)),
    Case("packed_short", n=21, l=2, documents=(7, 7, 7), options=("null",)),
    Case("packed_stride", n=50, stride=3, documents=(11, 20, 19), options=ALL),
    Case("packed_surplus", n=45, l=9, documents=(23, 22), options=("relative", "relative_biases", "mask")),
    Case("packed_one_token_over", n=18, m=8, documents=(9, 9), dropout_p=0.4),
)

SELF = (
    Case("self", "self"),
    Case("self_one_token", "self", r=1),
    Case("self_odd", "self", l=2, k=3, r=19, h=3, d=20, d_value=12),
    Case("self_long", "self", b=1, l=1, k=2, r=150, h=1),
    Case("self_very_long", "self", b=1, l=1, k=1, r=530, h=1),
    Case("self_grouped", "self", h=6, hk=2, options=("mask",)),
    Case("self_mask", "self", options=("mask", "empty_chunk")),
    Case("self_bias", "self", options=("bias",)),
    Case("self_rotary", "self", options=("rotary", "mask")),
    Case("self_rotary_interleaved", "self", d=24, options=("rotary_partial", "rotary_interleaved")),
    Case("self_relative", "self", options=("relative",)),
    Case("self_relative_all", "self", r=21, h=4, hk=2, options=("relative", "relative_biases", "mask", "bias")),
    Case("self_relative_long", "self", b=1, l=1, k=1, r=150, h=1, options=("relative", "relative_biases")),
    Case("self_scale", "self", scale=-0.7),
    Case("self_dropout", "self", dropout_p=0.3, options=("mask", "relative", "relative_biases")),
    Case("self_strided", "self", options=("mask", "bias", "rotary", "strided")),
    Case("self_strided_relative", "self", options=("mask", "relative", "relative_biases", "strided")),
    Case("self_expanded", "self", options=("mask", "bias", "expanded")),
    Case("self_empty_batch", "self", b=0),
    Case("self_no_chunks", "self", l=0),
    Case("self_no_neighbours", "self", k=0),
    Case("self_no_tokens", "self", r=0),
    Case("causal", "self", causal=True),
    Case("causal_decoder", "self", l=1, k=1, r=150, causal=True, options=("rotary",)),
    Case("causal_mask", "self", causal=True, options=("mask", "empty_chunk", "bias")),
    Case("causal_grouped", "self", b=1, l=1, k=1, r=70, h=6, hk=2, causal=True),
    Case("causal_relative", "self", l=1, k=1, r=150, h=1, causal=True, options=("relative", "relative_biases")),
    Case("causal_dropout", "self", l=1, k=1, r=37, causal=True, dropout_p=0.3),
    Case("causal_packed", "self", l=1, k=1, r=45, causal=True, documents=(17, 3, 1, 24)),
    Case("causal_packed_long", "self", b=1, l=1, k=1, r=180, h=1, causal=True, documents=(100, 80), options=("mask",)),
    Case("causal_packed_rotary", "self", l=1, k=1, r=45, causal=True, documents=(17, 28), options=("rotary", "mask")),
    Case("causal_packed_relative", "self", l=1, k=1, r=45, h=4, hk=2, causal=True, documents=(17, 28), dropout_p=0.2,
         options=("relative", "relative_biases")),
)  # fmt: skip

CROSS = (
    Case("cross", "cross"),
    Case("cross_one_activation", "cross", m=1, r=3, d=8),
    Case("cross_one_token", "cross", r=1, k=3),
    Case("cross_odd", "cross", l=2, k=3, r=19, m=7, h=3, d=20, d_value=12),
    Case("cross_long", "cross", b=1, l=1, k=2, r=150, m=70, h=1),
    Case("cross_many_activations", "cross", b=1, l=1, k=1, r=9, m=300, h=1),
    Case("cross_many_neighbours", "cross", b=1, l=2, k=9, r=7),
    Case("cross_grouped", "cross", h=6, hk=2, options=("mask",)),
    Case("cross_mask", "cross", options=("mask", "empty_chunk")),
    Case("cross_bias", "cross", options=("bias",)),
    Case("cross_rotary", "cross", options=("rotary", "mask")),
    Case("cross_rotary_interleaved", "cross", d=24, options=("rotary_partial", "rotary_interleaved")),
    Case("cross_relative", "cross", options=("relative",)),
    Case("cross_relative_all", "cross", r=21, h=4, hk=2, options=("relative", "relative_biases", "mask", "bias")),
    Case("cross_relative_long", "cross", b=1, l=1, r=150, m=70, h=1, options=("relative", "relative_biases")),
    Case("cross_scale", "cross", scale=-0.7),
    Case("cross_dropout", "cross", dropout_p=0.3, options=("mask", "relative", "relative_biases")),
    Case("cross_strided", "cross", options=("mask", "bias", "rotary", "strided")),
    Case("cross_strided_relative", "cross", options=("mask", "relative", "relative_biases", "strided")),
    Case("cross_expanded", "cross", options=("mask", "bias", "expanded")),
    Case("cross_empty_batch", "cross", b=0),
    Case("cross_no_chunks", "cross", l=0),
    Case("cross_no_neighbours", "cross", k=0),
    Case("cross_no_tokens", "cross", r=0),
    Case("cross_no_activations", "cross", m=0),
)

EVERY = (*CASES, *SELF, *CROSS)


def by_name(name: str) -> Case:
    return next(case for case in EVERY if case.name == name)


def make(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """The keyword arguments of the case's operation, gradients wanted wherever they exist."""
    generator = torch.Generator().manual_seed(seed)
    d_value, hk, l = case.d_value or case.d, case.hk or case.h, case.chunks
    rows, slots = case.tables
    on = set(case.options)

    def draw(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)
        return x.to(device).requires_grad_()

    keys = (case.b, l, case.m) if case.operation == "cross" else (case.b, l, case.k, case.r)
    arguments: dict[str, Any] = {
        "query": draw(*case.query_shape),
        "key": draw(*keys, hk, case.d),
        "value": draw(*keys, hk, d_value),
        "scale": case.scale,
        "dropout_p": case.dropout_p,
    }
    if case.operation == "cca":
        arguments |= {name: getattr(case, name) for name in ("stride", "align", "query_offset", "chunk_offset")}
        arguments["chunk_size"] = case.m
    if case.operation == "self":
        arguments["causal"] = case.causal
    parameter = torch.float32 if "fp32_parameters" in on and dtype != torch.float64 else dtype
    if "mask" in on:
        mask = torch.rand(keys, generator=generator) > 0.3
        if "empty_chunk" in on:
            mask[:, 0] = False
        arguments["activation_mask" if case.operation == "cross" else "neighbour_mask"] = mask.to(device)
    if case.documents is not None:
        starts = torch.zeros(case.b, sum(case.documents), dtype=torch.bool)
        assert starts.shape[1] == (case.n if case.operation == "cca" else case.r)
        for row, lengths in enumerate([case.documents, case.documents[::-1]][: case.b]):
            starts[row, [sum(lengths[:i]) for i in range(len(lengths))]] = True
        arguments["sequence_starts"] = starts.to(device)
    if "bias" in on:
        arguments["attention_bias"] = draw(case.h, rows, slots, kind=parameter)
    if "bias_per_neighbour" in on:
        arguments["attention_bias"] = draw(case.h, rows, case.k * slots, kind=parameter)
    if "null" in on:
        arguments["null_key"] = draw(case.h, case.d, kind=parameter)
        arguments["null_value"] = draw(case.h, d_value, kind=parameter)
    if on & {"rotary", "rotary_interleaved", "rotary_partial"}:
        width = case.d // 3 if "rotary_partial" in on else case.d // 2
        rate = 10000.0 ** -(torch.arange(width, dtype=torch.float64) / max(width, 1))
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        shift = case.m - 1 if case.operation == "cca" else 0
        for name, positions in (("query_rotary", shift + torch.arange(rows)), ("key_rotary", torch.arange(slots))):
            angles = positions[:, None] * rate
            arguments[name] = tuple(x.to(kind).to(device) for x in (angles.cos(), angles.sin()))
        arguments["rotary_interleaved"] = "rotary_interleaved" in on
    if "relative" in on:
        arguments["relative_key"] = draw(case.h, rows + slots - 1, case.d, kind=parameter)
    if on & {"relative_biases", "content_bias"}:
        arguments["content_bias"] = draw(case.h, case.d, kind=parameter)
    if "relative_biases" in on:
        arguments["relative_bias"] = draw(case.h, case.d, kind=parameter)
    if "strided" in on:
        arguments = {name: _restride(x) for name, x in arguments.items()}
    if "expanded" in on:  # stride 0: one set of slots for all chunks, one key/value head for all heads
        for name in ("key", "value"):
            x = arguments[name].detach()[:1, :1, ..., :1, :]
            arguments[name] = x.expand(*arguments[name].shape).requires_grad_()
    return arguments


def _restride(x: Any) -> Any:
    """The same values behind other strides: dimensions stored in reverse order, each row with a gap after it."""
    if isinstance(x, tuple):
        return tuple(_restride(part) for part in x)
    if not isinstance(x, torch.Tensor):
        return x
    order = (*reversed(range(x.dim() - 1)), x.dim() - 1)
    gapped = torch.full((*(x.shape[i] + 1 for i in order[:-1]), x.shape[-1] + 3), 7, dtype=x.dtype, device=x.device)
    view = gapped[tuple(slice(1, 1 + x.shape[i]) for i in order[:-1])][..., 1 : 1 + x.shape[-1]]
    view = view.permute(*(order.index(i) for i in range(x.dim())))
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad)


def differentiable(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.requires_grad}


def as_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Detached copies in another floating dtype, gradients wanted where they were."""

    def convert(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(convert(part) for part in x)
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            return x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad)
        return x

    return {name: convert(x) for name, x in arguments.items()}


def operation(arguments: dict[str, Any]) -> Callable[..., Any]:
    """The public function that the arguments are for."""
    if "chunk_size" in arguments:
        return rk.chunked_cross_attention
    return rk.neighbour_self_attention if "causal" in arguments else rk.neighbour_cross_attention


def run(arguments: dict[str, Any], backend: str, grad_out: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """out, lse and, given grad_out, the gradient of every differentiable argument. Dropout always draws the same."""
    torch.manual_seed(7)
    out, lse = operation(arguments)(**arguments, return_lse=True, backend=backend)
    results = {"out": out.detach(), "lse": lse}
    if grad_out is not None:
        inputs = differentiable(arguments)
        gradients = torch.autograd.grad(out, list(inputs.values()), grad_out.to(out.dtype))
        results |= {f"gradient of {name}": g for name, g in zip(inputs, gradients)}
    return results


def same_precision(arguments: dict[str, Any], grad_out: torch.Tensor) -> dict[str, torch.Tensor]:
    """The call as plain PyTorch computes it in the arguments' own dtype: logits and probabilities are rounded to it, as
    in an eager RETRO. Its error is what a fused half-precision kernel is measured against."""
    with mock.patch.object(reference, "accumulation_dtype", lambda dtype: dtype):
        return run(arguments, "reference", grad_out)


def error(given: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference over the largest expected magnitude, or over 0.1 where all is smaller: inputs are
    standard normal, and what cancels to zero is zero only to their rounding. Infinite and NaN entries must agree."""
    given, expected = given.double(), expected.double()
    assert given.shape == expected.shape, f"shape {list(given.shape)}, expected {list(expected.shape)}"
    finite = expected.isfinite()
    same = torch.equal(given.isfinite(), finite) and torch.equal(given[~finite], expected[~finite])
    if not same:
        worst = (given.isfinite() != finite).nonzero()[:3].tolist()
        raise AssertionError(f"infinite or NaN where the reference is not (or the reverse), first at {worst}")
    if not finite.any():
        return 0.0
    magnitude = expected[finite].abs().max().item()
    return (given[finite] - expected[finite]).abs().max().item() / max(magnitude, 0.1)


def assert_close(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, x in expected.items():
        e = error(given[name], x)
        assert e <= tolerance, f"{name}: error {e:.2e}, expected at most {tolerance:.0e}"


HALF_FLOOR = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # two roundings of the largest value


def assert_twice(given, plain, expected, dtype: torch.dtype) -> None:
    """The twice-the-error rule: against fp64, at most twice the error of same-precision PyTorch plus a floor of two
    roundings to the dtype."""
    for name, x in expected.items():
        e, limit = error(given[name], x), 2 * error(plain[name], x) + HALF_FLOOR[dtype]
        assert e <= limit, f"{name}: error {e:.2e}, expected at most {limit:.2e}"
