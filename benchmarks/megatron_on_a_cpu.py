"""Megatron-core in one process on a CPU. It is written for GPUs and for Transformer Engine; these stand in for both."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from unittest import mock

import torch


@contextlib.contextmanager
def megatron_on_a_cpu() -> Iterator[None]:
    """Within it modules of Megatron-core are built and run, in fp32 or fp64."""
    import megatron.core.utils
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
    from packaging.version import Version

    with contextlib.ExitStack() as stack:
        for change in (
            mock.patch.dict("os.environ", {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0"}),
            mock.patch.object(megatron.core.utils, "get_te_version", return_value=Version("1.0")),
            mock.patch.object(torch.cuda, "current_device", return_value="cpu"),
            mock.patch.object(get_cuda_rng_tracker(), "fork", side_effect=lambda *_, **__: contextlib.nullcontext()),
        ):
            stack.enter_context(change)
        store = stack.enter_context(tempfile.TemporaryDirectory())
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}/store", rank=0, world_size=1)
        stack.callback(torch.distributed.destroy_process_group)
        parallel_state.initialize_model_parallel(1, 1)
        stack.callback(parallel_state.destroy_model_parallel)
        yield
