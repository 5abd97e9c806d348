"""What surrounds a call, and what it needs of eager code: torch.compile and fake tensors constants, and no look at data
that is not there; autocast, that what has been cast is not cast again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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


@constant  # torch 2.11's compiler does not trace the question
def has_autocast(device: str) -> bool:
    """Whether this type of device knows autocast."""
    return torch.amp.is_autocast_available(device)


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """What has been cast already must not be cast again: reference and kernels choose their precision themselves."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()
