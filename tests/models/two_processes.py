"""What tests run as each of two processes over gloo, into the folder given:

python two_processes.py RANK FOLDER train        DDP, FSDP2, context and tensor parallelism through the Trainer
python two_processes.py RANK FOLDER gradients    loss and gradients of a divided model, once; rank 0 writes them
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from models_common import batch, tiny
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from training_common import COMPARABLE, settings, stream_of

from retro_kernels.models.parallel import divide_projections, divide_rows
from retro_kernels.models.training import Trainer
from retro_kernels.ops.dropout import draw_seed

RUNS = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "context-ddp": {"context_parallel": 2},
    "context-fsdp": {"context_parallel": 2, "parallel": "fsdp"},
    "tensor": {"tensor_parallel": 2},
}
DIVIDED = {
    "tiny": {},
    "one-chunk-each": {"chunk_size": 8},
    "tiny-rotary": {"preset": "tiny-rotary"},  # one key head on two processes
    "tiny-rotary-two": {"preset": "tiny-rotary", "num_kv_heads": 2},
}


def example(name: str):
    """-> a model whose every parameter is random, and its batch, the same on every process."""
    torch.manual_seed(0)
    model = tiny(**DIVIDED[name])
    tokens, neighbours, mask = batch(model, n=16)
    return model, (tokens, tokens.roll(-1, 1), neighbours, mask)


def train(folder: Path) -> None:
    stream = stream_of(folder / "data", write=False)
    for name, kind in RUNS.items():
        for steps in (2, 4):  # the second takes up the first's checkpoint; both updates of the first are warm-up
            options = settings(folder / name, steps=steps, micro_batch_size=1, **kind, **COMPARABLE)
            Trainer(stream.config, stream, options, held_out=stream, say=lambda text: None).run()


def gradients(folder: Path, rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for name in DIVIDED:
        for kind in ("context", "context-checkpointed", "tensor"):
            model, inputs = example(name)
            if kind == "tensor":
                if name == "tiny-rotary":
                    continue  # one key head is not divided
                divide_projections(model, mesh)
            else:
                divide_rows(model, mesh.get_group())
                inputs = [x.chunk(2, dim=1)[rank] for x in inputs]
                model.activation_checkpointing = kind != "context"
            loss = model.loss(*inputs, reduction="sum")
            loss.backward()
            found = {"loss": loss.detach()}
            for key, parameter in model.named_parameters():
                gradient = parameter.grad
                found[key] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            if kind != "tensor":
                for x in found.values():
                    dist.all_reduce(x)
            if rank == 0:
                save_file({key: x.contiguous() for key, x in found.items()}, folder / f"{kind}.{name}.safetensors")


def seeds(folder: Path, rank: int) -> None:
    """What decides attention dropout, and all other, on a process that holds half the heads."""
    model, _ = example("tiny")
    divide_projections(model, init_device_mesh("cpu", (2,)))
    torch.manual_seed(1)
    save_file({"attention": draw_seed(torch.device("cpu")), "other": torch.rand(1)}, folder / f"seeds.{rank}")


def main(rank: int, folder: Path, what: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    if what == "train":
        train(folder)
    else:
        gradients(folder, rank)
        seeds(folder, rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
