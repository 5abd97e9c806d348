"""What is not finite comes out of the CUDA kernels as out of PyTorch's softmax attention: where a logit is NaN, the
output, the lse and every gradient that depends on its row, and nothing else; where one is inf, the same with an lse of
inf. An lse of -inf alone says that a row saw nothing. The oracle is PyTorch over the visible slots of each group."""

from __future__ import annotations

import pytest
import torch

import retro_kernels as rk
from retro_kernels import cuda_extension

pytestmark = pytest.mark.usefixtures("guarded")
NAN, INF = float("nan"), float("inf")
M, HEADS, KV_HEADS, D = 8, 4, 2, 64


@pytest.fixture(params=["sm80", "sm90 only"], autouse=True)
def kernels(request, emulated):
    cuda_extension.set_kernels(request.param)
    yield
    cuda_extension.set_kernels("")


def make(operation: str) -> dict[str, torch.Tensor]:
    """Two chunks of a sequence; a third of the slots is hidden."""
    generator = torch.Generator().manual_seed(3)
    rows = (1, 21) if operation == "cca" else (1, 2, 2, 20)
    slots = (1, 2, 11) if operation == "cross" else (1, 2, 2, 20)
    shapes = {"query": (*rows, HEADS, D), "key": (*slots, KV_HEADS, D), "value": (*slots, KV_HEADS, D)}
    shapes["grad_out"] = shapes["query"]
    x = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    return x | {"mask": torch.rand(slots, generator=generator) < 0.7}


def kernel(operation: str, x: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    tensors = [x[name].clone().requires_grad_() for name in ("query", "key", "value")]
    call, options = {
        "cca": (rk.chunked_cross_attention, {"chunk_size": M, "neighbour_mask": x["mask"]}),
        "self": (rk.neighbour_self_attention, {"neighbour_mask": x["mask"]}),
        "cross": (rk.neighbour_cross_attention, {"activation_mask": x["mask"]}),
    }[operation]
    out, lse = call(*tensors, **options, scale=scale, return_lse=True, backend="cuda")
    gradients = torch.autograd.grad(out, tensors, x["grad_out"])
    return dict(zip(("out", "lse", "query", "key", "value"), (out, lse, *gradients)))


def groups(operation: str) -> list[tuple[tuple, tuple]]:
    """The places of the rows and of the slots of every group."""
    if operation == "cca":
        return [((0, slice(M - 1 + M * u, min(2 * M - 1 + M * u, 21))), (0, u)) for u in range(2)]
    if operation == "self":
        return [((0, u, j), (0, u, j)) for u in range(2) for j in range(2)]
    return [((0, u), (0, u)) for u in range(2)]


def pytorch(operation: str, x: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """A row all of whose logits are -inf gives 0, with no gradient."""
    results = {"out": torch.zeros_like(x["query"]).double(), "lse": torch.full(x["query"].shape[:-1], -INF)}
    results |= {name: torch.zeros_like(x[name]).double() for name in ("query", "key", "value")}
    for rows, slots in groups(operation):
        seen = x["mask"][slots].flatten()
        q, grad_out = (x[name][rows].double().reshape(-1, HEADS, D) for name in ("query", "grad_out"))
        k, v = (x[name][slots].double().reshape(-1, KV_HEADS, D)[seen] for name in ("key", "value"))
        for each in (q, k, v):
            each.requires_grad_()
        wide_k, wide_v = (each.repeat_interleave(HEADS // KV_HEADS, 1) for each in (k, v))
        logits = (scale * torch.einsum("rhd,shd->rhs", q, wide_k)).float().double()  # finite ones overflow as in fp32
        nothing = (logits == -INF).all(-1, keepdim=True)
        weights = torch.where(nothing, 0.0, torch.where(nothing, 0.0, logits).softmax(-1))
        out = torch.einsum("rhs,shd->rhd", weights, wide_v)
        shape = results["out"][rows].shape
        results["out"][rows] = out.detach().view(shape)
        results["lse"][rows] = logits.detach().logsumexp(-1).float().view(shape[:-1])
        for name, place, gradient in zip(
            ("query", "key", "value"), (rows, slots, slots), torch.autograd.grad(out, (q, k, v), grad_out)
        ):
            if name == "query":
                results[name][place] = gradient.view(shape)
            else:
                whole = results[name][place].view(-1, KV_HEADS, D)
                whole[seen] = gradient
    return results


def first_seen(x: dict[str, torch.Tensor]) -> tuple[int, ...]:
    return tuple(x["mask"].nonzero()[1].tolist())


def spoil(operation: str, what: str, x: dict[str, torch.Tensor]) -> None:
    """One number of one row that attends, or of one slot that is seen; "nothing seen" is the row whose logits all
    overflow to -inf, beside rows whose logits do not."""
    row = (0, 12, 1) if operation == "cca" else (0, 1, 1, 7, 1)
    slot = (*first_seen(x), 1)
    if what == "nothing seen":
        x["query"][..., 0] = 0
        x["query"][row] = 0
        x["query"][(*row, 0)] = 1e25
        x["key"][..., 0] = -1e25
        return
    name, value = what.split(" of ")[1], NAN if what.startswith("NaN") else INF
    x[name][(*(row if name in ("query", "grad_out") else slot), 3)] = value


@pytest.mark.parametrize("operation", ["cca", "self", "cross"])
@pytest.mark.parametrize(
    "what", ["NaN of query", "NaN of key", "NaN of value", "NaN of grad_out", "inf of query", "nothing seen"]
)
def test_as_pytorch(operation, what):
    x = make(operation)
    spoil(operation, what, x)
    given, expected = kernel(operation, x, 0.125), pytorch(operation, x, 0.125)
    assert expected["out"].isnan().any() == (what not in ("nothing seen", "NaN of grad_out"))
    for name, e in expected.items():
        g = given[name].detach().double()
        if what == "nothing seen" and name == "query":  # a sum of 1e25 that cancels
            g, e = g[..., 1:], e[..., 1:]
        assert torch.equal(g.isnan(), e.isnan()), f"{name}: NaN elsewhere"
        assert torch.equal(g.isinf() * g.sign(), e.isinf() * e.sign().double()), f"{name}: inf elsewhere"
        finite = e.isfinite()
        assert (g - e)[finite].abs().max() <= 3e-2 * max(1.0, e[finite].abs().max()), name
    if what.startswith("inf"):
        assert (given["lse"] == INF).any()


@pytest.mark.parametrize("operation", ["cca", "self", "cross"])
def test_large_logits_give_no_weight_above_one(operation):
    """An lse of 1e10 has an error of hundreds: weights made anew from it are bounded all the same."""
    x = make(operation)
    given = kernel(operation, x, 1e9)
    for name, g in given.items():
        finite = g.isfinite() | (g == -INF) if name == "lse" else g.isfinite()
        assert finite.all(), name
    assert given["value"].abs().max() <= x["grad_out"].float().abs().sum()
