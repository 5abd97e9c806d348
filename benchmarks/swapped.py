"""What `rk.swap` is worth on a training step of each peer that can be installed, against the same model unswapped.

    python -m benchmarks.swapped [--rounds 5] [PEER ...]     one thread; needs the peers (`make peers` says which),
                                                             Norlund's with NORLUND=.../src/modeling_retro.py of a clone
    python -m benchmarks.swapped report                      docs/coming-from.md's table from the results

A step is forward and backward. Both models have the same weights and take turns; each round's seconds are kept, in CPU
time of the one thread, since others use the machine too. Outputs and gradients are compared first: in fp32 with each
other, in bf16 with the unswapped fp32 model's, from which the swapped one may be at most twice as far as the unswapped.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import retro_kernels as rk
from benchmarks import peers
from retro_kernels import files
from retro_kernels.bench import environment, report, results

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "coming-from.md"
RESULTS, FILE = Path(__file__).parent / "results", "swapped.json"
SIZES = {"width": 256, "layers": 6, "heads": 8, "head_dim": 64, "m": 64, "k": 2, "r": 128, "tokens": 256, "vocab": 1000}
FP32_LIMIT, BF16_FLOOR = 1e-4, 1e-3

Make, Call = Callable[[], nn.Module], Callable[[nn.Module], torch.Tensor]


def text(s: dict[str, int], chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(1, s["vocab"], (1, s["tokens"])), torch.randint(1, s["vocab"], (1, chunks, s["k"], s["r"]))


def retro_pytorch(s: dict[str, int], stack: contextlib.ExitStack) -> tuple[Make, Call]:
    from retro_pytorch.retro_pytorch import RETRO

    options = {
        "num_tokens": s["vocab"],
        "max_seq_len": s["tokens"],
        "enc_dim": s["width"],
        "enc_depth": 2,
        "dec_dim": s["width"],
        "dec_depth": s["layers"],
        "dec_cross_attn_layers": (3, 6),
        "dim_head": s["head_dim"],
        "chunk_size": s["m"],
    }
    given = text(s, s["tokens"] // s["m"])
    return lambda: RETRO(**options), lambda one: one(*given)


def labml(s: dict[str, int], stack: contextlib.ExitStack) -> tuple[Make, Call]:
    from retro_transformer.model import NearestNeighborEncoder, RetroModel

    sizes = {
        "chunk_len": s["m"],
        "d_model": s["width"],
        "n_heads": s["heads"],
        "d_k": s["head_dim"],
        "d_ff": 4 * s["width"],
    }
    given = text(s, s["tokens"] // s["m"])

    def make() -> nn.Module:
        encoder = NearestNeighborEncoder(n_layers=2, ca_layers={1}, **sizes)
        return RetroModel(n_vocab=s["vocab"], n_layers=s["layers"], ca_layers={2, 5}, encoder=encoder, **sizes)

    return make, lambda one: one(*given)


def megatron(s: dict[str, int], stack: contextlib.ExitStack) -> tuple[Make, Call]:
    from megatron.core.models.retro import RetroConfig, RetroModel, get_retro_decoder_block_spec

    stack.enter_context(peers.megatron())
    config = RetroConfig(
        num_layers=s["layers"],
        hidden_size=s["width"],
        num_attention_heads=s["heads"],
        kv_channels=s["head_dim"],
        retro_chunk_length=s["m"],
        retro_num_neighbors=s["k"],
        retro_num_retrieved_chunks=s["r"] // s["m"],
        retro_split_preprocessing="98,2,0",
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        retro_encoder_hidden_dropout=0.0,
        retro_encoder_attention_dropout=0.0,
    )
    spec = get_retro_decoder_block_spec(config, use_transformer_engine=False)
    tokens, neighbours = text(s, -(-s["tokens"] // s["m"]))
    n, context = s["tokens"], neighbours.flatten(0, 2)
    mask = torch.ones(1, 1, n, n, dtype=torch.bool).triu(1)

    def call(one: nn.Module) -> torch.Tensor:
        return one(
            tokens,
            torch.arange(n)[None],
            mask,
            context_input_ids=context,
            context_position_ids=torch.arange(s["r"]).expand_as(context),
            context_mask=None,
        )

    def make() -> nn.Module:
        return RetroModel(
            config=config, transformer_layer_spec=spec, vocab_size=s["vocab"], max_sequence_length=s["tokens"]
        )

    return make, call


def norlund(s: dict[str, int], stack: contextlib.ExitStack) -> tuple[Make, Call]:
    peer = stack.enter_context(peers.norlund())
    inner = s["heads"] * s["head_dim"]
    config = peer.RetroConfig(
        num_embeddings=s["vocab"],
        chunk_size=s["m"],
        dropout_p=0.0,
        enc_hidden_dim=s["width"],
        enc_ffn_dim=4 * s["width"],
        enc_num_heads=s["heads"],
        enc_qkv_dim=inner,
        enc_num_layers=2,
        enc_ca_layers=[1],
        dec_hidden_dim=s["width"],
        dec_ffn_dim=4 * s["width"],
        dec_num_heads=s["heads"],
        dec_qkv_dim=inner,
        dec_num_layers=s["layers"],
        dec_cca_layers=[2, 5],
    )
    given = text(s, -(-s["tokens"] // s["m"]))
    return lambda: peer.RetroModelLMHead(config), lambda one: one(*given).logits


def nemo(s: dict[str, int], stack: contextlib.ExitStack) -> tuple[Make, Call]:
    """The chunked cross-attention that its swap replaces, with rotary positions as version 2 has them."""
    attention, rotary = stack.enter_context(peers.nemo())
    sizes = {
        "layer_number": 1,
        "num_attention_heads": s["heads"],
        "hidden_size": s["width"],
        "kv_channels": s["head_dim"],
        "chunk_size": s["m"],
        "precision": 32,
        "attention_dropout": 0.0,
    }
    config = SimpleNamespace(sequence_parallel=False)
    n, m, k, r = s["tokens"], s["m"], s["k"], s["r"]
    hidden, encoded = torch.randn(n, 1, s["width"]), torch.randn(n // m, k, r, 1, s["width"])
    angles = rotary.RotaryEmbedding(32)
    positions = angles(2 * m - 1, offset=1 - m), angles(r, offset=1 - m)
    mask = torch.zeros(n // m, 1, m, k * r, dtype=torch.bool)

    def call(one: nn.Module) -> torch.Tensor:
        out, bias = one(hidden, mask, encoder_output=encoded, rotary_pos_emb=positions)
        return out + bias

    return lambda: attention.ParallelChunkedCrossAttention(config, None, None, **sizes), call


def flamingo(package: str, s: dict[str, int], stack: contextlib.ExitStack) -> tuple[Make, Call]:
    """One cross-attention, the module that its swap replaces, to images of 64 latents each."""
    kind = stack.enter_context(peers.flamingo(package)).MaskedCrossAttention
    n, images = s["tokens"], s["tokens"] // s["m"]
    locations = torch.zeros(1, n, dtype=torch.bool)
    locations[:, :: s["m"]] = True
    x, media = torch.randn(1, n, s["width"]), torch.randn(1, images, 64, s["width"])
    sizes = {"dim": s["width"], "dim_head": s["head_dim"], "heads": s["heads"]}
    if package == "open_flamingo":
        sizes["dim_visual"] = s["width"]
    return lambda: kind(**sizes), lambda one: one(x, media, locations)


PEERS = {
    "retro-pytorch 0.3.9": (retro_pytorch, "autocast"),
    "labml (retro-transformer 1.0.3)": (labml, "autocast"),
    "Megatron-core 0.15.3": (megatron, "weights"),
    "Norlund's, of a clone": (norlund, "autocast"),
    "NeMo 1.23.0, its chunked cross-attention": (nemo, "autocast"),
    "open_flamingo 2.0.1, its cross-attention": (functools.partial(flamingo, "open_flamingo"), "autocast"),
    "flamingo-pytorch 0.1.2, its cross-attention": (functools.partial(flamingo, "flamingo_pytorch"), "autocast"),
}
"""Name -> what builds it, and how it is run in bf16: under autocast, or with bf16 weights (Megatron's way)."""


def measure(name: str, rounds: int, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """A row for fp32 and one for bf16. Raises ImportError without the peer, RuntimeError where results differ."""
    build, way = PEERS[name]
    rows: list[dict[str, Any]] = []
    exact: list[torch.Tensor] = []
    with contextlib.ExitStack() as stack:
        torch.manual_seed(0)
        make, call = build(sizes, stack)
        state = make().state_dict()
        for dtype in ("fp32", "bf16"):
            pair = [make(), make()]
            for one in pair:
                one.load_state_dict(state)
                if dtype == "bf16" and way == "weights":
                    one.bfloat16()
            replaced = len(rk.swap(pair[1]).replaced)
            gradients: list[torch.Tensor] = []

            def step(one: nn.Module, cast: bool, gradients: list[torch.Tensor]) -> torch.Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                    out = call(one)
                if not gradients:
                    gradients.append(torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype))
                out.backward(gradients[0])
                return out.detach()

            cast = dtype == "bf16" and way == "autocast"
            found = []
            for one in pair:
                out = step(one, cast, gradients)
                found.append([out.float(), *(x.grad.float().clone() for x in one.parameters() if x.grad is not None)])
            exact = exact or found[0]
            errors = [difference(one, exact) for one in found]
            if errors[1] > (FP32_LIMIT if dtype == "fp32" else 2 * errors[0] + BF16_FLOOR):
                raise RuntimeError(f"{name}, {dtype}: the swapped model differs: errors {errors}")
            seconds = []
            for _ in range(rounds):
                turn = []
                for one in pair:
                    start = time.thread_time()
                    step(one, cast, gradients)
                    turn.append(time.thread_time() - start)
                seconds.append(turn)
            rows.append({"peer": name, "dtype": dtype, "replaced": replaced, "errors": errors, "seconds": seconds})
    return rows


def difference(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Of output or a gradient, the largest, over the largest of the output or of all gradients."""
    largest = max(x.abs().max() for x in exact[1:])
    scales = [exact[0].abs().max(), *[largest] * (len(exact) - 1)]
    return max(((x - y).abs().max() / s).item() for x, y, s in zip(found, exact, scales, strict=True))


def table(document: dict[str, Any]) -> str:
    about, s = document["environment"], document["sizes"]
    tiles = " with AMX" if "amx_bf16" in about["cpu_features"] else ""
    lines = [
        f"{about['device']}{tiles}, torch {about['packages']['torch']}, commit {about['commit']}: CPU seconds of "
        f"a step (forward and backward), unswapped and swapped in turns, {len(document['rows'][0]['seconds'])} rounds "
        f"on a machine that others used too; {s['layers']} layers of width {s['width']}, {s['tokens']} tokens, chunks "
        f"of {s['m']}, {s['k']} neighbours of {s['r']}; bf16 by autocast, Megatron's by its weights.",
        "",
        "| peer | | unswapped, median (least) | swapped | times faster, medians | leasts |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in document["rows"]:
        before, after = zip(*row["seconds"])
        medians, leasts = [statistics.median(x) for x in (before, after)], [min(x) for x in (before, after)]
        shown = [f"{median:.3f} ({least:.3f})" for median, least in zip(medians, leasts)]
        lines.append(
            f"| {row['peer']} | {row['dtype']} | {shown[0]} | {shown[1]} | {medians[0] / medians[1]:.2f} | "
            f"{leasts[0] / leasts[1]:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)  # before the folder is named by them
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="'report', or words of the peers' names; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    folder = RESULTS / environment.device_slug("cpu")
    parser.add_argument("--out", type=Path, default=folder / FILE)
    given = parser.parse_args()
    if given.what == ["report"]:
        block = "\n\n".join(table(json.loads(path.read_text())) for path in sorted(RESULTS.glob(f"*/{FILE}")))
        DOCUMENT.write_text(report.replace_block(DOCUMENT.read_text(), block, name="swapped", file=DOCUMENT.name))
        return
    names = [name for name in PEERS if not given.what or any(word.lower() in name.lower() for word in given.what)]
    if not names:
        parser.error(f"got {' '.join(given.what)}, expected words of these names: {'; '.join(PEERS)}")
    if given.rounds < 1:
        parser.error(f"--rounds: got {given.rounds}, expected at least 1")
    document = {"environment": environment.collect("cpu"), "sizes": SIZES, "rows": []}
    for name in names:
        document["rows"] += measure(name, given.rounds, SIZES)
        for row in document["rows"][-2:]:
            print(json.dumps(row), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(given.out, results.compact_json(document))
    print(table(document))


if __name__ == "__main__":
    main()
