"""How a backend is checked: problems, the error rule, memory that shows what was not or wrongly written.

The tests, the self-check of a GPU (`ops/verification.py`) and the GPU suite judge by what is here. A case is a shape
and the names of the options that are on; `make` draws its tensors.

The rule. The truth is the reference in fp64. An fp32 result may be FP32_TOLERANCE of the largest true value off, a
result in half precision twice as far as the same computation in plain PyTorch of that precision, and HALF_FLOOR more.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from .ops import common, validate
from .ops.attention import reference


class Wrong(AssertionError):
    """A result that is not right; the message says which and by how much."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. `options` are names that `make` knows; sizes are the letters of design section 1. The operation is
    "cca", "projected" (from encoder states), "decode", "projected_decode", "self" or "cross". n, stride, align and the
    offsets are of the first two only, t and the positions of the decoding ones, and m is not of neighbour
    self-attention."""

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
    e: int = 12
    t: int = 2
    positions: tuple[int, ...] = (9, 2, 15)  # of each sequence's first new token, over again where b is larger
    strategy: str | None = None  # of "projected", "materialise" or "absorb"
    fp32: tuple[str, ...] = ()  # arguments in fp32 beside a query in half precision
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def chunks(self) -> int:
        """l: the chunks given, by default those needed (design section 3, exact conventions)."""
        if self.l is not None:
            return self.l
        if self.operation in ("self", "cross"):
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
        if self.operation in ("cca", "projected"):
            return (self.b, self.n, self.h, self.d)
        if self.operation in ("decode", "projected_decode"):
            return (self.b, self.t, self.h, self.d)
        return (self.b, self.chunks, self.k, self.r, self.h, self.d)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (*self.query_shape[:-1], self.d_value or self.d)

    @property
    def tables(self) -> tuple[int, int]:
        """Rows and slots of a table of positions."""
        return {"self": (self.r, self.r), "cross": (self.r, self.m)}.get(self.operation, (self.m, self.r))

    @property
    def slots_shape(self) -> tuple[int, ...]:
        """Of the mask: the axes of `key` and of `encoded` before the heads and the width."""
        if self.operation == "cross":
            return (self.b, self.chunks, self.m)
        if self.operation in ("decode", "projected_decode"):
            return (self.b, self.k, self.r)
        return (self.b, self.chunks, self.k, self.r)


def make(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """The keyword arguments of the case's operation, gradients wanted wherever they exist."""
    generator = torch.Generator().manual_seed(seed)
    d_value, hk = case.d_value or case.d, case.hk or case.h
    rows, slots = case.tables
    on = set(case.options)

    def draw(*shape: int, kind: torch.dtype = dtype, factor: float = 1.0) -> torch.Tensor:
        x = (torch.randn(shape, generator=generator, dtype=torch.float64) * factor).to(kind)
        return x.to(device).requires_grad_()

    def parameter(name: str, *shape: int) -> torch.Tensor:
        wide = "fp32_parameters" in on or name in case.fp32
        return draw(*shape, kind=torch.float32 if wide and dtype != torch.float64 else dtype)

    keys, decoding = case.slots_shape, case.operation in ("decode", "projected_decode")
    arguments: dict[str, Any] = {"query": draw(*case.query_shape), "scale": case.scale}
    if case.operation in ("projected", "projected_decode"):
        arguments["encoded"] = draw(*keys, case.e)
        arguments["w_key"] = draw(hk, case.d, case.e, factor=max(case.e, 1) ** -0.5)
        arguments["w_value"] = draw(hk, d_value, case.e, factor=max(case.e, 1) ** -0.5)
        if "bias_key" in on:
            arguments["bias_key"] = parameter("bias_key", hk, case.d)
        if "bias_value" in on:
            arguments["bias_value"] = parameter("bias_value", hk, d_value)
    else:
        arguments |= {"key": draw(*keys, hk, case.d), "value": draw(*keys, hk, d_value)}
    if not decoding:
        arguments["dropout_p"] = case.dropout_p
    if case.operation in ("cca", "projected"):
        arguments |= {name: getattr(case, name) for name in ("stride", "align", "query_offset", "chunk_offset")}
        arguments["chunk_size"] = case.m
    if case.operation == "projected":
        arguments["strategy"] = case.strategy
    if case.operation == "self":
        arguments["causal"] = case.causal
    if decoding:
        arguments["chunk_size"] = case.m
        places = [case.positions[i % len(case.positions)] for i in range(case.b)]
        arguments["position"] = torch.tensor(places, dtype=torch.int64, device=device)
        if "valid" in on:  # every other sequence, whose position then may be anything
            arguments["valid"] = torch.arange(case.b, device=device) % 2 == 0
            arguments["position"] = torch.where(arguments["valid"], arguments["position"], -7)
        if "chunk" in on:
            clock = (arguments["position"] + (case.t - 1) - (case.m - 1)).clamp(min=0)
            arguments["chunk"] = clock // case.m
        for quantised in on & {"int8", "float8_e4m3fn"}:
            for name in ("encoded",) if "encoded" in arguments else ("key", "value"):
                arguments[name] = (arguments[name].detach().float() * 30).to(getattr(torch, quantised))
                arguments[f"{name}_scale"] = (torch.rand(keys, generator=generator) / 30).to(device)
    if "mask" in on:
        mask = torch.rand(keys, generator=generator) > 0.3
        if "empty_chunk" in on:
            mask[:, :1] = False
        arguments["activation_mask" if case.operation == "cross" else "neighbour_mask"] = mask.to(device)
    if case.documents is not None:
        starts = torch.zeros(case.b, sum(case.documents), dtype=torch.bool)
        if starts.shape[1] != (case.r if case.operation == "self" else case.n):
            raise ValueError(f"documents: got lengths {case.documents}, expected their sum to be the row's length")
        for row, lengths in enumerate([case.documents, case.documents[::-1]][: case.b]):
            starts[row, [sum(lengths[:i]) for i in range(len(lengths))]] = True
        arguments["sequence_starts"] = starts.to(device)
    if "bias" in on:
        arguments["attention_bias"] = parameter("attention_bias", case.h, rows, slots)
    if "bias_per_neighbour" in on:
        arguments["attention_bias"] = parameter("attention_bias", case.h, rows, case.k * slots)
    if "null" in on:
        arguments["null_key"] = parameter("null_key", case.h, case.d)
        arguments["null_value"] = parameter("null_value", case.h, d_value)
    if on & {"rotary", "rotary_interleaved", "rotary_partial"}:
        width = case.d // 3 if "rotary_partial" in on else case.d // 2
        rate = 10000.0 ** -(torch.arange(width, dtype=torch.float64) / max(width, 1))
        kind = dtype if dtype == torch.float64 or "half_tables" in on else torch.float32
        shift = 0 if case.operation in ("self", "cross") else case.m - 1
        for name, positions in (("query_rotary", shift + torch.arange(rows)), ("key_rotary", torch.arange(slots))):
            angles = positions[:, None] * rate
            arguments[name] = tuple(x.to(kind).to(device) for x in (angles.cos(), angles.sin()))
        arguments["rotary_interleaved"] = "rotary_interleaved" in on
        if "turned" in on:  # the cache holds keys that were turned before
            del arguments["key_rotary"]
    if "relative" in on:
        arguments["relative_key"] = parameter("relative_key", case.h, max(rows + slots - 1, 0), case.d)
    if on & {"relative_biases", "content_bias"}:
        arguments["content_bias"] = parameter("content_bias", case.h, case.d)
    if on & {"relative_biases", "relative_bias"}:
        arguments["relative_bias"] = parameter("relative_bias", case.h, case.d)
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
    """Detached copies in another floating dtype, gradients wanted where they were; a quantised cache stays as it is."""

    def convert(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(convert(part) for part in x)
        if isinstance(x, torch.Tensor) and x.dtype in validate.FLOATING:
            return x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad)
        return x

    return {name: x if name.endswith("_scale") else convert(x) for name, x in arguments.items()}


def name_of(arguments: dict[str, Any]) -> str:
    """The public operation that the arguments are for."""
    if "position" in arguments:
        return ("projected_" if "encoded" in arguments else "") + "chunked_cross_attention_decode"
    if "chunk_size" in arguments:
        return ("projected_" if "encoded" in arguments else "") + "chunked_cross_attention"
    return "neighbour_self_attention" if "causal" in arguments else "neighbour_cross_attention"


def operation(arguments: dict[str, Any]) -> Callable[..., Any]:
    """The public function that the arguments are for."""
    import retro_kernels as rk

    return getattr(rk, name_of(arguments))


def run(arguments: dict[str, Any], backend: str, grad_out: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """out, lse and, given grad_out, the gradient of every differentiable argument. Dropout always draws the same. A
    decoding kernel is called without gradients, which it has not."""
    torch.manual_seed(7)
    without = grad_out is None or ("position" in arguments and backend != "reference")
    with torch.no_grad() if without else contextlib.nullcontext():
        out, lse = operation(arguments)(**arguments, return_lse=True, backend=backend)
    return results(arguments, out, lse, None if without else grad_out)


def results(
    arguments: dict[str, Any], out: torch.Tensor, lse: torch.Tensor, grad_out: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """out, lse and, given grad_out, the gradient of every differentiable argument: 0 where the output depends on none
    of it."""
    found = {"out": out.detach(), "lse": lse.detach()}
    if grad_out is not None:
        inputs = differentiable(arguments)
        gradients: Any = [None] * len(inputs)
        if out.requires_grad:
            gradients = torch.autograd.grad(out, list(inputs.values()), grad_out.to(out.dtype), allow_unused=True)
        found |= {
            f"gradient of {name}": torch.zeros_like(x) if gradient is None else gradient
            for (name, x), gradient in zip(inputs.items(), gradients)
        }
    return found


@contextlib.contextmanager
def plain_precision() -> Iterator[None]:
    """Within it the reference computes in its inputs' own precision, as eager PyTorch does."""
    with mock.patch.object(reference, "accumulation_dtype", lambda dtype: dtype):
        yield


def same_precision(arguments: dict[str, Any], grad_out: torch.Tensor) -> dict[str, torch.Tensor]:
    """The call as plain PyTorch computes it in the arguments' own dtype: logits and probabilities are rounded to it, as
    in an eager RETRO. Its error is what a fused half-precision kernel is measured against."""
    with plain_precision():
        return run(arguments, "reference", grad_out)


FP32_TOLERANCE = 1e-5
HALF_FLOOR = {torch.float16: 1e-3, torch.bfloat16: 8e-3}  # two roundings of the largest value


def error(given: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference over the largest expected magnitude, or over 0.1 where all is smaller: inputs are
    standard normal, and what cancels to zero is zero only to their rounding. Infinite and NaN entries must agree."""
    if given.shape != expected.shape:
        raise Wrong(f"shape {list(given.shape)}, expected {list(expected.shape)}")
    given, expected = given.double(), expected.double()
    finite = expected.isfinite()
    same = (finite & given.isfinite()) | (expected.isnan() & given.isnan()) | (given == expected)
    if not same.all():
        worst = (~same).nonzero()[:3].tolist()
        raise Wrong(f"infinite or NaN where the reference is not (or the reverse), first at {worst}")
    if not finite.any():
        return 0.0
    magnitude = expected[finite].abs().max().item()
    return (given[finite] - expected[finite]).abs().max().item() / max(magnitude, 0.1)


def assert_close(
    given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = FP32_TOLERANCE
) -> float:
    """Raises Wrong where a result is further off than `tolerance` -> the largest error."""
    return _largest((name, error(given[name], x), tolerance) for name, x in expected.items())


def assert_twice(
    given: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], expected: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> float:  # fmt: skip
    """The twice-the-error rule: against fp64, at most twice the error of same-precision PyTorch plus a floor of two
    roundings to the dtype. Raises Wrong -> the largest error."""
    return _largest(
        (name, error(given[name], x), 2 * error(plain[name], x) + HALF_FLOOR[dtype]) for name, x in expected.items()
    )


def _largest(judged: Iterator[tuple[str, float, float]]) -> float:
    largest = 0.0
    for name, found, limit in judged:
        if not found <= limit:
            raise Wrong(f"{name}: error {found:.2e}, expected at most {limit:.2e}")
        largest = max(largest, found)
    return largest


GUARD = 64  # elements before and after every tensor
UNTOUCHED = 123.0


class Bands:
    """Memory between guard bands, and what to say when a band was written to."""

    def __init__(self) -> None:
        self.memory: list[tuple[torch.Tensor, int]] = []

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As `ops.common.allocate`, but filled with NaN (an integer with its least value)."""
        size = int(torch.Size(shape).numel())
        empty = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
        memory = torch.full((size + 2 * GUARD,), empty, dtype=dtype, device=device)
        memory[:GUARD] = memory[GUARD + size :] = UNTOUCHED
        if type(memory) is torch.Tensor:  # not where a fake stands for it
            self.memory.append((memory, size))
        return memory[GUARD : GUARD + size].view(shape)

    def check(self) -> None:
        """Raises Wrong when a band was written to."""
        for memory, size in self.memory:
            outside = torch.cat([memory[:GUARD], memory[GUARD + size :]])
            if not bool((outside == UNTOUCHED).all()):
                raise Wrong("a kernel wrote outside its output")


@contextlib.contextmanager
def guard_bands() -> Iterator[Bands]:
    """Within it outputs and scratch of fused backends are filled with NaN and lie between guard bands; at its end the
    bands must be untouched."""
    bands = Bands()
    with mock.patch.object(common, "allocate", bands.allocate):
        yield bands
    bands.check()
