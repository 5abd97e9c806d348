"""For the tests of every operation: the CUDA kernels in the emulator (csrc/cuda/emulator), and guard bands."""

from __future__ import annotations

import emulator
import pytest

from retro_kernels import cuda_extension, testing
from retro_kernels.ops import memory as common


@pytest.fixture(scope="session")
def emulator_library():
    """The CUDA kernels compiled for the emulator."""
    if emulator.compiler() is None or not emulator.SOURCES.exists():
        pytest.skip("there is no C++ compiler, or this is not a source tree")
    return emulator.build()


@pytest.fixture
def emulated(emulator_library):
    """Within the test backend="cuda" takes CPU tensors."""
    cuda_extension.emulate(emulator_library)
    yield
    cuda_extension.emulate(None)


@pytest.fixture
def guarded(monkeypatch):
    """Outputs and scratch are filled with NaN and lie between guard bands, which must be untouched afterwards. (By
    monkeypatch, because tests replace `allocate` with it too: whatever undoes both must do it in order.)"""
    bands = testing.Bands()
    monkeypatch.setattr(common, "allocate", bands.allocate)
    yield
    bands.check()
