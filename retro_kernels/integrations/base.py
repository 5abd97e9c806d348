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
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any, Protocol

import torch
from torch import nn

from ..ops.verification.classes import Class
from .tensors import plain_name

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


def is_changed(part: nn.Module, kind: type[nn.Module] | None = None) -> bool:
    """Whether a part that a fused forward bypasses may do something else than what that stands for: hooks, a forward of
    its own, or another class than `kind`."""
    return has_hooks(part) or "forward" in vars(part) or kind not in (None, type(part))


def describe_additions(model: nn.Module) -> str | None:
    """What some part of a model computes that its weights do not tell, or None. What hooks do cannot be known, so a
    warning names them."""
    hooked = []
    for name, part in model.named_modules():
        if "torch._dynamo.eval_frame.OptimizedModule" in class_names(part):
            continue
        if not isinstance(vars(part).get("forward"), (FusedForward, type(None))):
            return f"something else has replaced forward on {name or 'it'}"
        theirs = [kind for kind in type(part).__mro__ if kind.__module__.startswith("torch.nn.modules.")][:-1]
        if theirs and getattr(type(part), "forward", None) is not getattr(theirs[0], "forward", None):
            return f"{name} is a {type(part).__qualname__}, a {theirs[0].__name__} with a forward of its own"
        hooks = [hook for kind in HOOKS for hook in getattr(part, kind).values()]
        if any(not str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks):
            hooked.append(name or "the model itself")
    if hooked:
        shown = ", ".join(hooked[:5]) + (f" and {len(hooked) - 5} more" if len(hooked) > 5 else "")
        warnings.warn(f"source: hooks on {shown} are left out: a Retro computes what the weights tell", stacklevel=4)
    return None


def describe_unevenness(model: nn.Module, common: Mapping[str, str]) -> str | None:
    """Two parts with other settings where a config has one for both, or None.

    Args:
        common: attribute -> what has one value of it: "model"; "half" (encoder and decoder each); in a half each
            "class"; or in a half the parts of each "holder", a class.
    """
    seen: dict[tuple[str, ...], tuple[str, Any]] = {}
    parts = dict(model.named_modules())
    for name, part in parts.items():
        half, kind = str(plain_name(name).startswith("encoder.")), type(part).__name__
        holder = type(parts[name.rpartition(".")[0]]).__name__
        for attribute, scope in common.items():
            if not isinstance(vars(part).get(attribute), (int, float)):
                continue
            value = vars(part)[attribute]
            within = {"model": (), "half": (half,), "class": (half, kind), "holder": (half, holder)}[scope]
            first, other = seen.setdefault((attribute, *within), (name, value))
            if other != value:
                return f"{attribute} is {value!r} in {name} and {other!r} in {first or 'it'}, and a Retro has one"
    return None


def describe_change(
    name: str, function: Any, known: str | Sequence[str] | None, version: str, *, verbatim: bool = False
) -> str | None:
    """Why a function is not known to compute what the sources do whose `digest` is (among) `known`; None if it is."""
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return f"{name} is no Python function, so it cannot be checked against {version}"
    found = digest(code, verbatim)
    if found is None:
        return f"the source of {name} cannot be read, so it cannot be checked against {version}"
    if found not in ([known] if isinstance(known, str) else known or ()):
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


def kind_of(
    module: nn.Module, homes: Sequence[str], known: Mapping[str, str | Sequence[str]], *, verbatim: bool = False
) -> str | None:
    """The name of a peer's class that the module is of, or derives from; None if of none.

    Args:
        homes: where its classes are, such as "retro_pytorch.retro_pytorch.".
        known: "Name.forward" -> the `digest` of its source. A class of that name and source is the peer's, wherever it
            is: people copy files.
    """
    for kind in type(module).__mro__:
        name = f"{kind.__module__}.{kind.__qualname__}"
        for home in homes:
            if name.startswith(home):
                return name.removeprefix(home)
        source = known.get(f"{kind.__qualname__}.forward")
        forward = vars(kind).get("forward")
        if source is not None and describe_change("", forward, source, "", verbatim=verbatim) is None:
            return kind.__qualname__
    return None


def is_foreign(module: nn.Module, homes: tuple[str, ...] = ("torch.",)) -> bool:
    """Whether its class's forward comes from elsewhere than from Python modules whose names begin so."""
    kind = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    return not kind.__module__.startswith(homes)


def class_names(module: nn.Module) -> list[str]:
    """The qualified names of the module's class and all its bases."""
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]


def warn_once(message: str) -> None:
    """A warning at the first call with this message in the process; none while torch.compile traces."""
    if not torch.compiler.is_compiling() and message not in _warned:
        _warned.add(message)
        warnings.warn(f"retro_kernels.swap: {message}", stacklevel=3)
