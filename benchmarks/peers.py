"""Peers that cannot be imported as they are on a machine without a GPU, with stand-ins for what they want. What
their attentions compute is their own."""

from __future__ import annotations

import contextlib
import enum
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

FLAMINGO = {"open_flamingo": "src/helpers.py", "flamingo_pytorch": "flamingo_pytorch.py"}
NEMO = "nemo.collections.nlp.modules.common.megatron"


@contextlib.contextmanager
def megatron() -> Iterator[None]:
    """Within it modules of Megatron-core are built and run in one process on a CPU, in fp32 or fp64. It is written for
    GPUs and for Transformer Engine; these stand in for both."""
    import megatron.core.utils
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
    from packaging.version import Version

    installed = importlib.metadata.distribution

    def distribution(name: str) -> Any:
        return types.SimpleNamespace(version="1.0") if name == "transformer-engine" else installed(name)

    with contextlib.ExitStack() as stack:
        for change in (
            mock.patch.dict("os.environ", {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0"}),
            mock.patch.object(importlib.metadata, "distribution", distribution),  # to 0.8.0
            mock.patch.object(megatron.core.utils, "get_te_version", create=True, return_value=Version("1.0")),
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


@contextlib.contextmanager
def flamingo(package: str) -> Iterator[Any]:
    """-> the file of `package`, one of FLAMINGO, that has `MaskedCrossAttention`. The packages import vision models.
    Raises ImportError where it is not installed."""
    name = f"{package}.{FLAMINGO[package].removesuffix('.py').replace('/', '.')}"
    path = _folder(package) / FLAMINGO[package]
    with _kept(name):
        yield _load(name, path)


@contextlib.contextmanager
def norlund() -> Iterator[Any]:
    """-> the file of Norlund's model, which is in no package: NORLUND names src/modeling_retro.py of a clone. A
    transformers of 2022 is stood in for. Raises ImportError where there is none."""
    path = os.environ.get("NORLUND")
    if path is None:
        raise ImportError("NORLUND names no modeling_retro.py of a clone")
    generation, retrieval = "transformers.generation_utils", "retrieval"
    with _kept(generation, retrieval, "modeling_retro"):
        sys.modules[generation] = _module(generation, GenerationMixin=object)
        sys.modules[retrieval] = _module(retrieval, Retriever=object, DummyRetriever=object)
        yield _load("modeling_retro", Path(path))


class Linear(nn.Linear):
    """Megatron's parallel layers, of one process: the output with its bias, or the bias beside it."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, skip_bias_add: bool = False, **_: Any) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.skip = skip_bias_add

    def forward(self, x):
        out = nn.functional.linear(x, self.weight, None if self.skip else self.bias)
        return out, self.bias if self.skip else None


class Softmax(nn.Module):
    """Apex's, by what it computes."""

    def __init__(self, fp16, bf16, kind, fusion, mask_func, in_fp32, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x, mask):
        x = x * (self.scale or 1.0)
        return x.masked_fill(mask, -10000.0).softmax(-1) * ~mask.all(-1, keepdim=True)


class Base(nn.Module):
    def __init__(self, config=None):
        super().__init__()


class Adapters:
    def set_accepted_adapter_types(self, _):
        pass

    def is_adapter_available(self):
        return False


class Anything(types.ModuleType):
    """A module that has a class of every name."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"_target_": name})


@contextlib.contextmanager
def nemo() -> Iterator[tuple[Any, Any]]:
    """-> NeMo's files of its attention and of its rotary positions. Apex, Megatron's parallel layers (of one process)
    and adapters are stood in for. Raises ImportError where NeMo is not installed."""
    folder = _folder("nemo").parent.joinpath(*NEMO.split("."))
    kinds = {name: enum.Enum(name, "self_attn cross_attn padding causal") for name in ("AttnType", "AttnMaskType")}
    split = types.SimpleNamespace(
        ColumnParallelLinear=Linear,
        RowParallelLinear=Linear,
        split_tensor_along_last_dim=lambda x, parts, contiguous_split_chunks: x.chunk(parts, -1),
        random=types.SimpleNamespace(get_cuda_rng_tracker=lambda: types.SimpleNamespace(fork=contextlib.nullcontext)),
    )
    one = {"get_tensor_model_parallel_world_size": lambda: 1, "get_tensor_model_parallel_rank": lambda: 0}
    given: dict[str, dict[str, Any]] = {
        "apex.transformer.enums": kinds,
        "apex.transformer.utils": {"divide": lambda x, y: x // y},
        "megatron.core": {"tensor_parallel": split, "parallel_state": types.SimpleNamespace(**one)},
        "nemo.core": {"adapter_mixins": types.SimpleNamespace(AdapterModuleMixin=Adapters)},
        f"{NEMO}.module": {"MegatronModule": Base},
        f"{NEMO}.fused_softmax": {"MatchedScaleMaskSoftmax": Softmax},
        f"{NEMO}.adapters.parallel_adapters": {},
        f"{NEMO}.position_embedding": {},
        f"{NEMO}.utils": {},
    }
    parents = {name: [name.rsplit(".", i)[0] for i in range(name.count("."), -1, -1)] for name in given}
    loaded = [f"{NEMO}.attention", f"{NEMO}.position_embedding.rotary_position_embedding"]
    with _kept(*{stem for stems in parents.values() for stem in stems}, *loaded):
        for name, parts in given.items():
            for stem in parents[name]:
                if stem == name or not isinstance(sys.modules.get(stem), Anything):
                    sys.modules[stem] = Anything(stem)
                    sys.modules[stem].__path__ = []
            for part, value in parts.items():
                setattr(sys.modules[name], part, value)
        rotary = _load(loaded[1], folder / "position_embedding" / "rotary_position_embedding.py")
        yield _load(loaded[0], folder / "attention.py"), rotary


@contextlib.contextmanager
def _kept(*names: str) -> Iterator[None]:
    """Gives the modules of these names back afterwards. (`mock.patch.dict` would forget whatever else is imported.)"""
    before = {name: sys.modules.get(name) for name in names}
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ImportError(f"No module named {package!r}")
    return Path(found.origin).parent


def _load(name: str, path: Path) -> Any:
    """The file as the module of this name, without its package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _module(name: str, **parts: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(parts)
    return module
