"""What the GPU suite times, and what else is no test: functions that are given a `gpu_part.Record`."""

from __future__ import annotations

import contextlib
import os

from .gpu_part import Record, Skip


def device_of(record: Record):
    import torch

    return torch.device("cpu") if record.reduced else torch.device("cuda", torch.cuda.current_device())


def ceilings_of(record: Record):
    """Environment, copy bandwidth and matrix rates of this device: measured by the first part that needs them."""
    import json

    from retro_kernels.bench import environment, timing

    device = device_of(record)
    for line in record.file.read_text().splitlines():
        entry = json.loads(line)
        if entry.get("ceilings"):
            return timing.Ceilings(**entry["ceilings"])
    with record.item("machine") as found:
        found["environment"] = environment.collect(device)
        dtypes = ["fp32", "bf16"] if record.reduced else ["fp32", "bf16", "fp16"]
        made = timing.measure_ceilings(device, dtypes, quick=True)
        found["ceilings"] = made.to_json()
        rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in made.matrix_flops_per_second.items())
        found["detail"] = f"copy {made.copy_bytes_per_second / 1e9:,.0f} GB/s; matrix {rates} TFLOP/s"
        return made
    raise RuntimeError("without the limits of this machine nothing is timed")


class _Quiet:
    def case(self, text: str) -> None: ...
    def step(self, text: str) -> None:
        print(text, flush=True)

    def row(self, row) -> None: ...


def time_workloads(record: Record, planned: list[tuple], compiled: bool, seconds: float) -> None:
    """planned: (workload, dtype), what matters most first. Each is checked and then timed, all variants interleaved,
    as CUDA graphs and, besides, as eager calls on the wall's clock."""
    import torch

    from retro_kernels.bench import suite, timing
    from retro_kernels.bench.operations import MODES
    from retro_kernels.bench.variants import CompileBudget

    ceilings, device = ceilings_of(record), device_of(record)
    budget = CompileBudget(0.4 * max(0.0, record.seconds_left()), 20.0)
    for workload, dtype in planned:
        name = f"{workload.operation} {workload.option} {workload.name} {dtype}"
        if name in record.done:
            continue
        with record.item(name) as found:
            settings = suite.Settings(
                device=device,
                dtypes=[dtype],
                modes=MODES,
                protocol=timing.Protocol(seconds=seconds, min_rounds=3, max_rounds=100),
                budget=budget,
                compiled=compiled,
                # side by side, in the same rounds: what is the default was not yet decided there
                backends=None if record.reduced else ["triton", "cuda"],
            )
            rows = suite.run([workload], settings, ceilings, _Quiet())
            found["rows"] = [row.to_json() for row in rows]
            wrong = [row for row in rows if row.status in (suite.WRONG, suite.FAILED)]
            ours = [row for row in wrong if row.variant.startswith("retro_kernels") or row.variant == "all"]
            if ours:
                raise RuntimeError("; ".join(f"{row.variant} {row.mode}: {row.reason}" for row in ours))
            timed = sum(row.status == suite.OK for row in rows)
            found["detail"] = f"{timed} rows timed, {len(wrong)} of the alternatives failed or were wrong"
        torch._dynamo.reset()


def headline(record: Record) -> None:
    """Two timings that a run of a minute already has: chunked cross-attention and the encoder's self-attention."""
    from retro_kernels.bench.operations import CCA, ENCODER_SELF, PLAIN
    from retro_kernels.bench.workloads import select

    if record.reduced:
        planned = [(workload, "fp32") for workload in select(["tiny"], [CCA], [PLAIN])]
    else:
        planned = [
            (workload, "bf16")
            for workload in (*select(["retro-425m"], [CCA], [PLAIN]), *select(["encoder-896"], [ENCODER_SELF], [PLAIN]))
        ]
    time_workloads(record, planned, compiled=False, seconds=0.1 if record.reduced else 1.5)


def tables(record: Record) -> None:
    """The workloads of design section 6 against SDPA, FlexAttention and torch.compile, what matters most first."""
    from retro_kernels.bench.operations import CAUSAL_SELF, CCA, ENCODER_CROSS, ENCODER_SELF, OPTIONS, PLAIN, RELATIVE
    from retro_kernels.bench.workloads import select

    if record.reduced:
        planned = [(workload, "fp32") for workload in select(["tiny"], [ENCODER_CROSS], [PLAIN])]
        time_workloads(record, planned, compiled=False, seconds=0.1)
        return
    encoder = [ENCODER_SELF, ENCODER_CROSS]
    first = [
        *select(["retro-425m"], [CCA], [PLAIN, RELATIVE]),
        *select(["encoder-896"], encoder, list(OPTIONS)),
        *select(["retro-172m"], [CCA], list(OPTIONS)),
        *select(["retro-172m"], [CAUSAL_SELF], [PLAIN, RELATIVE]),
    ]
    rest = [workload for workload in select() if workload not in first]
    others = select(["retro-172m", "encoder-896"], [CCA, *encoder], [PLAIN])
    planned = [(workload, "bf16") for workload in first] + [(workload, "fp16") for workload in others]
    planned += [(workload, "bf16") for workload in rest] + [(workload, "fp32") for workload in others]
    time_workloads(record, planned, compiled=True, seconds=0.8)


def self_check(record: Record) -> None:
    """What a first call checks by itself (`retro-kernels verify`), for every class of calls that RETRO's own sizes use.
    Its verdicts are what `benchmarks.evidence` ships."""
    import retro_kernels as rk
    from retro_kernels.cli.verify import classes
    from retro_kernels.ops.verification import self_check as check
    from retro_kernels.ops.verification import verdicts
    from retro_kernels.ops.verification.classes import Class

    device = device_of(record)
    names = [name for name in (("cpu",) if record.reduced else ("triton", "cuda")) if rk.backends()[name].available]
    few = [Class("chunked_cross_attention", "bfloat16", 64, 64, 64)]
    wanted = [(one, name) for name in names for one in (few if record.reduced else classes(name, False))]
    wanted = [(one, name) for one, name in wanted if f"{name}: {one}" not in record.done]
    # A child process is for what may spoil a CUDA context.
    if record.reduced:
        verdicts = (check.check_here(*one, device) for one in wanted)
    else:
        verdicts = check.check_in_children(wanted, device)
    identities = {name: verdicts.identity(device, name) for name in names}
    with contextlib.closing(verdicts):
        for one, name in wanted:
            with record.item(f"{name}: {one}") as found:
                verdict = next(verdicts)
                found["detail"] = verdict.detail
                if verdict.status == check.UNKNOWN:
                    raise RuntimeError(f"could not be checked: {verdict.detail}")
                entry = {verdicts.entry_of(one, name): verdict.to_json()}
                found["verified"] = {"identity": identities[name], "verdicts": entry}
                if not record.reduced:
                    verdicts.remember(one, name, device, verdict)
                if verdict.status == check.FAILED:
                    raise RuntimeError(verdict.detail)


def real_text(record: Record) -> None:
    """A retro-pytorch model on real text, with and without rk.swap, where its packages are there."""
    from retro_kernels.bench import real_text as real
    from retro_kernels.bench import timing

    reduced = record.reduced
    small = dict(
        real.README,
        max_seq_len=256,
        enc_dim=64,
        enc_depth=1,
        dec_dim=64,
        dec_depth=2,
        heads=2,
        dec_cross_attn_layers=(1, 2),
    )
    if not reduced:
        os.environ["RETRO_KERNELS_BACKEND"] = "triton"  # the default is for a GPU that is verified
    if "real text" in record.done:
        return
    with record.item("real text") as found:
        reports: list[real.Report] = []
        try:
            report = real.run(
                device_of(record),
                length=128 if reduced else 2048,
                dtypes=["fp32"] if reduced else ["fp32", "bf16"],
                protocol=timing.Protocol(seconds=0.5 if reduced else 10.0, min_rounds=2, max_rounds=20),
                characters=4_000 if reduced else None,
                step=lambda text: print(text, flush=True),
                configuration=small if reduced else None,
                report=reports.append,
            )
        except real.Unavailable as error:
            raise Skip(str(error)) from error
        finally:
            if reports:
                found["real_text"] = reports[0].to_json()
        wrong = [comparison.worst for comparison in report.comparisons if not comparison.passed]
        if wrong:
            raise RuntimeError(f"the swapped model differs: {wrong[0]}")
        found["detail"] = f"{len(report.rows)} rows timed, all comparisons passed"
