"""Checkpoints that Megatron-LM's own training code saves, and the listing of them that a test holds.

    git clone https://github.com/NVIDIA/Megatron-LM clone
    python -m benchmarks.megatron_checkpoints clone folder    # the checkpoints, and folder/megatron_checkpoints.json

Megatron wants GPUs, Apex and Transformer Engine. On a CPU its arguments, models, `train_step` and `save_checkpoint` run
as they are, in a process each, with stand-ins: torch's generator and device for CUDA's, gloo for NCCL, PyTorch's layers
for Apex's and for the four of Transformer Engine that a RETRO has, random tokens for data. After three steps `noise`
takes the place of the weights, so that a test can write the same ones.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import inspect
import io
import json
import os
import re
import subprocess
import sys
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

M, K, N, VOCABULARY = 4, 2, 16, 60  # a chunk, its neighbours of two chunks, a sequence, tokens
SHAPE = "--num-layers 6 --hidden-size 32 --num-attention-heads 4 --micro-batch-size 2 --make-vocab-size-divisible-by 8"
PLAIN = (
    "--lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --save-interval 1 --use-cpu-initialization "
    "--distributed-backend gloo --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-dropout-fusion "
    "--attention-dropout 0 --hidden-dropout 0 --retro-encoder-hidden-dropout 0 --retro-encoder-attention-dropout 0"
)
RECIPE = (
    "--apply-layernorm-1p --untie-embeddings-and-output-weights --disable-bias-linear --swiglu --rotary-percent 0.5"
)
ROTARY = "--no-position-embedding --use-rotary-position-embeddings"
CHECKPOINTS = {
    "legacy, recipe": ("InstructRetro", f"{RECIPE} {ROTARY}", (16, 13, 3)),
    "legacy, gate 0.5": ("InstructRetro", f"{RECIPE} {ROTARY} --retro-attention-gate 0.5", (16, 13, 3)),
    "legacy, biases": ("InstructRetro", "", (16, 13, 3)),
    "legacy, May 2023": ("6dba84b1f0", f"{RECIPE} {ROTARY}", (16, 12, 4)),  # it raises for a chunk that is not whole
    "core": (
        "core_v0.15.3",
        f"{RECIPE} --position-embedding-type rope --no-rope-fusion --retro-attention-gate 0 --ckpt-format torch "
        "--attention-backend unfused",
        (16, 13, 3),
    ),
}
OF_THE_MODEL = re.compile(
    "retro|rot|rope|position|norm|bias|swiglu|gelu|squared|attention|dropout|hidden|layers|heads|channels|groups|"
    "parallel_size|vocab_size|seq_length|experts|latent|softmax|window|glu|residual|scaling|interpol|untie"
)


def noise(name: str, shape: Any, centre: float) -> torch.Tensor:
    """Weights that any machine makes of a tensor's name: round `centre` for a norm's, round 0 for others."""
    steps = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    x = torch.sin(steps * 12.9898 + zlib.crc32(name.encode()) % 997) * 43758.5453
    x = 2 * (x - x.floor()) - 1
    x = centre + 0.1 * x if name.endswith("weight") and len(shape) == 1 else 0.2 * x
    return x.float().view(*shape)


class Blank(types.ModuleType):
    """A module that has whatever is asked for: an empty layer, or a module of that name."""

    __version__ = "1.7.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.islower():
            return importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, type(name, (nn.Module,), {}))
        return vars(self)[name]


class Blanks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in ("transformer_engine", "transformers", "torchvision", "h5py", "faiss", "apex"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return Blank(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class Stated(nn.Module):
    """Transformer Engine saves bytes with each layer."""

    def get_extra_state(self) -> io.BytesIO:
        return io.BytesIO(b"fp8")

    def set_extra_state(self, state: Any) -> None:
        pass


class Linear(Stated):
    def __init__(
        self, in_features, out_features, *, init_method, bias=True, return_bias=False, parallel_mode=None, **_
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        init_method(self.weight)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.return_bias, self.use_bias, self.parallel_mode = return_bias, bias, parallel_mode

    def forward(self, x, is_first_microbatch=None):
        if self.return_bias:
            return F.linear(x, self.weight), self.bias
        return F.linear(x, self.weight, self.bias)


class LayerNorm(Stated):
    def __init__(self, hidden_size, eps=1e-5, zero_centered_gamma=False, **_):
        super().__init__()
        self.eps, self.shift = eps, float(zero_centered_gamma)
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - self.shift))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight + self.shift, self.bias, self.eps)


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, *, eps=1e-5, zero_centered_gamma=False, **options):
        super().__init__(in_features, out_features, **options)
        self.eps, self.shift = eps, float(zero_centered_gamma)
        self.layer_norm_weight = nn.Parameter(torch.full((in_features,), 1.0 - self.shift))
        self.layer_norm_bias = nn.Parameter(torch.zeros(in_features))

    def forward(self, x, is_first_microbatch=None):
        weight = self.layer_norm_weight + self.shift
        return super().forward(F.layer_norm(x, x.shape[-1:], weight, self.layer_norm_bias, self.eps))


class DotProductAttention(Stated):
    qkv_format = "sbhd"

    def __init__(self, *_, **__):
        super().__init__()

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, **_):
        heads = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return (
            F.scaled_dot_product_attention(*heads, is_causal=attn_mask_type == "causal").permute(2, 0, 1, 3).flatten(2)
        )


class FusedAdam(torch.optim.Optimizer):
    """With Apex's state: the steps are counted by group."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **_):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            first, second = group["betas"]
            for x in group["params"]:
                state = self.state[x]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(x), "exp_avg_sq": torch.zeros_like(x)}
                state["exp_avg"].lerp_(x.grad, 1 - first)
                state["exp_avg_sq"].lerp_(x.grad**2, 1 - second)
                spread = (state["exp_avg_sq"] / (1 - second**step)).sqrt() + group["eps"]
                x.addcdiv_(state["exp_avg"] / (1 - first**step), spread, value=-group["lr"])


def stand_in() -> None:
    """For all that Megatron imports and asks of a GPU, until the process ends."""
    sys.meta_path.insert(0, Blanks())
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: Blank.__version__ if name == "transformer-engine" else version(name)

    def provide(module: str, **parts: Any) -> None:
        vars(importlib.import_module(module)).update(parts)

    def norm(tensors: list[list[torch.Tensor]]) -> tuple[torch.Tensor, None]:
        return torch.stack([x.norm() for x in tensors[0]]).norm()[None], None

    def scale(tensors: list[list[torch.Tensor]], by: float) -> None:
        for x, y in zip(*tensors):
            y.copy_(x * by)

    apply = {"multi_tensor_applier": lambda function, _, tensors, *more: function(tensors, *more[:1])}
    l2norm = {"multi_tensor_l2norm": lambda tensors, *_: norm(tensors), "multi_tensor_scale": scale}
    split = type("_SplitAlongDim", (), {"apply": staticmethod(lambda x, dim, sizes: torch.split(x, sizes, dim))})
    offload = {"get_cpu_offload_context": lambda *_, **__: (contextlib.nullcontext(), lambda x: x)}
    normed = staticmethod(lambda x, weight, bias, shape, eps: F.layer_norm(x, shape, weight, bias, eps))
    affine = {
        "fused_layer_norm_affine": normed,
        "FusedLayerNormAffineFunction": type("Function", (), {"apply": normed}),
    }
    layers = (Linear, LayerNorm, LayerNormLinear, DotProductAttention)
    provide("transformer_engine.pytorch", **{kind.__name__: kind for kind in layers})
    provide("transformer_engine.pytorch.attention", _SplitAlongDim=split)
    provide("transformer_engine.pytorch.cpu_offload", **offload)
    provide("transformer_engine.pytorch.optimizers", FusedAdam=FusedAdam, FusedSGD=torch.optim.SGD, **apply, **l2norm)
    provide("apex.optimizers", FusedAdam=FusedAdam, FusedSGD=torch.optim.SGD)
    provide("apex.multi_tensor_apply", **apply)
    provide("apex.normalization.fused_layer_norm", **affine)
    for name, parts in {
        "amp_C": l2norm,
        "fused_layer_norm_cuda": {},
        "pkg_resources": {"packaging": packaging()},
    }.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(parts)
    vars(importlib.import_module("numpy")).update(float=float, bool=bool, int=int)  # as of before NumPy 1.24

    def on_the_cpu(function: Any) -> Any:
        @functools.wraps(function)
        def called(*given: Any, **named: Any) -> Any:
            named |= {"device": "cpu"} if str(named.get("device")).startswith("cuda") else {}
            return function(*given, **named)

        return called

    for name in ("tensor", "zeros", "ones", "empty", "full", "arange"):
        setattr(torch, name, on_the_cpu(getattr(torch, name)))
    kind_of = torch.Tensor.type
    torch.Tensor.type = lambda x, *to: kind_of(x, *to) if to else kind_of(x).replace("torch.", "torch.cuda.")
    torch.Tensor.cuda = nn.Module.cuda = lambda x, *_, **__: x
    stream = types.SimpleNamespace(wait_stream=lambda _: None)
    facts = {
        "Stream": stream,
        "current_stream": stream,
        "stream": contextlib.nullcontext(),
        "is_available": True,
        "current_device": "cpu",
        "device_count": 1,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "manual_seed": None,
        "get_device_capability": (8, 0),
        "get_device_properties": types.SimpleNamespace(major=8, minor=0, total_memory=1, name="none"),
    }
    for name, value in facts.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    for place in (torch.cuda, torch.cuda.random):
        place.get_rng_state = lambda *_, **__: torch.get_rng_state()
    for name in ("LongTensor", "FloatTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "ByteTensor"):
        setattr(torch.cuda, name, getattr(torch, name))
    begin, group = torch.distributed.init_process_group, torch.distributed.new_group
    torch.distributed.init_process_group = lambda backend=None, device_id=None, **named: begin("gloo", **named)
    torch.distributed.new_group = lambda ranks=None, timeout=None, **_: group(ranks, timeout=timeout, backend="gloo")


def packaging() -> types.ModuleType:
    import packaging.version

    return packaging


def train(tree: Path, out: Path, options: list[str], lengths: list[int]) -> None:
    """Three steps, `noise`, a checkpoint in `out`, and out/cases.pt: tokens, neighbours, the saved model's logits."""
    sys.path.insert(0, str(tree))
    stand_in()
    core = (tree / "megatron" / "training").is_dir()
    retro = {
        "chunk_length": M,
        "seq_length": N,
        "data_path": ["x"],
        "tokenizer_type": "NullTokenizer",
        "split": "98,2,0",
    }
    retro |= {"eval_interval": 10, "eval_iters": 1, "global_batch_size": 2, "seed": 1234, "train_samples": 6}
    retro |= dict.fromkeys(("data_cache_path", "merge_file", "tokenizer_model", "vocab_file"))
    project = {f"retro_gpt_{name}": value for name, value in retro.items()}
    project |= {"retro_block_size": 100, "retro_neighbor_dirs": {}}
    project |= dict.fromkeys(("retro_bert_tokenizer_type", "retro_bert_vocab_file"))
    (out / "query").mkdir(parents=True)
    for name in ("config.json", "args.json", "query/args.json"):
        (out / name).write_text(json.dumps(project))
    sys.argv = [
        "pretrain_retro.py",
        *SHAPE.split(),
        *PLAIN.split(),
        *options,
        "--save",
        str(out),
        "--retro-add-retriever",
    ]
    sys.argv += ["--vocab-size", str(VOCABULARY), "--retro-num-neighbors", str(K)]
    if core:
        sys.argv += ["--retro-project-dir", str(out)]
    else:
        sys.argv += f"--retro-workdir {out} --tokenizer-type NullTokenizer --train-iters 3".split()
        sys.argv += f"--seq-length {N} --max-position-embeddings {N} --no-async-tensor-model-parallel-allreduce".split()
    start, training, saving, utils, root = (
        importlib.import_module(f"megatron.{'training.' if core else ''}{name}".rstrip("."))
        for name in ("initialize", "training", "checkpointing", "utils", "")
    )
    importlib.import_module("megatron.core.tensor_parallel.random")._set_cuda_rng_state = lambda state, *_, **__: (
        torch.set_rng_state(state)
    )
    pretrain = importlib.import_module("pretrain_retro")
    start._compile_dependencies = lambda: None
    start.initialize_megatron(args_defaults={"tokenizer_type": "NullTokenizer"})
    args = root.get_args()
    kind = importlib.import_module("megatron.core.enums").ModelType.retro_decoder
    model, optimizer, scheduler = training.setup_model_and_optimizer(pretrain.model_provider, kind)
    generator = torch.Generator().manual_seed(0)

    def draw(n: int, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = (2, chunks, K, 2 * M)
        return tuple(torch.randint(VOCABULARY, x, generator=generator) for x in ((2, n), size))

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield dict(zip(("text", "neighbor_tokens"), draw(N + 1, N // M)))

    data: Any = batches()
    named = inspect.signature(training.train_step).parameters
    more: dict[str, Any] = {}
    if "config" in named:
        more["config"] = importlib.import_module("megatron.core.utils").get_model_config(model[0])
    if core:
        data = importlib.import_module("megatron.core.rerun_state_machine").RerunDataIterator(data)
        pipeline = importlib.import_module("megatron.core.pipeline_parallel")
        more["forward_backward_func"] = pipeline.get_forward_backward_func()
        own = pretrain.get_ltor_masks_and_position_ids  # which 0.15.3's pretrain_retro.py calls as it was before
        pretrain.get_ltor_masks_and_position_ids = lambda tokens, end, *given: own(tokens, end, -1, *given, False)
    for part in model:
        part.train()
    for step in range(3):
        print(training.train_step(pretrain.forward_step, data, model, optimizer, scheduler, **more)[0])
        args.iteration = step + 1
    net = utils.unwrap_model(model)[0].eval()
    with torch.no_grad():
        for name, x in net.named_parameters():
            x.copy_(noise(name.removeprefix("module."), tuple(x.shape), 0.0 if args.apply_layernorm_1p else 1.0))
    saving.save_checkpoint(3, model, optimizer, scheduler, *([0] if core else []))
    cases = []
    names = [f"{'context' if core else 'retriever'}_{x}" for x in ("input_ids", "position_ids")]
    for n in lengths:
        tokens, neighbours = draw(n, -(-n // M))
        if not core:  # there a model has one length
            next(x for x in net.modules() if hasattr(x, "encoder") and hasattr(x, "embedding")).seq_length = n
        context = neighbours.flatten(0, 2)
        mask = torch.ones(1, 1, n, n, dtype=torch.bool).triu(1)
        given = dict(zip(names, (context, torch.arange(2 * M).expand_as(context))))
        with torch.no_grad():
            cases.append((tokens, neighbours, net(tokens, torch.arange(n).expand(2, n), mask, **given)))
    torch.save(cases, out / "cases.pt")


class Seen:
    """An object of a class that the file names, as text."""

    name = ""

    def __new__(cls, *given: Any) -> Seen:
        made = super().__new__(cls)
        made.text = f"{cls.name}({', '.join(map(repr, given)) if 'BytesIO' not in cls.name else ''})"
        return made

    def __setstate__(self, _: Any) -> None:
        pass


def listing(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds, without the weights."""
    file = folder / "iter_0000003" / "mp_rank_00" / "model_optim_rng.pt"
    classes = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    known = [(type("Seen", (Seen,), {"name": name}), name) for name in classes if name != "argparse.Namespace"]
    with torch.serialization.safe_globals([argparse.Namespace, *known]):
        held = torch.load(file, weights_only=True)
    plain, other = {}, {}
    for name, value in vars(held["args"]).items():
        if not isinstance(value, (bool, int, float, str, type(None))):
            other[name] = getattr(value, "text", None) or (str(value) if isinstance(value, torch.dtype) else value)
        elif OF_THE_MODEL.search(name):
            plain[name] = value
    arguments = {"arguments": plain, "other arguments": other}
    arguments = json.loads(json.dumps(arguments).replace(str(folder), "..."))
    cases = [
        {"tokens": tokens.tolist(), "neighbours": neighbours.tolist(), "logits": rounded(logits[..., ::16].tolist())}
        for tokens, neighbours, logits in torch.load(folder / "cases.pt")
    ]
    return {"classes": classes, "keys": list(held), **arguments, "tensors": shapes(held["model"]), "cases": cases}


def rounded(tree: Any) -> Any:
    return [rounded(x) for x in tree] if isinstance(tree, list) else round(tree, 6)


def shapes(tree: dict[str, Any]) -> dict[str, Any]:
    """Path -> shape, or what is no tensor as text; one path with "0-4" for the same in layers 0 to 4."""
    found: dict[str, Any] = {}

    def walk(tree: dict[str, Any], start: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{start}{key}/")
            else:
                found[f"{start}{key}"] = (
                    list(value.shape) if isinstance(value, torch.Tensor) else str(getattr(value, "text", value))
                )

    walk(tree, "")
    runs: dict[tuple[str, str, str], list[int]] = {}
    for path in found:
        start, _, rest = path.partition("layers.")
        number, _, rest = rest.partition(".")
        runs.setdefault((start, rest, str(found[path])), []).append(int(number or -1))
    joined = {}
    for (start, rest, _), numbers in runs.items():
        first, last = numbers[0], numbers[-1]
        assert numbers == list(range(first, last + 1)), rest
        middle = "" if first < 0 else f"layers.{first}." if first == last else f"layers.{first}-{last}."
        joined[f"{start}{middle}{rest}"] = found[f"{start}layers.{first}.{rest}" if middle else start]
    return joined


def written(found: dict[str, Any]) -> str:
    """As JSON, with a line for each part of each."""
    parts = {
        title: ",\n".join(f"  {json.dumps(x)}: {json.dumps(y, separators=(',', ':'))}" for x, y in entry.items())
        for title, entry in found.items()
    }
    return "{\n" + ",\n".join(f" {json.dumps(title)}: {{\n{lines}\n }}" for title, lines in parts.items()) + "\n}\n"


def main() -> None:
    if sys.argv[1] == "--train":
        tree, out, lengths, *options = sys.argv[2:]
        train(Path(tree), Path(out), options, [int(n) for n in lengths.split(",")])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="of github.com/NVIDIA/Megatron-LM, with its history")
    parser.add_argument("folder", type=Path, help="for the checkpoints")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513"}
    alone |= {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    alone |= {"TORCHDYNAMO_DISABLE": "1", "PYTORCH_JIT": "0"}
    for title, (commit, options, lengths) in CHECKPOINTS.items():
        tree, out = (given.folder.resolve() / x for x in (commit, title.replace(", ", "-").replace(" ", "-")))
        if not tree.exists():
            tree.mkdir(parents=True)
            packed = subprocess.run(["git", "-C", given.clone, "archive", commit], check=True, capture_output=True)
            subprocess.run(["tar", "x", "-C", tree], input=packed.stdout, check=True)
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.megatron_checkpoints",
            "--train",
            str(tree),
            str(out),
        ]
        command += [",".join(map(str, lengths)), *options.split()]
        subprocess.run(command, check=True, env={**os.environ, **alone})
        entry = {"commit": commit, **listing(out)}
        base = found.get("legacy, recipe") if commit == "InstructRetro" else None
        if base is not None:
            own, other = entry["arguments"], base["arguments"]
            entry["arguments"] = {"base": "legacy, recipe", **{x: own[x] for x in own if own[x] != other[x]}}
        found[title] = entry
    (given.folder / "megatron_checkpoints.json").write_text(written(found))


if __name__ == "__main__":
    main()
