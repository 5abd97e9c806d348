"""The table of workloads: the shapes of design section 6, which operations have them, and what a run times."""

from __future__ import annotations

from dataclasses import replace

from .attention import Attention
from .decoding import Decode, Step
from .operations import (
    ATTENTIONS,
    CAUSAL_SELF,
    CCA,
    DECODE,
    DROPOUT,
    ENCODER_CROSS,
    ENCODER_SELF,
    LAYER,
    OPERATIONS,
    OPTIONS,
    OPTIONS_OF,
    PLAIN,
    PROJECTED,
    RELATIVE,
    RETRIEVAL,
    STEP,
    Workload,
)
from .projected import Layer, Projected

KINDS: dict[str, type[Workload]] = {
    **dict.fromkeys(ATTENTIONS, Attention),
    PROJECTED: Projected,
    LAYER: Layer,
    DECODE: Decode,
    STEP: Step,
}

_DECODERS = (
    Attention("retro-172m", 16, 64, model_dim=896),
    Attention("retro-425m", 12, 128),
    Attention("retro-1.5b", 16, 128),
    Attention("retro-7.5b", 32, 128),
    Attention("retro-7.5b-k1", 32, 128, num_neighbours=1),
    Attention("retro-7.5b-k10", 32, 128, num_neighbours=10),
    Attention("retro-7.5b-k40", 32, 128, num_neighbours=40),
    Attention("megatron-8b", 32, 128, encoder_dim=4096, sequence_length=4096),
    Attention("gqa-8b", 32, 128, encoder_dim=4096, num_kv_heads=8, sequence_length=4096),
    Attention("lucidrains", 8, 64),
)
BATCHES = (1, 8, 64, 256)
_GENERATING = tuple(
    replace(workload, name=f"{workload.name}-batch-{batch}", batch=batch)
    for workload in _DECODERS
    if workload.name in ("retro-172m", "retro-425m", "retro-7.5b")
    for batch in BATCHES
)
# The encoders of the workloads above: all of width 896 at one k are one, and so are the two of width 4096.
_ENCODERS = (
    Attention("encoder-896", 14, 64),
    Attention("encoder-896-k1", 14, 64, num_neighbours=1),
    Attention("encoder-896-k10", 14, 64, num_neighbours=10),
    Attention("encoder-896-k40", 14, 64, num_neighbours=40),
    Attention("encoder-4096", 32, 128, encoder_dim=4096, sequence_length=4096),
)
WORKLOADS = {workload.name: workload for workload in (*_DECODERS, *_ENCODERS, *_GENERATING)}
TINY = Attention("tiny", 2, 16, sequence_length=37, chunk_size=8, num_neighbours=2, retrieved_length=16, batch=1)
"""For tests of the suite itself, every operation: an incomplete last chunk, small enough for Triton's interpreter."""

_ENCODER_NAMES = tuple(workload.name for workload in _ENCODERS)
_DECODER_NAMES = tuple(workload.name for workload in _DECODERS)
_ONE_ROW = tuple(name for name in _DECODER_NAMES if "-k" not in name and name != "retro-1.5b")
_BATCH_NAMES = tuple(workload.name for workload in _GENERATING)
NAMES = {
    CCA: _DECODER_NAMES,
    ENCODER_SELF: _ENCODER_NAMES,
    ENCODER_CROSS: _ENCODER_NAMES,
    CAUSAL_SELF: _ONE_ROW,
    PROJECTED: _DECODER_NAMES,
    LAYER: _DECODER_NAMES,
    DECODE: _BATCH_NAMES,
    STEP: _BATCH_NAMES,
}
"""The workloads of each operation. (For a decoder's self-attention k changes nothing.)"""

DEFAULT: dict[tuple[str, str], tuple[str, ...]] = {
    (CCA, PLAIN): NAMES[CCA],
    (ENCODER_SELF, PLAIN): NAMES[ENCODER_SELF],
    (ENCODER_CROSS, PLAIN): NAMES[ENCODER_CROSS],
    (CAUSAL_SELF, PLAIN): ("retro-172m",),
    (CCA, RELATIVE): ("retro-172m", "retro-425m", "retro-7.5b"),
    (ENCODER_SELF, RELATIVE): ("encoder-896", "encoder-4096"),
    (ENCODER_CROSS, RELATIVE): ("encoder-896", "encoder-4096"),
    (CAUSAL_SELF, RELATIVE): ("retro-172m", "retro-425m"),
    (CCA, DROPOUT): ("retro-172m",),
    (ENCODER_SELF, DROPOUT): ("encoder-896",),
    (ENCODER_CROSS, DROPOUT): ("encoder-896",),
    (PROJECTED, PLAIN): NAMES[PROJECTED],
    (LAYER, PLAIN): ("retro-172m", "retro-425m", "retro-7.5b", "gqa-8b"),
    (DECODE, PLAIN): tuple(f"retro-7.5b-batch-{batch}" for batch in BATCHES),
    (STEP, RETRIEVAL): ("retro-172m-batch-1", "retro-7.5b-batch-1", "retro-7.5b-batch-8"),
}
"""The workloads that a run times by default, by (operation, option)."""

QUICK: dict[tuple[str, str], tuple[str, ...]] = {
    (CCA, PLAIN): ("retro-172m",),
    (ENCODER_SELF, PLAIN): ("encoder-896",),
    (ENCODER_CROSS, PLAIN): ("encoder-896",),
    (CCA, RELATIVE): ("retro-172m",),
    (LAYER, PLAIN): ("retro-172m",),
    (DECODE, PLAIN): ("retro-7.5b-batch-8",),
}

GOALS = {(LAYER, "retro-7.5b"), (PROJECTED, "retro-7.5b"), (PROJECTED, "retro-425m"), (CCA, "retro-7.5b")}
"""(operation, workload) with a stated goal or a place in the README: a run of limited time takes them early."""


def as_operation(workload: Workload, operation: str, option: str) -> Workload:
    """Makes the workload of another operation with the same shape."""
    return KINDS[operation](**{**vars(workload), "operation": operation, "option": option})


def select(
    names: list[str] | tuple[str, ...] | None = None,
    operations: list[str] | tuple[str, ...] | None = None,
    options: list[str] | tuple[str, ...] | None = None,
    default: dict[tuple[str, str], tuple[str, ...]] | None = None,
) -> list[Workload]:
    """The workloads of these names, operations and options. What is not named is as in `default` (or DEFAULT); a name
    that is given is taken with every operation that has it. One workload's options stand side by side, plain first.

    Raises ValueError for what there is not.
    """
    _check_known("operation", operations, OPERATIONS)
    _check_known("option", options, OPTIONS)
    _check_known("workload", names, (*WORKLOADS, TINY.name))
    table = default or DEFAULT
    known = {**WORKLOADS, TINY.name: TINY}
    found = []
    for operation in operations or OPERATIONS:
        listed = {option: table[operation, option] for option in OPTIONS if (operation, option) in table}
        for name in names or dict.fromkeys(name for group in listed.values() for name in group):
            if name not in (*NAMES[operation], TINY.name):
                continue
            usual = [option for option, group in listed.items() if name in group]
            for option in options or usual or OPTIONS_OF[operation][:1]:
                if option in OPTIONS_OF[operation] and (names or option in usual or option not in listed):
                    found.append(as_operation(known[name], operation, option))
    if not found:
        raise ValueError(
            f"workload, operation: got {', '.join(names or ['all'])} and {', '.join(operations or ['all'])}, no case "
            f"in common; {ENCODER_SELF} and {ENCODER_CROSS} have the workloads encoder-..., {DECODE} and {STEP} those "
            "of a batch, the others the rest"
        )
    return found


def _check_known(what: str, given, there) -> None:
    unknown = [name for name in given or () if name not in there]
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; there are: {', '.join(there)}")
