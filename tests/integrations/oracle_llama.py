"""A Llama with neighbours, written down token by token from its weights: it shares no code with transformers or us."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def logits(model, ids, neighbours, mask, gates, join, chunk_size, retrieved_length, cross=None):
    """ids [n], neighbours and mask [l, k, r], gates: layer -> [h] -> [n, vocab]. cross: the layer where a neighbour's
    tokens look at its chunk too, below which no token sees neighbours, and the gate [h]."""
    weights, config = dict(model.named_parameters()), model.config
    h, hk, d = config.num_attention_heads, config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)

    def weight(layer, name):
        return weights[f"model.layers.{layer}.{name}.weight"]

    def norm(x, scale):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * scale

    def turn(x, place):
        angle = place * frequency
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def heads(layer, name, x, count):
        bias = weights[f"model.layers.{layer}.self_attn.{name}.bias"]
        return (weight(layer, f"self_attn.{name}") @ x + bias).view(count, d)

    def decode(tokens, look):
        """-> hidden states [n, e]; look(layer, i, query, own logits, own values) gives what it attends to [h, d]."""
        x = list(weights["model.embed_tokens.weight"][tokens])
        for layer in range(config.num_hidden_layers):
            keys, values, new = [], [], []
            for i, state in enumerate(x):
                y = norm(state, weight(layer, "input_layernorm"))
                query = heads(layer, "q_proj", y, h)
                keys.append(turn(heads(layer, "k_proj", y, hk), i).repeat_interleave(h // hk, 0))
                values.append(heads(layer, "v_proj", y, hk).repeat_interleave(h // hk, 0))
                own = torch.stack([(turn(query, i) * key).sum(-1) for key in keys], -1) * d**-0.5
                seen = look(layer, i, query, own, torch.stack(values, 1), keys)
                bias = weights[f"model.layers.{layer}.self_attn.o_proj.bias"]
                state = state + weight(layer, "self_attn.o_proj") @ seen.flatten() + bias
                y = norm(state, weight(layer, "post_attention_layernorm"))
                gated = F.silu(weight(layer, "mlp.gate_proj") @ y) * (weight(layer, "mlp.up_proj") @ y)
                new.append(state + weight(layer, "mlp.down_proj") @ gated)
            x = new
        return norm(torch.stack(x), weights["model.norm.weight"])

    def read(tokens, chunk=None):
        """A neighbour's keys and values, layer -> [h, r, d] each; chunk: those of its chunk, where it looks at it."""
        found = {}

        def look(layer, i, query, own, values, keys):
            found[layer] = torch.stack(keys, 1), values
            out = torch.einsum("ht,htd->hd", own.softmax(-1), values)
            if chunk is None or layer != cross[0]:
                return out
            # The chunk at -m ... -1.
            first, (key, value) = chunk
            near = torch.stack([turn(x, -first - chunk_size) for x in key.unbind(1)], 1)
            shares = (torch.einsum("hd,htd->ht", turn(query, i), near) * d**-0.5).softmax(-1)
            return out + cross[1][:, None] * torch.einsum("ht,htd->hd", shares, value)

        decode(tokens, look)
        return found

    whole = None if cross is None else read(ids)[cross[0]]

    def of_chunk(u):
        places = slice(u * chunk_size, (u + 1) * chunk_size)
        return None if whole is None else (u * chunk_size, tuple(x[:, places] for x in whole))

    read_ones = [[read(one, of_chunk(u)) for one in chunk] for u, chunk in enumerate(neighbours)]

    def look(layer, i, query, own, values, keys):
        alone = torch.einsum("ht,htd->hd", own.softmax(-1), values)
        if i < chunk_size - 1 or layer not in gates:
            return alone
        chunk, row = divmod(i - (chunk_size - 1), chunk_size)
        visible = mask[chunk].clone()
        if join == "softmax":
            visible[:, 0] = False
        if not visible.any():
            return alone
        key = torch.cat([one[layer][0][:, there] for one, there in zip(read_ones[chunk], visible)], 1)
        value = torch.cat([one[layer][1][:, there] for one, there in zip(read_ones[chunk], visible)], 1)
        turned = turn(query, retrieved_length + (i if model.retro.positions == "text" else row))
        found = torch.einsum("hd,htd->ht", turned, key) * d**-0.5
        if join == "add":
            return alone + gates[layer][:, None] * torch.einsum("ht,htd->hd", found.softmax(-1), value)
        together = torch.cat([own, found + gates[layer][:, None]], -1).softmax(-1)
        return torch.einsum("ht,htd->hd", together, torch.cat([values, value], 1))

    return decode(ids, look) @ weights["lm_head.weight"].T
