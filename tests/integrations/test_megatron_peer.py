"""`swap` and `Retro.from_peer` against Megatron-core 0.15.3's own RETRO, and checkpoints in its format "torch".

    pip install --no-deps --target SOMEWHERE megatron-core==0.15.3 && PYTHONPATH=SOMEWHERE pytest tests/integrations

Megatron-core is written for GPUs and for Transformer Engine; three stand-ins let it run in one process on a CPU. Its
shards are cut here, as its layers divide, and legacy names are given to its weights: the package has no trainer that
saves. What Megatron-LM's own trainers save is in test_megatron_checkpoint.py."""

import argparse
import importlib.util
import random
import re

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip(
    "megatron.core.models.retro",
    reason="megatron-core 0.15.3, the last release with RETRO, is not installed (pip install megatron-core==0.15.3)",
)

from benchmarks import peers
from retro_kernels.integrations import base, swap
from retro_kernels.models import Neighbours, Retro

M, K, R, VOCABULARY = 4, 2, 8, 64


@pytest.fixture(scope="module")
def build():
    """-> `build(seed, **options)`, a whole RetroModel of six layers, the last with chunked cross-attention."""
    from megatron.core.models.retro import RetroConfig, RetroModel, get_retro_decoder_block_spec

    def make(seed=0, positions="learned_absolute", tied=True, **options):
        torch.manual_seed(seed)
        settings = {
            "num_layers": 6,
            "hidden_size": 16,
            "num_attention_heads": 4,
            "retro_chunk_length": M,
            "retro_num_neighbors": K,
            "retro_num_retrieved_chunks": R // M,
            "retro_split_preprocessing": "98,2,0",
            "use_cpu_initialization": True,
            "bias_dropout_fusion": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "retro_encoder_hidden_dropout": 0.0,
            "retro_encoder_attention_dropout": 0.0,
            **options,
        }
        if importlib.util.find_spec("megatron.core.transformer.torch_norm") is None:
            settings["normalization"] = "LayerNorm"  # without Apex, releases to 0.9.0 have no other
        config = RetroConfig(**settings)
        model = RetroModel(
            config=config,
            transformer_layer_spec=get_retro_decoder_block_spec(config, use_transformer_engine=False),
            vocab_size=VOCABULARY,
            max_sequence_length=32,
            share_embeddings_and_output_weights=tied,
            position_embedding_type=positions,
            rotary_percent=0.5,
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    with peers.megatron():
        yield make


def arguments(tokens, neighbours, mask=None):
    """As Megatron's trainer gives them: neighbours [b, l, k, r] as [b * l * k, r]."""
    b, n = tokens.shape
    context = neighbours.flatten(0, 2)
    mask = torch.ones(1, 1, n, n, dtype=torch.bool).triu(1) if mask is None else mask
    positions = torch.arange(R).expand_as(context)
    named = {"context_input_ids": context, "context_position_ids": positions, "context_mask": None}
    return (tokens, torch.arange(n).expand(b, n), mask), named


def call(model, tokens, neighbours, mask=None):
    given, named = arguments(tokens, neighbours, mask)
    return model(*given, **named)


def text(n, b=2):
    return torch.randint(VOCABULARY, (b, n)), torch.randint(VOCABULARY, (b, -(-n // M), K, R))


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(want.abs().max().item(), 1e-3))


def random_case(seed):
    draw = random.Random(seed)
    form = draw.choice(
        [
            {},
            {"bias_activation_fusion": True},
            {"add_bias_linear": False, "gated_linear_unit": True, "activation_func": F.silu},
            {"add_bias_linear": False, "add_qkv_bias": True, "normalization": "RMSNorm"},
            {"apply_query_key_layer_scaling": True},
        ]
    )
    return {
        "positions": draw.choice(["learned_absolute", "rope", "none"]),
        "tied": draw.random() < 0.5,
        "num_layers": draw.choice([6, 9]),
        "retro_encoder_num_layers": draw.choice([1, 2]),
        "rotary_interleaved": draw.random() < 0.5,
        **form,
    }


@pytest.mark.parametrize("block", range(10))
def test_swapped_and_converted_models_agree(build, block):
    """100 configurations and lengths, whole chunks or not: logits and every gradient of the swapped model, logits of
    the converted one, and the bits back after undo."""
    for seed in range(10 * block, 10 * block + 10):
        options = random_case(seed)
        model, swapped = build(seed, **options), build(seed, **options)
        report = swap(swapped)
        assert len(report.replaced) == options["num_layers"] + options["retro_encoder_num_layers"] + 2 + (
            options["num_layers"] == 9
        )
        tokens, neighbours = text(2 + seed % 13)
        want, got = call(model, tokens, neighbours), call(swapped, tokens, neighbours)
        close(got, want)
        gradient = torch.randn_like(want)
        want.backward(gradient)
        got.backward(gradient)
        largest = max(x.grad.abs().max().item() for x in model.parameters() if x.grad is not None)
        for (name, x), y in zip(model.named_parameters(), swapped.parameters()):
            assert (x.grad is None) == (y.grad is None), name
            if x.grad is not None:
                torch.testing.assert_close(y.grad, x.grad, rtol=2e-4, atol=4e-6 * largest, msg=name)
        close(Retro.from_peer(swapped)(tokens, neighbours), want)
        report.undo()
        assert torch.equal(call(swapped, tokens, neighbours), call(model, tokens, neighbours))


def test_half_precision_is_no_worse_than_the_unswapped(build):
    exact, half, swapped = (build(1) for _ in range(3))
    tokens, neighbours = text(11)
    want = call(exact, tokens, neighbours)
    half.bfloat16()
    swapped.bfloat16()
    swap(swapped)
    errors = [(call(x, tokens, neighbours).float() - want).abs().max().item() for x in (swapped, half)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.filterwarnings("ignore")
def test_export(build):
    model, swapped = build(1).eval(), build(1).eval()
    swap(swapped)
    given, named = arguments(*text(9))
    exported = torch.export.export(swapped, given, named, strict=False)
    close(exported.module()(*given, **named), model(*given, **named))


@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_mask_it_is_fused(build, monkeypatch):
    """(It breaks into graphs. A mask's content cannot be looked at there: with one Megatron's code runs. Without
    one, its code makes one, on a GPU.)"""
    model, swapped = build(1).eval(), build(1).eval()
    assert "if attention_mask is None" in swap(swapped).notes["decoder.layers.0.self_attention.core_attention"]
    (tokens, positions, mask), named = arguments(*text(9))
    want = model(tokens, positions, mask, **named)
    core = model.decoder.layers[0].self_attention.core_attention
    monkeypatch.setattr(type(core), "forward", lambda *_, **__: 1 / 0)
    compiled = torch.compile(swapped, backend="eager")
    close(compiled(tokens, positions, None, **named), want)


def test_dropout_has_the_same_distribution(build):
    options = {"attention_dropout": 0.3, "retro_encoder_attention_dropout": 0.3}
    model, swapped = build(2, **options), build(2, **options)
    assert "dropout 0.3" in swap(swapped).notes["decoder.layers.5.cross_attention"]
    tokens, neighbours = text(9)
    with torch.no_grad():
        draws = [torch.stack([call(x.train(), tokens, neighbours) for _ in range(100)]) for x in (model, swapped)]
        close(call(swapped.eval(), tokens, neighbours), call(model.eval(), tokens, neighbours))
    spread = draws[0].std(0).clamp(min=1e-6)
    assert ((draws[0].mean(0) - draws[1].mean(0)).abs() <= 0.5 * spread).all()  # 100 draws' means are off by 0.1 each
    assert 0.8 < draws[1].std(0).mean() / draws[0].std(0).mean() < 1.25


def test_masks_and_hooks_that_the_fused_attention_has_not(build, monkeypatch):
    monkeypatch.setattr(base, "_warned", set())
    model, swapped = build(3), build(3)
    swap(swapped)
    tokens, neighbours = text(9)
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).triu(1)
    mask[..., 5:, :5] = True  # a document ends
    with pytest.warns(UserWarning, match="a mask of its own"):
        close(call(swapped, tokens, neighbours, mask), call(model, tokens, neighbours, mask))
    memory = torch.ones(1, 1, 9, 9, dtype=torch.bool).triu(1).numpy()
    plain = torch.from_numpy(memory)
    close(call(swapped, tokens, neighbours, plain), call(model, tokens, neighbours, plain))
    memory[..., 5:, :5] = True
    other = torch.from_numpy(memory)  # another mask where that one was: the allocator does that, too
    close(call(swapped, tokens, neighbours, other), call(model, tokens, neighbours, other))
    with torch.inference_mode():
        given = mask.clone()
        close(call(swapped, tokens, neighbours, given), call(model, tokens, neighbours, given))
    seen = []
    swapped.decoder.layers[5].cross_attention.attn.core_attention.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="has hooks or was changed"):
        close(call(swapped, tokens, neighbours), call(model, tokens, neighbours))
    assert seen == [1]


def test_what_is_not_the_known_version_is_skipped(build, monkeypatch):
    from megatron.core.models.retro.encoder_attention import RetroEncoderCrossAttention

    monkeypatch.setattr(RetroEncoderCrossAttention, "forward", lambda self, *_, **__: None)
    model = build(4)
    model.decoder.layers[0].self_attention.core_attention.scale_mask_softmax.window_size = (3, 0)
    report = swap(model, strict=False)
    inside = "decoder.layers.5.cross_attention.encoder.layers.0.cross_attention"
    assert set(report.skipped) == {"decoder.layers.0.self_attention.core_attention", inside}
    assert "not that of megatron-core 0.6.0 to 0.15.3" in report.skipped[inside]
    assert "sliding window" in report.skipped["decoder.layers.0.self_attention.core_attention"]


ARGUMENTS = {
    "num_layers": 6,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "retro_chunk_length": M,
    "retro_num_neighbors": K,
    "retro_num_retrieved_chunks": R // M,
    "max_position_embeddings": 32,
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "add_bias_linear": True,
}


def legacy_names(names):
    """Of the legacy Megatron, by peers.md."""
    crossing = {x.partition(".cross_attention.attn.")[0] for x in names if ".cross_attention.attn." in x}
    found = {}
    for name in names:
        new = name
        layer = re.match(r"(.*\.layers\.\d+)\.pre_mlp_layernorm\.(?:norm\.)?(\w+)$", name)
        if layer:
            kind = "post_inter_attention_norm" if layer[1] in crossing else "post_attention_norm"
            new = f"{layer[1]}.{kind}.{layer[2]}"
        for old, later in (
            ("embedding.", "language_model.embedding."),
            ("decoder.", "language_model.encoder."),
            ("output_layer.", "language_model.output_layer."),
        ):
            new = later + new.removeprefix(old) if new.startswith(old) else new
        for old, later in (
            (".cross_attention.encoder.", ".retriever."),
            (".input_layernorm.", ".input_norm."),
            (".pre_cross_attn_layernorm.", ".post_attention_norm."),
            (".self_attention.linear_qkv.", ".self_attention.query_key_value."),
            (".self_attention.linear_proj.", ".self_attention.dense."),
            (".cross_attention.attn.linear_q.", ".inter_attention.query."),
            (".cross_attention.attn.linear_kv.", ".inter_attention.key_value."),
            (".cross_attention.attn.linear_proj.", ".inter_attention.dense."),
            (".mlp.linear_fc1.", ".mlp.dense_h_to_4h."),
            (".mlp.linear_fc2.", ".mlp.dense_4h_to_h."),
        ):
            new = new.replace(old, later)
        found[name] = new
    return found


def divide(name, x, size, gated):
    """A tensor's shards, as Megatron's column- and row-parallel layers hold them."""
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return x.chunk(size, dim=1)
    rows = ("linear_qkv", "linear_q.", "linear_kv", "linear_fc1", "word_embeddings", "output_layer")
    if any(mark in name for mark in rows):
        if gated and "linear_fc1" in name:
            return [torch.cat(parts) for parts in zip(*(half.chunk(size) for half in x.chunk(2)))]
        return x.chunk(size)
    return [x] * size


def save(folder, model, size=1, legacy=False, **arguments):
    """A checkpoint of format "torch" -> its folder."""
    from megatron.core.transformer.enums import AttnMaskType

    state = {name: x for name, x in model.state_dict().items() if isinstance(x, torch.Tensor)}
    names = legacy_names(state) if legacy else {name: name for name in state}
    args = argparse.Namespace(
        **{**ARGUMENTS, "tensor_model_parallel_size": size, "attn_mask_type": AttnMaskType.causal, **arguments}
    )
    for rank in range(size):
        part = folder / "iter_0000007" / f"mp_rank_{rank:02d}"
        part.mkdir(parents=True)
        shard = {names[name]: divide(name, x, size, args.__dict__.get("swiglu"))[rank] for name, x in state.items()}
        tree = {"args": args, "iteration": 7, "checkpoint_version": 3.0, "model": shard}
        torch.save(tree, part / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gated", [False, True])
def test_distributed_checkpoints(build, tmp_path, monkeypatch, gated):
    """As Megatron-core's own dist_checkpointing saves them (it waits for a GPU first)."""
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.enums import AttnMaskType

    form = {"gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False} if gated else {}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    model = build(9, tied=gated, **form)
    args = {**ARGUMENTS, "attn_mask_type": AttnMaskType.causal, "swiglu": gated, "add_bias_linear": not gated}
    folder = tmp_path / "iter_0000007"
    folder.mkdir()
    held = {"args": argparse.Namespace(**args), "iteration": 7, "checkpoint_version": 3.0}
    try:
        dist_checkpointing.save({**held, "model": model.sharded_state_dict()}, str(folder))
    except RuntimeError as error:
        if "_write_item()" not in str(error):
            raise
        pytest.skip(f"this release cannot save with this torch: {error}")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    tokens, neighbours = text(10)
    close(Retro.from_peer(tmp_path)(tokens, neighbours), call(model, tokens, neighbours))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_checkpoints_with_merged_shards(build, tmp_path, size):
    for i, (options, arguments) in enumerate(
        [
            ({}, {}),
            (
                {"gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False, "positions": "rope"},
                {
                    "swiglu": True,
                    "add_bias_linear": False,
                    "position_embedding_type": "rope",
                    "rotary_percent": 0.5,
                    "rotary_base": 10000,
                },
            ),
        ]
    ):
        model = build(5, tied=False, **options)
        folder = save(tmp_path / str(i), model, size, **arguments)
        retro = Retro.from_peer(folder)
        tokens, neighbours = text(10)
        close(retro(tokens, neighbours), call(model, tokens, neighbours))
        cut = Retro.from_peer(folder, vocab_size=50)  # of the padding
        tokens, neighbours = tokens % 50, neighbours % 50
        close(cut(tokens, neighbours), call(model, tokens, neighbours)[..., :50])


def test_legacy_checkpoints(build, tmp_path):
    """The layout of InstructRetro's: other names, the encoder's cross-attention added to its input, and the gate."""
    model = build(6)
    folder = save(tmp_path / "legacy", model, 2, legacy=True, retro_attention_gate=0)
    retro = Retro.from_peer(folder)
    assert retro.config.encoder_cross_residual == "input"
    assert retro.config.cross_attention_gate == 0.0
    tokens, neighbours = text(10)
    close(retro(tokens, neighbours), retro(tokens))  # the recipe's gate of 0 shuts the neighbours out
    told = {"encoder_cross_residual": "normed", "cross_attention_gate": False}
    close(Retro.from_peer(folder, **told)(tokens, neighbours), call(model, tokens, neighbours))


def test_generation_of_a_swapped_model(build):
    """The prompt ends a chunk: its first new token is the model's own, and so is the one after the next whole chunk."""
    model = build(7)
    report = swap(model)
    lookup = lambda chunks: (chunks.sum(-1)[:, None, None] + torch.arange(R) + 5 * torch.arange(K)[:, None]) % 64  # noqa: E731

    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    made = report.generate([prompt], retriever=lambda chunks: Neighbours(lookup(chunks)), max_new_tokens=9)
    sequence = made.sequences[0].tolist()
    for n in (10, 14, 18):
        chunks = torch.tensor([0] * (-n % M) + sequence[:n]).view(-1, M)
        logits = call(model, torch.tensor([sequence[:n]]), lookup(chunks)[None])
        assert int(logits[0, -1].argmax()) == sequence[n]


def test_a_part_of_ones_own_is_refused(build):
    """Which a layer spec may put there, with weights of the same names."""
    model = build(1)
    part = model.decoder.layers[0].mlp
    part.__class__ = type("OtherMLP", (type(part),), {"forward": lambda self, x: (2 * x, None)})
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.mlp is a OtherMLP, of neither torch\. nor megatron\."):
        Retro.from_peer(model)
    model = build(1)
    model.decoder.layers[1].input_layernorm.eps = 1.0
    with pytest.raises(ValueError, match=r"eps is 1\.0 in decoder\.layers\.1\.input_layernorm"):
        Retro.from_peer(model)


def test_half_matching_checkpoints_are_refused(build, tmp_path):
    model = build(8)

    def changed(name, change, size=2):
        folder = save(tmp_path / name, model, size)
        shard = folder / "iter_0000007" / "mp_rank_01" / "model_optim_rng.pt"
        with torch.serialization.safe_globals([argparse.Namespace]):
            tree = torch.load(shard, weights_only=False)  # of a file written above
        change(tree)
        torch.save(tree, shard)
        return folder

    missing = save(tmp_path / "missing", model, 2)
    (missing / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt").unlink()
    one = save(tmp_path / "one", model, 1, tensor_model_parallel_size=4)
    staged = save(tmp_path / "staged", model, 1)
    (staged / "iter_0000007" / "mp_rank_00").rename(staged / "iter_0000007" / "mp_rank_00_000")
    spread = save(tmp_path / "spread", model, 1)
    (spread / "iter_0000007" / ".metadata").write_bytes(b"")
    gone = save(tmp_path / "gone", model, 1)
    (gone / "latest_checkpointed_iteration.txt").write_text("8")
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, kind, message in (
        (missing, FileNotFoundError, "mp_rank_00/model_optim_rng.pt is not there"),
        (one, ValueError, "got 1 shards, expected 4"),
        (staged, ValueError, "a part of a pipeline"),
        (spread, ValueError, "no index that can be read"),
        (gone, FileNotFoundError, "iter_0000008 is not there"),
        (empty, ValueError, "got a folder, expected a checkpoint's file"),
        (changed("other run", lambda x: x.update(iteration=9)), ValueError, "expected shards of one run"),
        (
            changed("other norm", lambda x: x["model"]["decoder.layers.0.input_layernorm.weight"].add_(1)),
            ValueError,
            "input_layernorm.weight that differs between shards",
        ),
        (
            changed("a tensor less", lambda x: x["model"].pop("decoder.layers.0.mlp.linear_fc1.bias")),
            ValueError,
            "linear_fc1.bias in some of the shards only",
        ),
        (changed("version", lambda x: x.update(checkpoint_version=1.0)), ValueError, "expected shards of one run"),
        (
            changed("code", lambda x: x["model"].update(extra=re.compile("a"))),
            ValueError,
            "extra that is no tensor",
        ),
    ):
        with pytest.raises(kind, match=message):
            Retro.from_peer(folder)
    scale = lambda x: x["model"]["decoder.layers.0.input_layernorm.weight"].mul_(1.001)  # noqa: E731
    with pytest.warns(UserWarning, match="copies of 1 tensors have drifted apart"):
        Retro.from_peer(changed("drift", scale))
