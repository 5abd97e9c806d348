"""What tables show of a run's results (`results.py`): sections, cells as text, and legends."""

from __future__ import annotations

import re

from .operations import ATTENTIONS, DECODE, LAYER, OPERATIONS, OPTIONS, PLAIN, PROJECTED, RETRIEVAL, STEP
from .results import Case, case_of, cases, is_baseline, is_ours


def sections(document: dict) -> list[tuple[str, list[dict]]]:
    """(title, rows): one section an operation without options, then one for each option."""
    rows = document["rows"]
    plain = [(title, [row for row in rows if (row["operation"], row["option"]) == (operation, PLAIN)])
             for operation, title in ATTENTIONS.items()]  # fmt: skip
    others = [(f"With {text}", [row for row in rows if row["option"] == option])
              for option, text in OPTIONS.items() if option not in (PLAIN, RETRIEVAL)]  # fmt: skip
    around = [(title, [row for row in rows if row["operation"] == operation])
              for operation, title in OPERATIONS.items() if operation not in ATTENTIONS]  # fmt: skip
    return [(title, found) for title, found in plain + others + around if found]


README_WORKLOADS = ("retro-172m", "retro-7.5b", "encoder-896")
README_HEAD = (
    "forward and backward",
    "workload",
    "dtype",
    "ours ms",
    "SDPA ms",
    "compiled ms",
    "eager ms",
    "vs fastest",
)
README_LEGEND = """\
Medians of interleaved rounds; every timed result was checked against an fp64 reference in the same run. SDPA: the
fastest way of using scaled_dot_product_attention on folded tensors; compiled: the faster of torch.compile and
FlexAttention; eager: retro-pytorch's way; vs fastest: how many times faster ours is than the fastest of these."""


def readme_cells(document: dict) -> list[list[str]]:
    """The rows that the README shows of one run: a training step's attentions, without options, in bf16 and, of
    chunked cross-attention, the largest in fp32, too."""
    cells, order = [], list(ATTENTIONS)
    entries = [entry for entry in summary(document) if entry["operation"] in order]
    for entry in sorted(entries, key=lambda entry: order.index(entry["operation"])):
        operation, workload, dtype = (entry[name] for name in ("operation", "workload", "dtype"))
        if (entry["option"], entry["mode"]) != (PLAIN, "forward+backward") or workload not in README_WORKLOADS:
            continue
        if dtype != "bf16" and (dtype, workload) != ("fp32", "retro-7.5b"):
            continue
        others = [entry[name] for name in ("sdpa", "compiled", "eager")]
        best = min((row for row in others if row), key=lambda row: row["p50_ms"], default=None)
        cells.append(
            [
                ATTENTIONS[operation], workload, dtype, *(milliseconds(row) for row in (entry["ours"], *others)),
                times(ratio(best, entry["ours"])),
            ]
        )  # fmt: skip
    return cells


def summary(document: dict, rows: list[dict] | None = None) -> list[dict]:
    """One entry a case (of these rows): retro_kernels, the same without the option, eager, and the fastest of each
    family of alternatives; None where there is no checked time."""

    def fastest(rows: list[dict], *prefixes: str) -> dict | None:
        timed = [row for row in rows if row["status"] == "ok" and row["variant"].startswith(prefixes)]
        return min(timed, key=lambda row: row["p50_ms"], default=None)

    result = []
    grouped: dict[Case, list[dict]] = {}
    for row in document["rows"] if rows is None else rows:
        grouped.setdefault(case_of(row), []).append(row)
    for (operation, option, workload, dtype, mode), found in grouped.items():
        own = [row for row in found if is_ours(row["variant"])]
        ours = fastest([row for row in own if row["variant"] != "retro_kernels[reference]"], "retro_kernels")
        ours = ours or fastest(own, "retro_kernels")
        result.append(
            {
                "operation": operation,
                "option": option,
                "workload": workload,
                "dtype": dtype,
                "mode": mode,
                "ours": ours,
                "without": fastest([row for row in found if is_baseline(row["variant"])], "retro_kernels"),
                "eager": fastest(found, "eager"),
                "sdpa": fastest(found, "sdpa"),
                "compiled": fastest(found, "compile", "flex"),
            }
        )
    return result


def speedups(document: dict) -> list[dict]:
    """One entry an (operation, option, workload), in the order they were run. "times" is (dtype, mode) -> how many
    times faster retro_kernels is than the fastest alternative. "against" names the alternatives that were fastest."""
    found: dict[tuple[str, str, str], dict] = {}
    for entry in summary(document):
        alternatives = [row for row in (entry["eager"], entry["sdpa"], entry["compiled"]) if row]
        best = min(alternatives, key=lambda row: row["p50_ms"], default=None)
        value = ratio(best, entry["ours"])
        if value is None or best is None:
            continue
        place = entry["operation"], entry["option"], entry["workload"]
        names = dict(zip(("operation", "option", "workload"), place))
        line = found.setdefault(place, {**names, "times": {}, "against": []})
        line["times"][entry["dtype"], entry["mode"]] = value
        if best["variant"] not in line["against"]:
            line["against"].append(best["variant"])
    return list(found.values())


SPEEDUP_LEGEND = (
    "Medians of interleaved rounds, each result checked against fp64 in the same run. Against: the fastest of eager "
    "code, every backend of SDPA, and what was compiled. Below 1.00x is slower. cca: chunked cross-attention; "
    "retro-kernels bench --help explains the other names."
)
SPEEDUP_MODES = {"forward": "fwd", "forward+backward": "fwd+bwd"}


def speedup_cells(document: dict) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of `speedups` as a table of text: a column a (dtype, mode) that was timed anywhere."""
    lines = speedups(document)
    columns = sorted({column for line in lines for column in line["times"]}, key=lambda x: (x[0] != "fp32", *x))
    head = ["operation", "workload", *(f"{dtype}\n{SPEEDUP_MODES[mode]}" for dtype, mode in columns), "against"]
    cells = []
    for line in lines:
        name = line["operation"] if line["option"] == PLAIN else f"{line['operation']} {line['option']}"
        values = [times(line["times"].get(column)) for column in columns]
        families = dict.fromkeys(re.split(r"[\[ ]", variant)[0] for variant in line["against"])
        cells.append([name, line["workload"], *values, ", ".join(families)])
    return head, cells


def ratio(other: dict | None, ours: dict | None) -> float | None:
    """Divides the other's time by ours."""
    return other["p50_ms"] / ours["p50_ms"] if other and ours else None


def real_text_pairs(document: dict) -> list[dict]:
    """(dtype, stage) with both variants' rows, original and swapped."""
    report = document.get("real_text")
    if not report or "rows" not in report:
        return []
    pairs: dict[tuple[str, str], dict] = {}
    for row in report["rows"]:
        entry = pairs.setdefault((row["dtype"], row["stage"]), {"dtype": row["dtype"], "stage": row["stage"]})
        entry["swapped" if "rk.swap" in row["variant"] else "original"] = row
    # One round is no measurement: a pause of the machine would stand there as a fact about the code.
    return [pair for pair in pairs.values() if len(pair) == 4 and pair["swapped"]["samples"] > 1]


# Text of numbers: three significant digits, units in the column heads.


def milliseconds(row: dict | None) -> str:
    return "-" if row is None else digits(row["p50_ms"])


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def megabytes(row: dict | None) -> str:
    value = row.get("peak_extra_bytes") if row else None
    return "-" if value is None else digits(value / 1e6)


def percent(row: dict | None) -> str:
    value = row.get("percent_of_limit") if row else None
    return "-" if value is None else f"{value:.0f}%"


def digits(value: float) -> str:
    """Three significant digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"


SUMMARY_HEAD = (
    "workload", "dtype", "mode", "ours ms", "SDPA ms", "comp. ms", "eager ms", "vs SDPA", "vs comp.", "vs eager",
    "limit", "MB", "SDPA MB",
)  # fmt: skip
OPTION_HEAD = (
    "operation", "workload", "dtype", "mode", "ours ms", "without", "costs", "SDPA ms", "comp. ms", "eager ms",
    "vs SDPA", "vs comp.", "vs eager", "limit", "MB", "SDPA MB",
)  # fmt: skip
WALL_HEAD = ("ours wall ms", "SDPA wall ms")
SUMMARY_LEGEND = (
    "Medians of interleaved rounds; every timed result was checked against an fp64 reference in the same run. "
    "Ours: retro_kernels. SDPA: the fastest way of using scaled_dot_product_attention (every backend, on folded "
    "tensors; relative positions as a materialised bias); comp.: the fastest of torch.compile and FlexAttention; "
    "eager: retro-pytorch's way, with relative positions Transformer-XL's. vs: how many times faster ours is. without: "
    "ours without the option, in the same rounds; costs: how much longer the option takes. Limit: the least time that "
    "the measured copy bandwidth and multiply-add rate allow, as a share of our time. MB: most memory alive beyond the "
    "inputs, results included."
)
WALL_LEGEND = (
    " Wall: eager calls one after the other, Python included, where the other times are of replayed CUDA graphs."
)


def section_cells(document: dict, rows: list[dict]) -> tuple[tuple[str, ...], list[list[str]], int]:
    """One section's table: its head, its cells as text (one row a case), and how many columns are words."""
    special = {PROJECTED: _strategy_cells, LAYER: _strategy_cells, DECODE: _decode_cells, STEP: _step_cells}
    if rows[0]["operation"] in special:
        return special[rows[0]["operation"]](document, rows)
    entries = summary(document, rows)
    plain = all(entry["option"] == PLAIN for entry in entries)
    cells = []
    for entry in entries:
        ours, sdpa, compiled, eager = (entry[name] for name in ("ours", "sdpa", "compiled", "eager"))
        without = [] if plain else [milliseconds(entry["without"]), cost(entry)]
        cells.append(
            [
                *([] if plain else [entry["operation"]]), entry["workload"], entry["dtype"],
                entry["mode"].replace("forward", "fwd").replace("backward", "bwd"), milliseconds(ours), *without,
                *(milliseconds(row) for row in (sdpa, compiled, eager)),
                *(times(ratio(row, ours)) for row in (sdpa, compiled, eager)),
                percent(ours), megabytes(ours), megabytes(sdpa),
            ]
        )  # fmt: skip
    head = SUMMARY_HEAD if plain else OPTION_HEAD
    if any(row.get("cuda_graph") for row in rows):  # a GPU's times are of graphs: what eager calls take stands beside
        head = (*head, *WALL_HEAD)
        for row, entry in zip(cells, entries):
            row += [digits(x["wall_ms"]) if x and x.get("wall_ms") else "-" for x in (entry["ours"], entry["sdpa"])]
    return head, cells, 3 if plain else 4


def cost(entry: dict) -> str:
    """The additional time of ours with the case's option, in percent."""
    value = ratio(entry["ours"], entry["without"])
    return "-" if value is None else f"{100 * (value - 1):+.0f}%"


STRATEGY_HEAD = (
    "workload", "dtype", "mode", "auto", "K, V ms", "absorb ms", "predicted", "SDPA ms", "comp. ms", "eager ms",
    "vs best", "limit", "MB K, V", "MB abs.", "MB SDPA", "scratch K, V",
    "scratch abs.", "scratch SDPA", "saved K, V", "saved abs.", "saved SDPA",
)  # fmt: skip
DECODE_HEAD = (
    "workload", "dtype", "K, V ms", "states ms", "again ms", "SDPA ms", "vs again", "vs SDPA", "limit K, V",
    "limit states", "cache K, V MB", "cache states MB",
)  # fmt: skip
STEP_HEAD = (
    "workload", "dtype", "off ms", "K, V ms", "states ms", "again ms", "SDPA ms", "K, V / off", "states / off",
    "again / off", "weights on / off", "border ms",
)  # fmt: skip
LEGENDS = {
    PROJECTED: (
        "Keys and values of all neighbours are made (K, V), or their projections absorbed, or it is left to "
        '`strategy="auto"`: what that takes is named, its time bold. predicted: the cost model\'s times of both. '
        "SDPA, comp., eager: keys and values made, then as above. vs best: how many times faster than the fastest of "
        "these auto's choice is. MB: most memory alive beyond the inputs; scratch: the same in MB without output "
        "and returned gradients; saved: MB that autograd keeps besides inputs and output."
    ),
    LAYER: "The columns of the table before, for the whole layer; what is saved includes its norm and linear layers.",
    DECODE: (
        "Milliseconds for one token of every sequence of the batch. K, V and states: retro_kernels on a cache of keys "
        "and values, and on the encoder's states; again: the fastest way of projecting the neighbours for every token; "
        "SDPA: on a cache of keys and values. vs: how many times faster the faster form is. limit: the bytes of each "
        "form at the measured bandwidth, as a share of its time."
    ),
    STEP: (
        "One token through the decoder, without retrieval (off), and with it by each form of cache. weights on / off: "
        "the ratio of the bytes of parameters read with K, V. border: making keys and values for all layers when a "
        "chunk ends, once in 64 tokens."
    ),
}


def legend(rows: list[dict]) -> str:
    """The text under a section's table."""
    graphed = rows[0]["operation"] not in LEGENDS and any(row.get("cuda_graph") for row in rows)
    return LEGENDS.get(rows[0]["operation"], SUMMARY_LEGEND) + (WALL_LEGEND if graphed else "")


def ok_rows(rows: list[dict], *parts: str) -> list[dict]:
    """The timed rows whose variant contains every part."""
    return [row for row in rows if row["status"] == "ok" and all(part in row["variant"] for part in parts)]


def fastest_of(rows: list[dict]) -> dict | None:
    return min(rows, key=lambda row: row["p50_ms"], default=None)


def grouped(rows: list[dict]) -> dict[Case, list[dict]]:
    found: dict[Case, list[dict]] = {}
    for row in rows:
        found.setdefault(case_of(row), []).append(row)
    return found


def strategies(rows: list[dict]) -> dict[str, dict]:
    """The fastest row of each strategy of one case."""
    own = ok_rows(rows, "retro_kernels")
    return {name: row for name in ("materialise", "absorb")
            if (row := fastest_of([row for row in own if row.get("strategy") == name]))}  # fmt: skip


def regrets(rows: list[dict]) -> list[tuple[float, Case]]:
    """For each case with both strategies timed: the time of auto's choice over that of the faster."""
    found = []
    for case, group in grouped(rows).items():
        both = strategies(group)
        chosen = [row for row in both.values() if row["chosen"]]
        if len(both) == 2 and chosen:
            found.append((chosen[0]["p50_ms"] / min(row["p50_ms"] for row in both.values()), case))
    return found


def remark(rows: list[dict]) -> str | None:
    """Sentences about a section's numbers, or None."""
    return " ".join(text for text in (_remark_on_auto(rows), _remark_on_memory(rows)) if text) or None


def _remark_on_auto(rows: list[dict]) -> str | None:
    found = regrets(rows)
    if not found:
        return None
    worst, case = max(found)
    right = sum(regret == 1 for regret, _ in found)
    return (
        f"auto takes the faster strategy in {right} of {len(found)} cases and is at most {100 * (worst - 1):.0f}% "
        f"slower than it ({' '.join(case[2:])})."
    )


def _remark_on_memory(rows: list[dict]) -> str | None:
    """Scratch memory of both strategies at the whole length, where it was measured besides."""
    said: dict[str, list[str]] = {}
    for case, group in grouped(rows).items():
        both = strategies(group)
        made, absorbed = (both.get(name, {}).get("whole_scratch_bytes") for name in ("materialise", "absorb"))
        if made and absorbed:
            said.setdefault(case[2], []).append(
                f"{case[3]} {_short(case[4])} {digits(made / 1e6)} and {digits(absorbed / 1e6)} MB "
                f"({made / absorbed:.1f}x)"
            )
    if not said:
        return None
    return (
        "Scratch memory at the whole length of one sequence, K, V made and absorbed: "
        + "; ".join(f"{workload}: {', '.join(found)}" for workload, found in said.items())
        + "."
    )


def _mb(row: dict | None, field: str) -> str:
    value = row.get(field) if row else None
    return "-" if value is None else digits(value / 1e6)


def _short(mode: str) -> str:
    return mode.replace("forward", "fwd").replace("backward", "bwd")


def _strategy_cells(document: dict, rows: list[dict]) -> tuple[tuple[str, ...], list[list[str]], int]:
    cells, scratch = [], any(row.get("scratch_bytes") is not None for row in rows)
    for case, group in grouped(rows).items():
        both = strategies(group)
        auto = next((row for row in both.values() if row["chosen"]), None)
        sdpa, compiled, eager = (
            fastest_of([row for row in group if row["status"] == "ok" and row["variant"].startswith(prefix)])
            for prefix in ("sdpa", "compile", "eager")
        )
        best = fastest_of([row for row in (sdpa, compiled, eager) if row])
        made, absorbed = both.get("materialise"), both.get("absorb")

        def time(row: dict | None) -> str:
            text = milliseconds(row)
            return f"**{text}**" if row and row["chosen"] else text

        predicted = [row.get("predicted_ms") if row else None for row in (made, absorbed)]
        cells.append(
            [
                case[2], case[3], _short(case[4]), auto["strategy"] if auto else "-", time(made), time(absorbed),
                " / ".join("-" if value is None else digits(value) for value in predicted),
                *map(milliseconds, (sdpa, compiled, eager)), times(ratio(best, auto)), percent(auto),
                *(
                    # Scratch stands in place of the peak; older results have the peak alone.
                    _mb(row, name) if (name == "scratch_bytes") == scratch else "-"
                    for name in ("peak_extra_bytes", "scratch_bytes") for row in (made, absorbed, sdpa)
                ),
                *(_mb(row, "saved_bytes") for row in (made, absorbed, sdpa)),
            ]
        )  # fmt: skip
    head = STRATEGY_HEAD
    empty = [i for i in range(4, len(head)) if all(set(row[i]) <= set("-/ ") for row in cells)]
    kept = [i for i in range(len(head)) if i not in empty]
    return tuple(head[i] for i in kept), [[row[i] for i in kept] for row in cells], 4


def _decode_cells(document: dict, rows: list[dict]) -> tuple[tuple[str, ...], list[list[str]], int]:
    cells = []
    for case, group in grouped(rows).items():
        kv, states = (fastest_of(ok_rows(group, "retro_kernels", form)) for form in (" kv]", " states]"))
        again = fastest_of([*ok_rows(group, "eager"), *ok_rows(group, "projected again")])
        sdpa = fastest_of(ok_rows(group, "sdpa", "kv]"))
        ours = fastest_of([row for row in (kv, states) if row])
        cells.append(
            [case[2], case[3], *map(milliseconds, (kv, states, again, sdpa)), times(ratio(again, ours)),
             times(ratio(sdpa, ours)), percent(kv), percent(states), _mb(kv, "cache_bytes"), _mb(states, "cache_bytes")]
        )  # fmt: skip
    return DECODE_HEAD, cells, 2


def _step_cells(document: dict, rows: list[dict]) -> tuple[tuple[str, ...], list[list[str]], int]:
    cells = []
    for case, group in grouped(rows).items():
        off = fastest_of([row for row in group if row["status"] == "ok" and is_baseline(row["variant"])])
        kv, states = (fastest_of(ok_rows(group, "retro_kernels", form)) for form in (" kv]", " states]"))
        again = fastest_of([*ok_rows(group, "eager"), *ok_rows(group, "projected again")])
        sdpa = fastest_of(ok_rows(group, "sdpa[kv]"))
        on_off = kv["parameter_bytes"] / off["parameter_bytes"] if kv and off else None
        border = kv.get("border_ms") if kv else None
        cells.append(
            [case[2], case[3], *map(milliseconds, (off, kv, states, again, sdpa)),
             *(times(ratio(row, off)) for row in (kv, states, again)), times(on_off),
             "-" if border is None else digits(border)]
        )  # fmt: skip
    return STEP_HEAD, cells, 2


REAL_TEXT_HEAD = ("dtype", "what", "unswapped ms", "swapped ms", "faster", "rounds", "MB", "swapped MB")


def real_text_cells(document: dict) -> list[list[str]]:
    return [
        [
            pair["dtype"],
            pair["stage"].replace("forward+backward", "fwd+bwd"),
            milliseconds(pair["original"]),
            milliseconds(pair["swapped"]),
            times(ratio(pair["original"], pair["swapped"])),
            str(pair["swapped"]["samples"]),
            megabytes(pair["original"]),
            megabytes(pair["swapped"]),
        ]
        for pair in real_text_pairs(document)
    ]


def _places(where: list[str]) -> str:
    """Cases, those that differ in dtype and mode only named once."""
    short: dict[str, list[str]] = {}
    for what in where:
        operation, option, workload, *case = what.split()
        short.setdefault(f"{operation} {option} {workload}", []).append(" ".join(case))
    return "; ".join(f"{place}: {', '.join(found)}" for place, found in short.items())


def not_timed(document: dict) -> list[tuple[str, str]]:
    """(what, why) of everything that has no time: variants grouped by reason, then whole parts."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for row in document["rows"]:
        if row["status"] != "ok":
            what = " ".join(case_of(row))
            grouped.setdefault((row["variant"], row["status"], row["reason"] or ""), []).append(what)
    total = len(cases(document))
    entries = []
    for (variant, status, reason), where in grouped.items():
        place = "everywhere" if len(where) == total else _places(where)
        entries.append((f"{variant} ({place})", reason if status == "skipped" else f"{status}: {reason}"))
    text = document.get("real_text") or {}
    single = dict.fromkeys(f"{row['dtype']} {row['stage']}" for row in text.get("rows", []) if row["samples"] < 2)
    entries += [(f"real text, {what}", "one round only fitted into this run: not shown") for what in single]
    for note in (document.get("real_text") or {}).get("notes", []):
        if "was not timed" in note or "no time" in note:
            entries.append(("real text", note))
    return entries + [(entry["what"], entry["reason"]) for entry in document["skipped"]]
