"""Draws docs/architecture.svg: one decoder block with its bundles, forward on the left, gradients on the right.

python docs/draw_architecture.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes


plt.switch_backend("svg")
plt.rcParams["svg.hashsalt"] = "peft_bundles"  # the same file on every run

BASE, BUNDLE, OTHER, INK = "#e8e8ea", "#cfe3f6", "#f7dcc4", "#2b2d33"


def box(ax: Axes, x: float, y: float, w: float, h: float, text: str, color: str, size: float = 9) -> None:
    ax.add_patch(plt.Rectangle((x, y), w, h, facecolor=color, edgecolor=INK, linewidth=0.8))
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(ax: Axes, x0: float, y0: float, x1: float, y1: float, color: str = INK, style: str = "-") -> None:
    properties = {"arrowstyle": "-|>", "color": color, "linewidth": 1.1, "linestyle": style}
    ax.annotate("", (x1, y1), (x0, y0), arrowprops={**properties, "shrinkA": 0, "shrinkB": 0})


def main() -> None:
    figure, ax = plt.subplots(figsize=(10, 5.2))
    ax.set_xlim(0, 20)
    ax.set_ylim(0, 10.4)
    ax.axis("off")

    ax.text(4.6, 10.0, "forward: what a row pays", ha="center", fontsize=11, color=INK)
    box(ax, 0.4, 7.6, 3.6, 1.4, "decoder block\n(frozen, untouched)", BASE)
    arrow(ax, 2.2, 7.6, 2.2, 6.6)
    ax.text(2.4, 7.05, "h   (B, T, d)", fontsize=9, color=INK)
    box(ax, 0.4, 5.2, 3.6, 1.4, "forward hook", BASE)
    arrow(ax, 4.0, 5.9, 5.0, 5.9)
    box(ax, 5.0, 5.2, 4.6, 1.4, "s = (h - mu) D\nd x H, all bundles side by side", BUNDLE, 8)
    arrow(ax, 7.3, 5.2, 7.3, 4.4)
    box(ax, 5.0, 3.0, 4.6, 1.4, "alpha * act(s)\none gate per bundle and row", BUNDLE, 8)
    arrow(ax, 5.0, 3.7, 4.0, 3.7)
    box(ax, 0.4, 3.0, 3.6, 1.4, "y = h + (...) E\nH x d", BUNDLE, 8)
    arrow(ax, 2.2, 5.2, 2.2, 4.4)
    arrow(ax, 2.2, 3.0, 2.2, 2.2)
    ax.text(2.4, 2.45, "y   to the next block", fontsize=9, color=INK)
    ax.text(
        0.4,
        1.0,
        "D = (down W U^T / sigma)^T and E = up^T W U^T are folded once a forward\n"
        "from the bundles' own weights: a cost that does not depend on the tokens.",
        fontsize=8.5,
        color=INK,
        va="center",
    )

    ax.text(15, 10.0, "backward: who may learn from a row", ha="center", fontsize=11, color=INK)
    rows = [("row 1: lm", 8.0, BUNDLE), ("row 2: lm", 6.9, BUNDLE), ("row 3: policy", 5.8, OTHER)]
    for text, y, color in rows:
        box(ax, 10.6, y, 2.6, 0.9, text, color)
    names = [("b_ssl_main", 8.4, BUNDLE), ("b_ssl_semantic", 7.2, BUNDLE), ("b_rl_policy", 6.0, OTHER)]
    for text, y, color in names:
        box(ax, 16.6, y, 3.0, 0.9, text, color)
    for y in (8.45, 7.35):
        arrow(ax, 13.2, y, 16.6, 8.85)
        arrow(ax, 13.2, y, 16.6, 7.65)
    arrow(ax, 13.2, 6.25, 16.6, 6.45, "#b5651d")
    box(ax, 16.6, 4.6, 3.0, 0.9, "b_rl_value", BASE)
    ax.text(16.4, 5.05, ".grad is None", ha="right", va="center", fontsize=9, color=INK)
    ax.text(
        10.6,
        2.6,
        "dD = (h - mu)^T (gate * ds)     dE = (gate * a)^T dy\n\n"
        "A weight gradient is a sum over rows, so a gate per row\n"
        "routes a mixed batch in one forward and one backward.\n"
        "dh is never gated. Losses on the same rows take one pass\n"
        "per distinct routing column: the gates are rewritten between.",
        fontsize=8.5,
        color=INK,
        va="center",
    )
    target = Path(__file__).with_name("architecture.svg")
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None})
    print(f"wrote {target.name}")


if __name__ == "__main__":
    main()
