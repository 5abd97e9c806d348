"""`retro-kernels generate`: text from a model, with retrieval."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .db_common import counting, printable, say, show_errors, show_progress


class Printer:
    """A streamer: prints the prompt and each token as text, as soon as no letter of it is incomplete."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.printed = tokenizer, ""
        self.tokens: list[int] = []

    def put(self, tokens: Any) -> None:
        self.tokens += tokens.flatten().tolist()
        text = self.tokenizer.decode(self.tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._print(text)

    def end(self) -> None:
        self._print(self.tokenizer.decode(self.tokens))
        typer.echo()

    def _print(self, text: str) -> None:
        typer.echo(printable(text[len(self.printed) :]), nl=False)
        self.printed = text


class DatabaseRetriever:
    """A `Retriever` on a database whose tokens are the model's, and words for what it found."""

    def __init__(self, folder: Path, model: Path, config: Any, num_neighbours: int | None, device: str) -> None:
        from ..retrieval import Database, Retriever
        from ..tokenizers import model_tokenizer_hash

        database = Database(folder)
        theirs, mine = database.manifest["tokenizer"], model_tokenizer_hash(model)
        if theirs["sha256"] != mine:
            raise ValueError(
                f"db: {folder} was built with the tokenizer {theirs['name']!r} (SHA-256 {theirs['sha256'][:12]}), "
                f"expected {config.tokenizer!r} ({mine[:12]}), the model's: its tokens would mean other words"
            )
        if database.chunk_size != config.chunk_size:
            raise ValueError(
                f"db: {folder} has chunks of {database.chunk_size} tokens, expected {config.chunk_size}, the model's"
            )
        self.inner = Retriever(
            database,
            num_neighbours=config.num_neighbours if num_neighbours is None else num_neighbours,
            retrieved_length=config.retrieved_length,
            device=device,
        )

    def __call__(self, chunks: Any) -> Any:
        from ..models import Neighbours

        found = self.inner.retrieve(chunks)
        sources = [
            [(source, self.inner.decode(tokens[there])) for source, tokens, there in zip(*of) if source is not None]
            for of in zip(found.sources, found.tokens, found.mask)
        ]
        return Neighbours(found.tokens, found.mask, sources)


def describe_sources(chunk: str, sources: list[tuple[Any, str]]) -> str:
    """Describes the passages that informed the tokens after a chunk."""
    lines = [f"\nAfter {' '.join(chunk.split())!r}:" if sources else f"\nAfter {' '.join(chunk.split())!r}: nothing"]
    for source, passage in sources:
        record = "" if source.record is None else f", record {source.record:,}"
        place = "" if source.offset < 0 else f", character {source.offset:,}"
        lines += [f"  {source.path}{record}{place}", f"    {' '.join(passage.split())}"]
    return "\n".join(lines)


def retriever_of(name: str) -> Any:
    """`package.module:name`, an object that retrieves. Raises ValueError where there is none."""
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"retriever: got {name!r}, expected package.module:name ({error})") from error
    if not callable(found):
        raise ValueError(f"retriever: {name} is {type(found).__name__}, expected a function of chunks' tokens")
    return found


def generate(
    model: Annotated[Path, typer.Argument(help="Folder of a model: config.json, safetensors, tokenizer.json.")],
    prompt: Annotated[str | None, typer.Argument(help="What the text begins with.", show_default=False)] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="Instead: a file of prompts, one a line, - for standard input; .jsonl has them as 'prompt'."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON for each prompt, with its sources.")
    ] = False,
    db: Annotated[
        Path | None, typer.Option(help="Folder of a database to retrieve from; without: the decoder alone.")
    ] = None,
    retriever: Annotated[
        str | None, typer.Option(help="Instead: package.module:name of a retriever (see rk.models.generation).")
    ] = None,
    neighbours: Annotated[int | None, typer.Option(help="k. Default: the model's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="Draw tokens, sharpened by it. 0 and the default: the best.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest with this probability together.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: avoid tokens that are there.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the text; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    stale: Annotated[
        bool, typer.Option("--stale", help="Use neighbours of the chunk before: search has time.")
    ] = False,
    stride: Annotated[int | None, typer.Option(help="Tokens between retrievals, a multiple of the chunk.")] = None,
    show_neighbours: Annotated[
        bool, typer.Option("--show-neighbours", help="Print what each chunk was given, at the end.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="'cpu' or 'cuda'. Default: the GPU if there is one.")] = None,
) -> None:
    """Continues PROMPT, printing each token as it comes, or many prompts; ends where a document would.

    With a database, every chunk of the text is looked up when it is complete and informs what follows.
    """

    from ..models import Retro
    from ..retrieval.index.devices import find_device
    from ..tokenizers import load_model_tokenizer

    draws = any(x is not None for x in (temperature, top_k, top_p))
    with show_errors(TypeError, code=2):
        device = str(find_device(device or "auto"))
        if batch < 1:
            raise ValueError(f"batch: got {batch}, expected at least 1")
        if (prompt is None) == (prompts is None):
            raise ValueError("prompt, prompts: got both or neither, expected a text or a file of them")
        texts = [prompt] if prompt is not None else _read_prompts(str(prompts))
        loaded = Retro.from_pretrained(model, device=device)
        tokenizer = load_model_tokenizer(model, loaded.config)
        options: dict[str, Any] = {}
        if db is not None and retriever is not None:
            raise ValueError("db, retriever: got both, expected one of them")
        if db is not None or retriever is not None:
            found: Any = (
                DatabaseRetriever(db, model, loaded.config, neighbours, device)
                if db is not None
                else retriever_of(str(retriever))
            )
            options = {
                "retriever": found,
                "stale": stale,
                "retrieval_stride": stride,
                "num_neighbours": neighbours,
            }
        elif stale or stride is not None or show_neighbours or neighbours is not None:
            raise ValueError("stale, stride, neighbours, show-neighbours: got one without --db or --retriever")
        if draws:
            options |= {"do_sample": True, "top_k": top_k, "top_p": top_p}
            options |= {} if temperature is None else {"temperature": temperature}
        options |= {
            "max_new_tokens": max_new_tokens,
            "repetition_penalty": repetition_penalty,
            "stop_strings": stop,
            "tokenizer": tokenizer,
        }
        if prompt is not None and not as_json:
            made = loaded.generate([tokenizer.encode(prompt)], seed=seed, streamer=Printer(tokenizer), **options)
            _show(made, 0, tokenizer, loaded.config.chunk_size, db is not None, show_neighbours)
            return
        with show_progress() as progress:
            count = counting("generate", progress)
            for first in range(0, len(texts), batch):
                some = texts[first : first + batch]
                made = loaded.generate([tokenizer.encode(text) for text in some], seed=seed + first, **options)
                for i, text in enumerate(some):
                    if as_json:
                        typer.echo(json.dumps(_entry(made, i, text, tokenizer, loaded.config)))
                    else:
                        say(tokenizer.decode(made.sequences[i, : made.lengths[i]].tolist()))
                        _show(made, i, tokenizer, loaded.config.chunk_size, db is not None, show_neighbours)
                count(first + len(some), len(texts))


def _read_prompts(name: str) -> list[str]:
    """The prompts of a file, or of standard input. Raises ValueError where a line is none."""
    text = sys.stdin.read() if name == "-" else Path(name).read_text()
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"prompts: {name} has none, expected one a line")
    if not name.endswith((".jsonl", ".ndjson")):
        return lines
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line)["prompt"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"prompts: {name}, line {number}: expected an object with 'prompt' ({error})") from error
    return found


def _entry(made: Any, i: int, prompt: str, tokenizer: Any, config: Any) -> dict[str, Any]:
    """What is said of a sequence in JSON. Every neighbour comes with its source, and the chunk that it was given to."""
    m, tokens, new = config.chunk_size, made.sequences[i].tolist(), made.new_tokens(i)
    sources = []
    for chunk, found in sorted(made.sources[i].items()) if made.sources else ():
        listed: Any = found
        if isinstance(found, list):
            listed = [{**_plain(one[0]), "text": one[1]} if isinstance(one, tuple) else _plain(one) for one in found]
        text = tokenizer.decode(tokens[chunk * m : (chunk + 1) * m])
        sources.append({"chunk": chunk, "text": text, "neighbours": listed})
    ended = bool(new) and new[-1] == config.eos_token_id
    return {"prompt": prompt, "text": tokenizer.decode(new), "tokens": len(new), "ended": ended, "sources": sources}


def _plain(source: Any) -> Any:
    return dataclasses.asdict(source) if dataclasses.is_dataclass(source) else source  # type: ignore[arg-type]


def _show(made: Any, i: int, tokenizer: Any, m: int, of_database: bool, wanted: bool) -> None:
    for chunk, sources in sorted(made.sources[i].items()) if wanted else ():
        if of_database:
            say(describe_sources(tokenizer.decode(made.sequences[i, chunk * m : (chunk + 1) * m].tolist()), sources))
        else:
            say(f"chunk {chunk}: {sources}")
