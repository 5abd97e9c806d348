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

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.quicken()


# Cases of the emulated kernels whose every option another case of theirs has.
FOUND_IN_OTHERS = (
    "grouped",
    "self",
    "self, odd",
    "self, grouped",
    "cross",
    "cross, many neighbours",
    "cross, grouped",
)
# What `make test` leaves to `make slow`: what takes long and is shown by another test as well.
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
    "test_compiles_whole_with_a_dynamic_length[reference-end",  # the CPU's stays
    "nn/test_chunked_cross_attention.py::test_compiles_in_one_graph_for_any_length",  # the operation's stays
    "test_neighbour_encoder.py::test_compiles_in_one_graph[retro_pytorch",  # the paper's stays
    "test_neighbour_encoder.py::test_compiles_in_one_graph[norlund",
    "test_fp32_is_tight[triton-self_very_long",  # self_long stays
    "test_fp32_is_tight[triton-dropout_all",  # relative_all and dropout_odd stay
    "test_half_precision_is_within_twice_the_error_of_pytorch[triton-everything-fp16",  # fp32's stays
    "test_triton_is_traced_whole_on_a_cuda_device",  # the default call is traced in its own test
    "test_a_model_with_dropout_trains_alike[reference",  # the CPU's stays
    "test_casts_autocast_checkpointing_and_compile[reference",
    "test_a_file_compiled_anew_costs_what_the_table_says",  # the table's hash is tested
    "test_sm_89_has_sm_86s_ptx",  # so is this table's
    "test_a_broken_package_is_reported[faiss",  # torch and triton stay
    "test_a_broken_package_is_reported[retro_kernels/nn",  # the extensions stay
    *(f"test_logits_and_gradients_of_random_models_and_back[{block}" for block in range(3, 10)),  # 30 of 100 stay
    *(f"test_cuda_sm90.py::test_gradients_are_within_twice_the_error_of_pytorch[{name}]" for name in FOUND_IN_OTHERS),
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
