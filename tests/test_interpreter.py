"""Triton's interpreter quickened for these tests (interpreter.py) is Triton's interpreter."""

from __future__ import annotations

import cases
import interpreter
import pytest
import torch

triton = pytest.importorskip("triton")
from triton import language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

pytestmark = pytest.mark.skipif(not interpreter.REPLACED, reason="nothing is interpreted")


@pytest.mark.parametrize(
    "case",
    [
        cases.Case("one", b=1, n=13, m=5, r=5, h=1, options=("relative", "relative_biases", "mask", "null", "bias")),
        cases.Case("two", "self", b=1, l=1, r=5, h=1, dropout_p=0.3, options=("rotary",)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_its_results_have_the_same_bits(case, dtype, monkeypatch):
    arguments = cases.make(case, dtype)
    grad_out = torch.randn(case.out_shape, dtype=dtype).double()
    quick = cases.run(arguments, "triton", grad_out)
    for holder, name, original in interpreter.REPLACED:
        monkeypatch.setattr(holder, name, original)
    for name, expected in cases.run(arguments, "triton", grad_out).items():
        assert torch.equal(quick[name], expected), name


def of_each(x_ptr, y_ptr, OPERATION: tl.constexpr):
    x, y = tl.load(x_ptr + tl.arange(0, 2)), tl.load(y_ptr + tl.arange(0, 2))
    tl.store(x_ptr + tl.arange(0, 2), x + y if OPERATION == "+" else x - y if OPERATION == "-" else x * y)


@pytest.mark.parametrize(("operation", "x", "y"), [("+", 2**31 - 1, 1), ("-", -(2**31), 1), ("*", 2**16, 2**15)])
def test_it_sees_an_integer_overflow(operation, x, y):
    of_two = InterpretedFunction(of_each)[(1,)]
    fits = torch.tensor([1, x], dtype=torch.int32)
    of_two(fits, torch.tensor([1, 0], dtype=torch.int32), OPERATION=operation)
    with pytest.raises(InterpreterError, match="overflow"):
        of_two(torch.tensor([1, x], dtype=torch.int32), torch.tensor([1, y], dtype=torch.int32), OPERATION=operation)
