"""What is particular to the CPU kernels: instruction-set levels, blocking, threads, addresses, memory.

That they agree with the reference on every option is test_conformance.py, at the level this machine chooses.
"""

from __future__ import annotations

import cases
import pytest
import torch
from cases import ALL, Case
from torch.utils._python_dispatch import TorchDispatchMode

import retro_kernels as rk
from retro_kernels import extension
from retro_kernels.ops import memory as common
from retro_kernels.ops.attention import cpu
from retro_kernels.ops.attention.common import CLOCK, Call

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

LEVELS = extension.usable_isas() if cpu.unavailable() is None else ()
# Blocks hold 64 rows and 256 keys (128 above head size 128): one of each; several of either; several of both.
BLOCKING = (
    Case("odd_everything", n=23, m=5, k=3, r=11, h=4, hk=1, d=33, d_value=7, stride=3, options=ALL),
    Case("many_keys", b=1, n=40, m=16, k=3, r=99, h=2, d=20, options=(*ALL, "bias_per_neighbour")),
    Case("many_rows", b=1, n=70, m=30, k=2, r=17, h=10, hk=2, d=8, d_value=48, options=ALL),
    Case("many_of_both", b=1, n=40, m=20, k=3, r=90, h=8, hk=2, d=5, d_value=18, options=ALL),
    Case("widest", b=1, n=9, m=8, k=2, r=70, h=2, d=256, d_value=255, options=ALL),
    Case(
        "relative",
        b=1,
        n=47,
        m=13,
        k=3,
        r=99,
        h=4,
        hk=2,
        d=20,
        dropout_p=0.3,
        options=("relative", "relative_biases", "mask", "null", "bias"),
    ),
    Case("relative_wide", b=1, n=40, m=20, k=1, r=70, h=2, d=131, options=("relative", "relative_biases")),
    Case("packed", b=2, n=60, m=13, k=2, r=19, documents=(27, 14, 19), dropout_p=0.5, options=ALL),
    Case(
        "self",
        "self",
        b=1,
        l=1,
        k=2,
        r=150,
        h=4,
        hk=2,
        d=24,
        dropout_p=0.2,
        options=("relative", "relative_biases", "mask"),
    ),
    Case(
        "causal",
        "self",
        b=2,
        l=1,
        k=1,
        r=150,
        h=2,
        d=40,
        causal=True,
        documents=(83, 67),
        options=("relative", "relative_biases"),
    ),
    Case(
        "cross",
        "cross",
        b=1,
        l=2,
        k=3,
        r=50,
        m=70,
        h=4,
        hk=2,
        d=24,
        dropout_p=0.2,
        options=("relative", "relative_biases", "mask"),
    ),
    Case("whole_vectors", n=70, m=30, k=1, r=17, h=4, hk=2, d=64, options=("strided",)),
    Case("cross_whole_vectors", "cross", b=1, l=2, k=3, r=40, m=20, h=4, hk=2, d=32, options=("strided",)),
)


@pytest.fixture(params=LEVELS)
def level(request):
    extension.set_isa(request.param)
    yield request.param
    extension.set_isa("")


def gradients_of(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    arguments = cases.make(case, dtype)
    grad_out = torch.randn(case.out_shape)
    return cases.run(arguments, "cpu", grad_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BLOCKING, ids=str)
def test_every_level_agrees_with_the_reference(case, dtype, level):
    arguments = cases.make(case, dtype)
    grad_out = torch.randn(case.out_shape).to(dtype).double()
    expected = cases.run(cases.as_dtype(arguments, torch.float64), "reference", grad_out)
    given = cases.run(arguments, "cpu", grad_out)
    if dtype == torch.float32:
        cases.assert_close(given, expected, 1e-5)
    else:
        cases.assert_twice(given, cases.same_precision(arguments, grad_out), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BLOCKING, ids=str)
def test_any_number_of_threads_gives_the_same_bits(case, dtype):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(1)
            results.append(gradients_of(case, dtype))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("m", [4, 8])
def test_a_bias_of_minus_infinity_hides_like_a_mask(m):
    """Rows whose whole bias is -inf see nothing: out 0, lse -inf, no gradient, even from a NaN in grad_out."""
    arguments = cases.make(Case("bias", n=3 * m, m=m, options=("bias",)), torch.float32)
    bias = arguments["attention_bias"].detach().clone()
    bias[:, 1] = -float("inf")
    bias[:, 2, 3:9] = -float("inf")
    arguments["attention_bias"] = bias.requires_grad_()
    position = torch.arange(3 * m)
    hidden = (position >= m - 1) & ((position - m + 1) % m == 1)
    grad_out = torch.randn_like(arguments["query"])
    grad_out[:, hidden] = float("nan")
    given = cases.run(arguments, "cpu", grad_out)
    assert (given["out"][:, hidden] == 0).all()
    assert torch.isneginf(given["lse"][:, hidden]).all()
    assert (given["gradient of query"][:, hidden] == 0).all()
    for name, x in given.items():
        assert not x.isnan().any(), name


def test_gradients_beyond_the_cache_are_streamed_right():
    """dK and dV above 8 MiB are written past the cache; the result does not depend on it."""
    case = Case("large", b=1, n=512, m=64, k=2, r=128, h=16, d=64)
    arguments = cases.make(case, torch.float32)
    grad_out = torch.randn(1, 512, 16, 64)
    whole = cases.run(arguments, "cpu", grad_out)
    query, key, value = (arguments[name].detach() for name in ("query", "key", "value"))
    for head in (0, 15):
        part = {
            **arguments,
            "query": query[:, :, head : head + 1],
            "key": key[..., head : head + 1, :],
            "value": value[..., head : head + 1, :],
        }
        part = {
            name: x.clone().requires_grad_() if name in ("query", "key", "value") else x for name, x in part.items()
        }
        one = cases.run(part, "cpu", grad_out[:, :, head : head + 1])
        for name in ("key", "value"):
            assert torch.equal(one[f"gradient of {name}"], whole[f"gradient of {name}"][..., head : head + 1, :])


def test_strides_of_zero_and_addresses_aligned_to_one_element():
    """Expanded inputs, and bases that only an element's size divides, give what contiguous copies give."""
    shape = (2, 2, 2, 16, 1, 24)

    def unaligned(*size):
        return torch.randn(torch.Size(size).numel() + 1)[1:].view(size).bfloat16()

    query = unaligned(1, 23, 1, 24).expand(2, 23, 4, 24)
    key, value = unaligned(1, 1, 1, 16, 1, 24).expand(shape), unaligned(1, 2, 1, 16, 1, 24).expand(shape)
    mask = torch.tensor([True, False]).view(1, 1, 2, 1).expand(2, 2, 2, 16)
    for dtype in (torch.float32, torch.bfloat16):
        strided = [x.to(torch.float32) if dtype == torch.float32 else x for x in (query, key, value)]
        packed = [x.contiguous() for x in strided]
        expected = rk.chunked_cross_attention(*packed, chunk_size=8, neighbour_mask=mask.contiguous(), backend="cpu")
        given = rk.chunked_cross_attention(*strided, chunk_size=8, neighbour_mask=mask, backend="cpu")
        assert torch.equal(given, expected)


def test_offsets_beyond_32_bits():
    """A key whose last neighbour starts 2^31 elements after its first; the memory between is never touched."""
    step = (1 << 31) + 64
    try:
        storage = torch.empty(step + 4096, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    key = storage.as_strided((1, 1, 2, 16, 2, 16), (0, 0, step, 32, 16, 1))
    dense = torch.randn(1, 1, 2, 16, 2, 16).bfloat16()
    key.copy_(dense)
    query, value = torch.randn(1, 8, 2, 16).bfloat16(), torch.randn(1, 1, 2, 16, 2, 16).bfloat16()
    given = rk.chunked_cross_attention(query, key, value, chunk_size=8, backend="cpu")
    assert torch.equal(given, rk.chunked_cross_attention(query, dense, value, chunk_size=8, backend="cpu"))


def test_nothing_is_allocated_but_outputs_and_bounded_partial_sums(monkeypatch):
    """Forward: out and lse. Backward: the gradients, and at most 32 fp32 copies of each parameter's. No other op of
    torch that makes a tensor runs inside."""
    arguments = cases.make(Case("memory", n=64, options=ALL), torch.float32)
    shapes, made = [], []
    allocate = common.allocate

    def counting(shape, dtype, device):
        shapes.append(tuple(shape))
        return allocate(shape, dtype, device)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.append(function.name())
            return result

    monkeypatch.setattr(common, "allocate", counting)
    given = {name: x.detach() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    given |= {"query": given["query"][:, None, None], "mask": given["neighbour_mask"]}
    given |= {
        f"{side}_{part}": table
        for side in ("query", "key")
        for part, table in zip(("cos", "sin"), arguments[f"{side}_rotary"])
    }
    given = {name: given.get(name) for name in Call.form.tensors}
    call = Call(**given, grouping=CLOCK, scale=0.25, stride=8, first_token=7)
    with Watch():
        out, lse = cpu.attend(call)
    assert sorted(shapes) == sorted([tuple(out.shape), tuple(lse.shape)])
    assert set(made) <= {"aten::empty.memory_format", "retro_kernels_cpu::attention_forward"}
    shapes.clear()
    made.clear()
    grad_out = torch.randn_like(out)
    with Watch():
        wanted = [name for name in Call.form.groups if given[name] is not None]
        gradients = list(cpu.gradients(call, grad_out, None, out, lse, wanted).values())
    parameters = [tuple(x.shape) for x in gradients[3:]]
    copies = [shape for shape in shapes if shape[1:] in parameters]
    assert sorted(shapes) == sorted([*(tuple(x.shape) for x in gradients), *copies])
    assert len(copies) == 3
    assert all(shape[0] <= 32 for shape in copies)
    assert set(made) <= {"aten::empty.memory_format", "retro_kernels_cpu::attention_backward"}


def test_an_unknown_level_is_refused():
    with pytest.raises(RuntimeError, match="abacus"):
        extension.set_isa("abacus")
