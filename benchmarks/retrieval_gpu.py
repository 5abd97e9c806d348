"""Retrieval on a GPU, a part of the GPU suite: `python -m benchmarks.gpu retrieval --out DIR --limit SECONDS`.

Embedding; exact search and FAISS's indexes over embeddings of real text and over 10^6 and 10^7 made ones; and one line
from text to loss. Everything is compared before it is timed, with the CPU's result or with distances in fp64. Every row
of `retrieval` in bench.json is a setting: what it found of the true neighbours, queries or chunks a second, bytes.

FAISS is used where it is installed; a thin wheel of its GPU build can be carried along. Without one, or without its GPU
code, its lines say so and exact search runs alone. Without a GPU the same code runs on few keys, with FAISS's CPU
indexes.

Embeddings of real text are those in .gpu-kit/embeddings.npy; without the file hashed words stand in for them, and the
line says so. On a machine with the embedder

    python -m benchmarks.retrieval_gpu

makes that file, of the plays in data/: float16 [chunks, 384].
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retro_kernels.bench import text_database
from retro_kernels.retrieval import DatabaseError, Embedder, load_embedder
from retro_kernels.retrieval.embedders import DEFAULT_EMBEDDER
from retro_kernels.retrieval.index import exact
from retro_kernels.retrieval.index import index as library

from . import gpu_kit
from .gpu_part import Record, Skip
from .gpu_timings import device_of

EMBEDDINGS = gpu_kit.KIT / "embeddings.npy"
K, NPROBE = 2, 32
BATCHES = (1, 64, 1024, 8192)
WORDS = 45
"""Of a text that is embedded: about a chunk of 64 tokens."""
KEYS_AT_ONCE = 1 << 18


class Bench:
    """What the items share: the device, the sizes, and how a search is timed."""

    def __init__(self, record: Record) -> None:
        self.reduced = record.reduced
        self.device = device_of(record)
        self.batches = (1, 64) if self.reduced else BATCHES
        self.made_counts = (4_000,) if self.reduced else (10**6, 10**7)
        self.codes = "4x4" if self.reduced else "48"  # a GPU has codes of 8 bits only, which train slowly on a CPU
        self.seconds = 0.01 if self.reduced else 0.15
        self.real_count = 1_500 if self.reduced else None

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free_bytes(self) -> int:
        """0 on a CPU, where it is not measured."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds of a call, the median; the first is not counted."""
        call()
        self.synchronise()
        times, begun = [], time.perf_counter()
        while not times or time.perf_counter() - begun < self.seconds:
            start = time.perf_counter()
            call()
            self.synchronise()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def rates(self, search: Callable[[Tensor, int], Any], queries: Tensor, **row: Any) -> list[dict]:
        """A row for every batch size; where there are fewer queries they are repeated."""
        rows = []
        for batch in self.batches:
            given = queries[torch.arange(batch, device=queries.device) % len(queries)]
            seconds = self.time(functools.partial(search, given, K))
            rows.append({**row, "k": K, "batch": batch, "queries_per_second": batch / seconds})
        return rows


def run(record: Record) -> None:
    """The part, for `benchmarks.gpu`."""
    bench = Bench(record)
    for name, act in items(bench):
        if name not in record.done:
            with record.item(name) as found:
                found["detail"], found["retrieval"] = act()


def items(bench: Bench) -> Iterator[tuple[str, Callable[[], tuple[str, list[dict]]]]]:
    """In order: a name, and what gives a sentence and rows."""
    real = f"{len(real_embeddings(bench.real_count)[0]):,} embeddings of real text"
    yield "embedding", functools.partial(embedding, bench)
    yield f"exact search, {real}", functools.partial(exact_real, bench)
    specs = ("Flat", "IVF{lists},SQ8", f"IVF{{lists}},PQ{bench.codes}")
    for spec in specs:
        yield f"FAISS {spec.format(lists='n')}, {real}", functools.partial(faiss_real, bench, spec)
    yield "text to loss", functools.partial(text_to_loss, bench)
    for count in bench.made_counts:
        yield f"exact search, {count:,} made embeddings", functools.partial(exact_made, bench, count)
        for spec in specs:
            yield (
                f"FAISS {spec.format(lists='n')}, {count:,} made embeddings",
                functools.partial(faiss_made, bench, spec, count),
            )


# -- what is searched


@functools.cache
def real_embeddings(count: int | None) -> tuple[Tensor, str]:
    """-> float16 [chunks, dim], and what they are."""
    if EMBEDDINGS.exists():
        return torch.from_numpy(np.load(EMBEDDINGS))[:count], f"of {DEFAULT_EMBEDDER}, from the kit"
    texts = texts_of_plays()[:count]
    embedder, what = text_database.HashedWords(), "hashed words, a stand-in"
    return torch.from_numpy(np.asarray(embedder(texts), np.float16)), what


def texts_of_plays() -> list[str]:
    words = [play.split() for play in text_database.documents()]
    return [" ".join(of[at : at + WORDS]) for of in words for at in range(0, len(of) - WORDS, WORDS)]


def held_out(bench: Bench) -> tuple[Tensor, Tensor, str]:
    """-> keys and queries, float32 on the CPU: every eighth embedding is a query and no key."""
    whole, what = real_embeddings(bench.real_count)
    is_query = torch.arange(len(whole)) % 8 == 0
    return whole[~is_query].float(), whole[is_query].float(), what


def made(count: int, seed: int, device: torch.device, dim: int = 384, centres: int = 4096) -> Tensor:
    """float16 [count, dim]: points round centres, which are the same for every seed."""
    middle = torch.randn(centres, dim, generator=torch.Generator(device).manual_seed(0), device=device)
    generator = torch.Generator(device).manual_seed(1 + seed)
    found = torch.empty(count, dim, dtype=torch.float16, device=device)
    for part in found.split(KEYS_AT_ONCE):
        of = torch.randint(centres, (len(part),), generator=generator, device=device)
        part.copy_(middle[of] + 0.7 * torch.randn(len(part), dim, generator=generator, device=device))
    return found


@functools.lru_cache(1)
def made_case(bench: Bench, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> keys, queries and the queries' true neighbours."""
    keys, queries = made(count, 0, bench.device), made(max(bench.batches), 1, bench.device).float()
    _, ids = exact.search(exact.Keys([(0, keys)], bench.device), queries, K)
    return keys, queries, ids


def brute_force(keys: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Distances in fp64, by differences. -> distances and ids [q, k]"""
    best = torch.full((len(queries), k), torch.inf, dtype=torch.float64, device=keys.device)
    ids = torch.zeros(len(queries), k, dtype=torch.int64, device=keys.device)
    for first in range(0, len(keys), KEYS_AT_ONCE):
        part = keys[first : first + KEYS_AT_ONCE].double()
        here = torch.stack([(part - query).square().sum(-1) for query in queries.double()])
        together = torch.cat([best, here], dim=-1)
        numbers = torch.cat(
            [ids, torch.arange(first, first + len(part), device=keys.device).expand(len(queries), -1)], 1
        )
        best, order = together.topk(k, largest=False)
        ids = numbers.gather(-1, order)
    return best, ids


def recall(found: Tensor, true: Tensor) -> float:
    return float((found.cpu()[:, :, None] == true.cpu()[:, None]).any(1).float().mean())


# -- items


def exact_real(bench: Bench) -> tuple[str, list[dict]]:
    keys, queries, what = held_out(bench)
    expected = exact.search(exact.Keys([(0, keys)]).hold(), queries, 10)
    before = bench.free_bytes()
    there = exact.Keys([(0, keys)], bench.device).hold()
    held = before - bench.free_bytes()
    distances, ids = exact.search(there, queries, 10)
    if not torch.equal(ids.cpu(), expected[1]) or not torch.equal(distances.cpu(), expected[0]):
        wrong = int((ids.cpu() != expected[1]).sum())
        raise RuntimeError(f"{wrong} of {ids.numel()} ids, or some distances, are not the CPU's to the bit")
    rows = bench.rates(
        functools.partial(exact.search, there),
        queries.to(bench.device),
        index="exact",
        keys=len(keys),
        embeddings=what,
        recall=1.0,
        bytes=held,
    )
    return f"{what}: ids and distances are the CPU's to the bit; {in_words(rows)}", rows


def exact_made(bench: Bench, count: int) -> tuple[str, list[dict]]:
    keys, queries, true = made_case(bench, count)
    few = queries[:4]
    distances, ids = brute_force(keys, few, K)
    if not torch.equal(ids, true[:4]):
        raise RuntimeError(f"found {true[:4].tolist()}, by distances in fp64 {ids.tolist()}")
    there = exact.Keys([(0, keys)], bench.device).hold()
    torch.testing.assert_close(exact.search(there, few, K)[0].double(), distances, rtol=1e-5, atol=0)
    rows = bench.rates(
        functools.partial(exact.search, there),
        queries,
        index="exact",
        keys=count,
        embeddings="made",
        recall=1.0,
        bytes=keys.nbytes,
    )
    return f"as in fp64; {in_words(rows)}", rows


def faiss_real(bench: Bench, spec: str) -> tuple[str, list[dict]]:
    """Built on the CPU and moved, which must find what the CPU's finds; and built on the device."""
    faiss = faiss_for(bench)
    keys, queries, what = held_out(bench)
    spec = spec.format(lists=lists_for(len(keys)))
    true = exact.search(exact.Keys([(0, keys)]).hold(), queries, K)[1]
    on_cpu = faiss.index_factory(keys.shape[1], spec)
    on_cpu.train(keys.numpy())
    on_cpu.add(keys.numpy())
    set_nprobe(on_cpu)
    expected = on_cpu.search(queries.numpy(), K)
    of_cpu = recall(torch.from_numpy(expected[1]), true)
    rows, words = [], [f"the CPU's recall@{K} {of_cpu:.3f}"]
    for how in ("moved", "built there"):
        before = bench.free_bytes()
        index = placed(bench, faiss, on_cpu if how == "moved" else faiss.index_factory(keys.shape[1], spec))
        if how != "moved":
            fill(index, keys.to(bench.device))
        set_nprobe(index)
        search = functools.partial(searched, index)
        _, ids = search(queries.to(bench.device), K)
        held, share = before - bench.free_bytes(), float((ids.cpu() == torch.from_numpy(expected[1])).float().mean())
        found = recall(ids, true)
        if how == "moved" and share < 0.99:
            raise RuntimeError(f"{spec}, moved: {share:.1%} of the ids are those that the CPU's index finds")
        if found < of_cpu - 0.03:
            raise RuntimeError(f"{spec}, {how}: recall@{K} {found:.3f}, of the CPU's {of_cpu:.3f}")
        some = bench.rates(
            search,
            queries.to(bench.device),
            index=f"{spec}, {how}",
            keys=len(keys),
            embeddings=what,
            recall=found,
            bytes=held,
            nprobe=NPROBE,
        )
        rows += some
        words.append(f"{how}: {share:.1%} of the ids the same; {in_words(some)}")
        del index, search
    return f"{what}, {spec}: {'; '.join(words)}", rows


def faiss_made(bench: Bench, spec: str, count: int) -> tuple[str, list[dict]]:
    """Built on the device."""
    faiss = faiss_for(bench)
    keys, queries, true = made_case(bench, count)
    spec = spec.format(lists=lists_for(count))
    before = bench.free_bytes()
    index = placed(bench, faiss, faiss.index_factory(keys.shape[1], spec))
    begun = time.perf_counter()
    fill(index, keys)
    bench.synchronise()
    seconds = time.perf_counter() - begun
    set_nprobe(index)
    search = functools.partial(searched, index)
    found = recall(search(queries, K)[1], true)
    if spec == "Flat" and found < 0.999:
        raise RuntimeError(f"Flat: recall@{K} {found:.4f} against exact search")
    rows = bench.rates(
        search,
        queries,
        index=f"{spec}, built there",
        keys=count,
        embeddings="made",
        recall=found,
        bytes=before - bench.free_bytes(),
        nprobe=NPROBE,
        build_seconds=seconds,
    )
    return f"{spec}: built in {seconds:.1f} s; {in_words(rows)}", rows


def embedding(bench: Bench) -> tuple[str, list[dict]]:
    texts = texts_of_plays()[: 24 if bench.reduced else 8192]
    few = texts[:: max(1, len(texts) // 32)]
    rows, words = [], []
    with an_embedder(bench.reduced) as (name, what):
        expected = load_embedder(name, device="cpu", precision="fp32")(few)
        for precision in ("fp32",) if bench.reduced else ("fp32", "bf16"):
            embedder = load_embedder(name, device=str(bench.device), precision=precision)
            found, scale = embedder(few), np.abs(expected).max()
            error = float(np.abs(found - expected).max() / scale)
            if error > (1e-4 if precision == "fp32" else 3e-2):
                raise RuntimeError(f"{precision}: {error:.1e} of the largest number off the CPU's fp32")
            # As the builder and the retriever call it: tokenising is included.
            rate = len(texts) / bench.time(functools.partial(embedder, texts))
            rows.append({"what": "embedding", "model": what, "precision": precision, "chunks_per_second": rate})
            words.append(f"{precision} {rate:,.0f} chunks/s ({error:.0e} off the CPU's)")
    return f"{what}: {'; '.join(words)}", rows


def text_to_loss(bench: Bench) -> tuple[str, list[dict]]:
    """A passage of one play, its neighbours in the others, RETRO's loss on it and the gradient."""
    from retro_kernels.models import Retro, RetroConfig
    from retro_kernels.retrieval import Database, Retriever, build_database
    from retro_kernels.tokenizers import BYTES, open_tokenizer

    plays = text_database.documents()
    characters, length = (6_000, 256) if bench.reduced else (60_000, 2048)
    embedder: Embedder = text_database.HashedWords()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text").mkdir()
        for number, play in enumerate(plays[1:]):
            (folder / "text" / f"{number}.txt").write_text(play[:characters])
        database = build_database(folder / "text", folder / "db", tokenizer=BYTES, embedder=embedder, index="exact")
        tokenizer = open_tokenizer(database.manifest["tokenizer"])
        torch.manual_seed(0)
        sizes = {"model_dim": 128, "num_heads": 2, "encoder_dim": 64, "encoder_heads": 2, "encoder_head_dim": 32}
        if not bench.reduced:
            sizes = {"model_dim": 512, "num_heads": 8, "encoder_dim": 256, "encoder_heads": 4, "encoder_head_dim": 64}
        config = RetroConfig(
            vocab_size=max(256, 1 + max(tokenizer.encode("".join(plays)[:100_000]))),
            num_layers=2,
            cross_attention_layers=(2,),
            encoder_layers=1,
            initializer_range=0.05,
            **sizes,
        )
        model = Retro(config)
        weights = model.state_dict()

        def loss_on(device: torch.device, neighbours: Any = None) -> tuple[Any, Tensor, Tensor]:
            """-> the neighbours, the loss and the norm of the gradient."""
            there = Retro(config).to(device)
            there.load_state_dict(weights)
            found = neighbours
            tokens = torch.tensor(tokenizer.encode(plays[0][:characters])[: length + 1], device=device)[None]
            if found is None:
                store = Database(folder / "db").to(device)
                with Retriever(store, embedder=embedder, device=device) as retriever:
                    found = retriever.retrieve_tokens(tokens[:, :-1])
            loss = there.loss(tokens[:, :-1], tokens[:, 1:], found.tokens.to(device), found.mask.to(device))
            loss.backward()
            norms = [x.grad.norm() for x in there.parameters() if x.grad is not None]
            return found, loss.detach().cpu(), torch.stack(norms).norm().cpu()

        with backend("cpu" if bench.device.type == "cpu" else "triton") as name:
            found, loss, norm = loss_on(bench.device)
            seconds = bench.time(lambda: loss_on(bench.device))
        with backend("reference"):
            expected, expected_loss, expected_norm = loss_on(torch.device("cpu"))
        if not torch.equal(found.ids.cpu(), expected.ids) or not torch.equal(found.tokens.cpu(), expected.tokens):
            raise RuntimeError("the neighbours are not those that the CPU finds")
        torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=0)
        torch.testing.assert_close(norm, expected_norm, rtol=1e-3, atol=0)
    rows = [{"what": "text to loss", "tokens": length, "seconds": seconds, "backend": name, "loss": float(loss)}]
    same = f"loss {float(loss):.6f}, of the CPU's reference {float(expected_loss):.6f}"
    return f"{length} tokens, fp32, {name}: the CPU's neighbours; {same}; {1e3 * seconds:,.0f} ms with gradients", rows


# -- how it is done


@contextlib.contextmanager
def backend(name: str) -> Iterator[str]:
    """Without the self-check, which is another part's."""
    before = os.environ.get("RETRO_KERNELS_BACKEND")
    os.environ["RETRO_KERNELS_BACKEND"] = name
    try:
        yield name
    finally:
        os.environ.pop("RETRO_KERNELS_BACKEND")
        if before is not None:
            os.environ["RETRO_KERNELS_BACKEND"] = before


@contextlib.contextmanager
def an_embedder(small: bool) -> Iterator[tuple[str, str]]:
    """-> a name for `load_embedder`, and what it is: the offline embedder, or a model of its shape with made weights,
    whose tokens are words, or a small one. Raises Skip without transformers."""
    for needed in ("transformers", "tokenizers", "safetensors"):
        if importlib.util.find_spec(needed) is None:
            raise Skip(f"{needed} is not installed")
    if not small and importlib.util.find_spec(DEFAULT_EMBEDDER.replace("-", "_")):
        yield DEFAULT_EMBEDDER, DEFAULT_EMBEDDER
        return
    import tokenizers
    import transformers

    words = sorted({word for play in text_database.documents() for word in play.split()})
    with tempfile.TemporaryDirectory() as folder:
        numbers = {word: number for number, word in enumerate(("[UNK]", *words[:30_521]))}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        if small:
            shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        torch.manual_seed(0)
        transformers.BertModel(transformers.BertConfig(**shape)).save_pretrained(folder)
        yield folder, f"made weights in the shape of {'a small BERT' if small else DEFAULT_EMBEDDER}"


def faiss_for(bench: Bench) -> Any:
    """FAISS. Raises Skip, with the reason, where it cannot be used on this device."""
    try:
        faiss = library.import_faiss()
    except DatabaseError as error:
        raise Skip(f"exact search runs alone: {error.__cause__}") from error
    if bench.device.type == "cuda" and not hasattr(faiss, "StandardGpuResources"):
        raise Skip(f"exact search runs alone: FAISS {faiss.__version__} has no GPU code")
    return faiss


def placed(bench: Bench, faiss: Any, index: Any) -> Any:
    return library.on_gpu(faiss, index, bench.device) if bench.device.type == "cuda" else index


def fill(index: Any, keys: Tensor) -> None:
    """Trains an index with some of the keys and adds all. On a GPU they never leave it."""
    if not index.is_trained:
        index.train(arrays(keys[:: max(1, len(keys) // (64 * max(256, getattr(index, "nlist", 0))))].float()))
    for part in keys.split(KEYS_AT_ONCE):
        index.add(arrays(part.float()))


def searched(index: Any, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    distances, ids = index.search(arrays(queries), k)
    return torch.as_tensor(distances), torch.as_tensor(ids)


def arrays(x: Tensor) -> Any:
    """FAISS takes tensors on a GPU (see `library.on_gpu`) and arrays on a CPU."""
    return x.contiguous() if x.is_cuda else np.ascontiguousarray(x.numpy())


def set_nprobe(index: Any) -> None:
    if hasattr(index, "nprobe"):
        index.nprobe = min(NPROBE, index.nlist)


def lists_for(count: int) -> int:
    """A power of two with at least 64 keys a list; not more than 4,096, which train in seconds on a GPU."""
    return min(4096, 1 << max(2, (count // 64).bit_length() - 1))


def in_words(rows: list[dict]) -> str:
    rates = ", ".join(f"{row['queries_per_second']:,.0f} at {row['batch']:,}" for row in rows)
    held = f", {rows[0]['bytes'] / 1e6:,.0f} MB" if rows[0]["bytes"] else ""
    return f"recall@{K} {rows[0]['recall']:.3f}, queries/s {rates}{held}"


def main() -> None:
    """Writes `EMBEDDINGS`."""
    embedder = load_embedder(DEFAULT_EMBEDDER)
    texts = texts_of_plays()
    EMBEDDINGS.parent.mkdir(exist_ok=True)
    np.save(EMBEDDINGS, embedder(texts).astype(np.float16))
    print(f"{EMBEDDINGS}: {len(texts):,} embeddings")


if __name__ == "__main__":
    main()
