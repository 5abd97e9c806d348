"""Draws docs/groups.svg: which tokens see which in the three attentions, and at what distance. Run it as
`python docs/groups.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

M, K = 4, 2  # the paper has 64 and 2
R = 2 * M


def distances(rows: int, slots: int, shift: int) -> np.ndarray:
    """Row i of a chunk and token t: i - t + shift (equations 6 and 7, and Transformer-XL's within a neighbour)."""
    return np.arange(rows)[:, None] - np.arange(slots) + shift


def draw(axes, blocks, row_names, column_names, title, note) -> None:
    """`blocks`: (first row, first column, distances), everything else is not seen."""
    height = max(row + x.shape[0] for row, _, x in blocks)
    width = max(column + x.shape[1] for _, column, x in blocks)
    picture = np.full((height, width), np.nan)
    for row, column, x in blocks:
        picture[row : row + x.shape[0], column : column + x.shape[1]] = x
    axes.imshow(np.ma.masked_invalid(picture), cmap="RdYlBu_r", vmin=-R - M, vmax=R + M)
    for (i, j), value in np.ndenumerate(picture):
        if not np.isnan(value):
            axes.text(j, i, f"{value:+.0f}" if value else "0", ha="center", va="center", fontsize=5.5, color="#333333")
    for row, column, x in blocks:
        frame = plt.Rectangle((column - 0.5, row - 0.5), x.shape[1], x.shape[0], fill=False, lw=1.3, color="#222222")
        axes.add_patch(frame)
    for names, axis, set_ticks in ((row_names, 0, axes.set_yticks), (column_names, 1, axes.set_xticks)):
        at = 0
        places, labels = [], []
        for label, size in names:
            places.append(at + size / 2 - 0.5)
            labels.append(label)
            at += size
        set_ticks(places, labels, fontsize=7.5, rotation=90 if axis == 0 else 0, va="center" if axis == 0 else "top")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(title, fontsize=9.5, fontweight="bold", pad=8)
    axes.set_xlabel(note, fontsize=7.5, labelpad=6, color="#444444")


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "retro_kernels"  # the same drawing gives the same file
    matplotlib.rcParams["svg.fonttype"] = "none"
    figure, panels = plt.subplots(1, 3, figsize=(10.2, 4.0), width_ratios=(2 * R, 2.2 * M, 2 * R))
    neighbours = [(f"neighbour {j}: {R} tokens", R) for j in range(K)]
    own = distances(R, R, 0)
    draw(
        panels[0],
        [(0, 0, own), (R, R, own)],
        neighbours,
        neighbours,
        "neighbour self-attention",
        "a neighbour's tokens see each other,\nand no other neighbour",
    )
    # equation 7: neighbour token t and activation j are t - j apart
    across = distances(R, M, 0)
    draw(
        panels[1],
        [(0, 0, across), (R, 0, across)],
        neighbours,
        [(f"chunk: {M} activations", M)],
        "neighbour cross-attention",
        "both neighbours read\nthe same keys",
    )
    # equation 6: row i and neighbour token t are i - t + m - 1 apart, anew for every neighbour
    after = distances(M, R, M - 1)
    draw(
        panels[2],
        [(0, 0, after), (0, R, after)],
        [(f"{M} tokens\nafter the chunk", M)],
        neighbours,
        "chunked cross-attention",
        "one softmax over both neighbours;\nthe distance restarts with each",
    )
    figure.tight_layout(pad=0.6, w_pad=1.6)
    target = Path(__file__).with_suffix(".svg")
    figure.savefig(target, metadata={"Date": None}, facecolor="white")
    print(target)


if __name__ == "__main__":
    main()
