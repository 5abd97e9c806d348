"""NaN, infinity and finite masks: what PyTorch's softmax attention makes of them, and nothing elsewhere.

Every expectation is argued from the mathematics or computed by the loop below, none is the library's reference.
"""

from __future__ import annotations

import math

import pytest
import torch

import retro_kernels as rk
from retro_kernels import extension
from retro_kernels.ops.backends import ATTENTION as BACKENDS

NAN, INF = float("nan"), float("inf")
# The levels of the CPU's instruction sets are as many backends here: they have to agree.
LEVELS = extension.usable_isas() if BACKENDS["cpu"].unavailable() is None else ()


@pytest.fixture(params=[*(f"cpu {level}" for level in LEVELS)])
def backend(request):
    name, _, level = request.param.partition(" ")
    if level:
        extension.set_isa(level)
    yield name
    if level:
        extension.set_isa("")


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request):
    return request.param


class Call:
    """One operation on small tensors, its groups given by index: `row(b, u, i, h)` is the place of row i of group u in
    the query, `slots(b, u, h)` are those of the group's keys."""

    names = ("query", "key", "value")

    def __init__(self, kind: str, dtype: torch.dtype, *, k=2, r=5, m=4, seed=0, **parameters):
        generator = torch.Generator().manual_seed(seed)
        b, l, h, d = 2, 3, 2, 16
        self.kind, self.m, self.sizes = kind, m, (b, l, h, d)
        query = {"cca": (b, l * m + m - 1, h, d)}.get(kind, (b, l, k, r, h, d))
        keys = {"cross": (b, l, m, h, d)}.get(kind, (b, l, k, r, h, d))
        self.tensors = {
            "query": torch.randn(query, generator=generator).to(dtype),
            "key": torch.randn(keys, generator=generator).to(dtype),
            "value": torch.randn(keys, generator=generator).to(dtype),
        }
        shapes = {
            "null_key": (h, d),
            "null_value": (h, d),
            "relative_key": (h, m + r - 1, d),
            "content_bias": (h, d),
            "relative_bias": (h, d),
            "attention_bias": (h, m, r),
        }
        if kind == "self":
            shapes |= {"relative_key": (h, 2 * r - 1, d), "attention_bias": (h, r, r)}
        if kind == "cross":
            shapes |= {"attention_bias": (h, r, m)}
        for name in parameters.pop("with_", ()):
            self.tensors[name] = torch.randn(shapes[name], generator=generator).to(dtype)
        self.settings = parameters

    def row(self, u: int, i: int) -> tuple:
        """Row i of head 0 of the first sequence's group u."""
        if self.kind == "cca":
            return 0, u * self.m + self.m - 1 + i, 0
        return 0, u, 0, i, 0

    def slots(self, u: int) -> tuple:
        """Those that it sees, without `causal`."""
        if self.kind == "cca":
            return 0, u, slice(None), slice(None), 0
        return (0, u, 0, slice(None), 0) if self.kind == "self" else (0, u, slice(None), 0)

    def run(self, backend: str, grad_out: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        leaves = {name: x.detach().clone().requires_grad_() for name, x in self.tensors.items()}
        function = {
            "cca": rk.chunked_cross_attention,
            "self": rk.neighbour_self_attention,
            "cross": rk.neighbour_cross_attention,
        }[self.kind]
        settings = self.settings | ({"chunk_size": self.m} if self.kind == "cca" else {})
        torch.manual_seed(3)
        out, lse = function(**leaves, **settings, return_lse=True, backend=backend)
        if grad_out is None:
            grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
        gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
        return {"out": out.detach(), "lse": lse, **{f"d{name}": g for name, g in zip(leaves, gradients)}}


def assert_nan_exactly(given: dict, clean: dict, where: dict[str, list]) -> None:
    """NaN in the whole of the places named, and every other number as it was without it, bit for bit."""
    for name, x in given.items():
        hit = torch.zeros(x.shape, dtype=torch.bool)
        for place in where.get(name, []):
            hit[place] = True
        assert x[hit].isnan().all(), f"{name}: {x[hit].isnan().sum()} of {hit.sum()} are NaN"
        assert torch.equal(x[~hit], clean[name][~hit]), f"{name} is touched elsewhere"


KINDS = ("cca", "self", "cross")
# One key block and one row block; several of either, in which NaN comes in the last of them.
SIZES = {"small": {}, "many keys": {"k": 2, "r": 150}, "many rows": {"k": 1, "r": 3, "m": 70}}


@pytest.mark.parametrize("options", [(), ("attention_bias",)], ids=["plain", "bias"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_query_is_nan_in_its_row_and_in_the_gradients_of_what_it_sees(kind, size, options, dtype, backend):
    call = Call(kind, dtype, **SIZES[size], with_=options)
    clean = call.run(backend)
    row, slots = call.row(1, 2), call.slots(1)
    call.tensors["query"][(*row, 3)] = NAN
    where = {"out": [row], "lse": [row], "dquery": [row], "dkey": [slots], "dvalue": [slots]}
    if options:
        # the bias is shared by the groups: its gradient is lost where this row adds to it
        where["dattention_bias"] = [(0, 2)]
    assert_nan_exactly(call.run(backend), clean, where)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_logit_gives_nan_and_an_infinite_lse(kind, size, dtype, backend):
    """inf - inf is NaN in the softmax; the logarithm of the sum is +inf."""
    call = Call(kind, dtype, **SIZES[size])
    row, slots = call.row(1, 2), call.slots(1)
    call.tensors["query"][row] = 0
    call.tensors["query"][(*row, 0)] = INF
    call.tensors["key"][slots][..., 0] = call.tensors["key"][slots][..., 0].abs() + 0.1
    given = call.run(backend)
    call.tensors["query"][(*row, 0)] = 1
    clean = call.run(backend)
    assert given["lse"][row] == INF
    given["lse"][row] = clean["lse"][row]
    assert_nan_exactly(given, clean, {"out": [row], "dquery": [row], "dkey": [slots], "dvalue": [slots]})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_beside_an_infinite_logit_is_nan(kind, size, dtype, backend):
    call = Call(kind, dtype, **SIZES[size])
    row, slots = call.row(1, 2), call.slots(1)
    keys = call.tensors["key"][slots].reshape(-1, 16)
    for first, second in ((INF, NAN), (NAN, INF)):
        keys[0, 0], keys[-1, 0] = first, second
        call.tensors["key"][slots] = keys.view(call.tensors["key"][slots].shape)
        call.tensors["query"][row] = 1
        given = call.run(backend)
        assert given["lse"][row].isnan()
        assert given["out"][row].isnan().all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_minus_infinity_are_a_row_that_sees_nothing(kind, size, dtype, backend):
    """Made so by the data: a negative query against infinite keys. The row is 0 and adds nothing to any gradient; the
    keys' NaN and infinities, which the others of its group see, are their own."""
    call = Call(kind, dtype, **SIZES[size], scale=1.0)
    row, slots = call.row(1, 2), call.slots(1)
    call.tensors["query"][row] = 0
    call.tensors["query"][(*row, 0)] = -INF
    call.tensors["key"][slots][..., 0] = call.tensors["key"][slots][..., 0].abs() + 0.1
    given = call.run(backend)
    assert not given["out"][row].any()
    assert given["lse"][row] == -INF
    assert not given["dquery"][row].any()
    assert not any(x.isnan().any() for name, x in given.items())
    # as if its output's gradient had been 0
    grad_out = torch.randn(given["out"].shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    grad_out[row] = NAN
    again = call.run(backend, grad_out)
    assert all(torch.equal(given[name], again[name]) for name in given)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_key_is_nan_for_its_group_and_head(kind, dtype, backend):
    call = Call(kind, dtype)
    clean = call.run(backend)
    slots = call.slots(1)
    flat = call.tensors["key"][slots].clone().reshape(-1, 16)
    flat[3, 5] = NAN
    call.tensors["key"][slots] = flat.view(call.tensors["key"][slots].shape)
    if kind == "cca":
        rows = (0, slice(2 * call.m - 1, 3 * call.m - 1), 0)
    elif kind == "self":
        rows = (0, 1, 0, slice(None), 0)
    else:
        rows = (0, 1, slice(None), slice(None), 0)
    where = {"out": [rows], "lse": [rows], "dquery": [rows], "dkey": [slots], "dvalue": [slots]}
    assert_nan_exactly(call.run(backend), clean, where)


def test_a_masked_slot_stays_without_gradient_beside_a_nan_row(dtype, backend):
    """Its key may be NaN too. Rows of the same chunk that are finite keep what they had."""
    call = Call("cca", dtype)
    mask = torch.ones(2, 3, 2, 5, dtype=torch.bool)
    mask[0, 1, 1, 2:] = False
    call.settings["neighbour_mask"] = mask
    clean = call.run(backend)
    row = call.row(1, 2)
    call.tensors["query"][(*row, 3)] = NAN
    call.tensors["key"][~mask] = call.tensors["value"][~mask] = NAN
    given = call.run(backend)
    for name in ("dkey", "dvalue"):
        assert given[name][0, 1][mask[0, 1]][:, 0].isnan().all()
        assert not given[name][~mask].any()
        given[name][0, 1, :, :, 0], clean[name][0, 1, :, :, 0] = 0, 0
    assert_nan_exactly(given, clean, {"out": [row], "lse": [row], "dquery": [row]})


def test_a_causal_row_reaches_no_earlier_output(dtype, backend):
    """Token i sees 0 to i. A NaN in its query is in its own row, and in the gradients of the keys from 0 on; rows and
    queries' gradients of the others are as they were."""
    call = Call("self", dtype, k=1, r=90, causal=True)
    clean = call.run(backend)
    row = call.row(1, 40)
    call.tensors["query"][(*row, 3)] = NAN
    given = call.run(backend)
    seen = (0, 1, 0, slice(0, 41), 0)
    assert given["dkey"][seen].isnan().all()
    assert given["dvalue"][seen].isnan().all()
    for name in ("dkey", "dvalue"):  # later keys of the same block: 0 * NaN (docs/numerics.md)
        for x in (given[name], clean[name]):
            x[0, 1, 0, :, 0] = 0
    assert_nan_exactly(given, clean, {"out": [row], "lse": [row], "dquery": [row]})


@pytest.mark.parametrize("relative", [False, True], ids=["", "relative"])
def test_the_parameters_of_a_nan_row_s_head_and_no_others(relative, dtype, backend):
    """The null slot's and the positions' gradients add up over all rows of a head."""
    with_ = ("null_key", "null_value", *(("relative_key", "content_bias", "relative_bias") if relative else ()))
    call = Call("cca", dtype, with_=with_)
    clean = call.run(backend)
    row, slots = call.row(1, 2), call.slots(1)
    call.tensors["query"][(*row, 3)] = NAN
    given = call.run(backend)
    for name in with_:
        assert given[f"d{name}"][0].isnan().any(), name
        given[f"d{name}"][0] = clean[f"d{name}"][0] = 0
    assert_nan_exactly(given, clean, {"out": [row], "lse": [row], "dquery": [row], "dkey": [slots], "dvalue": [slots]})


@pytest.mark.parametrize("keys", [0, 2], ids=["null slot only", "with keys"])
def test_a_null_slot_that_is_not_finite(keys, dtype, backend):
    for value, lse in ((NAN, NAN), (INF, INF), (-INF, -INF)):
        call = Call("cca", dtype, k=keys, with_=("null_key", "null_value"))
        call.tensors["query"].abs_().add_(0.1)
        call.tensors["null_key"][0] = value
        given = call.run(backend)
        rows = slice(call.m - 1, None)
        found, out = given["lse"][:, rows, 0], given["out"][:, rows, 0]
        if value == -INF and keys:
            assert found.isfinite().all()
            assert out.isfinite().all()
            continue
        assert torch.equal(found, torch.full_like(found, lse)) if lse == lse else found.isnan().all()
        assert (out.isnan().all() and given["dnull_value"][0].isnan().all()) if value != -INF else not out.any()
        assert given["out"][:, rows, 1].isfinite().all()
        assert given["dnull_value"][1].isfinite().all()


# ---------------------------------------------------------------------------------------------- finite masks


def by_loop(call: Call, grad_out: torch.Tensor) -> dict[str, torch.Tensor]:
    """Chunked cross-attention with a bias, token by token in fp64."""
    leaves = {name: x.double().requires_grad_() for name, x in call.tensors.items()}
    query, key, value, bias = (leaves[name] for name in ("query", "key", "value", "attention_bias"))
    b, n, h, d = query.shape
    k = key.shape[2]
    out, lse = torch.zeros_like(query), torch.full((b, n, h), -INF, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for s in range(b):
        for j in range(call.m - 1, n):
            u, i = divmod(j - (call.m - 1), call.m)
            for head in range(h):
                logits = key[s, u, :, :, head] @ query[s, j, head] / math.sqrt(d) + bias[head, i].expand(k, -1)
                row = logits.flatten().softmax(0) @ value[s, u, :, :, head].flatten(0, 1)
                out[s, j, head] = row.detach()
                lse[s, j, head] = logits.detach().flatten().logsumexp(0)
                total = total + (row * grad_out[s, j, head].double()).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return {"out": out.detach(), "lse": lse, **{f"d{name}": g for name, g in zip(leaves, gradients)}}


@pytest.mark.parametrize("size", ["small", "many keys"])
@pytest.mark.parametrize("mask", [-1e4, -1e30, torch.finfo(torch.float32).min], ids=["-1e4", "-1e30", "finfo.min"])
def test_a_finite_mask_on_every_key_of_a_row(mask, size, backend):
    """The row becomes the mean of the values (or, where fp32 still tells the logits apart, their softmax): forward and
    every gradient are those of fp64. The log-sum-exp rounds the logarithm of the sum away."""
    call = Call("cca", torch.float32, **SIZES[size], with_=("attention_bias",))
    call.tensors["attention_bias"][:, 1] = mask
    call.tensors["attention_bias"][0, 2, 1:] = mask  # and a row of which one key is left
    grad_out = torch.randn(call.tensors["query"].shape, generator=torch.Generator().manual_seed(5))
    given, expected = call.run(backend, grad_out), by_loop(call, grad_out)
    tolerance = 1e-5 if mask < -1e5 else 2e-3  # at -1e4 fp32 itself rounds a logit by 5e-4
    for name, x in expected.items():
        if name == "lse":
            continue
        assert (given[name].double() - x).abs().max() <= tolerance * x.abs().max(), name
    finite = given["lse"].isfinite()
    assert torch.equal(finite, expected["lse"].isfinite())
    below = given["lse"][:, call.m :: call.m]  # of the rows 1
    assert (below < 0.6 * max(mask, -3e38)).all()


@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_largest_finite_mask_is_not_minus_infinity(half, backend):
    call = Call("cca", half, with_=("attention_bias",))
    call.tensors["attention_bias"].fill_(torch.finfo(half).min)
    given = call.run(backend)
    expected = call.tensors["value"].float().flatten(2, 3).mean(2).repeat_interleave(call.m, dim=1)
    assert (given["out"][:, call.m - 1 :].float() - expected).abs().max() < 2e-2
    assert given["lse"][:, call.m - 1 :].isfinite().all()


# ---------------------------------------------------------------------------------------------- large logits


@pytest.mark.parametrize("magnitude", [1e4, 1e10, 1e16, 1e30])
def test_large_logits_give_a_maximum_and_ties_exactly(magnitude, backend):
    """One-hot keys and queries: a row's logits are 0 but two equal ones. The softmax is 1/2 on those, at any magnitude;
    no level of instructions may contract the difference to the maximum into something that is not one."""
    b, n, m, r, d = 1, 15, 4, 8, 16
    query, key = torch.zeros(b, n, 1, d), torch.zeros(b, 3, 2, r, 1, d)
    token = torch.arange(r)
    key[:, :, :, token, 0, token] = 1.0  # both neighbours have a token for each of r dimensions
    query[0, torch.arange(n), 0, torch.arange(n) % r] = magnitude * 1.1
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(0))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    out, lse = rk.chunked_cross_attention(*inputs, chunk_size=m, scale=1.0, return_lse=True, backend=backend)
    for j in range(m - 1, n):
        u = (j - (m - 1)) // m
        assert torch.allclose(out[0, j, 0], value[0, u, :, j % r, 0].mean(0), atol=1e-6), j
    assert torch.allclose(lse[0, m - 1 :], torch.tensor(magnitude * 1.1 + math.log(2)), rtol=1e-6)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    _, _, grad_value = torch.autograd.grad(out, inputs, grad_out)
    # what is lost is the probabilities' accuracy (docs/numerics.md), never their bounds: 0 and 1
    bound = grad_out[0, m - 1 :].abs().sum(0)
    assert (grad_value.abs() <= bound + 1e-5).all()


# ---------------------------------------------------------------------------------------------- absorbed projections


def absorbed(tensors: dict[str, torch.Tensor], backend: str, grad_out: torch.Tensor | None = None, **settings) -> dict:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    out, lse = rk.projected_chunked_cross_attention(
        **leaves, chunk_size=4, strategy="absorb", return_lse=True, backend=backend, **settings
    )
    if grad_out is None:
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
    return {"out": out.detach(), "lse": lse, **{f"d{name}": g for name, g in zip(leaves, gradients)}}


def states(dtype: torch.dtype, r: int, biases: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": (2, 15, 2, 16), "encoded": (2, 3, 2, r, 24), "w_key": (2, 16, 24), "w_value": (2, 16, 24)}
    if biases:
        shapes |= {"bias_key": (2, 16), "bias_value": (2, 16), "attention_bias": (2, 4, r)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("r", [5, 150, 600])
def test_a_nan_query_of_absorbed_projections(r, biases, dtype, backend):
    """The states are shared by the heads, the weights are not."""
    tensors = states(dtype, r, biases)
    clean = absorbed(tensors, backend)
    row = (0, 8, 0)  # row 1 of chunk 1
    tensors["query"][(*row, 3)] = NAN
    where = {"out": [row], "lse": [row], "dquery": [row], "dencoded": [(0, 1)], "dw_key": [0], "dw_value": [0]}
    if biases:
        # bias_key adds one number to every logit of a row: a gradient of 0 in exact arithmetic, and NaN times 0 is NaN
        where |= {"dattention_bias": [(0, 1)], "dbias_value": [0], "dbias_key": [0]}
    given = absorbed(tensors, backend)
    assert_nan_exactly(given, clean, where)


@pytest.mark.parametrize("r", [5, 600])
def test_an_infinite_and_an_empty_row_of_absorbed_projections(r, dtype, backend):
    """Every key of the chunk has a positive first number: +inf in the query's gives +inf, -inf gives -inf."""
    tensors = states(dtype, r, False)
    tensors["encoded"][0, 1] = tensors["encoded"][0, 1].abs() + 0.1
    tensors["w_key"][0].zero_()
    tensors["w_key"][0, 0] = 0.5
    row = (0, 8, 0)
    tensors["query"][row] = 0
    tensors["query"][(*row, 0)] = INF
    given = absorbed(tensors, backend)
    assert given["lse"][row] == INF
    assert given["out"][row].isnan().all()
    assert given["dquery"][row].isnan().all()
    assert given["dencoded"][0, 1].isnan().all()
    assert not given["dencoded"][0, 0].isnan().any()
    # K = A q is -inf in one product of 16; the others are 0 * inf
    tensors["w_key"][0] = 0.5
    tensors["query"][row] = -INF
    given = absorbed(tensors, backend)
    assert given["lse"][row] == -INF
    assert not given["out"][row].any()
    assert not given["dquery"][row].any()
    assert not any(x.isnan().any() for x in given.values())


@pytest.mark.parametrize("r", [5, 600])
@pytest.mark.parametrize("mask", [-1e30, torch.finfo(torch.float32).min], ids=["-1e30", "finfo.min"])
def test_a_finite_mask_with_absorbed_projections(mask, r, backend):
    """As if keys and values were made: there the loop above has checked it."""
    tensors = states(torch.float32, r, True)
    tensors["attention_bias"][:, 1] = mask
    given, leaves = absorbed(tensors, backend), {name: x.clone().requires_grad_() for name, x in tensors.items()}
    made = [
        torch.einsum("blkre,hde->blkrhd", leaves["encoded"], leaves[f"w_{name}"]) + leaves[f"bias_{name}"]
        for name in ("key", "value")
    ]
    out = rk.chunked_cross_attention(
        leaves["query"], *made, chunk_size=4, attention_bias=leaves["attention_bias"], backend=backend
    )
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
    for name, x in {"out": out.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients)}}.items():
        if name != "dbias_key":  # rounding alone
            assert (given[name] - x).abs().max() <= 2e-5 * x.abs().max(), name


# ---------------------------------------------------------------------------------------------- decoding


def decode(tensors: dict[str, torch.Tensor], backend: str, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    rest = {name: x for name, x in tensors.items() if name not in ("query", "key", "value")}
    position = torch.full((query.shape[0],), 5)
    with torch.no_grad():
        return rk.chunked_cross_attention_decode(
            query, key, value, chunk_size=4, position=position, return_lse=True, backend=backend, **rest, **settings
        )


@pytest.mark.parametrize("null", [False, True], ids=["", "null"])
@pytest.mark.parametrize("group", [1, 6])  # the cache is read in place, or packed
@pytest.mark.parametrize("r", [5, 300])  # one range of slots, and several
def test_decoding_what_is_not_finite(r, group, null, dtype, backend):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    heads = 2 * group
    tensors = {"query": draw(2, 1, heads, 16), "key": draw(2, 2, r, 2, 16), "value": draw(2, 2, r, 2, 16)}
    if null:
        tensors |= {"null_key": draw(heads, 16), "null_value": draw(heads, 16)}
    clean, clean_lse = decode(tensors, backend)
    row = (0, 0, 0)
    others = torch.ones(clean_lse.shape, dtype=torch.bool)
    others[row] = False
    positive = tensors["key"].clone()
    positive[..., 0] = positive[..., 0].abs() + 0.1
    for entry, lse in ((NAN, NAN), (INF, INF), (-INF, -INF)):
        changed = {name: x.clone() for name, x in tensors.items()}
        changed["query"][row] = 0
        changed["query"][(*row, 0)] = entry
        changed["key"][0, :, :, 0, 0] = positive[0, :, :, 0, 0]
        if null:
            changed["null_key"][0] = 0  # times inf: NaN, unless its first number is not 0
            changed["null_key"][0, 0] = 0.5
        out, found = decode(changed, backend)
        if entry == -INF:
            assert not out[row].any()
            assert found[row] == lse
        else:
            assert out[row].isnan().all()
            assert found[row] == lse or (lse != lse and found[row].isnan())
        # the first head's keys and its null key were changed: others of its group, its own in another sequence
        same = others.clone()
        same[0, 0, :group] = same[:, :, 0] = False
        assert torch.equal(out[same], clean[same])
        assert torch.equal(found[same], clean_lse[same])
        assert out[others].isfinite().all()
        assert found[others].isfinite().all()
    for first, last in ((INF, NAN), (NAN, INF)):
        changed = {name: x.clone() for name, x in tensors.items()}
        changed["query"][row] = 1
        changed["key"][0, 0, 0, 0, 0], changed["key"][0, 1, -1, 0, 0] = first, last
        out, found = decode(changed, backend)
        assert out[row].isnan().all()
        assert found[row].isnan()
        if null:  # the same in the null slot
            changed["key"][0, 0, 0, 0, 0] = changed["key"][0, 1, -1, 0, 0] = first
            changed["null_key"][0] = last
            out, found = decode(changed, backend)
            assert out[row].isnan().all()
            assert found[row].isnan()


@pytest.mark.parametrize("r", [5, 300])
@pytest.mark.parametrize("mask", [-1e30, torch.finfo(torch.float32).min], ids=["-1e30", "finfo.min"])
def test_decoding_with_a_finite_mask_on_every_key(mask, r, backend):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in (("query", (2, 1, 2, 16)), ("key", (2, 2, r, 2, 16)), ("value", (2, 2, r, 2, 16)))
    }
    tensors["attention_bias"] = torch.full((2, 4, r), mask)
    out, lse = decode(tensors, backend)
    expected = tensors["value"].flatten(1, 2).mean(1)[:, None]
    assert (out - expected).abs().max() < 1e-5
    assert lse.isfinite().all()


def test_decoding_large_logits(backend):
    """As in the full operation: half on each of two equal maxima."""
    query, key = torch.zeros(2, 1, 1, 16), torch.zeros(2, 2, 8, 1, 16)
    key[:, :, torch.arange(8), 0, torch.arange(8)] = 1.0
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(0))
    for magnitude in (1e4, 1e10, 1e30):
        query[:, 0, 0, 3] = magnitude * 1.1
        out, lse = decode({"query": query, "key": key, "value": value}, backend, scale=1.0)
        assert torch.allclose(out[:, 0, 0], value[:, :, 3, 0].mean(1), atol=1e-6)
        assert torch.allclose(lse, torch.tensor(magnitude * 1.1 + math.log(2)), rtol=1e-6)
