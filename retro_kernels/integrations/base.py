"""Types that `swap` and the files of the peers share."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import io
import textwrap
import tokenize
import warnings
import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any, Protocol

import torch
from torch import nn

from ..ops.verification.classes import Class

AS_TRAINED, PAPER = "as_trained", "paper"

_warned: set[str] = set()


class FusedForward:
    """The replacement of one module's `forward`: a callable that holds its module and reads its weights.

    It is an object, not a closure, so that a deep copy or a pickle of the module carries one bound to the copy.
    `positions` is None where swap's argument of that name makes no difference.
    """

    def __init__(self, module: nn.Module, positions: str | None) -> None:
        self.module = module
        self.positions = positions

    @property
    def __code__(self) -> CodeType:
        """Where torch.export, of the module by itself, says that its inputs come from."""
        return type(self).__call__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class Looked:
    """What a look at a mask's content found, kept as long as it is that tensor, unchanged. (An address is not enough:
    the next batch's mask may lie where this one was.) All modules of a kind share one: a look waits for a GPU."""

    def __init__(self) -> None:
        self.last: tuple[weakref.ref[torch.Tensor], int, Any] | None = None

    def __call__(self, tensor: torch.Tensor, look: Callable[[torch.Tensor], Any]) -> Any:
        if tensor.is_inference():  # which has no version
            return look(tensor)
        last = self.last
        if last is None or last[0]() is not tensor or last[1] != tensor._version:
            last = self.last = weakref.ref(tensor), tensor._version, look(tensor)
        return last[2]


class Integration(Protocol):
    """The parts of one peer that `swap` can replace."""

    LOOKS_FOR: tuple[str, ...]
    NAME: str

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module claims to be what is looked for. Imports nothing of the peer."""

    def refusal(self, module: nn.Module) -> str | None:
        """Why it is not what this version was written for, or None."""

    def note(self, module: nn.Module) -> str | None:
        """A note for the user about the swapped module, or None."""

    def likely_class(self, module: nn.Module) -> Class:
        """The class of calls that the fused module makes, as far as the module tells."""

    def fused_forward(self, module: nn.Module, positions: str) -> FusedForward:
        """The forward to put on the instance."""


def random_text(
    model: nn.Module, vocab_size: int, chunk_size: int, length: int | None, longest: int, *, whole: bool, k: int, r: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [1, n] to try a model with, n the `length` or a few chunks, and the neighbours [1, l, k, r] of its chunks:
    the `whole` ones, or the incomplete one as well."""
    n = min(longest, 4 * chunk_size + chunk_size // 2) if length is None else length
    chunks = n // chunk_size if whole else -(-n // chunk_size)
    device = next(model.parameters()).device
    draw = lambda *size: torch.randint(1, vocab_size, size).to(device)  # noqa: E731
    return draw(1, n), draw(1, chunks, k, r)


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS)


def describe_change(name: str, function: Any, known: str | None, version: str, *, verbatim: bool = False) -> str | None:
    """Why a function is not known to compute what the source whose `digest` is `known` does; None if it is."""
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return f"{name} is no Python function, so it cannot be checked against {version}"
    found = digest(code, verbatim)
    if found is None:
        return f"the source of {name} cannot be read, so it cannot be checked against {version}"
    if found != known:
        return f"{name} is not that of {version}: another version, an override or a patch"
    return None


@functools.lru_cache(maxsize=256)
def digest(code: CodeType, verbatim: bool = False) -> str | None:
    """SHA-256 of the source itself (unlike `inspect.getsource(function)` this sees through no decorator), with comments
    and all; or without comments, docstring and white space, whatever the version of Python that reads it."""
    try:
        source = inspect.getsource(code)
        if verbatim:
            source = "\n".join(line.rstrip() for line in source.splitlines())
        else:
            source = "".join(_without_comments(textwrap.dedent(source)).split())
    except (OSError, TypeError, SyntaxError, IndexError, tokenize.TokenError):
        return None
    return hashlib.sha256(source.encode()).hexdigest()


def _without_comments(source: str) -> str:
    """Of one function, and without its docstring."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    function = ast.parse(source).body[0]
    if isinstance(function, ast.FunctionDef) and ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        del lines[docstring.lineno - 1 : docstring.end_lineno]
    return "\n".join(lines)


def class_names(module: nn.Module) -> list[str]:
    """The qualified names of the module's class and all its bases."""
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]


def warn_once(message: str) -> None:
    """A warning at the first call with this message in the process; none while torch.compile traces."""
    if not torch.compiler.is_compiling() and message not in _warned:
        _warned.add(message)
        warnings.warn(f"retro_kernels.swap: {message}", stacklevel=3)
