"""How a backend is checked: problems, the error rule, memory that shows what was not or wrongly written.

The tests, the self-check of a GPU (`ops/verification`) and the GPU suite judge by what is here. A case is a shape
and the names of the options that are on; `make` draws its tensors.

The rule. The truth is the reference in fp64. An fp32 result may be FP32_TOLERANCE of the largest true value off, a
result in half precision twice as far as the same computation in plain PyTorch of that precision, and a floor more.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from .ops import checks
from .ops import memory as ops_memory
from .ops.attention import reference

if TYPE_CHECKING:
    from .ops.verification.classes import Class


class Wrong(AssertionError):
    """A result that is not right; the message says which and by how much."""


class Refused(Exception):
    """A backend takes no problem of a class."""


SOFTCAP = 1.5  # of the cases with a cap: the logits of standard normal inputs reach it


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
    if "softcap" in on:
        arguments["logit_softcap"] = SOFTCAP
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
        if "all_masked" in on:
            mask[:] = False
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
        if isinstance(x, torch.Tensor) and x.dtype in checks.FLOATING:
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


def run(
    arguments: dict[str, Any], backend: str, grad_out: torch.Tensor | None = None, grad_lse: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """out, lse and, given grad_out, the gradient of every differentiable argument, through the lse, too, given
    grad_lse. Dropout always draws the same. A decoding kernel is called without gradients, which it has not."""
    torch.manual_seed(7)
    without = grad_out is None or ("position" in arguments and backend != "reference")
    with torch.no_grad() if without else contextlib.nullcontext():
        out, lse = operation(arguments)(**arguments, return_lse=True, backend=backend)
    return results(arguments, out, lse, None if without else grad_out, grad_lse)


def results(
    arguments: dict[str, Any],
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """out, lse and, given grad_out, the gradient of every differentiable argument: 0 where the output depends on none
    of it."""
    found = {"out": out.detach(), "lse": lse.detach()}
    if grad_out is not None:
        inputs = differentiable(arguments)
        gradients: Any = [None] * len(inputs)
        if out.requires_grad:
            outputs, grads = [out], [grad_out.to(out.dtype)]
            if grad_lse is not None:
                outputs, grads = [out, lse], [*grads, grad_lse.to(lse.dtype)]
            gradients = torch.autograd.grad(outputs, list(inputs.values()), grads, allow_unused=True)
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


def same_precision(
    arguments: dict[str, Any], grad_out: torch.Tensor, grad_lse: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The call as plain PyTorch computes it in the arguments' own dtype: logits and probabilities are rounded to it, as
    in an eager RETRO. Its error is what a fused half-precision kernel is measured against."""
    with plain_precision():
        return run(arguments, "reference", grad_out, grad_lse)


FP32_TOLERANCE = 1e-5
# Where tensors are so small that plain PyTorch may round nothing by chance: two roundings of the largest value.
HALF_FLOOR = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
# At the sizes of the self-check, the GPU suite and the bench, where its error has such roundings.
KERNEL_FLOOR = {torch.float16: 2e-4, torch.bfloat16: 1e-3}


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
    given: dict[str, torch.Tensor],
    plain: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    dtype: torch.dtype,
    floors: dict[torch.dtype, float] = HALF_FLOOR,
) -> float:
    """The twice-the-error rule: against fp64, at most twice the error of same-precision PyTorch plus a floor. Raises
    Wrong -> the largest error."""
    return _largest(
        (name, error(given[name], x), 2 * error(plain[name], x) + floors[dtype]) for name, x in expected.items()
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
        self.inputs: list[tuple[torch.Tensor, int]] = []

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As `ops.memory.allocate`, but filled with NaN (an integer with its least value)."""
        size = int(torch.Size(shape).numel())
        empty = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
        memory = torch.full((size + 2 * GUARD,), empty, dtype=dtype, device=device)
        memory[:GUARD] = memory[GUARD + size :] = UNTOUCHED
        if type(memory) is torch.Tensor:  # not where a fake stands for it
            self.memory.append((memory, size))
        return memory[GUARD : GUARD + size].view(shape)

    def around(self, x: Any) -> Any:
        """A copy of a floating tensor with NaN round it, which must stay there and reach no result; else x itself."""
        if isinstance(x, tuple):
            return tuple(self.around(part) for part in x)
        if not isinstance(x, torch.Tensor) or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return x
        memory = torch.full((x.numel() + 2 * GUARD,), float("nan"), dtype=x.dtype, device=x.device)
        self.inputs.append((memory, x.numel()))
        inside = memory[GUARD : GUARD + x.numel()].view(x.shape)
        return inside.copy_(x.detach()).requires_grad_(x.requires_grad)

    def check(self) -> None:
        """Raises Wrong when a band was written to."""
        for memory, size in self.inputs:
            if not bool(torch.cat([memory[:GUARD], memory[GUARD + size :]]).isnan().all()):
                raise Wrong("a kernel wrote outside its output, beside an input")
        for memory, size in self.memory:
            outside = torch.cat([memory[:GUARD], memory[GUARD + size :]])
            if not bool((outside == UNTOUCHED).all()):
                raise Wrong("a kernel wrote outside its output")


@contextlib.contextmanager
def guard_bands() -> Iterator[Bands]:
    """Within it outputs and scratch of fused backends are filled with NaN and lie between guard bands; at its end the
    bands must be untouched."""
    bands = Bands()
    with mock.patch.object(ops_memory, "allocate", bands.allocate):
        yield bands
    bands.check()


# What the self-check of a class of calls runs: `Class` and its words are those of `ops/verification/classes.py`.

ODD_ROWS = {16: 13, 32: 29, 64: 57, 128: 101, 512: 150, 1024: 530}
EVEN_ROWS = {16: 16, 32: 32, 64: 64, 128: 128, 512: 192, 1024: 576}
ODD_SLOTS = {16: (1, 8), 32: (3, 8), 64: (3, 16), 128: (3, 32), 512: (3, 72), 1024: (3, 200)}  # (k, r)
EVEN_SLOTS = {16: (2, 8), 32: (2, 16), 64: (2, 32), 128: (2, 64), 512: (2, 128), 1024: (2, 320)}
SHORT_NAMES = {
    "chunked_cross_attention": "cca",
    "projected_chunked_cross_attention": "projected",
    "neighbour_self_attention": "self",
    "neighbour_cross_attention": "cross",
    "chunked_cross_attention_decode": "decode",
    "projected_chunked_cross_attention_decode": "projected_decode",
}


def class_case(wanted: Class, odd: bool) -> Case:
    """The case of a class: odd sizes with a mask, or even sizes without."""
    on = set(wanted.options) - {"grouped", "causal", "packed", "dropout", "unlike_caches"}
    if "projection_biases" in on:
        on = on - {"projection_biases"} | {"bias_key", "bias_value"}
    operation = SHORT_NAMES[wanted.operation]
    sizes: dict[str, Any] = {"b": 2, "h": 4 if "grouped" in wanted.options else 2, "hk": 2}
    if operation.endswith("decode"):
        sizes |= _decode_sizes(wanted, odd)
        if on & {"rotary", "rotary_partial"} and "key_rotary" not in on:
            on.add("turned")
        on -= {"key_rotary"}
        on |= {"mask", "valid", "chunk"} if odd else set()
        return Case(str(wanted), operation, d=wanted.head_dim, d_value=wanted.value_dim, options=tuple(on), **sizes)
    rows = (ODD_ROWS if odd else EVEN_ROWS)[wanted.rows]
    k, r = (3, 23) if odd else (2, 32)
    sizes |= {"k": k, "r": r, "m": rows, "n": 2 * rows + rows // 2 + 3 if odd else 3 * rows}
    documents = (rows + 3, sizes["n"] - rows - 3)
    if operation == "projected":
        k, r = (ODD_SLOTS if odd else EVEN_SLOTS)[wanted.slots]
        sizes |= {"k": k, "r": r, "e": wanted.encoder_dim, "strategy": "absorb"}
    elif operation == "self":
        sizes |= {"k": 2, "r": rows, "l": 2}
        if "causal" in wanted.options:
            sizes |= {"k": 1, "l": 1}
        documents = (rows // 3, rows - rows // 3)
    elif operation == "cross":
        sizes |= {"r": rows, "l": 2, "m": wanted.slots - (7 if odd else 0)}
    if odd:
        # Where the null slot alone is left, its logit's gradient is a difference that cancels to 0: all rounding.
        on |= {"mask"} if sizes.get("l") == 1 or "null" in on else {"mask", "empty_chunk"}
    return Case(
        str(wanted),
        operation,
        d=wanted.head_dim,
        d_value=wanted.value_dim,
        causal="causal" in wanted.options,
        documents=documents if "packed" in wanted.options else None,
        dropout_p=0.25 if "dropout" in wanted.options else 0.0,
        options=tuple(on),
        **sizes,
    )


def _decode_sizes(wanted: Class, odd: bool) -> dict[str, Any]:
    """Odd: every other sequence is not valid, one begins just at its first chunk, one is before it. Even: so many
    sequences that tiles of slots are whole."""
    e = wanted.encoder_dim
    hk = 1 if e and wanted.rows == 1 else 4
    m = 29 if odd else 32
    return {
        "b": 5 if odd else 64,
        "m": m,
        "k": 3 if odd else 2,
        "r": 23 if odd else 32,
        "hk": hk,
        "h": 2 * hk if "grouped" in wanted.options else hk,
        "e": e,
        # rows are those that share a cache's row: of all heads, where it holds encoder states
        "t": {1: 1, 16: 1 if e else 3, 32: 20}[wanted.rows],
        "positions": (2 * m + 3, 0, m - 1, 0, 0) if odd else (2 * m + 1, m + 2, 2 * m + 5),
    }


def class_problem(wanted: Class, odd: bool, device: str = "cpu") -> dict[str, Any]:
    """The arguments of one problem of a class, in its dtype."""
    case, dtype = class_case(wanted, odd), getattr(torch, wanted.dtype)
    arguments = make(case, dtype, device)
    if "unlike_caches" in wanted.options:  # the value's is another than the key's
        quantised = {"int8", "float8_e4m3fn"} & set(case.options)
        others = tuple(set(case.options) - quantised) if quantised else (*case.options, "int8")
        other = make(dataclasses.replace(case, options=others), dtype, device)
        arguments = {name: x for name, x in arguments.items() if name != "value_scale"}
        arguments |= {name: other[name] for name in ("value", "value_scale") if name in other}
    return poison_unread(arguments)


def poison_unread(arguments: dict[str, Any]) -> dict[str, Any]:
    """With NaN in the caches of sequences that are not valid, which decoding does not read."""
    if "valid" not in arguments:
        return arguments
    spoilt = dict(arguments)
    for name in ("key", "value", "encoded"):
        if name in arguments and arguments[name].dtype in checks.FLOATING:
            spoilt[name] = arguments[name].detach().clone()
            spoilt[name][~arguments["valid"]] = float("nan")
    return spoilt


def check_class(wanted: Class, backend: str, device: torch.device) -> str:
    """Runs the two problems of a class on a backend -> what was found. Raises Wrong, or whatever the kernels raise, or
    Refused where the backend takes neither."""
    found, refusals = [], []
    for odd in (True, False):
        try:
            found.append(_check_problem(wanted, odd, backend, device))
        except ValueError as error:
            if "cannot run this" not in str(error):
                raise
            refusals.append(str(error))
    if not found:
        raise Refused(refusals[0])
    return f"largest error {max(found):.1e}"


def _check_problem(wanted: Class, odd: bool, backend: str, device: torch.device) -> float:
    return check_call(class_problem(wanted, odd, str(device)), backend)


def has_gradients(arguments: dict[str, Any], backend: str) -> bool:
    """Decoding has none, nor have the absorbed CUDA C++ kernels."""
    return "position" not in arguments and not ("encoded" in arguments and backend == "cuda")


def draw_grad_out(arguments: dict[str, Any], seed: int = 3) -> torch.Tensor:
    """An output gradient for a call, in the query's dtype."""
    query = arguments["query"]
    width = arguments["value"].shape[-1] if "value" in arguments else arguments["w_value"].shape[1]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((*query.shape[:-1], width), generator=generator, dtype=torch.float64).to(query)


def check_call(arguments: dict[str, Any], backend: str, floors: dict[torch.dtype, float] = KERNEL_FLOOR) -> float:
    """One call and its gradients by the error rule, its tensors between guard bands, twice for the same bits -> the
    largest error. Raises Wrong."""
    dtype = arguments["query"].dtype
    grad_out = draw_grad_out(arguments) if has_gradients(arguments, backend) else None
    with guard_bands() as bands:
        around = {name: bands.around(x) for name, x in arguments.items()}
        given = run(around, backend, grad_out)
        again = run(around, backend, grad_out)
    expected = run(as_dtype(arguments, torch.float64), "reference", grad_out)
    if dtype == torch.float32:
        largest = assert_close(given, expected)
    else:
        with plain_precision():
            plain = run(arguments, "reference", grad_out)
        largest = assert_twice(given, plain, expected, dtype, floors)
    for name, x in given.items():
        if not same_bits(x, again[name]):
            raise Wrong(f"{name}: two runs of one problem give other bits")
    return largest


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two results of one shape and dtype agree bit for bit, NaN included."""
    return torch.equal(bits(x), bits(y))


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of a floating tensor, as integers."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
