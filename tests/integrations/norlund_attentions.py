"""Norlund's attentions, written from what their code does: it is in no package, and needs a transformers of 2022."""

import torch
from torch import nn

from retro_kernels.integrations import base, norlund

M, D, E = 4, 12, 8


class Bias(nn.Module):
    def __init__(self, buckets, heads, both_ways):
        super().__init__()
        self.relative_attention_bias = nn.Embedding(buckets, heads)
        self.high = buckets // 2 if both_ways else 0

    def forward(self, rows, keys):
        low = self.high + 1 - self.relative_attention_bias.num_embeddings
        offset = torch.arange(keys) - torch.arange(rows)[:, None]
        return self.relative_attention_bias(offset.clamp(low, self.high) - low).permute(2, 0, 1)


class MultiHead(nn.Module):
    def __init__(self, width, heads, buckets, both_ways, dropout):
        super().__init__()
        self.heads = heads
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.final_proj = nn.Linear(width, width, bias=False)
        self.positional_bias = Bias(buckets, heads, both_ways)

    def forward(self, q, k, v, added):
        """q [b, rows, width], k and v [b, keys, width], added [b, rows, keys]."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        logits = q @ k.transpose(-1, -2) + self.positional_bias(q.shape[2], k.shape[2]) + added[:, None]
        out = (self.attn_dropout(logits.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        return self.resid_dropout(self.final_proj(out))


class Attention(nn.Module):
    """Any of the four, whose class has its name."""

    def __init__(self, width=D, source=E, heads=2, buckets=7, dropout=0.0):
        super().__init__()
        kind = type(self).__name__
        self.num_heads, self.ln = heads, nn.LayerNorm(width)
        if kind in norlund.SELF:
            self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        else:
            self.q_proj, self.kv_proj = nn.Linear(width, width, bias=False), nn.Linear(source, 2 * width, bias=False)
        self.multi_head_attention = MultiHead(width, heads, buckets, kind != norlund.DECODER, dropout)
        self.chunk_size = M

    def forward(self, x, *given):
        kind, normed, mask = type(self).__name__, self.ln(x), given[-1]
        if kind in norlund.SELF:
            q, k, v = self.qkv_proj(normed).chunk(3, -1)
        else:
            q, (k, v) = self.q_proj(normed), self.kv_proj(given[0]).chunk(2, -1)
        hidden, out = (1.0 - mask) * -10000.0, torch.zeros_like(x)
        if kind == norlund.DECODER:
            future = torch.ones(x.shape[1], x.shape[1]).triu(1) * -10000.0
            out = self.multi_head_attention(q, k, v, hidden[:, None] + future)
        elif kind == norlund.CCA:
            for u in range(x.shape[1] // M):
                rows = slice((u + 1) * M - 1, (u + 2) * M - 1)
                parts = (y[:, u].flatten(1, 2) for y in (k, v))
                made = self.multi_head_attention(q[:, rows], *parts, hidden[:, u].flatten(1)[:, None])
                out[:, rows] = made * mask[:, u].flatten(1).any(-1)[:, None, None]
        else:
            for u, j in [(u, j) for u in range(x.shape[1]) for j in range(x.shape[2])]:
                at = (slice(None), u) if kind == norlund.CROSS else (slice(None), u, j)
                out[:, u, j] = self.multi_head_attention(q[:, u, j], k[at], v[at], hidden[at][:, None])
        return x + out, None


KINDS = {name: type(name, (Attention,), {}) for name in norlund.ATTENTIONS}


class Whole(nn.Module):
    """One of each: the decoder's self-attention, the encoder's two, and chunked cross-attention."""

    def __init__(self):
        super().__init__()
        sizes = {norlund.DECODER: (D, E), norlund.ENCODER: (E, E), norlund.CROSS: (E, D), norlund.CCA: (D, E)}
        self.attentions = nn.ModuleDict({name: KINDS[name](*size) for name, size in sizes.items()})

    def forward(self, x, encoded):
        """x [b, n, D], encoded [b, ceil(n / M), k, r, E]."""
        b, n, chunks = *x.shape[:2], encoded.shape[1]
        ones = lambda *size: torch.ones(size, dtype=x.dtype)  # noqa: E731
        x = self.attentions[norlund.DECODER](x, ones(b, n))[0]
        seen = nn.functional.pad(x, (0, 0, 0, chunks * M - n)).unflatten(1, (chunks, M))
        places = ones(b, chunks * M)
        places[:, n:] = 0
        encoded = self.attentions[norlund.ENCODER](encoded, ones(*encoded.shape[:4]))[0]
        encoded = self.attentions[norlund.CROSS](encoded, seen, places.unflatten(1, (chunks, M)))[0]
        return self.attentions[norlund.CCA](x, encoded, ones(*encoded.shape[:4]))[0]


def know(monkeypatch):
    """Tells `swap` that these are the sources it knows."""
    for name in norlund.ATTENTIONS:
        monkeypatch.setitem(norlund.KNOWN_SOURCES, f"{name}.forward", base.digest(Attention.forward.__code__))
    for name, kind in (("MultiHeadAttention", MultiHead), ("RelativePositionBias", Bias)):
        monkeypatch.setitem(norlund.KNOWN_SOURCES, f"{name}.forward", base.digest(kind.forward.__code__))
