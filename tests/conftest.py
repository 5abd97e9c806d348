"""What every test shares: Triton's interpreter where there is no GPU, a fixed seed, and one thread pool of two."""

from __future__ import annotations

import os

import torch

# Read when the kernels are decorated, so it must be set before retro_kernels is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_backend_from_the_environment(monkeypatch):
    monkeypatch.delenv("RETRO_KERNELS_BACKEND", raising=False)
