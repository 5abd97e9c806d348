"""Measures what large logits cost in fp32 and rewrites the table of docs/numerics.md. Run it as
`python docs/numerics.py [backend]`."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

import retro_kernels as rk

HERE = Path(__file__).resolve().parent
MAGNITUDES = (10, 100, 1_000, 10_000, 100_000)
COLUMNS = ("output", "gradient of query", "of key", "of value")


def measure(magnitude: int, backend: str) -> dict[str, float]:
    """The largest error over the largest value (0.1 at least), against fp64, where the largest logit is about
    `magnitude`. Keys and queries are multiples of a power of two, so that fp32 has their products exactly."""
    b, n, m, k, r, h, d = 2, 31, 8, 2, 48, 2, 16
    generator = torch.Generator().manual_seed(0)
    query, key = (
        (torch.randn(shape, generator=generator) * 4).round() / 4 for shape in ((b, n, h, d), (b, 3, k, r, h, d))
    )
    value, grad_out = (torch.randn(x.shape, generator=generator) for x in (key, query))
    logits = torch.einsum("bnhd,blkrhd->bnhlkr", query, key)
    query = query * 2.0 ** round(math.log2(magnitude / float(logits.abs().max())))

    def run(dtype: torch.dtype, name: str) -> list[torch.Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        out = rk.chunked_cross_attention(*inputs, chunk_size=m, scale=1.0, backend=name)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(dtype))]

    given, expected = run(torch.float32, backend), run(torch.float64, "reference")
    errors = [float((x.double() - y).abs().max() / y.abs().max().clamp(min=0.1)) for x, y in zip(given, expected)]
    return dict(zip(COLUMNS, (errors[0], errors[1], errors[2], errors[3])))


def table(backend: str) -> str:
    lines = ["| largest logit | " + " | ".join(COLUMNS) + " |", "| ---: |" + " ---: |" * len(COLUMNS)]
    for magnitude in MAGNITUDES:
        errors = measure(magnitude, backend)
        lines.append(f"| {magnitude:,} | " + " | ".join(f"{errors[name]:.0e}" for name in COLUMNS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    from retro_kernels.bench.report import replace_block

    page = HERE / "numerics.md"
    block = table(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    page.write_text(replace_block(page.read_text(), block, name="large-logits", file=page.name))
    print(block)
