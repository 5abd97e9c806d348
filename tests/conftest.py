"""What every test shares: Triton's interpreter where there is no GPU, a fixed seed, and one thread."""

from __future__ import annotations

import os
import sys

import torch

# Read when the kernels are decorated, so it must be set before retro_kernels is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import interpreter
import pytest

# What `interpreter.quicken` replaced, for its own test.
REPLACED = interpreter.quicken() if os.environ.get("TRITON_INTERPRET") == "1" else []


# What `make test` leaves to `make slow`: half a minute and more each where others use the machine too.
SLOW = (
    "test_on_ray_a_worker_that_dies",  # the local pool's worker dies in its own test
    "test_any_order_of_warps_and_boxes_gives_the_same_gradients",  # the forward's order is shuffled in its own test
    "test_blocks_that_share_states_give_what_each_gives_alone[8-",  # one of three stays
    "test_cuda_sm90.py::test_gradients_in_fp16",  # bf16's stay
    "test_compiles_whole_with_a_dynamic_length[triton",  # the reference and the CPU stay
    "test_the_readmes_way_runs_as_written",  # test_five_commands.py runs the same commands on fewer texts
    "test_func.py::test_gradients_are_those_of_autograd_and_of_the_reference[triton",  # the CPU stays
    "test_twice_the_same_is_bitwise_the_same[triton",  # the CPU stays, and the interpreter runs in one order
    "test_what_is_not_attended_reaches_nothing[triton-inf",  # NaN stays
    "test_faiss_finds_what_brute_force_finds[OPQ8",  # the other indexes stay
)


@pytest.hookimpl(tryfirst=True)  # before `-m` looks
def pytest_collection_modifyitems(items):
    for item in items:
        if any(name in item.nodeid for name in SLOW):
            item.add_marker(pytest.mark.slow)


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
