"""The sizes of the paper, and configurations that do not fit."""

from __future__ import annotations

import pytest
import torch

from retro_kernels.models import PRESETS, Retro, RetroConfig

# Tables 2 and 10: the baseline, RETRO as it is called, and the baseline with one table of 128,000 tokens; in millions.
PAPER = {
    "retro-172m": (132, 172, 247),
    "retro-425m": (368, 425, 564),
    "retro-1.5b": (1309, 1500, 1574),
    "retro-7.5b": (6982, 7500, 7505),
}


@pytest.mark.parametrize("name", PAPER)
def test_parameters_are_the_papers(name):
    model = Retro(RetroConfig.preset(name), device="meta")
    counts = model.count_parameters()
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    decoder = counts["decoder"] / 1e6
    retro = decoder + (counts["cross-attention"] + counts["encoder"]) / 1e6
    baseline, named, with_table = PAPER[name]
    assert decoder == pytest.approx(baseline, rel=2e-3)
    assert decoder + model.embedding.weight.numel() / 1e6 == pytest.approx(with_table, rel=3e-3)
    if name in ("retro-172m", "retro-425m"):  # the paper rounds the names of the other two
        assert retro == pytest.approx(named, rel=4e-3)
    else:
        assert round(retro / 1e3, 1) == named / 1e3
    # Every attention has a projection of its own of the relative positions: without them nothing comes out.
    projections = sum(
        p.numel() for key, p in model.blocks.named_parameters() if key.endswith("relative.projection.weight")
    )
    assert decoder - projections / 1e6 < 0.95 * baseline


def test_cross_attention_from_layer_nine_gives_another_count_than_the_papers():
    """Table 10 says layer 9 for the 1.5B model, section 2.5 layer 6: its name is right only with the second."""
    model = Retro(RetroConfig.preset("retro-1.5b", cross_attention_layers=tuple(range(9, 25, 3))), device="meta")
    counts = model.count_parameters()
    assert round((sum(counts.values()) - counts["embeddings"]) / 1e9, 1) == 1.4


def test_flops_are_those_of_the_matrix_products():
    """Counted by PyTorch, for a configuration whose attentions it counts nothing of: they are the library's own."""
    from torch.utils.flop_counter import FlopCounterMode

    config = RetroConfig.preset("tiny")
    model = Retro(config)
    n = 32
    tokens, neighbours = torch.zeros(1, n, dtype=torch.int64), torch.zeros(1, 8, 2, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, neighbours)
    mine = config.forward_flops(n)
    h, d, m, k, r = config.num_heads, config.head_dim, config.chunk_size, 2, 8
    inner = config.encoder_heads * config.encoder_head_dim
    attentions = config.num_layers * 6 * n * (n + 1) // 2 * h * d
    attentions += len(config.cross_attention_layers) * 6 * n * k * r * h * d
    attentions += 2 * 6 * n * k * r * r // m * inner + 6 * n * k * r * inner
    # Tokens before the first chunk are not projected.
    skipped = len(config.cross_attention_layers) * 4 * (m - 1) * config.model_dim * h * d
    assert sum(mine.values()) - attentions - skipped == counter.get_total_flops()


@pytest.mark.parametrize("name", PRESETS)
def test_a_dictionary_holds_all(name):
    config = RetroConfig.preset(name, tokenizer="bytes", eos_token_id=3)
    assert RetroConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_dim": 0}, "model_dim: got 0"),
        ({"num_heads": 3}, "head_dim: got None"),
        ({"num_kv_heads": 3}, "num_kv_heads: got 3"),
        ({"cross_attention_layers": (2, 4)}, "cross_attention_layers: got .2, 4., expected numbers from 1 to 3"),
        ({"cross_attention_layers": (3, 2)}, "rising"),
        ({"positions": "absolute"}, "positions: got 'absolute'"),
        ({"activation": "tanh"}, "activation: got 'tanh'"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
        ({"norm_eps": 0.0}, "norm_eps: got 0.0"),
        ({"initializer_range": -0.1}, "initializer_range: got -0.1"),
        ({"encoder_dim": 15}, "encoder_dim: got 15"),
        ({"positions": "rotary", "encoder_head_dim": 7}, "encoder_head_dim: got 7"),
        ({"eos_token_id": 64}, "eos_token_id: got 64"),
        ({"pad_token_id": -1}, "pad_token_id: got -1"),
        ({"cross_positions": "absolute"}, "cross_positions: got 'absolute'"),
        ({"positions": "none", "self_positions": "rotary", "rotary_dim": 3}, "rotary_dim: got 3"),
        ({"norm": "batch"}, "norm: got 'batch'"),
        ({"align": "middle"}, "align: got 'middle'"),
        ({"attention_biases": ("up",)}, "biases: got"),
        ({"encoder_dropout": 1.0}, "encoder_dropout: got 1.0"),
        ({"embedding_dim": 8}, "embedding_dim: got 8 with tied_embeddings=True, expected 32"),
        ({"readout_bias": True}, "readout_bias: got True with tied_embeddings=True"),
        ({"absolute_positions": "both"}, "encoder_dim: got 16 with absolute_positions"),
        ({"encoder_output_dim": 0}, "encoder_output_dim: got 0"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        RetroConfig.preset("tiny", **changes)


def test_a_retrofit_compares_every_field_of_the_decoder():
    """A decoder whose weights another model takes must compute the same there: a new field belongs to one list."""
    from retro_kernels.models.initialisation import OF_DECODER

    of_retrieval = {
        *(name for name in RetroConfig.__dataclass_fields__ if name.startswith(("cross_", "encoder_"))),
        *("chunk_size", "num_neighbours", "retrieved_length", "shared_embeddings", "null_slot", "align"),
        *("partial_chunk", "pad_token_id"),
    }
    of_training = {"max_length", "dropout", "hidden_dropout", "embedding_dropout", "feed_forward_dropout"}
    of_training |= {"initializer_range", "eos_token_id"}
    assert {*OF_DECODER} | of_retrieval | of_training == set(RetroConfig.__dataclass_fields__)


def test_a_stored_config_of_before_the_dialects_is_still_read():
    """What a config.json of an earlier version holds: none of the names that came with the dialects."""
    config = RetroConfig.preset("tiny-rotary")
    stored = config.to_dict()
    later = list(stored)[list(stored).index("eos_token_id") + 1 :]
    assert "norm_position" in later
    assert RetroConfig.from_dict({name: x for name, x in stored.items() if name not in later}) == config


def test_flops_of_a_dialect_are_those_of_the_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode

    config = RetroConfig.preset(
        "tiny", tied_embeddings=False, embedding_dim=24, encoder_output_dim=20, positions="none"
    )
    model, n = Retro(config), 32
    tokens, neighbours = torch.zeros(1, n, dtype=torch.int64), torch.zeros(1, 8, 2, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, neighbours)
    h, d, m, k, r = config.num_heads, config.head_dim, config.chunk_size, 2, 8
    inner = config.encoder_heads * config.encoder_head_dim
    attentions = config.num_layers * 4 * n * (n + 1) // 2 * h * d
    attentions += len(config.cross_attention_layers) * 4 * n * k * r * h * d
    attentions += 2 * 4 * n * k * r * r // m * inner + 4 * n * k * r * inner
    skipped = len(config.cross_attention_layers) * 4 * (m - 1) * config.model_dim * h * d
    assert sum(config.forward_flops(n).values()) - attentions - skipped == counter.get_total_flops()


def test_wrong_names_and_types_are_named():
    with pytest.raises(ValueError, match="name: got 'retro-1b'"):
        RetroConfig.preset("retro-1b")
    with pytest.raises(ValueError, match="unknown names width"):
        RetroConfig.from_dict({"width": 3})
    with pytest.raises(ValueError, match="vocab_size, model_dim, num_layers, num_heads missing"):
        RetroConfig.from_dict({})
    with pytest.raises(TypeError, match="tied_embeddings: got 1"):
        RetroConfig.preset("tiny", tied_embeddings=1)
    with pytest.raises(ValueError, match="encoder_dim: got 8 with shared_embeddings=True, expected 16, the model_dim"):
        RetroConfig.preset("tiny", encoder_dim=8, model_dim=16, shared_embeddings=True)
    with pytest.raises(TypeError, match="config: got dict"):
        Retro({})
