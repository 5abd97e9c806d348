"""What people do to models works swapped as unswapped, in every peer: torch.func, adapters, quantisation, export, a
swap after compilation, half precision, FSDP, copies. What a peer refuses itself is skipped, with what it says.

`make peers` installs those that `make test` cannot. Each is a module that takes two tensors, the batch first."""

import contextlib
import copy
import importlib
import types
from dataclasses import dataclass

import norlund_attentions
import pytest
import torch
from torch import nn

from benchmarks import peers
from retro_kernels.cli import swap_check
from retro_kernels.integrations import base, swap, unswap, weights
from retro_kernels.integrations.base import FusedForward

M, K, R, B, N = 4, 2, 8, 2, 9


def retro_pytorch(stack):
    peer = importlib.import_module("retro_pytorch.retro_pytorch")
    model = peer.RETRO(
        num_tokens=50,
        max_seq_len=32,
        enc_dim=24,
        enc_depth=1,
        dec_dim=24,
        dec_depth=2,
        dec_cross_attn_layers=(1, 2),
        dim_head=32,
        chunk_size=M,
    )
    return model, "to_q", "to_out.bias", text(N // M)


def labml(stack):
    peer = importlib.import_module("retro_transformer.model")
    sizes = {"chunk_len": M, "d_model": 24, "n_heads": 2, "d_k": 8, "d_ff": 32}
    encoder = peer.NearestNeighborEncoder(n_layers=1, ca_layers={0}, **sizes)
    model = peer.RetroModel(n_vocab=50, n_layers=2, ca_layers={0, 1}, encoder=encoder, **sizes)
    return model, "query", "output.bias", text(N // M)


class Megatron(nn.Module):
    """Its model, called as its trainer calls it."""

    def __init__(self, peer):
        super().__init__()
        self.peer = peer

    def forward(self, tokens, neighbours):
        n, context = tokens.shape[1], neighbours.flatten(0, 2)
        mask = torch.ones(1, 1, n, n, dtype=torch.bool).triu(1)
        named = {"context_input_ids": context, "context_position_ids": torch.arange(R).expand_as(context)}
        return self.peer(tokens, torch.arange(n).expand_as(tokens), mask, context_mask=None, **named)


def megatron(stack):
    peer = importlib.import_module("megatron.core.models.retro")
    stack.enter_context(peers.megatron())
    config = peer.RetroConfig(
        num_layers=6,
        hidden_size=16,
        num_attention_heads=4,
        retro_chunk_length=M,
        retro_num_neighbors=K,
        retro_num_retrieved_chunks=R // M,
        retro_split_preprocessing="98,2,0",
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
    )
    spec = peer.get_retro_decoder_block_spec(config, use_transformer_engine=False)
    model = peer.RetroModel(config=config, transformer_layer_spec=spec, vocab_size=50, max_sequence_length=32)
    return Megatron(model), "linear_q", "linear_proj.bias", text(-(-N // M))


class Logits(nn.Module):
    def __init__(self, peer):
        super().__init__()
        self.peer = peer

    def forward(self, tokens, neighbours):
        return self.peer(tokens, neighbours).logits


def norlund(stack):
    """Of a clone, where NORLUND names one; else its four attentions as they are written here."""
    try:
        peer = stack.enter_context(peers.norlund())
    except ImportError:
        norlund_attentions.know(stack.enter_context(pytest.MonkeyPatch.context()))
        chunks = -(-N // M)
        given = torch.randn(B, N, norlund_attentions.D), torch.randn(B, chunks, K, R, norlund_attentions.E)
        return norlund_attentions.Whole(), "q_proj", "final_proj.weight", given
    sizes = {"num_embeddings": 50, "chunk_size": M, "enc_num_layers": 1, "enc_ca_layers": [0]}
    for part in ("enc", "dec"):
        sizes |= {f"{part}_{name}": 16 for name in ("hidden_dim", "ffn_dim", "qkv_dim")} | {f"{part}_num_heads": 2}
    model = Logits(peer.RetroModelLMHead(peer.RetroConfig(**sizes)))
    return model, "q_proj", "final_proj.weight", text(-(-N // M))


class Nemo(nn.Module):
    """Its chunked cross-attention: the batch is its second axis, and the output's bias stands beside it."""

    def __init__(self, peer):
        super().__init__()
        self.peer = peer

    def forward(self, x, encoded):
        """x [b, n, d], encoded [b, l, k, r, d]."""
        b, chunks = encoded.shape[:2]
        mask = torch.zeros(b * chunks, 1, M, K * R, dtype=torch.bool)
        out, bias = self.peer(x.transpose(0, 1), mask, encoder_output=encoded.permute(1, 2, 3, 0, 4))
        return (out + bias).transpose(0, 1)


def nemo(stack):
    attention, _ = stack.enter_context(peers.nemo())
    sizes = {"layer_number": 1, "num_attention_heads": 2, "hidden_size": 16, "chunk_size": M, "precision": 32}
    config = types.SimpleNamespace(sequence_parallel=False)
    model = Nemo(attention.ParallelChunkedCrossAttention(config, None, None, **sizes))
    return model, "query", "dense.bias", (torch.randn(B, N, 16), torch.randn(B, N // M, K, R, 16))


class Flamingo(nn.Module):
    """Its cross-attention, with a place of media at each chunk's beginning."""

    def __init__(self, peer):
        super().__init__()
        self.peer = peer

    def forward(self, x, media):
        """x [b, n, d], media [b, t, latents, d]."""
        locations = (torch.arange(x.shape[1]) % M == 1).expand(x.shape[:2])
        return self.peer(x, media, locations)


def flamingo(package):
    def build(stack):
        kind = stack.enter_context(peers.flamingo(package)).MaskedCrossAttention
        visual = {"dim_visual": 16} if package == "open_flamingo" else {}
        model = Flamingo(kind(dim=16, heads=2, dim_head=8, **visual))
        return model, "to_q", "to_out.weight", (torch.randn(B, N, 16), torch.randn(B, N // M, 5, 16))

    return build


PEERS = {
    "retro-pytorch": retro_pytorch,
    "labml": labml,
    "megatron": megatron,
    "norlund": norlund,
    "nemo": nemo,
    **{package: flamingo(package) for package in peers.FLAMINGO},
}


def text(chunks):
    return torch.randint(1, 50, (B, N)), torch.randint(1, 50, (B, chunks, K, R))


@dataclass
class Pair:
    """A model unswapped and swapped, whose parameters are alike; what its query projections are called, a parameter's
    name ends with, and the tensors it takes."""

    model: nn.Module
    swapped: nn.Module
    query: str
    parameter: str
    given: tuple


@pytest.fixture(params=PEERS)
def pair(request, monkeypatch):
    monkeypatch.setenv("RETRO_KERNELS_BACKEND", "reference")
    monkeypatch.setattr(base, "_warned", set())
    with contextlib.ExitStack() as stack:
        try:
            model, query, parameter, given = PEERS[request.param](stack)
        except ImportError as error:
            pytest.skip(f"the peer is not installed (`make peers`): {error}")
        torch.manual_seed(1)
        with torch.no_grad():
            for x in model.parameters():
                x.add_(0.1 * torch.randn_like(x))
        try:
            swapped = copy.deepcopy(model)
        except TypeError:  # Megatron's, which holds process groups
            swapped = type(model)(type(model.peer)(**construction(model.peer)))
            swapped.load_state_dict(model.state_dict())
        for one in (model, swapped):
            one.eval()
        assert swap(swapped).replaced
        yield Pair(model, swapped, query, parameter, given)


def construction(peer):
    """Megatron's model again."""
    names = ("config", "transformer_layer_spec", "vocab_size", "max_sequence_length")
    return {name: getattr(peer, name) for name in names}


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(want.abs().max().item(), 1e-3))


def unless_it_refuses(run):
    """What `run`, of the unswapped model, returns. A peer's own refusal ends the test."""
    try:
        return run()
    except Exception as error:  # of whatever kind
        pytest.skip(f"unswapped it refuses: {type(error).__name__}: {str(error).splitlines()[0][:200]}")


def functions(model, parameter, given):
    """Results of torch.func's transformations of one model."""
    parameters = {name: x for name, x in model.named_parameters() if x.requires_grad}
    name = next(x for x in parameters if x.endswith(parameter))
    others = {key: x for key, x in parameters.items() if key != name}

    def loss(part, *given):
        out = torch.func.functional_call(model, {**others, name: part}, tuple(x[None] for x in given))
        return out.square().mean()

    def last(part):
        return torch.func.functional_call(model, {**others, name: part}, given)[0, -1, :3]

    part = parameters[name].detach()
    out, back = torch.func.vjp(last, part)
    return {
        "grad": torch.func.grad(loss)(part, *(x[0] for x in given)),
        "vjp": back(torch.ones_like(out))[0],
        "jacrev": torch.func.jacrev(last)(part),
        "vmap": torch.stack([torch.func.grad(loss)(part, *x) for x in zip(*given)]),
        "per sample": torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(part, *given),
    }


def test_functional_transformations(pair):
    wanted = unless_it_refuses(lambda: functions(pair.model, pair.parameter, pair.given))
    found = functions(pair.swapped, pair.parameter, pair.given)
    for name, want in wanted.items():
        close(found[name], want, 1e-4)
    close(found["per sample"], found["vmap"], 1e-4)


@pytest.mark.parametrize("order", ["swap first", "adapt first"])
def test_adapters_in_both_orders(pair, order):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=[pair.query], init_lora_weights=False)
    torch.manual_seed(3)
    model = unless_it_refuses(lambda: peft.get_peft_model(pair.model, settings))
    want = unless_it_refuses(lambda: model(*pair.given))
    torch.manual_seed(3)
    if order == "adapt first":
        unswap(pair.swapped)
    swapped = peft.get_peft_model(pair.swapped, settings)
    if order == "adapt first":
        assert swap(swapped).replaced
    got = swapped(*pair.given)
    close(got, want)
    gradient = torch.randn_like(want)
    for out in (got, want):
        out.backward(gradient)
    for (name, x), y in zip(swapped.named_parameters(), model.parameters()):
        if y.grad is not None:
            close(x.grad, y.grad, 1e-4)
        else:
            assert x.grad is None, name


@pytest.mark.parametrize("order", ["swap first", "quantise first"])
@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation(pair, order):
    """No less exact than the unswapped. (The scales are those of all rows that a layer sees, and a swapped one may see
    fewer: only those that retrieve.)"""
    quantise = lambda x: torch.ao.quantization.quantize_dynamic(x, {nn.Linear}, dtype=torch.qint8)  # noqa: E731
    want = pair.model(*pair.given)
    theirs = unless_it_refuses(lambda: quantise(pair.model)(*pair.given))
    if order == "quantise first":
        unswap(pair.swapped)
    got = quantise(pair.swapped)
    if order == "quantise first":
        assert swap(got).replaced
    assert (got(*pair.given) - want).abs().max() <= 2 * (theirs - want).abs().max() + 1e-5 * want.abs().max()


@pytest.fixture
def traced(pair):
    """-> unswapped and swapped, and the arguments of a call: of retro-pytorch's, whose trace takes half a minute, its
    first chunked cross-attention."""
    if "decoder.layers.0.1.fn" not in dict(pair.model.named_modules()):
        return pair.model, pair.swapped, pair.given, {}
    seen = []
    part = pair.model.get_submodule("decoder.layers.0.1.fn")
    handle = part.register_forward_pre_hook(lambda _, *call: seen.append(call), with_kwargs=True)
    with torch.no_grad():
        pair.model(*pair.given)
    handle.remove()
    return part, pair.swapped.get_submodule("decoder.layers.0.1.fn"), *seen[0]


@pytest.mark.filterwarnings("ignore")
def test_export(traced):
    model, swapped, given, named = traced
    export = lambda one: torch.export.export(one, given, named, strict=False).module()(*given, **named)  # noqa: E731
    close(export(swapped), unless_it_refuses(lambda: export(model)))


@pytest.mark.filterwarnings("ignore")
def test_a_swap_after_the_first_compiled_call_compiles_anew(traced):
    """In one graph, where the peer itself compiles to one (Megatron's and NeMo's do not, and NeMo's says in its note
    that it is not fused there)."""
    model, late, given, named = traced
    unswap(late)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    try:
        torch.compile(model, fullgraph=True, backend="eager")(*given, **named)
        whole = True
    except torch._dynamo.exc.Unsupported:
        whole = False
    compiled = torch.compile(late, fullgraph=whole, backend=backend)
    want = compiled(*given, **named)
    before = len(graphs)
    report = swap(compiled)
    assert report.replaced
    close(compiled(*given, **named), want)
    after = len(graphs)
    assert after == 2 if whole else (after > before) != any("own forward" in x for x in report.notes.values())
    report.undo()
    assert torch.equal(compiled(*given, **named), want)
    assert len(graphs) == after  # the first graph's guards hold again


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_half_precision_is_no_worse_than_the_unswapped(pair, way):
    want = pair.model(*pair.given)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        errors = []
        for one in (pair.model, pair.swapped):
            if way == "weights":
                one.bfloat16()
            given = [x.bfloat16() if way == "weights" and x.is_floating_point() else x for x in pair.given]
            out = unless_it_refuses(lambda given=given: pair.model(*given)) if one is pair.model else one(*given)
            errors.append((out.float() - want).abs().max())
    assert errors[1] <= 2 * errors[0]


@pytest.mark.filterwarnings("ignore")
def test_a_swap_under_fsdp(pair, tmp_path):
    """Sharded (FSDP2) or with the original parameters all is swapped; what flat parameters forbid is said."""
    swapped, given = pair.swapped, pair.given
    want, names = pair.model(*given), unswap(swapped)
    copied = lambda: unless_it_refuses(lambda: copy.deepcopy(swapped))  # noqa: E731
    copied()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fsdp = importlib.import_module("torch.distributed.fsdp")
        sharded = fsdp.fully_shard(copied())
        assert swap(sharded).replaced == names
        close(sharded(*given), want)
        for original in (True, False):
            options = {"use_orig_params": original, "device_id": torch.device("cpu")}
            if not original and any(not x.requires_grad for x in swapped.parameters()):
                continue  # which FSDP refuses itself
            wrapped = fsdp.FullyShardedDataParallel(copied(), **options)
            report = swap(wrapped)
            assert len(report.replaced) + len(report.skipped) == len(names)
            assert all("use_orig_params=True" in x for x in report.skipped.values())
            close(wrapped(*given), want)
    finally:
        torch.distributed.destroy_process_group()


def test_copies_and_undo(pair):
    want = pair.model(*pair.given)
    unless_it_refuses(lambda: copy.deepcopy(pair.model))
    close(copy.deepcopy(pair.swapped)(*pair.given), want)
    unswap(pair.swapped)
    assert torch.equal(pair.swapped(*pair.given), want)


def test_swap_check_knows_how_to_call_it(pair):
    whole = getattr(pair.swapped, "peer", pair.swapped)
    if not any(peer.is_model(whole) for peer in weights.PEERS.values()):
        pytest.skip("it is no whole model")
    report, found = swap_check.compare(whole, swap_check.probe(whole, None), 1)
    assert report.replaced
    assert found["output_difference"] < 1e-5
    assert 0 < found["gradient_difference"] < 1e-4


def test_no_class_of_a_peer_is_patched(pair):
    unswap(pair.swapped)
    kinds = {kind for module in pair.swapped.modules() for kind in type(module).__mro__ if kind is not object}
    before = {kind: dict(vars(kind)) for kind in kinds}
    report = swap(pair.swapped)
    assert {kind: dict(vars(kind)) for kind in kinds} == before
    swapped = [module for module in pair.swapped.modules() if isinstance(vars(module).get("forward"), FusedForward)]
    assert len(swapped) == len(report.replaced)
    report.undo()
    assert {kind: dict(vars(kind)) for kind in kinds} == before
