"""Measures the rates of the cost model (retro_kernels/ops/absorbed/cost_model.py) here.

python -m benchmarks.rates              measure, and print each shape's time against what the fitted rates predict
python -m benchmarks.rates --write      also put them into constants.json, in place of this device's entry

The shapes are none of the workloads that the suite times, so that the model is judged on others than it was fitted to.
A time is the least of interleaved rounds, as other jobs only ever add to one; a backward's is that of forward and
backward less the forward's. The two rates of an absorbed pass are fitted to all shapes of a width by least squares of
the relative errors.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from retro_kernels import files
from retro_kernels.bench import environment, timing
from retro_kernels.bench.operations import DTYPES
from retro_kernels.bench.timing import Protocol, Timed

CHUNK = 64


@dataclass(frozen=True)
class Shape:
    encoder_dim: int
    heads: int
    head_dim: int
    slots: int
    chunks: int


SHAPES = (
    Shape(896, 16, 64, 256, 8),
    Shape(896, 10, 128, 128, 12),
    Shape(896, 10, 128, 256, 8),
    Shape(896, 10, 128, 1024, 3),
    Shape(4096, 8, 64, 256, 4),
    Shape(4096, 8, 128, 256, 4),
    Shape(4096, 8, 128, 640, 2),
)
# torch multiplies fp16 matrices on a CPU at a thousandth of the speed of others.
SMALL = (Shape(896, 2, 64, 64, 1), Shape(896, 2, 128, 128, 1))


def measure(device: torch.device, dtypes: list[str], say=print) -> dict:
    """-> this device's entry of constants.json."""
    from retro_kernels.ops.absorbed import cost_model

    protocol = Protocol(seconds=1e9, min_rounds=7, max_rounds=7)
    rates: dict[str, dict] = {}
    errors: dict[str, dict] = {}
    for name in dtypes:
        shapes = SMALL if name == "fp16" and device.type == "cpu" else SHAPES
        found = [(shape, times(shape, DTYPES[name], device, protocol)) for shape in shapes]
        rates[name] = fit(found, DTYPES[name].itemsize)
        errors[name] = {}
        known = cost_model.Constants("", True, "", rates[name], float("inf"))
        for shape, measured in found:
            for label, seconds in measured.items():
                predicted = known.seconds(phases_of(label, shape, DTYPES[name].itemsize), shape.encoder_dim)
                errors[name].setdefault(label, []).append(predicted / seconds - 1)
                say(
                    f"{name} {label:20} e {shape.encoder_dim:5} h {shape.heads:3} d {shape.head_dim:3} S "
                    f"{shape.slots:5}: {seconds * 1e3:8.2f} ms, fitted {predicted * 1e3:8.2f} ms"
                )
    ceilings = timing.measure_ceilings(device, ["fp32"], quick=True)
    found_environment = environment.collect(device)
    return {
        "type": device.type,
        "device": cost_model.device_name(device),
        "threads": torch.get_num_threads(),
        "date": found_environment["date"],
        "commit": found_environment["commit"],
        "versions": found_environment["packages"],
        "bandwidth": float(f"{ceilings.copy_bytes_per_second:.4g}"),
        "rates": rates,
        "largest_error_of_the_fit": {
            name: {label: round(max(map(abs, values)), 3) for label, values in labels.items()}
            for name, labels in errors.items()
        },
    }


def work_of(shape: Shape, itemsize: int):
    from retro_kernels.ops.absorbed.cost_model import Work

    return Work(
        shape.chunks * CHUNK,
        shape.chunks,
        shape.slots,
        shape.encoder_dim,
        shape.heads,
        shape.heads,
        shape.head_dim,
        shape.head_dim,
        itemsize,
        backward=True,
    )


def phases_of(label: str, shape: Shape, itemsize: int) -> list:
    """The phases of both strategies whose kind begins with `label`."""
    from retro_kernels.ops.absorbed.cost_model import STRATEGIES, phases

    work = work_of(shape, itemsize)
    return [phase for strategy in STRATEGIES for phase in phases(strategy, work) if phase.kind.startswith(label)]


def times(shape: Shape, dtype: torch.dtype, device: torch.device, protocol: Protocol) -> dict[str, float]:
    """Seconds of every pass that can run here, by the beginning of its kinds' names."""
    import retro_kernels as rk
    from retro_kernels.ops.materialise import project

    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(device, dtype)

    n = shape.chunks * CHUNK
    query = draw(1, n + CHUNK - 1, shape.heads, shape.head_dim)  # every chunk has all its rows
    encoded = draw(1, shape.chunks, 1, shape.slots, shape.encoder_dim)
    weights = [draw(shape.heads, shape.head_dim, shape.encoder_dim) * shape.encoder_dim**-0.5 for _ in range(2)]
    key, value = (part.contiguous() for part in project(encoded, weights, (None, None)))
    absorb = functools.partial(rk.projected_chunked_cross_attention, chunk_size=CHUNK, strategy="absorb")
    passes = {
        "project": (lambda states, *w: project(states, w, (None, None)), (encoded, *weights)),
        "core": (functools.partial(rk.chunked_cross_attention, chunk_size=CHUNK), (query, key, value)),
        "absorb": (absorb, (query, encoded, *weights)),
    }
    timed = {}
    for label, (call, inputs) in passes.items():
        for backward in (False, True):
            reason = None
            if label == "absorb":
                leaves = [x.detach().requires_grad_(backward) for x in inputs]
                reason = _absorb_refusal(leaves)
            if reason is None:
                name = f"{label}_{'backward' if backward else 'forward'}"
                timed[name] = Timed(functools.partial(_call, call, inputs, backward))
    found = timing.interleaved(timed, device, protocol)
    least = {name: samples.percentile(0) * 1e-3 for name, samples in found.items()}
    return {
        name: seconds - least[name.replace("backward", "forward")] if name.endswith("backward") else seconds
        for name, seconds in least.items()
    }


def _absorb_refusal(leaves: list[torch.Tensor]) -> str | None:
    from retro_kernels.ops import projected as api

    return api.absorb_refusal(api.prepare(*leaves, chunk_size=CHUNK))


def _call(call, inputs: tuple[torch.Tensor, ...], backward: bool) -> None:
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    with torch.set_grad_enabled(backward):
        out = call(*leaves)
        if backward:
            outs = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])


def fit(found: list[tuple[Shape, dict[str, float]]], itemsize: int) -> dict[str, list[list[float]]]:
    """Rates by kind and width from the times of all shapes."""
    rates: dict[str, list[list[float]]] = {}
    for label in dict.fromkeys(label for _, measured in found for label in measured):
        widths = sorted({shape.encoder_dim for shape, _ in found})
        for width in widths[:1] if label.startswith("core") else widths:  # the core does not know the states' width
            rows = [
                (phases_of(label, shape, itemsize), measured[label])
                for shape, measured in found
                if label in measured and (shape.encoder_dim == width or label.startswith("core"))
            ]
            kinds = [phase.kind for phase in rows[0][0]]
            # Seconds per FLOP of each kind, so that each row's sum is 1 when divided by its time.
            shares = torch.tensor([[phase.flops / seconds for phase in row] for row, seconds in rows]).double()
            scale = shares.mean()
            per_flop = torch.linalg.lstsq(shares / scale, torch.ones(len(rows), 1).double()).solution[:, 0] / scale
            if bool((per_flop <= 0).any()):  # shapes that cannot tell the kinds apart: one rate for all
                total = shares.sum(1)
                per_flop = torch.full_like(per_flop, float(total.sum() / total.square().sum()))
            for kind, value in zip(kinds, per_flop.tolist()):
                rates.setdefault(kind, []).append([width, float(f"{1 / value:.4g}")])
    return rates


def write(entry: dict, path: Path) -> None:
    """Puts the entry in place of the device's old one; the file is replaced whole."""
    document = json.loads(path.read_text()) if path.exists() else {"devices": []}
    kept = [old for old in document["devices"] if old["device"] != entry["device"]]
    text = json.dumps({"devices": [*kept, entry]}, indent=1)
    text = re.sub(r"\[\s+([^\[\]{}]+?),\s+([^\[\]{}]+?)\s+\]", r"[\1, \2]", text)  # a pair stands on one line
    files.write_bytes(path, f"{text}\n".encode())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.rates", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the rates into constants.json")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="may be repeated (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    from retro_kernels.ops.absorbed.cost_model import CONSTANTS

    entry = measure(torch.device(options.device), options.dtype or list(DTYPES))
    print(json.dumps(entry, indent=1))
    if options.write:
        write(entry, CONSTANTS)
        print(CONSTANTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
