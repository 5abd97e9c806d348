"""Norlund's weights in a `Retro`. Its code needs a transformers of 2022 and is in no package: names and maths here are
written out from what their code does, one attention row at a time."""

import pytest
import torch
import torch.nn.functional as F

from retro_kernels.models import Neighbours, Retro

M, K, R, V = 4, 2, 8, 50
D, E, H, EH = 24, 16, 3, 2
BUCKETS = {"own": 9, "cross": 10, "encoder": 6, "encoder_cross": 7}
TOLD = {"chunk_size": M, "num_neighbours": K, "retrieved_length": R}


def state(layers=(0, 2), encoder_layers=(1,)):
    torch.manual_seed(0)
    found = {
        "base.dec_embs.weight": (V, D),
        "base.encoder.enc_embs.weight": (V, E),
        "base.final_layer_norm.scale": (D,),
        "lm_head.weight": (V, D),
    }

    def attention(name, width, heads, buckets, joint, source):
        sizes = (
            {"qkv_proj": (3 * width, width)} if joint else {"q_proj": (width, width), "kv_proj": (2 * width, source)}
        )
        found.update({f"{name}.{part}.weight": size for part, size in sizes.items()})
        inner = f"{name}.multi_head_attention"
        found[f"{name}.ln.scale"] = (width,)
        found[f"{inner}.final_proj.weight"] = (width, width)
        found[f"{inner}.positional_bias.relative_attention_bias.weight"] = (buckets, heads)

    for stem, count, width, heads, crossing, own, cross, source in (
        ("base.decoder", 3, D, H, layers, "own", "cross", E),
        ("base.encoder.layers", 2, E, EH, encoder_layers, "encoder", "encoder_cross", D),
    ):
        for i in range(count):
            attention(f"{stem}.{i}.0", width, heads, BUCKETS[own], True, width)
            if i in crossing:
                attention(f"{stem}.{i}.1", width, heads, BUCKETS[cross], False, source)
            found[f"{stem}.{i}.2.layer_norm.scale"] = (width,)
            for part, size in (("wi_0", (20, width)), ("wi_1", (20, width)), ("wo", (width, 20))):
                found[f"{stem}.{i}.2.{part}.weight"] = size
    return {name: 0.3 * torch.randn(size) + (len(size) == 1) for name, size in found.items()}


class Loop:
    """Its logits, of one sequence."""

    def __init__(self, weights):
        self.w = {name: x.double() for name, x in weights.items()}

    def norm(self, name, x):
        return self.w[name] * x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-8)

    def attend(self, name, x, source, low, heads, visible):
        """Every row i of x to those keys j of source with visible(i, j), offsets j - i clamped from `low` on."""
        w, table = self.w, f"{name}.multi_head_attention.positional_bias.relative_attention_bias.weight"
        normed = self.norm(f"{name}.ln.scale", x)
        if source is None:
            q, k, v = (normed @ part.T for part in w[f"{name}.qkv_proj.weight"].chunk(3))
        else:
            q = normed @ w[f"{name}.q_proj.weight"].T
            k, v = (source @ part.T for part in w[f"{name}.kv_proj.weight"].chunk(2))
        q, k, v = (y.unflatten(-1, (heads, -1)) for y in (q, k, v))
        out = torch.zeros_like(q)
        for i in range(len(x)):
            keys = [j for j in range(len(k)) if visible(i, j)]
            for h in range(heads):
                if keys:
                    bias = torch.stack([w[table][min(max(j - i - low, 0), len(w[table]) - 1), h] for j in keys])
                    out[i, h] = (k[keys, h] @ q[i, h] + bias).softmax(0) @ v[keys, h]
        return x + out.flatten(1) @ w[f"{name}.multi_head_attention.final_proj.weight"].T

    def feed_forward(self, name, x):
        normed, w = self.norm(f"{name}.layer_norm.scale", x), self.w
        inner = F.gelu(normed @ w[f"{name}.wi_0.weight"].T, approximate="tanh") * (normed @ w[f"{name}.wi_1.weight"].T)
        return x + inner @ w[f"{name}.wo.weight"].T

    def both_ways(self, kind):
        count = BUCKETS[kind]
        return count // 2 - count + 1

    def encode(self, tokens, chunk):
        x = self.w["base.encoder.enc_embs.weight"][tokens]
        for i in range(2):
            name = f"base.encoder.layers.{i}"
            x = self.attend(f"{name}.0", x, None, self.both_ways("encoder"), EH, lambda _, j: tokens[j] != 0)
            if f"{name}.1.ln.scale" in self.w:
                x = self.attend(f"{name}.1", x, chunk, self.both_ways("encoder_cross"), EH, lambda *_: True)
            x = self.feed_forward(f"{name}.2", x)
        return x

    def __call__(self, tokens, neighbours):
        x, encoded = self.w["base.dec_embs.weight"][tokens], None
        for i in range(3):
            name = f"base.decoder.{i}"
            x = self.attend(f"{name}.0", x, None, 1 - BUCKETS["own"], H, lambda row, j: j <= row)
            if f"{name}.1.ln.scale" in self.w:
                if encoded is None:
                    encoded = [
                        torch.cat([self.encode(one, x[u * M : (u + 1) * M]) for one in chunk])
                        for u, chunk in enumerate(neighbours)
                    ]
                parts = [x[: M - 1]]
                for u, chunk in enumerate(neighbours):
                    there = chunk.flatten() != 0
                    rows = x[(u + 1) * M - 1 : (u + 2) * M - 1]
                    low = self.both_ways("cross")
                    parts.append(self.attend(f"{name}.1", rows, encoded[u], low, H, lambda _, j, there=there: there[j]))
                x = torch.cat(parts)
            x = self.feed_forward(f"{name}.2", x)
        return self.norm("base.final_layer_norm.scale", x) @ self.w["lm_head.weight"].T


@pytest.mark.parametrize(("layers", "encoder_layers"), [((0, 2), (1,)), ((1,), (0, 1)), ((2,), ())])
def test_logits_are_those_of_the_loop(tmp_path, layers, encoder_layers):
    weights = state(layers, encoder_layers)
    torch.save({"state_dict": weights}, tmp_path / "model.ckpt")
    retro = Retro.from_peer(tmp_path / "model.ckpt", dtype=torch.float64, backend="reference", **TOLD)
    for n in (4, 9, 14):
        tokens, neighbours = torch.randint(1, V, (1, n)), torch.randint(0, V, (1, n // M, K, R))
        neighbours[0, 0] = 0  # with nothing to attend to a chunk adds nothing
        want = Loop(weights)(tokens[0], neighbours[0])
        # Their norms add 1e-8 to the root, ours 1e-16 under it: 1e-7 of what small embeddings become.
        torch.testing.assert_close(retro(tokens, neighbours)[0], want, rtol=1e-5, atol=1e-5)


def test_what_is_not_told_and_what_does_not_fit(tmp_path):
    weights = state()
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="chunk_size: got none"):
        Retro.from_peer(tmp_path / "model.pt")
    del weights["base.decoder.1.2.wo.weight"]
    torch.save(weights, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"base\.decoder\.1\.2\.wo\.weight missing"):
        Retro.from_peer(tmp_path / "less.pt", **TOLD)


def test_generation_refuses_neighbours_of_another_length(tmp_path):
    """Its biases count on through all neighbours: after shorter ones the next would begin elsewhere."""
    torch.save(state(), tmp_path / "model.pt")
    retro = Retro.from_peer(tmp_path / "model.pt", **TOLD)

    def generate(k, r):
        lookup = lambda chunks: Neighbours(torch.ones(len(chunks), k, r, dtype=torch.int64))  # noqa: E731
        return retro.generate([[1] * (M + 1)], retriever=lookup, max_new_tokens=2)

    generate(K, R)
    generate(K - 1, R)
    with pytest.raises(
        ValueError, match=f"got neighbours of {R - 1} tokens, expected retrieved_length = {R}: the bias"
    ):
        generate(K, R - 1)
