"""What retrieval costs a whole model: a training step, and generation, of RETRO and of the same decoder without it.

    python -m benchmarks.end_to_end train --preset retro-172m --length 512
    python -m benchmarks.end_to_end generate --preset retro-172m --length 512

Both variants run in turns in one process, with the same kernels and weights. The retriever of the generation returns
stored neighbours at once: no search is in these numbers. The vocabulary is small (--vocabulary), so that the readout
and the tables, which are the same in both, do not hide the difference. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from retro_kernels.models import Neighbours, Retro, RetroConfig

SMALL = {
    "model_dim": 384, "num_layers": 6, "num_heads": 6, "cross_attention_layers": (3, 6), "encoder_dim": 256,
    "encoder_heads": 4,
}  # fmt: skip


def config_of(given: argparse.Namespace) -> RetroConfig:
    changes = {"vocab_size": given.vocabulary, "max_length": given.length + 2 * given.tokens}
    return RetroConfig(**SMALL, **changes) if given.preset == "small" else RetroConfig.preset(given.preset, **changes)


def train(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a forward and backward pass, and the ratio of matrix operations beside the ratio of times."""
    config = config_of(given)
    model = Retro(config)
    tokens, neighbours = _data(config, given.batch, given.length)
    seconds: dict[str, list[float]] = {"decoder": [], "retro": []}
    for repeat in range(given.repeats + 1):
        for name in seconds:
            start = time.perf_counter()
            model.loss(tokens, tokens.roll(-1, 1), neighbours if name == "retro" else None).backward()
            if repeat:  # the first run allocates
                seconds[name].append(time.perf_counter() - start)
            model.zero_grad(set_to_none=False)
    flops = config.forward_flops(given.length)
    base, added = flops["decoder"] + flops["readout"], flops["cross-attention"] + flops["encoder"]
    times = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": times, "spread": {name: [min(x), max(x)] for name, x in seconds.items()},
        "time_ratio": times["retro"] / times["decoder"], "flop_ratio": 1 + added / base,
        "gflops_a_second": {
            "decoder": 3 * base * given.batch / times["decoder"] / 1e9,
            "retro": 3 * (base + added) * given.batch / times["retro"] / 1e9,
        },
    }  # fmt: skip


def generate(given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a token after a prompt of `length` tokens, with retrieval on and off; `tokens` is best a multiple of
    the chunk size, so that each chunk's border has its share."""
    config = config_of(given)
    model = Retro(config).eval()
    tokens, _ = _data(config, given.batch, given.length)
    found = torch.randint(
        config.vocab_size, (given.batch * (1 + given.length // config.chunk_size), 2, config.retrieved_length)
    )

    def retriever(chunks: torch.Tensor) -> Neighbours:
        return Neighbours(found[: len(chunks)])

    class Clock:
        """A streamer that notes when each token came."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, tokens: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    milliseconds: dict[str, list[float]] = {"off": [], "on": []}
    slowest: dict[str, float] = {}
    for repeat in range(given.repeats + 1):
        for name in milliseconds:
            clock = Clock()
            options: dict[str, Any] = {"retriever": retriever} if name == "on" else {}
            count = given.tokens + 1 if repeat else 3
            model.generate(tokens, max_new_tokens=count, streamer=clock, **options)
            gaps = [1e3 * (y - x) for x, y in zip(clock.times[1:], clock.times[2:])]
            if repeat:
                milliseconds[name].append(sum(gaps) / len(gaps))
                slowest[name] = max(gaps)
    times = {name: statistics.median(values) for name, values in milliseconds.items()}
    weights = sum(p.numel() * p.element_size() for name, p in model.blocks.named_parameters() if ".cross_" not in name)
    return {
        "milliseconds_a_token": times, "spread": {name: [min(x), max(x)] for name, x in milliseconds.items()},
        "slowest_token": slowest, "time_ratio": times["on"] / times["off"],
        "decoder_gigabytes_a_token": (weights + model.readout_weight.nbytes) / 1e9,
        "gigabytes_a_second_off": (weights + model.readout_weight.nbytes) / 1e6 / times["off"],
    }  # fmt: skip


def _data(config: RetroConfig, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    size = (batch, length // config.chunk_size, config.num_neighbours, config.retrieved_length or 0)
    return torch.randint(config.vocab_size, (batch, length)), torch.randint(config.vocab_size, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "generate"))
    parser.add_argument("--preset", default="small", help="of RetroConfig, or 'small' (width 384, 6 layers)")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    result = (train if given.what == "train" else generate)(given)
    about = {**vars(given), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"settings": about, **result}, indent=1))


if __name__ == "__main__":
    main()
