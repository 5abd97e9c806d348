"""`retro-kernels verify`: checks the fused kernels on this machine's GPU ahead of their first use."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

PASSED, FAILED, UNKNOWN = 0, 1, 2


def verify(
    all_: Annotated[
        bool, typer.Option("--all", help="Every option, dtype and head size, not only what RETRO's own sizes use.")
    ] = False,
    backend: Annotated[
        list[str] | None, typer.Option(help="'triton' or 'cuda'; may be repeated. Default: those that can run here.")
    ] = None,
    device: Annotated[str, typer.Option(help="The GPU.")] = "cuda",
    again: Annotated[bool, typer.Option("--again", help="Check what has passed before, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, for machines.")] = False,
) -> None:
    """Checks the fused kernels on this GPU, class of calls by class, and remembers the verdicts.

    A GPU takes fused kernels by default once they have proved themselves there. Each class of calls does so at its
    first call; this does it ahead, where no first call may wait (CUDA graphs) or with failed classes again. Every check
    runs forward and gradients of a small problem against the fp64 reference, between guard bands, twice. Exit code 0
    when all passed, 1 when one failed, 2 when something could not be checked.
    """
    import torch

    from ..ops.backends import ATTENTION as BACKENDS
    from ..ops.verification import self_check, verdicts

    on = torch.device(device)
    if on.type == "cuda" and on.index is None and torch.cuda.is_available():
        on = torch.device("cuda", torch.cuda.current_device())
    unusable = {name: BACKENDS[name].unavailable() for name in backend or ("triton", "cuda") if name in BACKENDS}
    unknown = [name for name in backend or () if name not in ("triton", "cuda")]
    if unknown:
        raise typer.BadParameter(f"got {unknown[0]!r}, expected triton or cuda", param_hint="--backend")
    names = [name for name, reason in unusable.items() if reason is None]
    here = on.type != "cuda" or torch.cuda.is_available()
    if not names or not here or not verdicts.needs_proof(on):
        for name, reason in unusable.items():
            other = f"kernels on {on} need no proof" if here else f"there is no {on}"
            typer.echo(f"{name}: {reason or other}", err=True)
        typer.echo("Nothing can be checked here.", err=True)
        raise typer.Exit(UNKNOWN)

    wanted = [(one, name) for name in names for one in classes(name, all_)]
    rows: list[dict[str, Any]] = []

    def add(one: Any, name: str, verdict: Any) -> None:
        rows.append({"backend": name, "class": str(one), "source": verdict.source, **verdict.to_json()})
        if not as_json:
            line = f"{verdict.status:8} {verdict.seconds:6.1f} s  {name}: {one}: {verdict.detail}"
            typer.echo(f"{line} ({verdict.source})" if verdict.source else line)

    missing = []
    for one, name in wanted:
        verdict = None if again else verdicts.look_up(one, name, on)
        if verdict is None or verdict.status != self_check.PASSED:
            missing.append((one, name))
        else:
            add(one, name, verdict)
    for (one, name), verdict in zip(missing, self_check.check_in_children(missing, on)):
        verdicts.remember(one, name, on, verdict)
        add(one, name, verdict)

    counts = {status: sum(row["status"] == status for row in rows) for status in ("passed", "failed", "unknown")}
    if as_json:
        identities = {name: verdicts.identity(on, name) for name in names}
        typer.echo(json.dumps({"device": verdicts.describe(on), "identities": identities, "verdicts": rows}, indent=1))
    else:
        from ..ops.verification import records

        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        typer.echo(f"{verdicts.describe(on)}: {said}. Remembered in {records.path()}.")
    raise typer.Exit(FAILED if counts["failed"] else UNKNOWN if counts["unknown"] else PASSED)


def classes(backend: str, every: bool) -> list[Any]:
    """The classes that RETRO's own sizes use, in half precision; with `every`, every option alone and together, dtypes
    and head sizes. What the backend refuses by its kind is left out."""
    from ..ops.verification.classes import Class

    halves = ("bfloat16", "float16") if every else ("bfloat16",)
    found = []

    def add(operation: str, dtype: str, head: int, rows: int, slots: int = 0, e: int = 0, options: str = "") -> None:
        words = tuple(options.split())
        if backend == "cuda" and not takes(operation, dtype, head, words):
            return
        found.append(Class(operation, dtype, head, head, rows, slots, e, words))

    def takes(operation: str, dtype: str, head: int, words: tuple[str, ...]) -> bool:
        """The options that the CUDA C++ kernels refuse, roughly; the backend judges each call by itself."""
        if operation.endswith("decode"):
            return "key_rotary" not in words
        return dtype != "float32" and head in (64, 96, 128) and set(words) <= {"grouped", "packed"}

    paper = "relative relative_biases"
    for dtype in (*halves, "float32") if every else halves:
        for head in (64, 128, 96, 256) if every and dtype == "bfloat16" else (64, 128):
            for options in ("", paper, f"{paper} dropout", "dropout", "null rotary_partial"):
                add("chunked_cross_attention", dtype, head, 64, 0, 0, options)
                if "null" not in options:
                    add("neighbour_self_attention", dtype, head, 128, 0, 0, options)
                    add("neighbour_cross_attention", dtype, head, 128, 64, 0, options)
            add("neighbour_self_attention", dtype, head, 1024, 0, 0, "causal rotary")
            for rows in (1, 16):
                for options in ("", "relative relative_biases"):
                    add("chunked_cross_attention_decode", dtype, head, rows, 0, 0, options)
            if head <= 128:
                for options in ("", paper):
                    add("projected_chunked_cross_attention", dtype, head, 64, 512, 768, options)
            add("projected_chunked_cross_attention_decode", dtype, head, 32, 0, 768, "")
    if not every:
        return found
    for dtype in (*halves, "float32"):
        for head in (64, 128):
            for options in (
                "grouped",
                "bias",
                "bias_per_neighbour",
                "null",
                "rotary",
                "rotary rotary_interleaved",
                "packed",
                "content_bias relative",
                "bias dropout grouped null rotary",
                f"bias dropout grouped null packed {paper}",
                "bias fp32_parameters null",
            ):
                for rows in (16, 64, 128):
                    add("chunked_cross_attention", dtype, head, rows, 0, 0, options)
                if "rotary" not in options:
                    add("projected_chunked_cross_attention", dtype, head, 64, 512, 768, options)
                    add("projected_chunked_cross_attention", dtype, head, 64, 128, 192, f"{options} projection_biases")
                if not {"null", "packed", "bias_per_neighbour"} & set(options.split()):
                    for rows in (64, 128, 512):
                        add("neighbour_self_attention", dtype, head, rows, 0, 0, options)
                        add("neighbour_cross_attention", dtype, head, rows, 128 if rows == 512 else 64, 0, options)
            for options in ("causal", "causal packed", f"causal {paper}", "causal dropout grouped rotary"):
                add("neighbour_self_attention", dtype, head, 1024, 0, 0, options)
            for options in ("grouped", "bias null", "bias_per_neighbour", "key_rotary rotary", "int8", "float8_e4m3fn"):
                for rows in (1, 16, 32):
                    if "grouped" not in options or rows > 1:
                        add("chunked_cross_attention_decode", dtype, head, rows, 0, 0, options)
                if "rotary" not in options:
                    add("projected_chunked_cross_attention_decode", dtype, head, 32, 0, 768, options)
    return list(dict.fromkeys(found))
