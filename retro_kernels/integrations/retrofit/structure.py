"""Which self-attentions a decoder has and how each turns its queries: found in what the model does, not in a list of
families."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .attention import CALL, LayerConfig, rotate, tables

LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass
class Found:
    """One self-attention: its module and what its function is given."""

    name: str
    module: Any
    eager: Any
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    value_head_dim: int = 0
    rotary: tuple[int, bool] | None = None


class Recorder:
    """The call that looks at what each attention's function is given."""

    def __init__(self) -> None:
        self.queries: dict[int, torch.Tensor] = {}
        self.keys: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.options: dict[int, dict[str, Any]] = {}

    def attend(self, module: Any, base: Any, query: Any, key: Any, value: Any, mask: Any, options: Any) -> Any:
        layer = module.layer_idx
        self.queries[layer], self.keys[layer], self.options[layer] = query, (key, value), options
        return base(module, query, key, value, mask, **options)


def decoder_of(model: Any) -> Any:
    """The transformers model inside wrappers, which must be a causal language model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    from transformers import PreTrainedModel

    inner: Any = model
    if isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inner = inner.module
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    what = type(inner).__name__
    if not isinstance(inner, PreTrainedModel):
        hint = "; a RETRO of another library is what rk.swap is for" if "retro" in what.lower() else ""
        raise ValueError(f"model: got {what}, expected a decoder of transformers, such as LlamaForCausalLM{hint}")
    if inner.config.is_encoder_decoder:
        raise ValueError(f"model: got {what}, which has an encoder and a decoder, expected a decoder alone")
    if inner.get_output_embeddings() is None or inner.base_model is inner:
        raise ValueError(f"model: got {what}, which predicts no tokens, expected its ...ForCausalLM")
    if any(x.device.type == "meta" for x in inner.parameters()):
        raise ValueError("model: got one on the meta device, expected its weights: what it computes is compared")
    return inner


def attentions_of(model: Any) -> dict[int, Found]:
    """Layer -> its self-attention. Raises ValueError where none goes through `AttentionInterface`."""
    found: dict[int, Found] = {}
    for name, module in model.base_model.named_modules():
        source = vars(sys.modules.get(type(module).__module__, object))
        if not {"ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"} <= set(source):
            continue
        layer = getattr(module, "layer_idx", None)
        if layer is None or not hasattr(module, "config") or not getattr(module, "is_causal", True):
            continue
        if getattr(module, "is_cross_attention", False) or not any(
            "attn" in part or "attention" in part for part in name.split(".")[-1:]
        ):
            continue
        if layer in found:
            raise ValueError(f"model: {name} and {found[layer].name} both are the self-attention of layer {layer}")
        found[layer] = Found(name, module, source["eager_attention_forward"])
    if not found:
        raise ValueError(
            f"model: no self-attention of this {type(model).__name__} goes through transformers' AttentionInterface, "
            "which is where the neighbours come in"
        )
    return dict(sorted(found.items()))


@contextmanager
def at_rest(model: nn.Module) -> Any:
    """The model in eval mode, without gradients; then every module as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def refuse_by_config(model: Any, join: str) -> None:
    """Raises ValueError for what could not be carried over, by name."""
    config = model.config.get_text_config()
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    settings = [scaling, *(x for x in scaling.values() if isinstance(x, dict))]
    for kind in (x.get("rope_type", x.get("type")) for x in settings):
        if kind in LENGTH_DEPENDENT:
            raise ValueError(
                f"model: its rotary positions are of the kind {kind!r}, whose frequencies change with the length of "
                "the text, so that no query can be turned on from its own position to one behind the neighbours"
            )
    implementation = model.config._attn_implementation
    if getattr(config, "reorder_and_upcast_attn", False) and implementation == "eager":
        raise ValueError(
            "model: its config says reorder_and_upcast_attn, with which its attention does not go through "
            'AttentionInterface; expected attn_implementation="sdpa"'
        )
    if join == "softmax" and implementation not in (None, "eager", "sdpa"):
        raise ValueError(
            f'join: got "softmax" for a model whose attention is {implementation!r}, expected '
            'model.set_attn_implementation("sdpa"), whose mask can be read, or join="add"'
        )


def look(model: Any, found: dict[int, Found], join: str) -> list[tuple[str, str]]:
    """Fills in what each attention is, from what its function is given, and returns the tables of frequencies."""
    buffers = [
        (name.rpartition(".")[0], name.rpartition(".")[2])
        for name, _ in model.base_model.named_buffers()
        if "inv_freq" in name and "original" not in name
    ]
    prefix = model.base_model_prefix
    frequencies = [(f"{prefix}.{module}" if module else prefix, buffer) for module, buffer in buffers]
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(size, (1, 9), generator=generator).to(device)
    place = torch.arange(9, device=device)[None]
    shift = 5
    first = record(model, found, ids, place if frequencies else None)
    for layer, one in found.items():
        if layer not in first.queries:
            raise ValueError(f"model: the attention {one.name} was not reached through AttentionInterface")
        query, (key, value) = first.queries[layer], first.keys[layer]
        one.num_heads, one.head_dim = query.shape[1], query.shape[3]
        one.num_kv_heads, one.value_head_dim = key.shape[1], value.shape[3]
        if first.options[layer].get("s_aux") is not None and join == "softmax":
            raise ValueError(f'join: got "softmax", but {one.name} has attention sinks; expected join="add"')
        if first.options[layer].get("position_bias") is not None:
            raise ValueError(f"model: {one.name} adds position biases to its logits, which neighbours would lack")
    if not frequencies:
        if not any(
            isinstance(x, nn.Embedding) and x is not model.get_input_embeddings() for x in model.base_model.modules()
        ):
            raise ValueError(
                f"model: this {type(model).__name__} has neither tables of rotary frequencies (inv_freq) nor an "
                "embedding of positions, so how it knows positions is unknown"
            )
        return frequencies
    second = record(model, found, ids, place + shift)
    values = [getattr(model.get_submodule(module), buffer) for module, buffer in frequencies]
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    for layer, one in found.items():
        before, after = (x.queries[layer].transpose(1, 2).float() for x in (first, second))
        errors: dict[tuple[int, bool] | None, float] = {None: _difference(before, after)}
        for number, table in enumerate(values):
            if 2 * table.numel() > one.head_dim:
                continue
            turn = tables(torch.full((1, 9), shift, device=device), table)
            for interleaved in (False, True):
                errors[number, interleaved] = _difference(rotate(before, *turn, interleaved), after)
        one.rotary = min(errors, key=lambda x: errors[x])
        if errors[one.rotary] > tolerance:
            raise ValueError(
                f"model: the queries of {one.name} are turned with their position in no known way: {shift} positions "
                f"further they differ by {errors[one.rotary]:.2g} from what its frequencies give"
            )
    return frequencies


def record(model: Any, found: dict[int, Found], ids: torch.Tensor, positions: torch.Tensor | None) -> Recorder:
    recorder = Recorder()
    given = {} if positions is None else {"position_ids": positions}
    model.base_model(input_ids=ids, use_cache=False, **given, **{CALL: recorder})
    return recorder


def copy_projections(model: Any, found: dict[int, Found], width: int) -> None:
    """Gives the projections of keys and values of every part those of its layer, with their biases, however the family
    holds them: what each attention makes, at position 0, of nothing and of every unit vector.

    Raises ValueError where states of this width are not what the layer reads, and where its keys or values are no
    linear map of what it reads (norms of the keys)."""
    weight = model.get_input_embeddings().weight
    given = torch.cat([torch.zeros(1, width), torch.eye(width), torch.randn(3, width)])[:, None]
    given = given.to(weight.device, model.dtype)

    def replace(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if hidden.shape[-1] != width:
            raise ValueError(
                f'init: got "self_attention" for an encoder whose states are {width} wide, expected '
                f'{hidden.shape[-1]}, which is what the decoder\'s projections read, or init="random"'
            )
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": given}
        return (given, *args[1:]), kwargs

    hooks = [one.module.register_forward_pre_hook(replace, with_kwargs=True) for one in found.values()]
    try:
        ids = torch.zeros(len(given), 1, dtype=torch.int64, device=weight.device)
        recorder = record(model, found, ids, torch.zeros_like(ids))
    finally:
        for hook in hooks:
            hook.remove()
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 0.05
    for layer, one in found.items():
        for made, linear in zip(recorder.keys[layer], (one.module.retro.w_key, one.module.retro.w_value)):
            rows = made[:, :, 0].flatten(1)
            linear.bias.copy_(rows[0])
            linear.weight.copy_((rows[1 : width + 1] - rows[0]).T)
            if _difference(linear(given[-3:, 0]), rows[-3:]) > tolerance:
                raise ValueError(
                    f'init: got "self_attention", but the keys of {one.name} are no linear map of what it reads (it '
                    'may have norms of the keys), so that they cannot begin as copies; expected init="random"'
                )


def intercept(found: Found) -> None:
    """The attention reads its config through ours."""
    found.module.config = LayerConfig(found.module.config)


def _difference(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm().clamp_min(1e-30))
