"""No speed without a check: every timed variant's output and gradients against an fp64 reference, in the same run.

The truth is retro_kernels' backend="reference" on fp64 inputs. The inputs are the same numbers in every precision
(workloads.py), so one truth judges them all. A result passes when its largest error is at most twice that of the same
computation in eager PyTorch of the same precision, plus a floor of FLOORS times the largest true value, and when its
direction agrees (COSINES). The eager computation is what sets that measure, so it is judged by EAGER_LIMITS instead.
Where the tensors are too large for fp64, the first and the last batch entry and key/value head are checked, and the
rest is checked to be finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .workloads import Workload

FLOORS = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 2e-4}
COSINES = {"fp32": 0.999999, "bf16": 0.9995, "fp16": 0.9999}
EAGER_LIMITS = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
NAMES = ("output", "query gradient", "key gradient", "value gradient")
LARGEST_FP64_KEY = 512 << 20


@dataclass(frozen=True)
class Error:
    """How far one tensor is from the truth."""

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
    difference = (tensor.double() - truth.double()).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    if difference.numel() == 0:
        return Error(name, 0.0, 0.0, 1.0, ())
    worst = int(difference.argmax())
    largest = float(difference.flatten()[worst])
    scale = float(truth.abs().max())
    x, y = tensor.double().flatten(), truth.double().flatten()
    norms = float(x.norm() * y.norm())
    cosine = float(x @ y) / norms if norms > 0 else 1.0
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
    return Error(name, largest, largest / scale if scale > 0 else largest, cosine, index)


@dataclass(frozen=True)
class Slice:
    """A part of the batch and of the heads; heads are independent, so the truth of a part is the part of the truth."""

    batch: slice
    kv_heads: slice
    group: int

    def of(self, name: str, tensor: Tensor) -> Tensor:
        if name in ("key", "value", "key gradient", "value gradient"):
            return tensor[self.batch, :, :, :, self.kv_heads]
        heads = slice(self.kv_heads.start * self.group, self.kv_heads.stop * self.group)
        return tensor[self.batch, :, heads]


def slices(workload: Workload) -> list[Slice]:
    """Everything when it fits LARGEST_FP64_KEY bytes, otherwise two corners of it."""
    group = workload.num_heads // workload.kv_heads
    b, hk = workload.batch or 1, workload.kv_heads
    per_head = workload.num_chunks * workload.keys_per_chunk * workload.head_dim * 8
    if b * hk * per_head <= LARGEST_FP64_KEY:
        return [Slice(slice(0, b), slice(0, hk), group)]
    return [
        Slice(slice(0, 1), slice(0, 1), group),
        Slice(slice(b - 1, b), slice(hk - 1, hk), group),
    ]


Result = dict[str, Tensor]


def run(attention: Callable[..., Tensor], inputs: tuple[Tensor, ...], mode: str) -> Result:
    """Output, and for "forward+backward" the gradients, of one call. inputs: query, key, value, output gradient."""
    *leaves, grad_out = inputs
    if mode == "forward":
        with torch.no_grad():
            return {"output": attention(*leaves)}
    with torch.enable_grad():
        out = attention(*leaves)
        gradients = torch.autograd.grad(out, leaves, grad_out)
    return dict(zip(NAMES, (out.detach(), *gradients)))


def leaves(inputs: tuple[Tensor, ...], gradients: bool) -> tuple[Tensor, ...]:
    """query, key and value as autograd leaves, and the output gradient."""
    *tensors, grad_out = inputs
    return (*(t.detach().requires_grad_(gradients) for t in tensors), grad_out)


class Truth:
    """The fp64 reference of one workload, computed once, for the slices that are checked."""

    def __init__(self, workload: Workload, inputs: tuple[Tensor, ...]) -> None:
        """inputs: query, key, value, output gradient in any precision (the values are the same in all)."""
        import retro_kernels as rk

        def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return rk.chunked_cross_attention(query, key, value, chunk_size=workload.chunk_size, backend="reference")

        self.slices = slices(workload)
        self.whole = len(self.slices) == 1
        self.results: list[Result] = []
        for part in self.slices:
            doubles = tuple(
                part.of(name, tensor).double()
                for name, tensor in zip(("query", "key", "value", "output gradient"), inputs)
            )
            self.results.append(run(reference, leaves(doubles, True), "forward+backward"))

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
