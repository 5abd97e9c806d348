"""Draws docs/alignment.svg: which tokens attend to which chunk's neighbours. Run `python docs/alignment.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

M, N, K = 4, 14, 2  # the paper has 64, 2048 and 2
COLOURS = ("#2a78b5", "#d1742c", "#4d9a55")
IDLE, EDGE, TEXT = "#e4e4e4", "#555555", "#1b1b1b"


def cell(axes, x, y, label, face, width=1.0, edge=EDGE, colour=TEXT, size=9):
    axes.add_patch(Rectangle((x, y), width, 0.8, facecolor=face, edgecolor=edge, linewidth=0.8))
    axes.text(x + width / 2, y + 0.4, label, ha="center", va="center", fontsize=size, color=colour)


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "retro_kernels"  # the same drawing gives the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    figure, axes = plt.subplots(figsize=(9.6, 4.3))
    chunks = N // M
    for u in range(chunks):
        left = u * M
        axes.add_patch(
            FancyBboxPatch(
                (left + 0.1, 3.15),
                M - 0.2,
                1.95,
                boxstyle="round,pad=0,rounding_size=0.15",
                facecolor="none",
                edgecolor=COLOURS[u],
                linewidth=1.6,
            )
        )
        axes.text(left + M / 2, 5.28, f"neighbours of chunk {u}", ha="center", fontsize=9.5, color=COLOURS[u])
        for j in range(K):
            y = 4.2 - j * 0.95
            cell(axes, left + 0.25, y, "neighbour", COLOURS[u] + "55", 1.75, COLOURS[u], size=7.5)
            cell(axes, left + 2.0, y, "continuation", COLOURS[u] + "22", 1.75, COLOURS[u], size=7.5)
        first, last = (u + 1) * M - 1, min((u + 2) * M - 1, N) - 1
        axes.annotate(
            "",
            xy=((first + last + 1) / 2, 1.05),
            xytext=(left + M / 2, 3.1),
            arrowprops={"arrowstyle": "-|>", "color": COLOURS[u], "linewidth": 1.8},
        )
        axes.annotate(
            "",
            xy=(left + M / 2 - 1.1, 3.1),
            xytext=(left + M / 2 - 1.1, 0.95),
            arrowprops={"arrowstyle": "->", "color": "#999999", "linestyle": "dashed"},
        )
    axes.text(0.95, 2.0, "look up", ha="left", va="center", fontsize=8, color="#777777")
    for i in range(N):
        u = (i - (M - 1)) // M
        cell(axes, i, 0.15, str(i), COLOURS[u] + "88" if u >= 0 else IDLE)
    for u in range(chunks + 1):
        width = min(M, N - u * M)
        label = f"chunk {u}" if width == M else "incomplete"
        axes.plot([u * M + 0.08, u * M + width - 0.08], [-0.08, -0.08], color=EDGE, linewidth=1)
        axes.text(u * M + width / 2, -0.42, label, ha="center", fontsize=9, color=TEXT)
    axes.text(
        (M - 1) / 2,
        -0.98,
        "nothing retrieved yet:\nthe output is 0",
        ha="center",
        va="center",
        fontsize=8,
        color="#777777",
    )
    axes.text(
        M - 0.5,
        -1.0,
        "the last token of chunk 0 attends already:\nit predicts the first token of chunk 1",
        ha="left",
        va="center",
        fontsize=8,
        color=COLOURS[0],
    )
    axes.set_xlim(-0.2, N + 0.2)
    axes.set_ylim(-1.4, 5.6)
    axes.axis("off")
    figure.tight_layout(pad=0.3)
    target = Path(__file__).with_suffix(".svg")
    figure.savefig(target, metadata={"Date": None}, facecolor="white")
    print(target)


if __name__ == "__main__":
    main()
