"""No speed without a check: every timed variant's output and gradients against an fp64 reference, in the same run.

The truth is retro_kernels' backend="reference" on fp64 inputs. The inputs are the same numbers in every precision
(operations.py), so one truth judges them all. A result passes when its largest error is at most twice that of the same
computation in eager PyTorch of the same precision, plus a floor of FLOORS times the largest true value, and when its
direction agrees (COSINES). The eager computation is what sets that measure, so it is judged by EAGER_LIMITS instead.
Where the tensors are too large for fp64, the first and the last batch entry and key/value head are checked, and the
rest is checked to be finite.

Dropout: retro_kernels is judged as above, by a reference that drops the same probabilities. PyTorch draws a mask of its
own, so its ways are judged as above with dropout off, and with dropout by what it must leave alone and change: output
and gradients unbiased (BIAS), the output's noise that of this probability (NOISE).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from retro_kernels.testing import FP32_TOLERANCE, KERNEL_FLOOR

from .operations import ATTENTIONS, CAUSAL_SELF, DROPOUT, DROPOUT_P, MODES, SEED, STEP, Workload

FLOORS = {"fp32": FP32_TOLERANCE, "bf16": KERNEL_FLOOR[torch.bfloat16], "fp16": KERNEL_FLOOR[torch.float16]}
COSINES = {"fp32": 0.999999, "bf16": 0.9995, "fp16": 0.9999}
EAGER_LIMITS = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
BIAS, NOISE = 0.01, 0.1
LARGEST_FP64_KEY = 640 << 20
LARGEST_FP64_LOGITS = 1 << 30


def names(workload: Workload) -> tuple[str, ...]:
    """Names of the results of a call with gradients, in order."""
    return ("output", *(f"{leaf} gradient" for leaf in workload.leaves))


@dataclass(frozen=True)
class Error:
    """The distance of one tensor from the truth."""

    name: str
    largest: float
    """max |x - truth|"""
    relative: float
    """largest / max |truth|"""
    cosine: float
    worst: tuple[int, ...]
    """Index of the largest error."""


def compare(name: str, tensor: Tensor, truth: Tensor) -> Error:
    """A NaN or infinity that the truth does not have counts as an infinite error."""
    if tensor.numel() == 0:
        return Error(name, 0.0, 0.0, 1.0, ())
    x, y = tensor.double().flatten(), truth.double().flatten()
    norms = float(x.norm() * y.norm())
    cosine = float(x @ y) / norms if norms > 0 else 1.0
    difference = (x - y).abs_()
    if not bool(torch.isfinite(difference.sum())):
        difference.nan_to_num_(nan=float("inf"), posinf=float("inf"))
    worst = int(difference.argmax())
    largest, scale = float(difference[worst]), float(torch.linalg.vector_norm(y, float("inf")))
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
    return Error(name, largest, largest / scale if scale > 0 else largest, cosine, index)


@dataclass(frozen=True)
class Slice:
    """A part of the batch and of the heads; heads are independent, so the truth of a part is the part of the truth."""

    batch: slice
    kv_heads: slice
    group: int

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """The part of an input, or of what a call gives, by its name."""
        name = name.removesuffix(" gradient")
        heads = slice(self.kv_heads.start * self.group, self.kv_heads.stop * self.group)
        if name in ("relative_key", "content_bias", "relative_bias"):
            return tensor[heads]
        return tensor[self.batch][..., self.kv_heads if name in ("key", "value") else heads, :]


@dataclass(frozen=True)
class Sequences(Slice):
    """Some sequences whole, for operations that mix heads; weights have no batch. `batched`: the names that have."""

    batched: frozenset[str] = frozenset()

    def of(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[self.batch] if name.removesuffix(" gradient") in self.batched else tensor


def slices(workload: Workload) -> list[Slice]:
    """Everything when it fits LARGEST_FP64_KEY bytes, otherwise two corners of it. (A parameter's gradient is a sum
    over the batch, so with parameters the corners have all of it.)"""
    group = workload.num_heads // workload.kv_heads
    b, hk = workload.batch or 1, workload.kv_heads
    if workload.operation not in ATTENTIONS:
        batched = frozenset({"output", "output gradient", "hidden", "query", "encoded"})
        # A step holds what is past of all its sequences, so that it is checked whole.
        whole = workload.modes == MODES or workload.operation == STEP or b <= 4
        edges = [slice(0, b)] if whole else [slice(0, 2), slice(b - 2, b)]
        return [Sequences(edge, slice(0, 1), group, batched) for edge in edges]
    query, key, _, *positions = workload.shapes()
    elements = max(torch.Size(query).numel(), torch.Size(key).numel())
    if elements * 8 <= LARGEST_FP64_KEY:
        return [Slice(slice(0, b), slice(0, hk), group)]
    first, last = (slice(0, b), slice(0, b)) if positions else (slice(0, 1), slice(b - 1, b))
    return [Slice(first, slice(0, 1), group), Slice(last, slice(hk - 1, hk), group)]


Result = dict[str, Tensor]


def run(workload: Workload, attention: Callable[..., Tensor], inputs: tuple[Tensor, ...], mode: str) -> Result:
    """Output, and for "forward+backward" the gradients, of one call. inputs: the workload's, the output gradient
    last."""
    *leaves, grad_out = inputs
    if mode == "forward":
        with torch.no_grad():
            return {"output": attention(*leaves)}
    with torch.enable_grad():
        out = attention(*leaves)
        gradients = torch.autograd.grad(out, leaves, grad_out)
    return dict(zip(names(workload), (out.detach(), *gradients)))


def leaves(inputs: tuple[Tensor, ...], gradients: bool) -> tuple[Tensor, ...]:
    """The inputs as autograd leaves, and the output gradient."""
    *tensors, grad_out = inputs
    return (*(t.detach().requires_grad_(gradients) for t in tensors), grad_out)


class Truth:
    """The fp64 reference of one workload, computed once, for the slices that are checked."""

    def __init__(self, workload: Workload, inputs: tuple[Tensor, ...]) -> None:
        """inputs: the workload's in any precision (the values are the same in all). Raises ValueError when the
        workload has dropout and is too large to be checked whole: a slice of it would drop something else."""
        self.workload = workload
        self.slices = slices(workload)
        self.whole = len(self.slices) == 1
        workload.check_room(inputs[0].device)
        if workload.option == DROPOUT and not self.whole:
            raise ValueError("too large for an fp64 reference, which dropout needs whole")
        self.results = [self._reference(part, inputs) for part in self.slices]

    def _reference(self, part: Slice, inputs: tuple[Tensor, ...]) -> Result:
        """Head by head where all heads' logits at once would be too many (but not with dropout, which counts heads)."""
        workload: Any = self.workload
        mode = workload.modes[-1]
        rows = (workload.rows,) if workload.operation == CAUSAL_SELF else ()
        pairs = workload.pairs()[0] if workload.operation in ATTENTIONS else 0
        logits = 8 * part.group * pairs * (2 if rows else 1)
        count = part.kv_heads.stop - part.kv_heads.start
        step = count if workload.option == DROPOUT else max(1, min(count, LARGEST_FP64_LOGITS // max(1, logits)))
        found: list[Result] = []
        for start in range(part.kv_heads.start, part.kv_heads.stop, step):
            heads = replace(part, kv_heads=slice(start, min(start + step, part.kv_heads.stop)))
            doubles = tuple(
                heads.of(name, tensor).double() for name, tensor in zip((*workload.leaves, "output gradient"), inputs)
            )
            torch.manual_seed(SEED)
            found.append(run(workload, self._attend, leaves(doubles, mode != "forward"), mode))
        if len(found) == 1:
            return found[0]
        whole = {}
        for name in found[0]:
            axis = 0 if name.split()[0] in ("relative_key", "content_bias", "relative_bias") else -2
            whole[name] = torch.cat([result[name] for result in found], dim=axis)
        return whole

    def _attend(self, *tensors: Tensor) -> Tensor:
        return self.workload.attend(*tensors, backend="reference")

    def what(self) -> str:
        """Describes the part of a result that is compared."""
        if self.whole:
            return "every element"
        corners = "two corners of batch and heads" if self.workload.operation in ATTENTIONS else "four sequences"
        return f"{corners}; the rest finite"

    def errors(self, result: Result) -> list[Error]:
        """One Error a tensor; of several slices the worst. Outside the slices everything must be finite."""
        found = []
        for name, tensor in result.items():
            worst = max(
                (compare(name, part.of(name, tensor), truth[name]) for part, truth in zip(self.slices, self.results)),
                key=lambda error: error.relative,
            )
            if not self.whole and not bool(torch.isfinite(tensor).all()):
                worst = Error(name, float("inf"), float("inf"), 0.0, ())
            found.append(worst)
        return found

    def judge_own_dropout(self, result: Result) -> str | None:
        """Why a result with PyTorch's own dropout mask cannot be right, or None. This is the truth without dropout."""
        (truth,) = self.results
        for name, tensor in result.items():
            x, y = tensor.double().flatten(), truth[name].double().flatten()
            noise, rows = float((x - y).norm() / y.norm()), y.numel() / tensor.shape[-1]
            slope = float(x @ y) / float(y @ y)
            allowed = BIAS + 6 * noise / rows**0.5  # what chance may do to so many rows
            if not abs(slope - 1) <= allowed:
                return f"{name}: on average {slope:.4f} of what it is without dropout, expected 1 within {allowed:.2g}"
            expected = (DROPOUT_P / (1 - DROPOUT_P)) ** 0.5
            allowed = NOISE + 3 / rows**0.5
            if name == "output" and not abs(noise / expected - 1) <= allowed:
                return f"output: noise {noise:.3f} of its length, expected {expected:.3f} within {allowed:.0%}"
        return None


def judge(errors: list[Error], eager: list[Error] | None, dtype: str) -> str | None:
    """Why a result is not right, or None. `eager`: the errors of eager PyTorch in this precision; None judges the
    eager computation itself."""
    by_name = {error.name: error for error in eager or []}
    for error in errors:
        if eager is None:
            allowed, rule = EAGER_LIMITS[dtype], "the limit for eager PyTorch"
        else:
            allowed = 2 * by_name[error.name].relative + FLOORS[dtype]
            rule = "twice the error of eager PyTorch in this precision, plus the floor"
        if not error.relative <= allowed:
            return (
                f"{error.name}: error {error.relative:.2e} of the largest value at {list(error.worst)}, "
                f"allowed {allowed:.2e} ({rule})"
            )
        if not error.cosine >= COSINES[dtype]:
            return f"{error.name}: cosine {error.cosine:.6f} with the truth, expected at least {COSINES[dtype]}"
    return None


def to_json(errors: list[Error]) -> list[dict]:
    return [{**asdict(error), "worst": list(error.worst)} for error in errors]
