"""The cases that every backend must get right, and how their results are compared.

A case is a shape and the names of the options that are on; `make` draws its tensors. The same cases run on the
reference (against a per-token loop in fp64) and on every fused backend (against the reference in fp64).
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import torch

import retro_kernels as rk
from retro_kernels.ops.chunked_cross_attention import reference


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `options` are names that `make` knows; sizes are the letters of design section 1."""

    name: str
    b: int = 2
    n: int = 21
    m: int = 8
    l: int | None = None  # None: exactly the chunks needed
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
    scale: float | None = None
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def needed(self) -> int:
        """Chunks that the tokens need (design section 3, exact conventions)."""
        if self.align == "end":
            return -(-self.n // self.m)
        if self.n == 0 or self.query_offset + self.n < self.m:
            return 0
        return (self.query_offset + self.n - self.m) // (self.stride or self.m) + 1 - self.chunk_offset


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
)

# The options that only the reference honours until the kernels of relative positions are there.
RELATIVE = (
    Case("relative", options=("relative",)),
    Case("relative_u_v", options=("relative", "relative_biases")),
    Case("relative_all", n=45, m=10, k=3, r=9, h=4, hk=2, stride=7,
         options=("relative", "relative_biases", "mask", "null", "bias")),
    Case("relative_end", align="end", options=("relative", "relative_biases")),
)  # fmt: skip


def make(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """The keyword arguments of `rk.chunked_cross_attention` for the case, gradients wanted wherever they exist."""
    generator = torch.Generator().manual_seed(seed)
    d_value, hk = case.d_value or case.d, case.hk or case.h
    l = case.needed if case.l is None else case.l
    on = set(case.options)

    def draw(*shape: int, kind: torch.dtype = dtype, gradient: bool = True) -> torch.Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)
        return x.to(device).requires_grad_(gradient)

    arguments: dict[str, Any] = {
        "query": draw(case.b, case.n, case.h, case.d),
        "key": draw(case.b, l, case.k, case.r, hk, case.d),
        "value": draw(case.b, l, case.k, case.r, hk, d_value),
        "chunk_size": case.m,
        "stride": case.stride,
        "align": case.align,
        "query_offset": case.query_offset,
        "chunk_offset": case.chunk_offset,
        "scale": case.scale,
    }
    parameter = torch.float32 if "fp32_parameters" in on and dtype != torch.float64 else dtype
    if "mask" in on:
        mask = torch.rand((case.b, l, case.k, case.r), generator=generator) > 0.3
        if "empty_chunk" in on:
            mask[:, 0] = False
        arguments["neighbour_mask"] = mask.to(device)
    if "bias" in on:
        arguments["attention_bias"] = draw(case.h, case.m, case.r, kind=parameter)
    if "bias_per_neighbour" in on:
        arguments["attention_bias"] = draw(case.h, case.m, case.k * case.r, kind=parameter)
    if "null" in on:
        arguments["null_key"] = draw(case.h, case.d, kind=parameter)
        arguments["null_value"] = draw(case.h, d_value, kind=parameter)
    if on & {"rotary", "rotary_interleaved", "rotary_partial"}:
        width = case.d // 3 if "rotary_partial" in on else case.d // 2
        rate = 10000.0 ** -(torch.arange(width, dtype=torch.float64) / max(width, 1))
        tables = torch.float64 if dtype == torch.float64 else torch.float32
        for name, positions in (
            ("query_rotary", case.m - 1 + torch.arange(case.m)),
            ("key_rotary", torch.arange(case.r)),
        ):
            angles = positions[:, None] * rate
            arguments[name] = tuple(x.to(tables).to(device) for x in (angles.cos(), angles.sin()))
        arguments["rotary_interleaved"] = "rotary_interleaved" in on
    if "relative" in on:
        arguments["relative_key"] = draw(case.h, case.m + case.r - 1, case.d)
    if "relative_biases" in on:
        arguments["content_bias"] = draw(case.h, case.d)
        arguments["relative_bias"] = draw(case.h, case.d)
    if "strided" in on:
        arguments = {name: _restride(x) for name, x in arguments.items()}
    if "expanded" in on:  # stride 0: one neighbour set for all chunks, one key/value head for all heads
        for name in ("key", "value"):
            x = arguments[name].detach()[:1, :1, :, :, :1]
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
            return x.detach().to(dtype).requires_grad_(x.requires_grad)
        return x

    return {name: convert(x) for name, x in arguments.items()}


def run(arguments: dict[str, Any], backend: str, grad_out: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """out, lse and, given grad_out, the gradient of every differentiable argument."""
    out, lse = rk.chunked_cross_attention(**arguments, return_lse=True, backend=backend)
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
