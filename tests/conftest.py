"""What every test shares: Triton's interpreter where there is no GPU, a fixed seed, and one thread."""

from __future__ import annotations

import os
import sys

import torch

# Read when the kernels are decorated, so it must be set before retro_kernels is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread():
    """The problems here are so small that a second thread only waits. (The tests of threading set their own.)"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_backend_from_the_environment(monkeypatch):
    monkeypatch.delenv("RETRO_KERNELS_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def _no_plans_of_another_test():
    """A call like one of an earlier test is checked anew: this one may have changed what it would find."""
    plans = sys.modules.get("retro_kernels.ops.plans")
    if plans is not None:
        plans._plans.clear()
