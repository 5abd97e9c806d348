"""Modules that are imported when they are first asked for anything: Triton and the kernels written in it take ten times
as long to import as all else here, and no call on a CPU needs them."""

from __future__ import annotations

import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any

_lock = threading.RLock()  # one for all: two modules that import each other must not wait for each other
_running: set[str] = set()


class _Later(ModuleType):
    """A module whose code has not run. Whatever is asked of it runs the code, and turns it into a plain module."""

    def __getattribute__(self, attribute: str) -> Any:
        if attribute not in ("__spec__", "__class__", "__dict__", "__file__", "__name__"):  # which imports ask for
            _execute(self)
        return ModuleType.__getattribute__(self, attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        if attribute != "__class__":
            _execute(self)
        ModuleType.__setattr__(self, attribute, value)


def _execute(module: ModuleType) -> None:
    spec = module.__spec__
    assert spec is not None
    assert spec.loader is not None
    with _lock:
        if type(module) is not _Later or spec.name in _running:  # another thread was first, or its own code asks
            return
        _running.add(spec.name)
        try:
            spec.loader.exec_module(module)
            module.__class__ = ModuleType  # type: ignore[assignment]
        finally:
            _running.discard(spec.name)


def import_later(package: str, name: str) -> Any:
    """The submodule `package.name`, imported when it is first used."""
    full = f"{package}.{name}"
    if full in sys.modules:
        return sys.modules[full]
    spec = importlib.util.find_spec(full)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {full!r}", name=full)
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Later
    sys.modules[full] = module
    vars(sys.modules[package])[name] = module
    return module
