"""`swap`, the layer and the encoder against retro-pytorch 0.3.9 itself, with its own weights."""

import copy
import functools
import importlib.util
import io
import math
import warnings

import pytest
import torch
import torch.distributed.fsdp
from torch import nn

pytest.importorskip("retro_pytorch", reason="the peer is not installed (extra `peers`)")

from retro_pytorch.retro_pytorch import RETRO, Attention, Encoder, RMSNorm, RotaryEmbedding
from retro_pytorch.retro_pytorch import ChunkedCrossAttention as Peer

from retro_kernels.integrations import base, retro_pytorch, swap, unswap
from retro_kernels.ops.backends import backends

BACKENDS = ["reference"] + (["cpu"] if backends()["cpu"].available else [])
M, R, K, DIM, CONTEXT, H, D = 8, 16, 2, 24, 20, 2, 32
LENGTHS = [8, 9, 15, 16, 20, 23, 24]
CCAS = ["decoder.layers.0.1.fn", "decoder.layers.2.1.fn"]
ATTENTIONS = ["encoder.layers.0.0.fn", "encoder.layers.0.1.fn", *(f"decoder.layers.{i}.0.fn" for i in range(3))]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Runs swapped modules on one backend: swap itself has no argument for it."""
    monkeypatch.setenv("RETRO_KERNELS_BACKEND", request.param)
    return request.param


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.setenv("RETRO_KERNELS_BACKEND", "reference")


def peer(dtype=torch.float32, **options):
    settings = {"dim": DIM, "context_dim": CONTEXT, "dim_head": D, "heads": H, **options}
    return Peer(M, **settings).to(dtype)


def call(module, n, dtype=torch.float32, masked=True):
    """What retro-pytorch's decoder hands to a chunked cross-attention of n tokens."""
    x = torch.randn(2, n, DIM, dtype=dtype)
    context = torch.randn(2, n // M, K, R, CONTEXT, dtype=dtype)
    mask = torch.rand(context.shape[:4]) > 0.3
    if mask.numel():
        mask[0, 0] = False  # only the null slot is left
    rotary = RotaryEmbedding(min(D, 32)).to(dtype)
    positions = rotary(M, device="cpu", offset=M - 1), rotary(R, device="cpu")
    return (x,), {"context": context, "context_mask": mask if masked else None, "pos_emb": positions}


def retro(**options):
    torch.manual_seed(1)
    settings = {
        "num_tokens": 50,
        "max_seq_len": 64,
        "enc_dim": 36,
        "enc_depth": 1,
        "dec_dim": DIM,
        "dec_depth": 3,
        "dec_cross_attn_layers": (1, 3),
        "dim_head": D,
        "chunk_size": M,
        **options,
    }
    return RETRO(**settings)


def text(n, k=K):
    tokens, retrieved = torch.randint(1, 50, (2, n)), torch.randint(1, 50, (2, n // M, k, R))
    retrieved[0, 0, -1, 5:] = retrieved[1, -1] = 0  # the padding token, which the model masks
    return tokens, retrieved


def modules_of(model):
    """Those that swap replaces: CCAs, and attentions that are not a CCA's own."""
    return {
        name: x for name, x in model.named_modules() if type(x) is Peer or (type(x) is Attention and x.null_k is None)
    }


def ccas_of(model):
    return {name: x for name, x in model.named_modules() if type(x) is Peer}


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(want.abs().max().item(), 1e-3))


# The layer and the swapped module against the peer's own


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("n", [5, *LENGTHS])
def test_copied_weights_give_the_same_in_fp64(reference, n, masked):
    """The layer of `to_layer` and a swapped module: output and gradients to 1e-10 of the peer's own."""
    module = peer(torch.float64)
    layer = retro_pytorch.to_layer(module)
    swapped = copy.deepcopy(module)
    swap(swapped)
    arguments, options = call(module, n, torch.float64, masked)
    want = module(*arguments, **options)
    assert (layer(*arguments, options["context"], options["context_mask"]) - want).abs().max() < 1e-10
    got = swapped(*arguments, **options)
    assert (got - want).abs().max() < 1e-10
    if n >= M:
        gradient = torch.randn_like(want)
        wanted = torch.autograd.grad(want, list(module.parameters()), gradient)
        for x, y in zip(torch.autograd.grad(got, list(swapped.parameters()), gradient), wanted):
            assert (x - y).abs().max() < 1e-10


@pytest.mark.parametrize("n", LENGTHS)
def test_copied_weights_give_the_same_in_fp32(backend, n):
    module = peer()
    layer, swapped = retro_pytorch.to_layer(module), copy.deepcopy(module)
    swap(swapped)
    arguments, options = call(module, n)
    want = module(*arguments, **options)
    close(layer(*arguments, options["context"], options["context_mask"]), want)
    close(swapped(*arguments, **options), want)
    assert (swapped(*arguments, **options)[:, : M - 1] == 0).all()  # the output's bias does not reach them


@pytest.mark.parametrize("n", [16, 20, 25])
def test_a_swapped_model_has_the_same_logits_loss_and_gradients(backend, n):
    model, swapped = retro(), retro()
    assert set(swap(swapped).replaced) == {*CCAS, *ATTENTIONS}
    tokens, retrieved = text(n)
    with torch.no_grad():
        close(swapped.eval()(tokens, retrieved), model.eval()(tokens, retrieved))
    labels = torch.cat([tokens, tokens[:, :1]], 1)
    losses = [x.train()(labels, retrieved, return_loss=True) for x in (model, swapped)]
    close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for (name, want), (_, got) in zip(model.named_parameters(), swapped.named_parameters()):
        assert (want.grad is None) == (got.grad is None), name
        if want.grad is not None:
            close(got.grad, want.grad, 1e-4)


def test_training_steps_stay_together(backend):
    losses = []
    for swapped in (False, True):
        model = retro()
        if swapped:
            swap(model)
        torch.manual_seed(2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for _ in range(4):
            tokens, retrieved = text(24)
            loss = model(torch.cat([tokens, tokens[:, :1]], 1), retrieved, return_loss=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [9, 16, 23])
def test_paper_positions_against_a_loop(reference, n):
    """positions="paper" turns query row i by m - 1 + i: written out token by token, with nothing of the peer's code."""
    module = peer(torch.float64)
    layer = retro_pytorch.to_layer(module, positions="paper")
    (x,), options = call(module, n, torch.float64)
    attention, mask, context = module.cross_attn, options["context_mask"], options["context"]
    want = torch.zeros_like(x)
    frequency = 1.0 / 10000.0 ** (torch.arange(0, 32, 2).float() / 32)

    def turned(vector, position):
        angle = position * frequency.double()
        a, b = vector[:16], vector[16:32]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), vector[32:]])

    for b in range(2):
        for i in range(M - 1, n):
            u, row = divmod(i - (M - 1), M)
            heads = []
            for head in (slice(0, D), slice(D, 2 * D)):
                q = turned(attention.to_q(x[b, i])[head], M - 1 + row)
                keys, values = [attention.null_k[head]], [attention.null_v[head]]
                for j in range(K):
                    for t in range(R):
                        if mask[b, u, j, t]:
                            keys.append(turned(attention.to_k(context[b, u, j, t])[head], t))
                            values.append(attention.to_v(context[b, u, j, t])[head])
                heads.append((torch.stack(keys) @ q / math.sqrt(D)).softmax(0) @ torch.stack(values))
            want[b, i] = attention.to_out(torch.cat(heads))
    before = module(x, **options)
    assert swap(module, positions="paper").replaced == [""]
    got = module(x, **options)
    assert (got - want).abs().max() < 1e-10
    assert (layer(x, context, mask) - want).abs().max() < 1e-6  # frequencies of the same fp32 table
    assert (got - before).abs().max() > 1e-3  # as trained it is another function


def test_whatever_rotary_angles_are_handed_over_are_used(reference):
    module = peer()
    swapped = copy.deepcopy(module)
    swap(swapped)
    arguments, options = call(module, 20)
    for width in (2, 10, 32):
        halves = [torch.randn(1, 1, length, width // 2) for length in (M, R)]
        options["pos_emb"] = tuple(torch.cat([x, x], -1) for x in halves)
        close(swapped(*arguments, **options), module(*arguments, **options))


# The encoder, and the decoder's self-attention


def attention_call(kind, dtype=torch.float32, masked=True, batch=5):
    """What the encoder and the decoder hand to an attention: 5 neighbours of 16 tokens, for chunks of 8; or a sequence
    of 21 tokens, which is never masked."""
    n = 21 if kind == "causal" else R
    rotary = RotaryEmbedding(min(D, 32)).to(dtype)
    positions = rotary(n, device="cpu")
    x = torch.randn(batch, n, DIM, dtype=dtype)
    if kind == "cross":
        context = torch.randn(batch, M, CONTEXT, dtype=dtype)
        return (x,), {"context": context, "pos_emb": (positions, rotary(M, device="cpu"))}
    mask = torch.rand(batch, n) > 0.3
    mask[1] = False  # a neighbour of padding only: the peer gives it the mean of all values
    return (x,), {"mask": mask if masked and kind == "self" else None, "pos_emb": positions}


def agree(got, want, inputs, parameters, tolerance):
    gradient = torch.randn_like(want)
    results = [torch.autograd.grad(x, [*y, *z], gradient) for x, y, z in zip((got, want), inputs, parameters)]
    assert (got - want).abs().max() <= tolerance * want.abs().max()
    for x, y in zip(*results):
        assert (x - y).abs().max() <= tolerance * max(y.abs().max().item(), 1e-3)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", ["self", "cross", "causal"])
def test_a_swapped_attention_computes_the_same(backend, kind, masked):
    """Output and every gradient: in fp64 to 1e-10 on the reference, in fp32 on every backend; also of a neighbour whose
    tokens are all masked, and of a mask in cross-attention, which the encoder never hands over."""
    for dtype in (torch.float64, torch.float32) if backend == "reference" else (torch.float32,):
        module = Attention(
            DIM, dim_head=D, heads=H, causal=kind == "causal", context_dim=CONTEXT if kind == "cross" else None
        ).to(dtype)
        swapped = copy.deepcopy(module)
        assert swap(swapped).replaced == [""]
        (x,), options = attention_call(kind, dtype, masked)
        if kind == "cross" and masked:
            options["mask"] = torch.rand(5, M) > 0.4
            options["mask"][2] = False
        inputs = [[x.clone().requires_grad_()] for _ in range(2)]
        outs = [y(*z, **options) for y, z in zip((swapped, module), inputs)]
        parameters = [list(y.parameters()) for y in (swapped, module)]
        agree(*outs, inputs, parameters, 1e-10 if dtype == torch.float64 else 1e-4)
        options["pos_emb"] = None
        close(swapped(x, **options), module(x, **options))


ENCODERS = {
    "as it comes": {},
    "cross-attention in layer 2": {"cross_attn_layers": (2,)},
    "no projection": {"output_dim": None, "final_norm": False},
    "deepnet": {"post_norm": True, "norm_klass": nn.LayerNorm, "scale_residual": 1.3},
    "gated norms": {"norm_klass": functools.partial(RMSNorm, gated=True)},
}


@pytest.mark.parametrize("form", ENCODERS)
def test_the_encoder_with_copied_weights_and_swapped(reference, form):
    """Output and every gradient to 1e-10 of the peer's own encoder, which takes each neighbour with its own copy of
    the chunk; `NeighbourEncoder` takes the sequence."""
    b, chunks, n = 2, 2, 2 * M
    settings = {"depth": 2, "context_dim": CONTEXT, "heads": H, "dim_head": D, "output_dim": 14, **ENCODERS[form]}
    module = Encoder(DIM, **settings).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.normal_()
    swapped = copy.deepcopy(module)
    encoder = retro_pytorch.to_encoder(module, chunk_size=M, retrieved_length=R)
    crossing = 1 if "cross_attn_layers" in ENCODERS[form] else 2
    assert len(swap(swapped).replaced) == 2 + crossing
    embeddings, hidden = torch.randn(b, chunks, K, R, DIM).double(), torch.randn(b, n + 3, CONTEXT).double()
    mask = torch.rand(b, chunks, K, R) > 0.3
    mask[..., 0] = True  # a neighbour that is all padding gets a mean from the peer and 0 from NeighbourEncoder
    leaves = [[embeddings.clone().requires_grad_(), hidden.clone().requires_grad_()] for _ in range(3)]

    def own(kind, x, sequence):
        chunked = sequence[:, :n].reshape(b, chunks, 1, M, -1).expand(-1, -1, K, -1, -1)
        out = kind(x.flatten(0, 2), mask=mask.flatten(0, 2), chunked_seq=chunked.flatten(0, 2))
        return out.unflatten(0, (b, chunks, K))

    want = own(module, *leaves[0])
    wanted = list(module.parameters())
    agree(own(swapped, *leaves[1]), want, leaves[1::-1], [list(swapped.parameters()), wanted], 1e-10)
    # The same parameters under other names: matched by a number that each of them holds.
    theirs = {float(x.detach().flatten()[0]): x for x in wanted}
    ours = list(encoder.parameters())
    assert len(ours) == len(wanted)
    matched = [theirs[float(x.detach().flatten()[0])] for x in ours]
    want = own(module, *leaves[0])
    got = encoder(leaves[2][0], leaves[2][1], mask)
    agree(got, want, [leaves[2], leaves[0]], [ours, matched], 1e-7)  # frequencies of an fp32 table


def test_to_encoder_refuses_what_it_does_not_know(monkeypatch):
    with pytest.raises(ValueError, match="Linear"):
        retro_pytorch.to_encoder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="causal"):
        retro_pytorch.to_encoder(Encoder(DIM, depth=1, causal=True))
    encoder = retro().encoder
    swap(encoder)
    retro_pytorch.to_encoder(encoder)  # swapped is still the known version
    monkeypatch.setattr(Encoder, "forward", lambda self, x, **options: x)
    with pytest.raises(ValueError, match=r"Encoder\.forward is not that of 0\.3\.9"):
        retro_pytorch.to_encoder(encoder)


def test_gated_norms_and_deepnet_are_swapped_all_the_same(backend):
    """Swap replaces the attentions only: whatever surrounds them stays."""
    for options in ({"gated_rmsnorm": True}, {"use_deepnet": True}):
        model, swapped = retro(**options), retro(**options)
        assert len(swap(swapped).replaced) == 7
        tokens, retrieved = text(20)
        close(swapped.eval()(tokens, retrieved), model.eval()(tokens, retrieved))


def test_calls_of_an_attention_that_are_not_covered_run_its_own_code(reference, unwarned):
    causal = Attention(DIM, dim_head=D, heads=H, causal=True)
    swapped = copy.deepcopy(causal)
    swap(swapped)
    (x,), options = attention_call("causal")
    options["mask"] = torch.rand(5, 21) > 0.5
    with pytest.warns(UserWarning, match="causal"):
        assert torch.equal(swapped(x, **options), causal(x, **options))
    bidirectional = Attention(DIM, dim_head=D, heads=H)
    swapped = copy.deepcopy(bidirectional)
    swap(swapped)
    (x,), options = attention_call("self")
    seen = []
    handle = swapped.dropout.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="hooks"):
        assert torch.equal(swapped(x, **options), bidirectional(x, **options))
    handle.remove()
    assert seen == [1]
    swapped.to_q.register_forward_hook(lambda *_: seen.append(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(swapped(x, **options), bidirectional(x, **options))
    assert seen == [1, 2]
    for wrong in (torch.randn(1, 1, R, 32), torch.randn(1, 1, R, 32).requires_grad_()):
        with pytest.warns(UserWarning, match=r"halves differ|gradient"):
            assert torch.equal(swapped(x, pos_emb=wrong), bidirectional(x, pos_emb=wrong))


# What swap leaves alone


def test_only_forward_of_the_instances_changes_and_undo_restores_exactly(reference):
    model = retro()
    before = {name: dict(vars(x)) for name, x in model.named_modules()}
    classes = {kind: dict(vars(kind)) for kind in (RETRO, Peer, Attention, Encoder)}
    state, names = copy.deepcopy(model.state_dict()), [name for name, _ in model.named_parameters()]
    other = retro()
    report = swap(model)
    assert set(report.replaced) == {*CCAS, *ATTENTIONS}
    assert [name for name, _ in model.named_parameters()] == names
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    for kind, attributes in classes.items():
        assert dict(vars(kind)) == attributes
    assert not any("forward" in vars(x) for x in modules_of(other).values())
    for name, module in model.named_modules():
        changed = {key for key in vars(module) if vars(module)[key] is not before[name].get(key)}
        assert changed == ({"forward"} if name in report.replaced else set())
    tokens, retrieved = text(20)
    swapped_logits = model.eval()(tokens, retrieved)
    report.undo()
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
    assert torch.equal(model(tokens, retrieved), other.eval()(tokens, retrieved))
    close(swapped_logits, model(tokens, retrieved))
    report.undo()
    assert swap(model).replaced == report.replaced  # and it can be swapped again


def test_a_second_call_says_so():
    model = retro()
    first = swap(model)
    second = swap(model)
    assert second.replaced == []
    assert second.skipped == dict.fromkeys(first.replaced, "already swapped")
    with pytest.raises(ValueError, match=r'already swapped with positions="as_trained"'):
        swap(model, positions="paper")
    assert 'not changed to "paper"' in str(swap(model, positions="paper", strict=False))
    second.undo()  # it replaced nothing, so it restores nothing
    assert swap(model).replaced == []
    first.undo()
    assert len(swap(model, positions="paper").replaced) == 7
    with pytest.raises(ValueError, match=r'already swapped with positions="paper"'):
        swap(model)


def test_submodules_and_a_single_module_can_be_swapped(reference):
    model = retro()
    assert swap(model.decoder.layers[0]).replaced == ["0.fn", "1.fn"]
    assert swap(model.encoder).replaced == ["layers.0.0.fn", "layers.0.1.fn"]
    report = swap(model)
    assert report.replaced == ["decoder.layers.1.0.fn", "decoder.layers.2.0.fn", "decoder.layers.2.1.fn"]
    assert set(report.skipped) == {"decoder.layers.0.0.fn", "decoder.layers.0.1.fn", *ATTENTIONS[:2]}
    module = peer()
    assert swap(module).replaced == [""]
    assert "(the model itself)" in str(swap(module))


def test_undo_says_when_something_else_was_put_on_top():
    model = retro()
    report = swap(model)
    first, second = ccas_of(model).values()
    fused = first.forward
    first.forward = lambda *a, **k: fused(*a, **k)
    with pytest.raises(RuntimeError, match=r"decoder\.layers\.0\.1\.fn"):
        report.undo()
    assert "forward" not in vars(second)
    assert "something else" in swap(model).skipped["decoder.layers.0.1.fn"]
    first.forward = fused
    report.undo()
    assert "forward" not in vars(first)


@pytest.mark.parametrize("what", ["patched class", "subclass", "structure", "sizes"])
def test_what_is_not_the_known_version_is_skipped(monkeypatch, what):
    model = retro()
    expected = {*CCAS, *ATTENTIONS}  # what cannot be replaced
    if what == "patched class":
        monkeypatch.setattr(Attention, "forward", lambda self, x, **options: x)
    elif what == "subclass":
        expected = {CCAS[0], ATTENTIONS[0]}
        for name, module in modules_of(model).items():
            if name in expected:
                module.__class__ = type("Mine", (type(module),), {"forward": lambda self, x, **options: x})
    else:
        for module in modules_of(model).values():
            attention = getattr(module, "cross_attn", module)
            if what == "structure":
                attention.gate = nn.Linear(2, 2)
            else:
                attention.to_k = nn.Linear(attention.to_k.in_features, 7, bias=False)
    if what != "subclass":
        with pytest.raises(ValueError, match=r"decoder\.layers\.0\.1\.fn"):
            swap(model)
    report = swap(model, strict=False)
    assert set(report.skipped) == expected
    assert {*report.replaced, *report.skipped} == {*CCAS, *ATTENTIONS}
    assert all("0.3.9" in reason or "sizes" in reason for reason in report.skipped.values())


def test_a_subclass_that_inherits_forward_is_swapped(reference):
    module = peer()
    module.__class__ = type("Mine", (Peer,), {})
    assert swap(module).replaced == [""]


def test_finding_modules_does_not_import_the_peer():
    """The integration names the peer's class; only a model that has it brings it in."""
    spec = importlib.util.find_spec("retro_kernels.integrations.retro_pytorch")
    with open(spec.origin) as file:
        source = file.read()
    assert "import retro_pytorch" not in source
    assert "from retro_pytorch" not in source


# What people do to swapped models


def test_a_deep_copy_runs_on_its_own_weights(reference):
    model = retro().eval()
    swap(model)
    tokens, retrieved = text(20)
    before = model(tokens, retrieved)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for module in modules_of(twin).values():
            for parameter in module.parameters():
                parameter.add_(0.5)
    assert torch.equal(model(tokens, retrieved), before)
    assert not torch.equal(twin(tokens, retrieved), before)
    assert set(unswap(twin)) == {*CCAS, *ATTENTIONS}
    assert len(swap(model).skipped) == 7  # the original is still swapped


def test_state_dicts_and_whole_models_save_and_load(reference):
    model = retro().eval()
    tokens, retrieved = text(20)
    swap(model)
    want = model(tokens, retrieved)
    buffers = [io.BytesIO(), io.BytesIO()]
    torch.save(model.state_dict(), buffers[0])
    torch.save(model, buffers[1])
    for buffer in buffers:
        buffer.seek(0)
    plain = retro().eval()
    with torch.no_grad():
        plain.to_logits.bias.add_(1)
    plain.load_state_dict(torch.load(buffers[0]))
    close(plain(tokens, retrieved), want)
    loaded = torch.load(buffers[1], weights_only=False)  # a whole module, of bytes written above
    assert torch.equal(loaded(tokens, retrieved), want)
    assert unswap(loaded)


def test_casts_autocast_checkpointing_and_compile(backend):
    model, swapped = retro(), retro()
    swap(swapped)
    tokens, retrieved = text(24)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = model(tokens, retrieved), swapped(tokens, retrieved)
    assert got.dtype == want.dtype
    close(got.float(), want.float(), 0.05)
    halves = [copy.deepcopy(x).bfloat16() for x in (model, swapped)]
    close(halves[1](tokens, retrieved).float(), halves[0](tokens, retrieved).float(), 0.05)

    module, original = modules_of(swapped)["decoder.layers.0.1.fn"], modules_of(model)["decoder.layers.0.1.fn"]
    x, context = torch.randn(2, 20, DIM), torch.randn(2, 2, K, R, DIM)
    rotary = model.decoder.rotary_pos_emb
    options = {"context": context, "pos_emb": (rotary(M, device="cpu", offset=M - 1), rotary(R, device="cpu"))}
    x = x.requires_grad_()
    recomputed = torch.utils.checkpoint.checkpoint(lambda y: module(y, **options), x, use_reentrant=False)
    recomputed.sum().backward()
    got, x.grad = x.grad, None
    original(x, **options).sum().backward()
    close(got, x.grad, 1e-4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(compiled(x, **options), original(x, **options))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
@pytest.mark.parametrize("order", ["swap first", "wrap first"])
@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "fully_shard"])
def test_data_parallel_wrappers(reference, tmp_path, wrapper, order):
    """Names below `module.` (DDP) and classes derived on the fly (FSDP2) are found; hooks and sharding keep working."""
    model, want = retro(), retro()
    tokens, retrieved = text(24)
    labels = torch.cat([tokens, tokens[:, :1]], 1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        if order == "swap first":
            swap(model)
        if wrapper == "fully_shard":
            for module in modules_of(model).values():
                torch.distributed.fsdp.fully_shard(module)
            wrapped = torch.distributed.fsdp.fully_shard(model)
        else:
            wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        assert len(swap(wrapped).replaced) == (0 if order == "swap first" else 7)
        wrapped(labels, retrieved, return_loss=True).backward()
        gradients = [x.grad for x in model.parameters()]
        if wrapper == "fully_shard":
            gradients = [x if x is None else x.full_tensor() for x in gradients]
    finally:
        torch.distributed.destroy_process_group()
    want(labels, retrieved, return_loss=True).backward()
    for got, parameter in zip(gradients, want.parameters()):
        if parameter.grad is not None:
            close(got, parameter.grad, 1e-4)


# Calls that the fused operation does not cover: never in silence


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(base, "_warned", set())


def draws(module, arguments, options, number=600):
    """Mean and standard deviation of `number` draws, which are sequences of one batch."""

    def repeat(x):
        return None if x is None else x.repeat(number, *[1] * (x.dim() - 1))

    repeated = {name: x if name == "pos_emb" else repeat(x) for name, x in options.items()}
    with torch.no_grad():
        out = module(*map(repeat, arguments), **repeated)
    outs = out.unflatten(0, (number, -1))
    return outs.mean(0), outs.std(0)


@pytest.mark.parametrize("kind", ["chunked", "self", "cross", "causal"])
def test_dropout_in_training_has_the_peers_distribution(backend, unwarned, kind):
    """Fused, without a warning: mean and spread of the outputs are the peer's, its random numbers are not. In eval()
    dropout is off."""
    if kind == "chunked":
        module = peer(dropout=0.3)
        arguments, options = call(module, 12)
    else:
        module = Attention(
            DIM,
            dim_head=D,
            heads=H,
            dropout=0.3,
            causal=kind == "causal",
            context_dim=CONTEXT if kind == "cross" else None,
        )
        arguments, options = attention_call(kind)
    swapped = copy.deepcopy(module)
    report = swap(swapped)
    assert "dropout 0.3" in report.notes[""]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(5)
        one = swapped(*arguments, **options)
        torch.manual_seed(5)
        assert torch.equal(swapped(*arguments, **options), one)
        (mean, spread), (want_mean, want_spread) = (draws(x, arguments, options) for x in (swapped, module))
        assert not torch.equal(swapped(*arguments, **options), one)
        close(swapped.eval()(*arguments, **options), module.eval()(*arguments, **options))
    # Each mean is 600 draws' and so off by spread / sqrt(600) = 4 %; two of them differ by five such at most, or so.
    assert ((mean - want_mean).abs() <= 0.3 * want_spread.clamp(min=1e-6)).all()
    torch.testing.assert_close(spread, want_spread, rtol=0.35, atol=1e-5)


def test_a_model_with_dropout_trains_alike(backend):
    """The mean loss of 40 passes, and no gradient missing."""
    options = {"dec_attn_dropout": 0.2, "enc_attn_dropout": 0.2}
    model, swapped = retro(**options), retro(**options)
    swap(swapped)
    tokens, retrieved = text(20)
    labels = torch.cat([tokens, tokens[:, :1]], 1)
    means = []
    for x in (model, swapped):
        loss = sum(x.train()(labels, retrieved, return_loss=True) for _ in range(40)) / 40
        loss.backward()
        means.append(loss.item())
    assert abs(means[1] - means[0]) < 0.02 * means[0]
    for want, got in zip(model.parameters(), swapped.parameters()):
        assert (want.grad is None) == (got.grad is None)


def test_hooks_on_the_inner_attention_still_run(reference, unwarned):
    module = peer()
    arguments, options = call(module, 16)
    want = module(*arguments, **options)
    swap(module)
    seen = []
    handle = module.cross_attn.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="hooks"):
        assert torch.equal(module(*arguments, **options), want)
    assert seen == [1]
    handle.remove()
    module.cross_attn.to_q.register_forward_hook(lambda *_: seen.append(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(module(*arguments, **options), want)
    assert seen == [1, 2]


class Halved(nn.Module):
    def forward(self, x):
        return 0.5 * x


@pytest.mark.parametrize("part", ["decoder.layers.0.0.fn", "decoder.layers.0.1.fn.cross_attn"])
@pytest.mark.parametrize("change", ["class", "forward"])
def test_a_dropout_that_is_changed_after_the_swap_is_called(part, change, unwarned):
    model, (tokens, retrieved) = retro().eval(), text(20)
    swapped = copy.deepcopy(model)
    swap(swapped)
    for x in (model, swapped):
        if change == "class":
            x.get_submodule(part).dropout = Halved()
        else:
            x.get_submodule(part).dropout.forward = lambda y: 0.5 * y
    with pytest.warns(UserWarning, match="own forward"):
        close(swapped(tokens, retrieved), model(tokens, retrieved))


def test_with_the_positions_of_the_paper_a_changed_dropout_is_refused():
    module = peer()
    swap(module, positions="paper")
    module.cross_attn.dropout = Halved()
    arguments, options = call(module, 16)
    with pytest.raises(ValueError, match=r"its dropout is a Halved, expected nn\.Dropout"):
        module(*arguments, **options)


def test_unusual_calls_keep_the_peers_behaviour(reference, unwarned):
    """Angles with two different halves run its own code; what it refuses, it still refuses."""
    module = peer()
    swapped = copy.deepcopy(module)
    swap(swapped)
    arguments, options = call(module, 16)
    odd = {**options, "pos_emb": (torch.randn(1, 1, M, 32), torch.randn(1, 1, R, 32))}
    with pytest.warns(UserWarning, match="halves differ"):
        assert torch.equal(swapped(*arguments, **odd), module(*arguments, **odd))
    learned = {**options, "pos_emb": tuple(x.clone().requires_grad_() for x in options["pos_emb"])}
    with pytest.warns(UserWarning, match="gradient"):
        swapped(*arguments, **learned).sum().backward()
    assert learned["pos_emb"][1].grad is not None
    surplus = {**options, "context": torch.cat([options["context"]] * 2, 1), "context_mask": None}
    for x in (module, swapped):
        with pytest.raises(Exception):  # noqa: B017  (whatever the peer raises)
            x(*arguments, **surplus)
    paper = copy.deepcopy(module)
    swap(paper, positions="paper")
    with pytest.raises(ValueError, match="halves differ"):
        paper(*arguments, **odd)


def test_to_layer_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="Linear"):
        retro_pytorch.to_layer(nn.Linear(2, 2))
