"""`retro-kernels generate`: text from a model, with retrieval."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer


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
        typer.echo(text[len(self.printed) :], nl=False)
        self.printed = text


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
    prompt: Annotated[str, typer.Argument(help="What the text begins with.")],
    retriever: Annotated[
        str | None,
        typer.Option(help="package.module:name of a retriever (see rk.models.generation); without: the decoder alone."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="Draw tokens, sharpened by it. Default: the best.")] = None,
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
    """Continues PROMPT, printing each token as it comes.

    With a retriever, every chunk of the text is looked up when it is complete and informs what follows.
    """
    import torch

    from ..models import Retro
    from ..models.tokenizers import load_tokenizer

    device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    draws = any(x is not None for x in (temperature, top_k, top_p))
    try:
        loaded = Retro.from_pretrained(model, device=device)
        tokenizer = load_tokenizer(model, loaded.config)
        options: dict[str, Any] = {}
        if retriever is not None:
            options = {"retriever": retriever_of(retriever), "stale": stale, "retrieval_stride": stride}
        elif stale or stride is not None or show_neighbours:
            raise ValueError("stale, stride, show-neighbours: got one without --retriever")
        if draws:
            options |= {"do_sample": True, "top_k": top_k, "top_p": top_p, "temperature": temperature or 1.0}
        made = loaded.generate(
            [tokenizer.encode(prompt)], max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty,
            stop_strings=stop, tokenizer=tokenizer, seed=seed, streamer=Printer(tokenizer), **options,
        )  # fmt: skip
    except (ValueError, TypeError, FileNotFoundError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    if show_neighbours:
        for chunk, source in sorted(made.sources[0].items()):
            typer.echo(f"chunk {chunk}: {source}")
