"""For the GPU suite, `pytest -m gpu` on a machine with a GPU. Without one the same tests run reduced, on the CPU's
kernels (gpu_problems.py)."""

from __future__ import annotations

import gpu_problems
import pytest

import retro_kernels as rk


@pytest.fixture(params=gpu_problems.targets(), ids=str)
def target(request):
    """Whose kernels the test is for."""
    status = rk.backends()[request.param.backend]
    if not status.available:
        pytest.skip(f"{request.param.backend}: {status.reason}")
    return request.param
