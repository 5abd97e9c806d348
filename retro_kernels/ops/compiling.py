"""What torch.compile and fake tensors need of eager code: constants, and no look at data that is not there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result` without importing torch._dynamo, which takes longer than all of this
    library: that decorator only sets this attribute, in torch 2.11 to 2.15 (a test asks the installed one)."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.assume_constant_result(function)
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def readable(*tensors: torch.Tensor | None) -> bool:
    """Whether a check may look at what the tensors hold: not while torch.compile traces, nor of fake or meta tensors or
    under torch.func.vmap, where one number stands for many. On a GPU it may, but waits for it: that is the caller's to
    decide."""
    if torch.compiler.is_compiling():
        return False
    return not any(x is not None and (x.is_meta or isinstance(x, FakeTensor) or _is_batched(x)) for x in tensors)


def _is_batched(x: torch.Tensor) -> bool:
    if not torch._C._are_functorch_transforms_active():
        return False
    while True:
        if torch._C._functorch.is_batchedtensor(x):
            return True
        if not torch._C._functorch.is_gradtrackingtensor(x):
            return isinstance(x, FakeTensor)
        x = torch._C._functorch.get_unwrapped(x)
