"""One of two processes that train a retrofitted decoder together: python retrofit_processes.py FOLDER RANK."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from decoders import SETTINGS, batch, decoder

import retro_kernels as rk

WAYS = ("ddp", "fsdp")


def train(way: str, rows: slice) -> dict[str, torch.Tensor]:
    """What is added after three updates of gates and maps on these rows of a batch."""
    model = decoder()
    rk.retrofit(model, gate=0.0, adapt=True, **SETTINGS)
    wrapped = model
    if way == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    elif way == "fsdp":
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            dist.fsdp.fully_shard(layer, mesh=mesh)
        dist.fsdp.fully_shard(model, mesh=mesh)
    optimiser = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], 0.1)
    ids, neighbours, mask = (x[rows] for x in batch(4))
    for _ in range(3):
        optimiser.zero_grad()
        wrapped(ids, neighbours=neighbours, neighbour_mask=mask, labels=ids).loss.backward()
        optimiser.step()
    added = model.retro.added()
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in added.items()}


if __name__ == "__main__":
    folder, rank = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {way: train(way, slice(2 * rank, 2 * rank + 2)) for way in WAYS}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()
