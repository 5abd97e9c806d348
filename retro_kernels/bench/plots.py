"""The report's figures as inline SVG. Text and axes take the page's own colour, so they read in light and dark."""

from __future__ import annotations

import io
import re
import zlib

from . import results, tables

INK = "#123457"  # stands for the page's text colour in the SVG until it is put in
COLOURS = {
    "eager": "#8a8a8a",
    "eager rows": "#b4b4b4",
    "sdpa[math]": "#9ec5e8",
    "sdpa[math rows]": "#c3dcf2",
    "sdpa[flash]": "#3d85c6",
    "sdpa[flash rows]": "#1f5f99",
    "sdpa[efficient]": "#5b7fd4",
    "sdpa[efficient rows]": "#8ea6e2",
    "sdpa[cudnn]": "#2a5db0",
    "sdpa[cudnn rows]": "#17407f",
    "sdpa[default]": "#7fb2d9",
    "compile[sdpa]": "#57a773",
    "compile[eager]": "#9ccc9c",
    "flex[folded]": "#a678c9",
    "flex[block mask]": "#7a4fa3",
    "retro_kernels[reference]": "#d9a38f",
    "retro_kernels[cpu]": "#e4572e",
    "retro_kernels[triton]": "#e4572e",
    "retro_kernels[cuda]": "#b8321a",
    "retro_kernels[cpu materialise]": "#e4572e",
    "retro_kernels[cpu absorb]": "#b8321a",
    "retro_kernels[cpu kv]": "#e4572e",
    "retro_kernels[cpu states]": "#b8321a",
}
BASELINE = "#f3b7a4"
MARKERS = {
    "cca": "o", "encoder-self": "s", "encoder-cross": "D", "causal-self": "^", "cca-projected": "v", "cca-layer": "P",
    "cca-decode": "X", "decoder-step": "*",
}  # fmt: skip
LONGEST_BAR = 8.0  # times the fastest folded SDPA; longer bars end here and say so


def speed(document: dict, rows: list[dict]) -> list[str]:
    """One figure a (precision, mode): median time of every checked variant, whiskers from p20 to p80."""
    return _bars(
        document,
        rows,
        lambda row: row["p50_ms"],
        "median time, fastest folded SDPA = 1; whiskers p20 to p80 (shorter is faster)",
        lambda row: (row["p50_ms"] - row["p20_ms"], row["p80_ms"] - row["p50_ms"]),
        lambda value: f"{tables.digits(value)} ms",
    )


def memory(document: dict, rows: list[dict]) -> list[str]:
    """One figure a (precision, mode): most bytes alive during the call, beyond the inputs."""
    return _bars(
        document,
        rows,
        lambda row: row["peak_extra_bytes"] / 1e6 if row["peak_extra_bytes"] else None,
        "most memory alive during the call beyond the inputs, results included; fastest folded SDPA = 1",
        None,
        lambda value: f"{tables.digits(value)} MB",
    )


def roofline(document: dict) -> list[str]:
    """One figure a precision: rate against FLOPs per byte, under the measured copy and matrix ceilings. Hollow:
    forward; filled: forward and backward."""
    ceilings = document["ceilings"]
    figures = []
    for dtype in dict.fromkeys(row["dtype"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["dtype"] == dtype and row["status"] == "ok"]
        if not rows or not ceilings:
            continue
        figure, axes = _figure(9.6, 5.0)
        copy, peak = ceilings["copy_bytes_per_second"], ceilings["matrix_flops_per_second"][dtype]
        intensities = [row["flops"] / row["bytes"] for row in rows]
        low, high = min(*intensities, peak / copy) / 2, max(*intensities, peak / copy) * 2
        x = [low, peak / copy, high]
        axes.plot(x, [copy * low / 1e9, peak / 1e9, peak / 1e9], color=INK, linewidth=1.5)
        axes.annotate(f"copy, {copy / 1e9:,.0f} GB/s", (low, copy * low / 1e9), xytext=(16, 0), va="center",
                      textcoords="offset points", color=INK, fontsize=9)  # fmt: skip
        axes.annotate(f"arithmetic, {peak / 1e9:,.0f} GFLOP/s", (high, peak / 1e9), xytext=(-6, 5),
                      textcoords="offset points", ha="right", color=INK, fontsize=9)  # fmt: skip
        for row in rows:
            ours = results.is_ours(row["variant"])
            colour = _colour(row["variant"])
            axes.plot(row["flops"] / row["bytes"], row["tflops"] * 1e3, MARKERS[row["operation"]], markersize=7 if ours
                      else 5, markerfacecolor="none" if row["mode"] == "forward" else colour, markeredgecolor=colour,
                      markeredgewidth=1.1, zorder=3 if ours else 2)  # fmt: skip
        _logarithmic(axes, "x")
        _logarithmic(axes, "y")
        axes.set_xlim(low, high)
        axes.set_xlabel("FLOP per byte that must move")
        axes.set_ylabel("GFLOP/s")
        axes.set_title(dtype, loc="left", color=INK)
        _style(axes, grid="both")
        handles = [_handle(name, "s") for name in dict.fromkeys(row["variant"] for row in rows)]
        handles += [_handle(name, MARKERS[name], INK) for name in dict.fromkeys(row["operation"] for row in rows)]
        handles += [_handle("hollow: forward only", " ")]
        _legend(figure, axes, handles)
        figures.append(_svg(figure))
    return figures


def swap(document: dict) -> list[str]:
    """retro-pytorch on real text with and without rk.swap: one bar pair a stage and precision."""
    pairs = tables.real_text_pairs(document)
    if not pairs:
        return []
    figure, axes = _figure(9.6, 0.42 * len(pairs) + 1.3)
    labels = []
    for position, pair in enumerate(pairs):
        for offset, key, colour in ((-0.19, "original", COLOURS["eager"]), (0.19, "swapped", "#e4572e")):
            row = pair[key]
            value = row["p50_ms"]
            axes.barh(position + offset, value, 0.36, color=colour)
            axes.errorbar(value, position + offset, xerr=[[value - row["p20_ms"]], [row["p80_ms"] - value]],
                          color=INK, linewidth=0.8, capsize=2)  # fmt: skip
            label = f"{tables.digits(value)} ms"
            axes.annotate(label, (row["p80_ms"], position + offset),
                          xytext=(5, 0), textcoords="offset points", va="center", color=INK, fontsize=8)  # fmt: skip
        labels.append(f"{pair['stage']}, {pair['dtype']}")
    _logarithmic(axes, "x")
    axes.margins(x=0.12)
    axes.set_yticks(range(len(pairs)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, median; whiskers p20 to p80 (logarithmic)")
    _style(axes, grid="x")
    _legend(figure, axes, [_handle("retro-pytorch", "s", COLOURS["eager"]), _handle("with rk.swap", "s", "#e4572e")])
    return [_svg(figure)]


def _bars(document, rows, value_of, label, whiskers, text) -> list[str]:
    """Bars relative to the fastest folded SDPA of the same case, from zero: lengths may be compared, and workloads of
    every size share an axis. The absolute value stands at each bar's end."""
    figures = []
    fastest = {results.case_of(entry): entry["sdpa"] for entry in tables.summary(document, rows)}
    checked = [row for row in rows if row["status"] == "ok" and value_of(row) is not None]
    for dtype, mode in dict.fromkeys((row["dtype"], row["mode"]) for row in checked):
        shown_rows = [row for row in checked if (row["dtype"], row["mode"]) == (dtype, mode)]
        position, ticks, labels, longest = 0.0, [], [], 1.0
        groups: dict[results.Case, list[dict]] = {}
        for row in shown_rows:
            groups.setdefault(results.case_of(row), []).append(row)
        several = len({case[:2] for case in groups}) > 1
        figure, axes = _figure(9.6, 0.2 * len(shown_rows) + 0.22 * len(groups) + 1.2)
        for case, group in groups.items():
            sdpa = fastest[case]
            unit = (sdpa and value_of(sdpa)) or max(value_of(row) for row in group)
            ticks.append(position + (len(group) - 1) / 2)
            labels.append(f"{case[0]}\n{case[2]}" if several else case[2])
            for row in group:
                value = value_of(row) / unit
                shown = min(value, LONGEST_BAR)
                axes.barh(position, shown, 0.86, color=_colour(row["variant"]))
                end = shown
                if whiskers and value == shown:
                    down, up = (side / unit for side in whiskers(row))
                    end = shown + up
                    axes.errorbar(shown, position, xerr=[[down], [up]], color=INK, linewidth=0.8, capsize=2)
                note = text(value_of(row)) + (f" ({value:.1f} times)" if value > shown else "")
                axes.annotate(note, (end, position), xytext=(4, 0), textcoords="offset points", va="center",
                              color=INK, fontsize=7.5)  # fmt: skip
                longest = max(longest, end)
                position += 1
            position += 1
        axes.axvline(1.0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
        axes.set_xlim(0, longest * 1.16)
        axes.set_ylim(position - 1.3, -0.7)
        axes.set_yticks(ticks, labels)
        axes.set_xlabel(label)
        axes.set_title(f"{dtype}, {mode}", loc="left", color=INK)
        _style(axes, grid="x")
        axes.tick_params(axis="y", length=0)
        _legend(figure, axes, [_handle(name, "s") for name in dict.fromkeys(row["variant"] for row in shown_rows)])
        figures.append(_svg(figure))
    return figures


def _figure(width: float, height: float):
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "retro_kernels"
    matplotlib.rcParams["font.family"] = "sans-serif"
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    return figure, figure.add_subplot()


def _logarithmic(axes, which: str) -> None:
    """Plain numbers at 1, 2 and 5 of every decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _style(axes, grid: str) -> None:
    axes.patch.set_alpha(0)
    axes.grid(axis=grid, color=INK, alpha=0.15, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, which="both", labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
        label.set_fontsize(9)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(INK)


def _legend(figure, axes, handles) -> None:
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8,
                labelcolor=INK, borderaxespad=0.0)  # fmt: skip


def _handle(name: str, marker: str, colour: str | None = None):
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", marker=marker, markersize=7, color=colour or _colour(name), label=name)


def _colour(variant: str) -> str:
    return BASELINE if results.is_baseline(variant) else COLOURS.get(variant, "#c28f00")


def _svg(figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # One page holds many figures: names within one must not be names within another.
    prefix = f"f{zlib.crc32(text.encode()):08x}-"
    return re.sub(r'( id="|url\(#|href="#)', rf"\1{prefix}", text)
