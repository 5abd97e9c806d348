"""Measures what retrieval costs a whole model: a training step and generation of RETRO and of its decoder alone.

    python -m benchmarks.end_to_end train --preset retro-172m            with fused kernels, folded SDPA and eager code
    python -m benchmarks.end_to_end train --preset retro-425m --ways fused
    python -m benchmarks.end_to_end parts --preset retro-172m            time beside matrix operations, part by part
    python -m benchmarks.end_to_end generate --db DATABASE               retrieval on and off, search included
    python -m benchmarks.end_to_end peer                                 retro-pytorch's own generation, and swapped
    python -m benchmarks.end_to_end report                               docs/retro.md's tables from the results

All variants of a run take turns in one process, with the same weights. Each run adds its result to end-to-end.json of
this device (`--out`), in place of an earlier one of the same settings. Without `--db` the retriever returns stored
neighbours at once. The vocabulary is small (--vocabulary), so that the readout and the tables, which are the same in
both, do not hide the difference.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from retro_kernels import files
from retro_kernels.bench import attention, environment, report, results
from retro_kernels.bench.operations import CAUSAL_SELF, CCA, ENCODER_CROSS, ENCODER_SELF
from retro_kernels.bench.timing import measure_ceilings
from retro_kernels.models import Neighbours, Retro, RetroConfig
from retro_kernels.models.loss import linear_cross_entropy

HERE = Path(__file__).resolve().parent
FILE = "end-to-end.json"
DOCUMENT = HERE.parent / "docs" / "retro.md"
SMALL = {
    "model_dim": 384,
    "num_layers": 6,
    "num_heads": 6,
    "cross_attention_layers": (3, 6),
    "encoder_dim": 256,
    "encoder_heads": 4,
}
WAYS = ("fused", "sdpa", "eager")
PARTS = ("decoder", "readout", "cross-attention", "encoder")
SAME = 2e-4
"""The largest relative difference between the losses of two ways."""


def config_of(given: argparse.Namespace, **changes: Any) -> RetroConfig:
    changes = {"vocab_size": given.vocabulary, "max_length": given.length + 2 * given.tokens, **changes}
    return RetroConfig(**SMALL, **changes) if given.preset == "small" else RetroConfig.preset(given.preset, **changes)


# -- the attentions of a model, computed in another way


@contextlib.contextmanager
def use_attentions(way: str) -> Iterator[None]:
    """In the block the models' attentions are `way`: "fused" (this library's, as they are), "sdpa" (PyTorch's, on
    folded tensors, relative positions as a materialised bias) or "eager"; the latter two are those of attention.py."""
    if way == "fused":
        yield
        return
    attend = getattr(attention, way)

    def cross(query, key, value, *, chunk_size, query_offset, chunk_offset, **options):
        workload = _workload(CCA, query, key, options, chunk_size=chunk_size, num_neighbours=key.shape[2])
        whole = F.pad(query, (0, 0, 0, 0, query_offset, 0))
        return attend(workload, whole, key, value, *_positions(options))[:, query_offset:]

    def own(query, key, value, *, causal=False, **options):
        workload = _workload(CAUSAL_SELF if causal else ENCODER_SELF, query, key, options)
        return attend(workload, query, key, value, *_positions(options))

    def to_chunk(query, key, value, **options):
        workload = _workload(ENCODER_CROSS, query, key, options)
        return attend(workload, query, key, value, *_positions(options), rows=True)

    replaced = (
        ("chunked_cross_attention", "chunked_cross_attention", cross),
        ("neighbour_encoder", "neighbour_self_attention", own),
        ("neighbour_encoder", "neighbour_cross_attention", to_chunk),
        ("retro_decoder_block", "neighbour_self_attention", own),
    )
    modules = [importlib.import_module(f"retro_kernels.nn.{module}") for module, _, _ in replaced]
    before = [getattr(module, name) for module, (_, name, _) in zip(modules, replaced)]
    try:
        for module, (_, name, function) in zip(modules, replaced):
            setattr(module, name, function)
        yield
    finally:
        for module, (_, name, _), function in zip(modules, replaced, before):
            setattr(module, name, function)


def _workload(operation: str, query, key, options: dict[str, Any], **sizes: int) -> Any:
    """The fields of a workload that attention.py reads. Raises ValueError for an option that it leaves out."""
    known = {"relative_key", "content_bias", "relative_bias", "scale", "stride", "align", "dropout_p", "backend"}
    unknown = [name for name, value in options.items() if name not in known and value is not None]
    if unknown or options.get("dropout_p"):
        raise ValueError(f"{', '.join(unknown) or 'dropout_p'}: attention.sdpa and attention.eager have no such thing")
    return SimpleNamespace(operation=operation, head_dim=query.shape[-1], **sizes)


def _positions(options: dict[str, Any]) -> list[torch.Tensor]:
    return [options[name] for name in ("relative_key", "content_bias", "relative_bias")]


# -- what is measured


def interleaved(calls: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Each call returns the seconds it took. They take turns; the first turn, which allocates, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            took = call()
            if repeat:
                seconds[name].append(took)
    return seconds


def timed(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def summary(samples: list[float]) -> dict[str, float]:
    return {"median": statistics.median(samples), "lowest": min(samples), "highest": max(samples)}


def train(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a forward and backward pass, and the ratio of matrix operations beside the ratio of times."""
    config = config_of(given)
    model = Retro(config)
    tokens, neighbours = _data(config, given.batch, given.length)
    losses: dict[str, float] = {}

    def step(name: str) -> float:
        way, kind = name.split()

        def run() -> None:
            loss = model.loss(tokens, tokens.roll(-1, 1), neighbours if kind == "retro" else None)
            loss.backward()
            losses[name] = loss.item()

        with use_attentions(way):
            seconds = timed(run)
        model.zero_grad(set_to_none=False)
        return seconds

    names = [f"{way} {kind}" for way in given.ways for kind in ("decoder", "retro")]
    seconds = interleaved({name: functools.partial(step, name) for name in names}, given.repeats)
    for name, loss in losses.items():
        expected = losses[f"{given.ways[0]} {name.split()[1]}"]
        if abs(loss - expected) > SAME * expected:
            raise AssertionError(f"{name}: loss {loss}, expected {expected}: nothing is reported of wrong results")
    flops = config.forward_flops(given.length)
    base, added = flops["decoder"] + flops["readout"], flops["cross-attention"] + flops["encoder"]
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "losses": losses,
        "time_ratio": {way: median[f"{way} retro"] / median[f"{way} decoder"] for way in given.ways},
        "flop_ratio": 1 + added / base,
        "gflops": {"decoder": 3 * base * given.batch / 1e9, "retro": 3 * (base + added) * given.batch / 1e9},
        "parameters": model.count_parameters(),
    }


def parts(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds and matrix operations, forward and backward, of each part alone, on the inputs that it has in the model.
    (Norms and residuals round cross-attention and readout count to the decoder.)"""
    config = config_of(given)
    model = Retro(config)
    tokens, neighbours = _data(config, given.batch, given.length)
    layers: Any = [model.blocks[p - 1].cross_attention for p in config.cross_attention_layers]
    with torch.no_grad():
        activations = model.activations(tokens)
        encoded = model.encode(neighbours, activations)
    activations, encoded = (x.detach().requires_grad_() for x in (activations, encoded))

    def finish(out: torch.Tensor) -> None:
        torch.autograd.backward(out, torch.ones_like(out))

    def cross_attention() -> None:
        for layer in layers:
            finish(layer(activations, encoded))

    def readout() -> None:
        finish(linear_cross_entropy(activations, model.readout_weight, tokens))

    steps: dict[str, Callable[[], None]] = {
        "decoder": lambda: finish(model.activations(tokens)),
        "readout": readout,
        "cross-attention": cross_attention,
        "encoder": lambda: finish(model.encode(neighbours, activations)),
        "whole": lambda: model.loss(tokens, tokens, neighbours).backward(),
    }
    seconds = interleaved({name: functools.partial(timed, step) for name, step in steps.items()}, given.repeats)
    flops = config.forward_flops(given.length)
    return {
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "gflops": {name: 3 * flops[name] * given.batch / 1e9 for name in PARTS},
    }


class Clock:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def gaps(self) -> list[float]:
        """Milliseconds of each token after the first, which has the prompt's time."""
        return [1e3 * (y - x) for x, y in zip(self.times[1:], self.times[2:])]


def generate(given: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a token after a prompt of `length` tokens, with retrieval on and off; `tokens` is best a multiple of
    the chunk size, so that each chunk's border has its share."""
    retriever, search = _load_neighbours(given), None
    if given.db is not None:
        from retro_kernels.retrieval import Retriever, open_tokenizer

        found = Retriever(given.db, cache_size=0)
        given.vocabulary = open_tokenizer(found.database.manifest["tokenizer"]).vocabulary_size
        waits: list[float] = []

        def retriever(chunks: torch.Tensor) -> Neighbours:
            start = time.perf_counter()
            result = found(chunks)
            if len(chunks) == given.batch:
                waits.append(1e3 * (time.perf_counter() - start))
            return result

        search = {"chunks": len(found.database), "embedder": found.database.manifest["embedder"]["name"]}
    config = config_of(given)
    model = Retro(config).eval()
    tokens, _ = _data(config, given.batch, given.length)
    milliseconds: dict[str, list[float]] = {"off": [], "on": []}
    slowest: dict[str, float] = {}
    for repeat in range(given.repeats + 1):
        for name in milliseconds:
            clock = Clock()
            options: dict[str, Any] = {"retriever": retriever} if name == "on" else {}
            # From the second new token on: `tokens` of them, one of which ends each chunk.
            model.generate(tokens, max_new_tokens=given.tokens + 1 if repeat else 3, streamer=clock, **options)
            if repeat:
                milliseconds[name].append(statistics.fmean(clock.gaps))
                slowest[name] = max(clock.gaps)
    median = {name: statistics.median(values) for name, values in milliseconds.items()}
    blocks = {name: p for name, p in model.blocks.named_parameters() if ".relative." not in name}
    decoder = sum(p.nbytes for name, p in blocks.items() if ".cross_" not in name) + model.readout_weight.nbytes
    own = {"w_query", "w_out"}  # keys and values of the neighbours are in the cache
    crossing = sum(p.nbytes for name, p in blocks.items() if ".cross_" in name and name.split(".")[-2] in own)
    inner = 2 * config.num_neighbours * (config.retrieved_length or 0) * (config.num_kv_heads or 0)
    cache = len(config.cross_attention_layers) * inner * (config.head_dim or 0) * 4 * given.batch
    copy = measure_ceilings(torch.device("cpu"), ["fp32"], quick=True).copy_bytes_per_second
    result = {
        "milliseconds_a_token": {name: summary(values) for name, values in milliseconds.items()},
        "slowest_token": slowest,
        "time_ratio": median["on"] / median["off"],
        "bytes_a_token": {"off": decoder, "on": decoder + crossing + cache},
        "copy_bytes_per_second": copy,
        "floor_milliseconds": {"off": 1e3 * decoder / copy, "on": 1e3 * (decoder + crossing + cache) / copy},
        "search": search,
    }
    if search is not None:
        result["search_milliseconds"] = summary(waits)
    return result


def _load_neighbours(given: argparse.Namespace) -> Callable[[torch.Tensor], Neighbours]:
    """A retriever that returns the same neighbours at once."""
    generator = torch.Generator().manual_seed(0)
    count = given.batch * (1 + given.length // 64)
    found = torch.randint(given.vocabulary, (count, 2, 128), generator=generator)
    return lambda chunks: Neighbours(found[: len(chunks)])


def peer(given: argparse.Namespace) -> dict[str, Any]:
    """`TrainingWrapper.generate` of retro-pytorch, as it is, at its README's configuration, and `report.generate` of
    the same model, swapped; both with the same stored neighbours, and the best token each time. Raises RuntimeError
    where their tokens differ."""
    from retro_pytorch import TrainingWrapper

    import retro_kernels as rk
    from retro_kernels.bench.real_text import load_model

    theirs, swapped = load_model(torch.device("cpu")).eval(), load_model(torch.device("cpu")).eval()
    swapped.load_state_dict(theirs.state_dict())
    swap = rk.swap(swapped)
    length, count = given.length, given.tokens
    given.vocabulary = theirs.token_emb.num_embeddings
    tokens = torch.randint(1, given.vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    stored = _load_neighbours(given)
    wrapper = object.__new__(TrainingWrapper)  # its __init__ would build a database
    torch.nn.Module.__init__(wrapper)
    wrapper.retro, wrapper.chunk_size, wrapper.max_seq_len = theirs, theirs.chunk_size, length + count - 1
    wrapper.fetch_knn_chunks_fn = lambda chunks: stored(chunks).tokens
    made: dict[str, torch.Tensor] = {}

    def of_theirs() -> None:
        with contextlib.redirect_stdout(None):
            made["theirs"] = wrapper.generate(tokens, filter_thres=1 - 1e-9)[0]  # of all logits it keeps the best

    def of_ours() -> None:
        made["ours"] = swap.generate(tokens, retriever=stored, max_new_tokens=count).sequences[0]

    seconds = interleaved(
        {"retro-pytorch": lambda: timed(of_theirs) / count, "retro_kernels": lambda: timed(of_ours) / count},
        given.repeats,
    )
    if not torch.equal(made["theirs"], made["ours"]):
        raise RuntimeError(f"the tokens differ: {made['theirs'][length:].tolist()}, {made['ours'][length:].tolist()}")
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds_a_token": {name: summary(values) for name, values in seconds.items()},
        "times_faster": median["retro-pytorch"] / median["retro_kernels"],
        "parameters": sum(p.numel() for p in theirs.parameters()),
    }


def _data(config: RetroConfig, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    size = (batch, length // config.chunk_size, config.num_neighbours, config.retrieved_length or 0)
    return torch.randint(config.vocab_size, (batch, length)), torch.randint(config.vocab_size, size)


# -- results and their tables


def store(path: Path, settings: dict[str, Any], result: dict[str, Any]) -> None:
    runs = json.loads(path.read_text()) if path.exists() else []
    runs = [run for run in runs if run["settings"] != settings]
    runs.append({"settings": settings, "environment": environment.collect("cpu"), "result": result})
    runs.sort(key=lambda run: json.dumps(run["settings"], sort_keys=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, results.compact_json(runs))


def tables(runs: list[dict[str, Any]]) -> str:
    """Markdown of all runs."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_kind.setdefault(run["settings"]["what"], []).append(run)
    about = runs[0]["environment"]
    lines = [f"{about['device']}, torch {about['packages']['torch']}, fp32, medians of runs in turns.", ""]
    for what, write in (
        ("train", _train_table),
        ("parts", _parts_table),
        ("generate", _generate_table),
        ("peer", _peer_table),
    ):
        if what in by_kind:
            lines += [*write(by_kind[what]), ""]
    commits = sorted({str(run["environment"]["commit"]) for run in runs})
    return "\n".join([*lines, f"Commits {', '.join(commits)}."])


def _describe_model(settings: dict[str, Any]) -> str:
    name = "width 384, 6 layers" if settings["preset"] == "small" else settings["preset"]
    return f"{name}, {settings['batch']} x {settings['length']} tokens"


def _train_table(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "A training step (forward and backward) of the decoder alone and of RETRO, in seconds:",
        "",
        "| model | attentions | decoder | RETRO | ratio | ratio of matrix operations | overhead against fused |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        result = run["result"]
        for way, ratio in result["time_ratio"].items():
            decoder, retro = (result["seconds"][f"{way} {kind}"]["median"] for kind in ("decoder", "retro"))
            fused = result["seconds"]["fused retro"]["median"]
            lines.append(
                f"| {_describe_model(run['settings'])} | {way} | {decoder:.3f} | {retro:.3f} | {ratio:.2f} | "
                f"{result['flop_ratio']:.2f} | {retro / fused:.2f} |"
            )
    return lines


def _parts_table(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Each part alone, forward and backward:",
        "",
        "| model | part | GFLOP of matrix operations | share | seconds | share | GFLOP/s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        flops, seconds = run["result"]["gflops"], run["result"]["seconds"]
        total, whole = sum(flops.values()), sum(seconds[name]["median"] for name in PARTS)
        for name in PARTS:
            took = seconds[name]["median"]
            lines.append(
                f"| {_describe_model(run['settings'])} | {name} | {flops[name]:.1f} | {flops[name] / total:.0%} | "
                f"{took:.3f} | {took / whole:.0%} | {flops[name] / took:.0f} |"
            )
        measured = seconds["whole"]["median"]
        lines.append(f"| | all together, in the model | {total:.1f} | | {measured:.3f} | | {total / measured:.0f} |")
    return lines


def _generate_table(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Generation, milliseconds a token, the chunks' borders included:",
        "",
        "| model, prompt | database | retrieval off | on | ratio | floor off | on | slowest token | search |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        result, settings = run["result"], run["settings"]
        off, on = (result["milliseconds_a_token"][name]["median"] for name in ("off", "on"))
        floor, found = result["floor_milliseconds"], result["search"]
        where = "stored neighbours" if found is None else f"{found['chunks']:,} chunks, {found['embedder']}"
        search = "-" if found is None else f"{result['search_milliseconds']['median']:.0f} ms a chunk"
        lines.append(
            f"| {_describe_model(settings)} | {where} | {off:.1f} | {on:.1f} | {result['time_ratio']:.2f} | "
            f"{floor['off']:.1f} | {floor['on']:.1f} | {result['slowest_token']['on']:.0f} | {search} |"
        )
    return [*lines, "", "Floor: the bytes of weights and cache that a token needs, at the measured copy bandwidth."]


def _peer_table(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Generation at the sizes of retro-pytorch's README, seconds a token, the prompt included:",
        "",
        "| prompt | new tokens | retro-pytorch's `generate` | `report.generate` | times faster |",
        "|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        result, settings = run["result"], run["settings"]
        theirs, ours = (result["seconds_a_token"][name]["median"] for name in ("retro-pytorch", "retro_kernels"))
        lines.append(
            f"| {settings['length']} | {settings['tokens']} | {theirs:.3f} | {ours:.4f} | "
            f"{result['times_faster']:.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "parts", "generate", "peer", "report"))
    parser.add_argument("--preset", default="small", help="of RetroConfig, or 'small' (width 384, 6 layers)")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of computing attentions, for train"
    )
    parser.add_argument("--db", help="a database for generate")
    parser.add_argument("--out", type=Path, default=HERE / "results" / environment.device_slug("cpu") / FILE)
    given = parser.parse_args()
    if given.what == "report":
        block = "\n\n".join(tables(json.loads(path.read_text())) for path in sorted(HERE.glob(f"results/*/{FILE}")))
        DOCUMENT.write_text(report.replace_block(DOCUMENT.read_text(), block, file=DOCUMENT.name))
        return
    used = {
        "train": ("preset", "batch", "vocabulary", "ways"),
        "parts": ("preset", "batch", "vocabulary"),
        "generate": ("preset", "batch", "tokens", "db"),
        "peer": ("tokens",),
    }[given.what]
    settings = {name: getattr(given, name) for name in ("what", "length", "repeats", *used)}
    result = {"train": train, "parts": parts, "generate": generate, "peer": peer}[given.what](given)
    store(given.out, settings, result)
    print(json.dumps({"settings": settings, **result}, indent=1))


if __name__ == "__main__":
    main()
