"""What people do to models works swapped as unswapped: torch.func, adapters, quantisation, copies."""

import copy
import importlib
import importlib.util

import pytest
import torch
from torch import nn

from retro_kernels.integrations import swap, unswap


def retro_pytorch():
    peer = pytest.importorskip("retro_pytorch.retro_pytorch", reason="the peer is not installed (extra `peers`)")
    model = peer.RETRO(
        num_tokens=50,
        max_seq_len=32,
        enc_dim=24,
        enc_depth=1,
        dec_dim=24,
        dec_depth=2,
        dec_cross_attn_layers=(1, 2),
        dim_head=32,
        chunk_size=4,
    )
    return model, "to_q"


def labml():
    peer = pytest.importorskip(
        "retro_transformer.model",
        reason="retro-transformer is not installed (pip install --no-deps retro-transformer==1.0.3)",
    )
    sizes = {"chunk_len": 4, "d_model": 24, "n_heads": 2, "d_k": 8, "d_ff": 32}
    encoder = peer.NearestNeighborEncoder(n_layers=1, ca_layers={0}, **sizes)
    return peer.RetroModel(n_vocab=50, n_layers=2, ca_layers={0, 1}, encoder=encoder, **sizes), "query"


@pytest.fixture(params=[retro_pytorch, labml], ids=["retro-pytorch", "labml"])
def pair(request, monkeypatch):
    """-> unswapped and swapped, the name of its query projections, tokens and neighbours."""
    monkeypatch.setenv("RETRO_KERNELS_BACKEND", "reference")
    model, query = request.param()
    model.eval()
    swapped = copy.deepcopy(model)
    assert swap(swapped).replaced
    return model, swapped, query, torch.randint(1, 50, (2, 9)), torch.randint(1, 50, (2, 2, 2, 8))


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(want.abs().max().item(), 1e-3))


def functions(model, tokens, neighbours):
    """Results of torch.func's transformations of one model."""
    parameters = {name: x for name, x in model.named_parameters() if x.requires_grad}
    name = next(x for x in parameters if x.endswith(("to_out.bias", "output.bias")))
    others = {key: x for key, x in parameters.items() if key != name}

    def loss(part, tokens, neighbours):
        out = torch.func.functional_call(model, {**others, name: part}, (tokens[None], neighbours[None]))
        return out.square().mean()

    def logits(part):
        return torch.func.functional_call(model, {**others, name: part}, (tokens, neighbours))[0, -1, :3]

    part = parameters[name].detach()
    out, back = torch.func.vjp(logits, part)
    return {
        "grad": torch.func.grad(loss)(part, tokens[0], neighbours[0]),
        "vjp": back(torch.ones_like(out))[0],
        "jacrev": torch.func.jacrev(logits)(part),
        "vmap": torch.stack([torch.func.grad(loss)(part, *x) for x in zip(tokens, neighbours)]),
        "per sample": torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(part, tokens, neighbours),
    }


def test_functional_transformations(pair):
    model, swapped, _, tokens, neighbours = pair
    wanted, found = functions(model, tokens, neighbours), functions(swapped, tokens, neighbours)
    for name, want in wanted.items():
        close(found[name], want, 1e-4)
    close(found["per sample"], found["vmap"], 1e-4)


@pytest.mark.parametrize("order", ["swap first", "adapt first"])
def test_adapters_in_both_orders(pair, order):
    peft = pytest.importorskip("peft")
    model, swapped, query, tokens, neighbours = pair
    settings = peft.LoraConfig(r=2, target_modules=[query], init_lora_weights=False)
    torch.manual_seed(3)
    want = peft.get_peft_model(model, settings)
    torch.manual_seed(3)
    if order == "adapt first":
        unswap(swapped)
    got = peft.get_peft_model(swapped, settings)
    if order == "adapt first":
        assert swap(got).replaced
    outs = [x(tokens, neighbours) for x in (got, want)]
    close(*outs)
    gradient = torch.randn_like(outs[0])
    for out in outs:
        out.backward(gradient)
    for (name, x), y in zip(got.named_parameters(), want.parameters()):
        if y.grad is not None:
            close(x.grad, y.grad, 1e-4)
        else:
            assert x.grad is None, name


@pytest.mark.parametrize("order", ["swap first", "quantise first"])
@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation(pair, order):
    model, swapped, _, tokens, neighbours = pair
    quantise = lambda x: torch.ao.quantization.quantize_dynamic(x, {nn.Linear}, dtype=torch.qint8)  # noqa: E731
    want = quantise(model)(tokens, neighbours)
    if order == "quantise first":
        unswap(swapped)
    got = quantise(swapped)
    if order == "quantise first":
        assert swap(got).replaced
    close(got(tokens, neighbours), want, 1e-3)


@pytest.fixture
def traced(pair):
    """-> unswapped and swapped, and the arguments of a call: of labml's whole model; of retro-pytorch's, whose trace
    takes half a minute, its first chunked cross-attention."""
    model, swapped, _, *given = pair
    if "decoder.layers.0.1.fn" not in dict(model.named_modules()):
        return model, swapped, tuple(given), {}
    seen = []
    part = model.get_submodule("decoder.layers.0.1.fn")
    handle = part.register_forward_pre_hook(lambda _, *call: seen.append(call), with_kwargs=True)
    with torch.no_grad():
        model(*given)
    handle.remove()
    return part, swapped.get_submodule("decoder.layers.0.1.fn"), *seen[0]


@pytest.mark.filterwarnings("ignore")
def test_export(traced):
    model, swapped, given, named = traced
    close(torch.export.export(swapped, given, named, strict=False).module()(*given, **named), model(*given, **named))


def test_a_swap_after_the_first_compiled_call_compiles_anew(traced):
    _, late, given, named = traced
    unswap(late)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(late, fullgraph=True, backend=backend)
    want = compiled(*given, **named)
    report = swap(compiled)
    assert report.replaced
    close(compiled(*given, **named), want)
    assert len(graphs) == 2
    report.undo()
    assert torch.equal(compiled(*given, **named), want)
    assert len(graphs) == 2  # the first graph's guards hold again


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_half_precision_is_no_worse_than_the_unswapped(pair, way):
    model, swapped, _, tokens, neighbours = pair
    want = model(tokens, neighbours)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        found = [one.bfloat16() if way == "weights" else one for one in (model, swapped)]
        errors = [(one(tokens, neighbours).float() - want).abs().max().item() for one in found]
    assert errors[1] <= 2 * errors[0]


@pytest.mark.filterwarnings("ignore")
def test_a_swap_under_fsdp(pair, tmp_path):
    """Sharded (FSDP2) or with the original parameters all is swapped; what flat parameters forbid is said."""
    model, swapped, _, tokens, neighbours = pair
    want, names = model(tokens, neighbours), unswap(swapped)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fsdp = importlib.import_module("torch.distributed.fsdp")
        sharded = fsdp.fully_shard(copy.deepcopy(swapped))
        assert swap(sharded).replaced == names
        close(sharded(tokens, neighbours), want)
        for original in (True, False):
            options = {"use_orig_params": original, "device_id": torch.device("cpu")}
            if not original and any(not x.requires_grad for x in swapped.parameters()):
                continue  # which FSDP refuses itself
            wrapped = fsdp.FullyShardedDataParallel(copy.deepcopy(swapped), **options)
            report = swap(wrapped)
            assert len(report.replaced) + len(report.skipped) == len(names)
            assert all("use_orig_params=True" in x for x in report.skipped.values())
            assert bool(report.skipped) != original
            close(wrapped(tokens, neighbours), want)
    finally:
        torch.distributed.destroy_process_group()


def test_copies_and_undo(pair):
    model, swapped, _, tokens, neighbours = pair
    want = model(tokens, neighbours)
    close(copy.deepcopy(swapped)(tokens, neighbours), want)
    unswap(swapped)
    assert torch.equal(swapped(tokens, neighbours), want)


def test_no_class_of_a_peer_is_patched():
    for name, build in (("retro_pytorch.retro_pytorch", retro_pytorch), ("retro_transformer.model", labml)):
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            continue
        kinds = [x for x in vars(importlib.import_module(name)).values() if isinstance(x, type)]
        before = [dict(vars(kind)) for kind in kinds]
        report = swap(build()[0])
        report.undo()
        assert [dict(vars(kind)) for kind in kinds] == before
