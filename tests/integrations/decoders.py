"""Tiny random decoders of transformers, and neighbours for them."""

from __future__ import annotations

import torch
import transformers

M, K, R, V = 8, 2, 12, 61
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama": ("Llama", {**GROUPED, "attention_bias": True}),
    "llama-scaled": ("Llama", {**GROUPED, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 10}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),
    "phi": ("Phi", {**GROUPED, "partial_rotary_factor": 0.5}),
    "gpt2": ("GPT2", {"vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoX", {**SIZES, "max_position_embeddings": 128, "rotary_pct": 0.25, "hidden_size": 64}),
    "opt": (
        "OPT",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 3,
            "ffn_dim": 48,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
        },
    ),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8, "sliding_window": 10, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", {**GROUPED, "head_dim": 8, "sliding_window": 10, "num_hidden_layers": 6}),
    "smollm3": ("SmolLM3", {**GROUPED, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
}


def decoder(name="llama", dtype=torch.float32, seed=0, **changes):
    """A random decoder in eval mode. Its weights are large enough that attention is not even."""
    kind, sizes = FAMILIES[name]
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    given = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, **sizes, **changes}
    torch.manual_seed(seed)
    named = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, named)(config(**given)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def batch(b=2, n=30, seed=1, k=K, r=R):
    """Tokens [b, n], neighbours and a mask [b, l, k, r]: neighbours end early, and one is missing."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V, (b, n), generator=generator)
    size = (b, n // M, k, r)
    neighbours = torch.randint(2, V, size, generator=generator)
    length = torch.randint(3, r + 1, size[:-1], generator=generator)
    if length.numel():
        length[0, 0, -1] = 0
    return ids, neighbours, torch.arange(r) < length[..., None]


SETTINGS = {"chunk_size": M, "num_neighbours": K, "retrieved_length": R}
