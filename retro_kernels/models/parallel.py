"""A model on several processes: its rows of tokens divided (context parallelism), its projections and heads (tensor
parallelism), or the rows of a batch (DDP and FSDP2). All keep the parameters' names, so that checkpoints are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from ..nn import ChunkedCrossAttention, RelativePositions
from ..nn.context_parallel import ContextParallel
from ..nn.neighbour_encoder import FeedForward, NeighbourAttention
from ..nn.retro_decoder_block import CausalSelfAttention
from ..ops.dropout import set_stream
from .retro import Retro
from .training_config import TrainingConfig


def divide(
    loss: nn.Module, model: Retro, settings: TrainingConfig, device: torch.device, *, reads_neighbours: bool
) -> Any:
    """Divides the model of a module that computes its loss among all processes, as the settings say. -> what to call
    instead of that module.

    Raises ValueError for what the processes cannot divide.
    """
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    context, tensor = settings.context_parallel, settings.tensor_parallel
    gradients_meet = world > tensor
    if gradients_meet and tensor > 1 and settings.parallel != "fsdp":
        raise ValueError(
            f"parallel: got {settings.parallel!r} with tensor_parallel = {tensor} of {world} processes, expected "
            "'fsdp', which keeps parts of parameters"
        )
    wrapped: Any = loss
    if world > 1:
        sizes, names = (world // (context * tensor), context, tensor), ("replica", "context", "tensor")
        mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        if tensor > 1:
            divide_projections(model, mesh["tensor"])
        if context > 1:  # of the heads that are left to this process
            divide_rows(model, mesh.get_group("context"))
        if gradients_meet and settings.parallel == "fsdp":
            shards = mesh["replica", "context"]._flatten("shard")
            for part in (*model.blocks, *([model.encoder] if model.encoder is not None else [])):
                fully_shard(part, mesh=shards)
            fully_shard(wrapped, mesh=shards)
    if settings.compile:
        wrapped = torch.compile(wrapped)
    if gradients_meet and settings.parallel == "ddp":
        # Without neighbours the encoder is left out.
        unused = model.encoder is not None and not reads_neighbours
        wrapped = nn.parallel.DistributedDataParallel(wrapped, find_unused_parameters=unused)
    return wrapped


def exchange_gradients(wrapped: Any, yes: bool) -> None:
    """Says whether the next backward exchanges gradients. Once an update is enough: with its last micro-batch."""
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        wrapped.require_backward_grad_sync = yes
    elif hasattr(wrapped, "set_requires_gradient_sync"):
        wrapped.set_requires_gradient_sync(yes)


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that are divided among the same processes, or not at all, together: operations on lists of tensors
    take no others."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The Euclidean norm of all gradients, over all processes."""
    norms = [nn.utils.get_total_norm([p.grad for p in some if p.grad is not None]) for some in by_mesh(parameters)]
    return nn.utils.get_total_norm([x.full_tensor() if isinstance(x, DTensor) else x for x in norms])


def divide_rows(model: Retro, group: dist.ProcessGroup) -> None:
    """Divides rows among the group's processes: each gives the model the tokens, targets and neighbours of its part
    of every row, as many whole chunks as every other (see `ContextParallel`). A process's loss is that of its tokens;
    the sum of the processes' gradients is that of the whole rows.

    Raises ValueError where the processes cannot share the heads of the decoder's self-attention out.
    """
    if model.config.align != "start":
        raise ValueError(f'context_parallel: got a model with align="{model.config.align}", expected "start"')
    context = ContextParallel(group)
    for block in model.blocks:
        attention: CausalSelfAttention = block.self_attention  # type: ignore[assignment]
        context.heads(attention.num_heads)
        if context.size % attention.num_kv_heads:
            context.heads(attention.num_kv_heads)
        block.context = attention.context = context  # type: ignore[assignment]
    model.context = context


def divide_projections(model: Retro, mesh: DeviceMesh) -> None:
    """Gives each process of the mesh (one dimension) an equal share of the heads of every attention, of their
    projections and relative positions, and of the inner width of every feed-forward. All processes hold embeddings and
    norms. Attention dropout then differs between the processes; all other random numbers are the same.

    Raises ValueError for heads and widths that the processes do not divide.
    """
    count = mesh.size()
    if model.config.null_slot or "bias" in model.config.kinds():
        raise ValueError(
            "tensor_parallel: got a model with a null slot or learned biases by distance, which no process divides "
            "yet, expected one without"
        )
    for name, module in model.named_modules():
        plan: dict[str, ParallelStyle] = {"w_out": RowwiseParallel()}
        if isinstance(module, CausalSelfAttention | ChunkedCrossAttention | NeighbourAttention):
            for size in ("num_heads", "num_kv_heads"):
                setattr(module, size, _share(f"{name}.{size}", getattr(module, size), count))
            if module.relative is not None:
                _divide_positions(name, module.relative, mesh)
            plan |= dict.fromkeys(("w_query", "w_key", "w_value"), ColwiseParallel())
        elif isinstance(module, FeedForward):
            _share(f"{name}'s feed_forward_dim", module.w_in.out_features, count)
            plan |= {"w_in": ColwiseParallel()} | ({} if module.w_gate is None else {"w_gate": ColwiseParallel()})
        else:
            continue
        parallelize_module(module, mesh, plan)
    set_stream(mesh.get_local_rank())


def _divide_positions(name: str, relative: RelativePositions, mesh: DeviceMesh) -> None:
    relative.num_heads = _share(f"{name}.num_heads", relative.num_heads, mesh.size())
    for module, parameter in (
        (relative.projection, "weight"),
        (relative, "content_bias"),
        (relative, "relative_bias"),
    ):
        whole = getattr(module, parameter)
        if whole is not None:
            divided = distribute_tensor(whole.detach(), mesh, [Shard(0)])
            setattr(module, parameter, nn.Parameter(divided, requires_grad=whole.requires_grad))


def _share(name: str, size: int, count: int) -> int:
    if size % count:
        raise ValueError(f"tensor_parallel: got {count} processes for {name} = {size}, expected a divisor of it")
    return size // count
