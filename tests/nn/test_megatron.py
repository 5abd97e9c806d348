"""The encoder and the chunked cross-attention against Megatron-core 0.15.3's own modules, with their weights copied.

Megatron-core is written for GPUs and for Transformer Engine; three stand-ins let it run in one process on a CPU."""

import pytest
import torch

pytest.importorskip(
    "megatron.core.models.retro",
    reason="megatron-core 0.15.3, the last release with RETRO, is not installed (pip install megatron-core==0.15.3)",
)

from benchmarks import peers
from retro_kernels.nn import ChunkedCrossAttention, NeighbourEncoder

DIM, H, M, K, R, B, LAYERS = 16, 4, 4, 2, 8, 2, 2


@pytest.fixture(scope="module")
def megatron():
    """-> `build()`, a decoder's first chunked cross-attention, which owns the encoder,
    and the bias-dropout-add behind it, both in fp64."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.retro.config import RetroConfig
    from megatron.core.models.retro.decoder_attention import RetroDecoderBiasDropoutAdd
    from megatron.core.models.retro.decoder_spec import get_retro_decoder_layer_local_spec
    from megatron.core.models.retro.encoder_spec import get_retro_encoder_block_spec
    from megatron.core.transformer.spec_utils import build_module

    def build():
        config = RetroConfig(
            num_layers=12,
            hidden_size=DIM,
            num_attention_heads=H,
            retro_chunk_length=M,
            retro_num_neighbors=K,
            retro_num_retrieved_chunks=R // M,
            retro_encoder_num_layers=LAYERS,
            retro_split_preprocessing="98,2,0",
            use_cpu_initialization=True,
            bias_dropout_fusion=False,
            retro_encoder_hidden_dropout=0.0,
            retro_encoder_attention_dropout=0.0,
            hidden_dropout=0.0,
            attention_dropout=0.0,
        )
        encoder_spec = get_retro_encoder_block_spec(config, use_transformer_engine=False)
        spec = get_retro_decoder_layer_local_spec(encoder_spec).submodules.cross_attention
        module = build_module(spec, config=config, layer_number=1).double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=0.5)
        return module

    def add_bias(outcome, residual):
        bias_dropout_add = get_bias_dropout_add(False, False)
        return RetroDecoderBiasDropoutAdd._forward(outcome, residual, 0.0, M, bias_dropout_add)

    with peers.megatron():
        yield build, add_bias


def per_head(tensor, parts):
    """Rows of `parts` interleaved by head -> one tensor for each part."""
    return [x.flatten(0, 1) for x in tensor.unflatten(0, (H, parts, -1)).unbind(1)]


def attention_weights(ours, theirs):
    """Name here -> their parameter, for one attention."""
    state = {}
    for kind in ("weight", "bias"):
        if hasattr(theirs, "linear_qkv"):
            parts = per_head(getattr(theirs.linear_qkv, kind), 3)
        else:
            parts = [getattr(theirs.linear_q, kind), *per_head(getattr(theirs.linear_kv, kind), 2)]
        for name, part in zip(("query", "key", "value", "out"), [*parts, getattr(theirs.linear_proj, kind)]):
            state[f"{ours}.w_{name}.{kind}".removeprefix(".")] = part
    return state


def encoder_weights(block):
    state = {}
    for i, layer in enumerate(block.layers):
        state |= attention_weights(f"layers.{i}.self_attention", layer.self_attention)
        mlp_norm = getattr(layer.pre_mlp_layernorm, "norm", layer.pre_mlp_layernorm)
        parts = {
            "self_norm": layer.input_layernorm,
            "feed_forward_norm": mlp_norm,
            "feed_forward.w_in": layer.mlp.linear_fc1,
            "feed_forward.w_out": layer.mlp.linear_fc2,
        }
        if hasattr(layer.cross_attention, "attn"):
            state |= attention_weights(f"layers.{i}.cross_attention", layer.cross_attention.attn)
            parts["cross_norm"] = layer.pre_cross_attn_layernorm
        for name, module in parts.items():
            state |= {f"layers.{i}.{name}.{kind}": getattr(module, kind) for kind in ("weight", "bias")}
    return state


@pytest.mark.parametrize("n", [3, 4, 10, 12])
def test_encoder_and_chunked_cross_attention_with_copied_weights(megatron, n):
    """Encoded neighbours, the layer's output, and the gradients of inputs and of every parameter to 1e-10, for whole
    chunks and for a first chunk that is incomplete, whose zeros the encoder attends to."""
    build, add_bias = megatron
    module = build()
    chunks = -(-n // M)
    encoder = NeighbourEncoder.megatron(
        DIM, num_heads=H, chunk_size=M, retrieved_length=R, dropout=0.0, hidden_dropout=0.0, backend="reference"
    ).double()
    layer = ChunkedCrossAttention.megatron(DIM, num_heads=H, chunk_size=M, backend="reference").double()
    encoder.load_state_dict(encoder_weights(module.encoder))
    layer.load_state_dict(attention_weights("", module.attn))

    hidden, embeddings = torch.randn(B, n, DIM).double(), torch.randn(B, chunks, K, R, DIM).double()
    leaves = [[x.clone().requires_grad_() for x in (hidden, embeddings)] for _ in range(2)]
    theirs_hidden, theirs_embeddings = leaves[0]
    outcome = module(
        hidden_states=theirs_hidden.transpose(0, 1),
        attention_mask=None,
        key_value_states=theirs_embeddings.permute(3, 0, 1, 2, 4).flatten(1, 3),
    )
    want_encoded = outcome["context"].view(R, K, B, chunks, DIM).permute(2, 3, 1, 0, 4)
    want = add_bias(outcome, torch.zeros(n, B, DIM).double()).transpose(0, 1)
    encoded = encoder(leaves[1][1], leaves[1][0])
    got = layer(leaves[1][0], encoded)
    torch.testing.assert_close(encoded, want_encoded, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)

    gradient = torch.randn_like(want)
    want.backward(gradient)
    got.backward(gradient)
    for ours, theirs in zip(leaves[1], leaves[0]):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-10, rtol=1e-10)
    # Their gradients, arranged as the weights were.
    for parameter in module.parameters():
        parameter.data = parameter.grad
    for ours, wanted in ((encoder, encoder_weights(module.encoder)), (layer, attention_weights("", module.attn))):
        assert dict(ours.named_parameters()).keys() == wanted.keys()
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name].data, atol=1e-9, rtol=1e-9, msg=name)
