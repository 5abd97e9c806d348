"""The CUDA kernels against the specification, their own source in the emulator (csrc/cuda/emulator): fibers of the CPU
in place of CUDA threads. What that proves: indices, masks, products by the fragment layouts of the PTX ISA, barriers
and waits. What it does not prove is said in csrc/cuda/README.md; no GPU has run these kernels.
"""

from __future__ import annotations

import subprocess

import cases
import emulator
import pytest
import torch

import retro_kernels as rk
from retro_kernels import cuda_extension
from retro_kernels.ops import memory as common
from retro_kernels.ops.attention import cuda
from retro_kernels.ops.attention.common import CLOCK, Call

pytestmark = pytest.mark.usefixtures("emulated")
Case = cases.Case

CCA = (
    Case("plain", d=64),
    Case("one chunk", n=8, d=64),
    Case("no token attends", n=5, l=2, d=64),
    Case("incomplete chunk", n=30, d=96),
    Case("surplus chunks", l=5, d=64),
    Case("many neighbours", k=7, r=5, d=64),
    Case("chunk of one", m=1, n=5, r=3, d=64),
    Case("one key", k=1, r=1, d=64),
    Case("odd sizes", n=29, m=7, k=3, r=11, h=3, d=128),
    Case("rows of two tiles", n=150, m=70, k=1, r=9, b=1, h=1, d=64),
    Case("rows of three tiles", n=260, m=130, k=1, r=70, b=1, h=1, d=64),
    Case("keys of many tiles", n=9, m=4, k=3, r=150, b=1, h=1, d=96),
    Case("grouped", h=6, hk=2, d=64),
    Case("grouped, keys of two tiles", n=40, k=1, r=70, h=4, hk=2, d=128, b=1),
    Case("multi query, mask", h=4, hk=1, d=64, options=("mask",)),
    Case("mask", d=128, options=("mask",)),
    Case("mask, an empty chunk", d=64, options=("mask", "empty_chunk")),
    Case("mask of long keys", n=9, m=4, k=2, r=140, b=1, h=1, d=64, options=("mask",)),
    Case("scale", scale=-0.7, d=64),
    Case("scale of zero", scale=0.0, d=64, options=("mask",)),
    Case("stride", n=40, stride=3, d=64),
    Case("end", align="end", d=64, options=("mask",)),
    Case("end, short", n=3, align="end", d=64),
    Case("offset", query_offset=11, d=64),
    Case("offset of chunks", query_offset=37, chunk_offset=3, d=96, options=("mask",)),
    Case("one token", n=1, query_offset=20, chunk_offset=1, d=64),
    Case("everything", n=45, m=10, k=3, r=9, h=4, hk=2, d=128, stride=7, l=9, options=("mask",)),
    Case("empty batch", b=0, d=64),
    Case("empty sequence", n=0, l=1, d=64),
    Case("no neighbours", k=0, d=64),
    Case("no tokens retrieved", r=0, d=64),
    Case("no chunks", n=5, l=0, d=64),
    Case("strided", n=29, d=64, options=("mask", "strided by rows")),
    Case("packed", n=45, documents=(17, 3, 8, 17), d=64),
    Case("packed, stride, surplus", n=50, l=20, stride=3, documents=(11, 20, 19), d=64, options=("mask",)),
)
ENCODER = (
    Case("self", "self", d=64),
    Case("self, one token", "self", r=1, d=64),
    Case("self, odd", "self", l=2, k=3, r=19, h=3, d=96),
    Case("self, two tiles", "self", b=1, l=1, k=2, r=100, h=1, d=128, options=("mask",)),
    Case("self, sweeps", "self", b=1, l=1, k=1, r=150, h=1, d=64, options=("mask",)),
    Case("self, grouped", "self", h=6, hk=2, d=64, options=("mask", "empty_chunk")),
    Case("self, strided", "self", d=64, options=("mask", "strided by rows")),
    Case("self, no tokens", "self", r=0, d=64),
    Case("cross", "cross", d=64),
    Case("cross, odd", "cross", l=2, k=3, r=19, m=7, h=3, d=128),
    Case("cross, long", "cross", b=1, l=1, k=2, r=70, m=70, h=1, d=96),
    Case("cross, many neighbours", "cross", b=1, l=1, k=9, r=7, d=64),
    Case("cross, grouped", "cross", h=4, hk=2, d=64, options=("mask", "empty_chunk")),
    Case("cross, no neighbours", "cross", k=0, d=64),
    Case("cross, no activations", "cross", m=0, d=64),
)
# m = 64, k = 2, r = 128 as the kernels are written for.
PAPER = (
    Case("cca", b=1, n=130, m=64, k=2, r=128, h=1, d=64),
    Case("cca, 128", b=1, n=127, m=64, k=2, r=128, h=1, d=128, options=("mask",)),
    Case("self", "self", b=1, l=1, k=1, r=128, h=1, d=128),
    Case("cross", "cross", b=1, l=1, k=2, m=64, r=128, h=1, d=64, options=("mask",)),
)
OF_LSE = ("everything", "mask, an empty chunk", "packed", "self, grouped", "cross, odd", "rows of three tiles")
BOTH = (
    "plain",
    "everything",
    "self, two tiles",
    "self, sweeps",
    "cross, odd",
    "grouped, keys of two tiles",
    "keys of many tiles",
)


def make(case: Case, dtype: torch.dtype) -> dict:
    arguments = cases.make(case, dtype)
    if "strided by rows" in case.options:  # rows stay aligned: tokens two apart, heads of a wider tensor
        for name in ("query", "key", "value"):
            x = arguments[name].detach()
            wide = torch.full((*x.shape[:-2], 2 * x.shape[-2], x.shape[-1] + 24), float("nan"), dtype=dtype)
            wide[..., ::2, 8 : 8 + x.shape[-1]] = x
            arguments[name] = wide[..., ::2, 8 : 8 + x.shape[-1]].requires_grad_()
        for name in ("neighbour_mask", "activation_mask"):
            if name in arguments:
                arguments[name] = arguments[name].repeat_interleave(2, -1)[..., ::2]
    return arguments


def check(case: Case, dtype: torch.dtype, *, of_lse: bool = False) -> None:
    """`of_lse`: a gradient of the log-sum-exp arrives too, NaN for rows that saw nothing, which pass none."""
    arguments = make(case, dtype)
    grads = [torch.randn(case.out_shape, dtype=torch.float64).to(dtype).double()]
    if of_lse:
        lse = cases.run(arguments, "reference")["lse"]
        grads.append(torch.randn(lse.shape, dtype=torch.float64).masked_fill(lse == float("-inf"), float("nan")))
    expected = cases.run(cases.as_dtype(arguments, torch.float64), "reference", *grads)
    given = cases.run(arguments, "cuda", *grads)
    assert given["out"].dtype == dtype
    assert given["lse"].dtype == torch.float32
    cases.assert_twice(given, cases.same_precision(arguments, *grads), expected, dtype)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("case", [*CCA, *ENCODER, *PAPER], ids=str)
def test_bf16_is_within_twice_the_error_of_pytorch(case):
    """Outputs are poisoned and lie between guard bands."""
    check(case, torch.bfloat16)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("case", [case for case in (*CCA, *ENCODER) if case.name in OF_LSE], ids=str)
def test_the_gradient_of_the_log_sum_exp(case):
    check(case, torch.bfloat16, of_lse=True)


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("case", [case for case in (*CCA, *ENCODER) if case.name in BOTH], ids=str)
def test_fp16_is_within_twice_the_error_of_pytorch(case):
    check(case, torch.float16)


@pytest.mark.parametrize("case", [case for case in (*CCA, *ENCODER) if case.name in BOTH], ids=str)
def test_the_order_of_the_warps_changes_no_bit(case, monkeypatch):
    """Warps run in an order drawn anew at every turn and are held back at random, or one as far as it can before the
    next: a barrier or a wait that is missing shows as a difference (or as NaN: shared memory and the targets of copies
    hold it before they are written)."""
    arguments = make(case, torch.bfloat16)
    grad_out = torch.randn(case.out_shape)
    expected = cases.run(arguments, "cuda", grad_out)
    for seed in (1, 2, 3):
        monkeypatch.setenv("RETRO_KERNELS_EMULATOR_SEED", str(seed))
        given = cases.run(arguments, "cuda", grad_out)
        for name, x in expected.items():
            assert torch.equal(given[name], x), f"{name} with seed {seed}"


def test_many_slots_fit_into_the_shared_memory_of_sm_86():
    """Rows of more than one tile, and as many slots as are taken: their visibility leaves less of 99 KiB, which the
    emulator holds a launch to, and smaller tiles take the call. Three slots are seen."""
    arguments = cases.make(Case("", b=1, n=199, m=100, k=1, r=cuda.MOST_SLOTS, h=1, d=128), torch.bfloat16)
    mask = torch.zeros(1, 1, 1, cuda.MOST_SLOTS, dtype=torch.bool)
    mask[..., [0, 20000, cuda.MOST_SLOTS - 1]] = True
    grad_out = torch.randn(1, 199, 1, 128)
    given = cases.run(arguments | {"neighbour_mask": mask}, "cuda", grad_out)
    expected = cases.run(arguments | {"neighbour_mask": mask}, "reference", grad_out)
    cases.assert_close(given, expected, 2e-2)


@pytest.mark.parametrize("name", ["masked tokens", "surplus chunks", "tokens before the first chunk"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_attended_reaches_nothing(name, poison):
    case = Case("", b=1, n=21, l=4, hk=1, d=64, options=("mask", "empty_chunk"))
    arguments = cases.make(case, torch.bfloat16)
    grad_out = torch.randn(case.out_shape)
    clean = cases.run(arguments, "cuda", grad_out)
    poisoned, grad_poisoned = cases.as_dtype(arguments, torch.bfloat16), grad_out.clone()
    with torch.no_grad():
        if name == "masked tokens":
            for x in (poisoned["key"], poisoned["value"]):
                x[~arguments["neighbour_mask"]] = poison
        elif name == "surplus chunks":
            for x in (poisoned["key"], poisoned["value"]):
                x[:, 2:] = poison
        else:
            poisoned["query"][:, :7] = poison
            grad_poisoned[:, :7] = poison
    given = cases.run(poisoned, "cuda", grad_poisoned)
    for result, x in clean.items():
        assert torch.equal(given[result], x), f"{result} was touched by {poison} in {name}"
    assert not clean["gradient of key"][:, 2:].any()
    assert not clean["gradient of key"][~arguments["neighbour_mask"]].any()
    assert not clean["gradient of query"][:, :7].any()


def test_an_output_gradient_that_is_not_aligned_is_copied():
    """A sum's gradient is one number expanded over all axes."""
    arguments = cases.make(Case("", d=64), torch.bfloat16)
    gradients = []
    for backend in ("cuda", "reference"):
        out = rk.chunked_cross_attention(**arguments, backend=backend)
        gradients.append(torch.autograd.grad(out.sum(), arguments["value"])[0])
    assert cases.error(*gradients) < 8e-3


def test_compiles_with_a_full_graph():
    arguments = cases.make(Case("", d=64, n=30), torch.bfloat16)

    def call(query, key, value):
        return rk.chunked_cross_attention(query, key, value, chunk_size=8, backend="cuda")

    tensors = [arguments[name] for name in ("query", "key", "value")]
    plain = call(*tensors)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")(*tensors)
    grad_out = torch.randn_like(plain)
    assert torch.equal(compiled, plain)
    for x, y in zip(torch.autograd.grad(compiled, tensors, grad_out), torch.autograd.grad(plain, tensors, grad_out)):
        assert torch.equal(x, y)


@pytest.mark.parametrize("test", ["test_schema", "test_faketensor"])
def test_opcheck(test):
    """The schema tells the truth about mutation and aliasing, and the fake agrees with the kernel."""
    x = cases.make(Case("", d=64, options=("mask",)), torch.bfloat16)
    given = {"query": x["query"].detach()[:, None, None], "mask": x["neighbour_mask"]}
    given |= {name: x[name].detach() for name in ("key", "value")}
    tensors = [given.get(name) for name in Call.form.tensors]
    given = {"grouping": CLOCK, "scale": 0.3, "stride": 8, "first_token": 7}
    settings = [given.get(name, 0) for name in Call.form.settings]
    torch.library.opcheck(cuda.forward, [*tensors, *settings], test_utils=test)
    out, lse = cuda.forward(*tensors, *settings)
    arguments = [torch.ones_like(out), None, *tensors, out, lse, *settings, False, False, False]
    torch.library.opcheck(cuda.backward, arguments, test_utils=test)


REFUSED = {
    "float32": (Case("", d=64), torch.float32, {}),
    "head sizes are 16": (Case("", d=16), torch.bfloat16, {}),
    "head sizes are 64 and 96": (Case("", d=64, d_value=96), torch.bfloat16, {}),
    "attention_bias": (Case("", d=64, options=("bias",)), torch.bfloat16, {}),
    "query_rotary": (Case("", d=64, options=("rotary",)), torch.bfloat16, {}),
    "relative_key": (Case("", d=64, options=("relative",)), torch.bfloat16, {}),
    "null_key": (Case("", d=64, options=("null",)), torch.bfloat16, {}),
    "dropout_p": (Case("", d=64, dropout_p=0.1), torch.bfloat16, {}),
    "causal": (Case("", "self", d=64, causal=True), torch.bfloat16, {}),
    "multiples of 16 bytes": (Case("", d=64), torch.bfloat16, {"odd": True}),
    "slots": (Case("", d=64, n=8, b=1, h=1, k=1, r=32769), torch.bfloat16, {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_taken_is_refused_by_name(reason):
    case, dtype, change = REFUSED[reason]
    arguments = cases.make(case, dtype)
    if change:
        x = arguments["key"].detach()
        arguments["key"] = torch.zeros(*x.shape[:-1], x.shape[-1] + 1, dtype=dtype)[..., 1:]
    with pytest.raises(ValueError, match=reason):
        cases.operation(arguments)(**arguments, backend="cuda")


def test_a_pointer_that_is_not_aligned_is_refused_before_the_launch():
    """What strides cannot tell (memory that was not torch's to begin with) is found by the binding."""
    arguments = cases.make(Case("", d=64), torch.bfloat16)
    storage = bytearray(2 * arguments["query"].numel() + 32)
    shift = 2 if torch.frombuffer(storage, dtype=torch.bfloat16).data_ptr() % 16 == 0 else 0
    query = torch.frombuffer(storage, dtype=torch.bfloat16, count=arguments["query"].numel(), offset=shift)
    query = query.view(arguments["query"].shape)
    assert query.data_ptr() % 16 != 0
    with pytest.raises((RuntimeError, ValueError), match="16 bytes"):
        rk.chunked_cross_attention(
            query, arguments["key"].detach(), arguments["value"].detach(), chunk_size=8, backend="cuda"
        )


def test_the_emulator_sees_what_it_is_for(tmp_path):
    """Kernels with a fault each (emulator_faults.cpp): a missing wait, a missing barrier, a deadlock, a write beside
    shared memory, copies left under way, lanes that meet in different instructions, boxes and products that are not
    waited for; and products of small integers, exact, by every way of loading an operand, mma and wgmma."""
    program = tmp_path / "faults"
    source = emulator.ROOT / "tests" / "ops" / "attention" / "emulator_faults.cpp"
    flags = [x for x in emulator.FLAGS if "visibility" not in x]
    done = subprocess.run(
        [*emulator.compiler(), *flags, f"-I{emulator.SOURCES}", str(source), "-o", str(program)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("architectures", "capability", "covered"),
    [
        (["8.0", "9.0a", "8.0+PTX"], (9, 0), True),
        (["8.0", "9.0a"], (10, 0), False),
        (["8.0", "9.0a", "8.0+PTX"], (10, 0), True),
        (["8.0", "9.0a", "8.0+PTX"], (7, 5), False),
        (["9.0a"], (8, 0), False),
        (["8.6"], (8, 0), False),
        (["8.0"], (8, 9), True),
    ],
)
def test_which_gpus_a_build_covers(architectures, capability, covered):
    assert cuda_extension.covers(architectures, capability) is covered


def test_outputs_are_allocated_where_the_guards_are():
    """`common.allocate` is what the guarded fixture replaces: the backend must use it for everything it writes."""
    made = []
    original = common.allocate

    def allocate(shape, dtype, device):
        made.append(tuple(shape))
        return original(shape, dtype, device)

    arguments = cases.make(Case("", d=64), torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "allocate", allocate)
        cases.run(arguments, "cuda", torch.randn(2, 21, 2, 64))
    assert made == [(2, 1, 1, 21, 2, 64), (2, 1, 1, 21, 2), (2, 1, 1, 21, 2, 64), *[(2, 2, 2, 16, 2, 64)] * 2]
