"""Draws the four pictures of the documentation: overview.svg, block.svg, batch.svg and alpha.svg.

python docs/draw_architecture.py
"""

from __future__ import annotations

from html import escape
from pathlib import Path


INK, GREY, LINE, BASE = "#24292f", "#57606a", "#8c959f", "#eef0f2"
# One colour a signal: text, preferences, reward. (fill, line)
BLUE, ORANGE, GREEN = ("#dbeafe", "#1d4ed8"), ("#ffe4cc", "#c2570c"), ("#d6f0dd", "#15803d")
PLAIN = (BASE, LINE)


class Picture:
    """A light panel with boxes, arrows and words, which reads well on a white and on a dark page."""

    def __init__(self, name: str, width: int, height: int, title: str) -> None:
        self.name, self.width, self.height, self.title = name, width, height, title
        self.parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 14,
        color: str = INK,
        anchor: str = "middle",
        font: str = "",
    ) -> None:
        """`font`: "bold", "code", or both in one string."""
        style = ' font-weight="600"' if "bold" in font else ""
        style += ' font-family="ui-monospace, Menlo, Consolas, monospace"' if "code" in font else ""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{style}>'
            f"{escape(words)}</text>"
        )

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        lines: list[str],
        colors: tuple[str, str] = PLAIN,
        *,
        size: float = 14,
        font: str = "",
        dashed: bool = False,
    ) -> None:
        """A box with centred lines of text; the first is bold."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="7" fill="{colors[0]}" stroke="{colors[1]}" '
            f'stroke-width="1.3"{dash}/>'
        )
        top = y + h / 2 - (len(lines) - 1) * (size + 4) / 2 + size * 0.35
        for i, line in enumerate(lines):
            first = i == 0
            self.text(
                x + w / 2,
                top + i * (size + 4),
                line,
                size=size if first else size - 1.5,
                color=INK if first else GREY,
                font=f"{font} bold" if first else font,
            )

    def arrow(self, *points: tuple[float, float], color: str = GREY, dashed: bool = False, head: bool = True) -> None:
        path = " L".join(f"{x} {y}" for x, y in points)
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        end = f' marker-end="url(#head{color[1:]})"' if head else ""
        self.parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.8"{dash}{end}/>')

    def slider(self, x: float, y: float, width: float, value: float, color: str) -> None:
        for end, stroke in ((1.0, "#d0d7de"), (value, color)):
            if end:
                self.parts.append(
                    f'<path d="M{x} {y} L{x + width * end} {y}" stroke="{stroke}" stroke-width="6" '
                    'stroke-linecap="round"/>'
                )
        self.parts.append(
            f'<circle cx="{x + width * value}" cy="{y}" r="10" fill="#ffffff" stroke="{color}" stroke-width="3"/>'
        )

    def save(self, folder: Path) -> None:
        heads = "".join(
            f'<marker id="head{c[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{c}"/></marker>'
            for c in (GREY, BLUE[1], ORANGE[1], GREEN[1])
        )
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            'font-family="-apple-system, Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif">',
            f"<title>{escape(self.title)}</title><defs>{heads}</defs>",
            f'<rect x="1" y="1" width="{self.width - 2}" height="{self.height - 2}" rx="12" fill="#ffffff" '
            'stroke="#d0d7de"/>',
            *self.parts,
            "</svg>",
        ]
        (folder / self.name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def overview() -> Picture:
    """What the package is: signals train their own bundles, and every bundle has a dial."""
    p = Picture("overview.svg", 960, 320, "Each signal trains its own bundle; at inference every bundle has a dial.")
    p.text(30, 38, "Training: one signal, its own bundles", size=15, font="bold", anchor="start")
    p.text(640, 38, "Inference: each has a dial, alpha", size=15, font="bold", anchor="start")
    p.box(345, 56, 250, 218, [], ("#f6f8fa", "#d0d7de"))
    p.box(490, 70, 90, 188, ["causal LM", "frozen"], PLAIN)
    rows = [
        ("text", "LM loss", "b_text", BLUE, 1.0, "1"),
        ("preferences", "DPO", "b_preference", ORANGE, 0.3, "0.3"),
        ("reward", "PPO", "b_policy", GREEN, 0.0, "0: off"),
    ]
    for k, (signal, loss, bundle, colors, alpha, label) in enumerate(rows):
        y = 70 + 66 * k
        p.box(30, y, 160, 56, [signal, loss], colors)
        p.box(360, y, 116, 56, [bundle], colors, size=13, font="code")
        p.arrow((190, y + 28), (360, y + 28), color=colors[1])
        p.text(268, y + 21, "gradient", size=12, color=colors[1])
        p.slider(650, y + 28, 190, alpha, colors[1])
        p.text(862, y + 33, label, anchor="start")
    p.text(30, 299, "the others stay bitwise unchanged", size=13, color=GREY, anchor="start")
    p.text(640, 299, "all at 0: the base model, bit for bit", size=13, color=GREY, anchor="start")
    return p


def block() -> Picture:
    """What one decoder block computes."""
    p = Picture(
        "block.svg", 960, 370, "One decoder block: bundles read its output, add to it, and are scaled by alpha."
    )
    p.box(30, 150, 110, 66, ["block", "frozen"])
    p.arrow((140, 183), (905, 183))
    p.text(168, 175, "h", size=15, font="bold")
    p.text(930, 188, "y", size=15, font="bold")
    p.parts.append(f'<circle cx="850" cy="183" r="13" fill="#ffffff" stroke="{GREY}" stroke-width="1.8"/>')
    p.text(850, 189, "+", size=18)
    p.arrow((185, 183), (185, 300), (210, 300))
    p.box(210, 266, 130, 68, ["standardise", "(h - mu) / sigma"], size=13)
    p.arrow((340, 300), (372, 300))
    p.box(372, 266, 92, 68, ["read", "columns of U"], size=13)
    p.box(738, 266, 92, 68, ["write", "columns of U"], size=13)
    p.arrow((830, 300), (850, 300), (850, 196))
    for k, (name, colors, alpha) in enumerate([("b_text", BLUE, 1.0), ("b_policy", GREEN, 0.0)]):
        y = 238 + 66 * k
        p.box(492, y, 148, 56, [name, "up act(down x)"], colors, size=13, font="code")
        p.arrow((464, 300), (478, 300), (478, y + 28), (492, y + 28))
        p.arrow((640, y + 28), (724, y + 28), (724, 300), (738, 300))
        p.text(682, y + 20, f"x alpha {alpha:g}", size=12.5, color=colors[1])
    p.text(30, 40, "forward", size=16, font="bold", anchor="start")
    p.text(
        30,
        62,
        "The block is unchanged. Bundles read its output and add to it; alpha scales each.",
        color=GREY,
        anchor="start",
    )
    p.text(30, 96, "backward of a row of text", size=16, font="bold", anchor="start")
    p.text(
        30,
        118,
        "The gradient flows to earlier layers; only the weights of b_text get one.",
        color=GREY,
        anchor="start",
    )
    p.arrow((905, 140), (566, 140), (566, 236), color=BLUE[1], dashed=True)
    p.arrow((566, 140), (150, 140), color=GREY, dashed=True)
    p.text(740, 132, "gradient", size=12.5, color=BLUE[1])
    return p


def batch() -> Picture:
    """A batch from rows to gradients."""
    p = Picture("batch.svg", 960, 470, "A batch from rows to gradients.")
    steps = ["1  rows", "2  one forward", "3  losses", "4  one backward", "5  step"]
    for x, w, title in zip((24, 206, 400, 520, 800), (160, 170, 100, 260, 140), steps):
        p.text(x + w / 2, 38, title, size=14, font="bold")
    rows = [("row 0: text", BLUE), ("row 1: text", BLUE), ("row 2: preference", ORANGE), ("row 3: preference", ORANGE)]
    for k, (label, colors) in enumerate(rows):
        p.box(24, 60 + 60 * k, 160, 46, [label], colors, size=13)
        p.arrow((184, 83 + 60 * k), (206, 83 + 60 * k), color=colors[1])
    p.box(
        206,
        60,
        170,
        226,
        ["every block", "frozen block, then", "h + alpha act(...) E", "", "keeps h - mu and the", "hidden units"],
        size=13,
    )
    for y, name, colors in ((113, "loss: text", BLUE), (233, "loss: pref.", ORANGE)):
        p.arrow((376, y), (400, y), color=colors[1])
        p.box(400, y - 26, 100, 52, [name], colors, size=13)
        p.arrow((500, y), (520, y), color=colors[1])
    p.box(520, 60, 260, 226, [], ("#f6f8fa", "#d0d7de"))
    p.text(650, 84, "gates: rows x bundles", size=13, font="bold")
    for j, name in enumerate(("b_text", "b_pref", "b_other")):
        p.text(606 + 68 * j, 108, name, size=12, font="code")
    for k, (_, colors) in enumerate(rows):
        p.text(548, 138 + 36 * k, f"row {k}", size=12, color=GREY)
        for j in range(3):
            on = (k < 2 and j == 0) or (k >= 2 and j == 1)
            p.box(
                578 + 68 * j,
                120 + 36 * k,
                56,
                28,
                ["1" if on else "0"],
                colors if on else ("#ffffff", "#d0d7de"),
                size=13,
            )
    p.text(650, 278, "they scale a row's weight gradients", size=11.5, color=GREY)
    for y, name, what, colors in (
        (60, "b_text", ".grad of rows 0, 1", BLUE),
        (138, "b_pref", ".grad of rows 2, 3", ORANGE),
        (216, "b_other", ".grad is None", ("#ffffff", LINE)),
    ):
        p.arrow((780, y + 35), (800, y + 35), color=colors[1] if colors[1] != LINE else GREY)
        p.box(800, y, 140, 70, [name, what], colors, size=13, dashed=colors[1] == LINE)
    who = [
        (24, 160, ["model.route([...])", "routing/routes.py", "Route holds the gates"]),
        (206, 170, ["BundleLayer.forward", "core/layer.py", "core/functional.py"]),
        (400, 100, ["objectives/", "or your own", "loss"]),
        (520, 260, ["loss.backward(), or routed_backward", "where one row has several losses", "routing/backward.py"]),
        (800, 140, ["finalize_grads", "clip_bundle_grads", "routing/reduction.py"]),
    ]
    for x, w, lines in who:
        for k, line in enumerate(lines):
            p.text(
                x + w / 2,
                324 + 20 * k,
                line,
                size=12.5,
                color=INK if k == 0 else GREY,
                font="code" if k == 0 and "," not in line else "",
            )
    p.box(
        24,
        392,
        916,
        56,
        [
            "The gradient to earlier layers is never gated: each loss flows through the whole network.",
            "A gate only chooses which weights learn from a row.",
        ],
        ("#f6f8fa", "#d0d7de"),
        size=13.5,
    )
    return p


def alpha() -> Picture:
    """An alpha from `generate` to the kernel."""
    p = Picture("alpha.svg", 960, 440, "An alpha from generate to the kernel.")
    p.text(30, 40, "once a call", size=16, font="bold", anchor="start")
    p.text(30, 262, "for every token", size=16, font="bold", anchor="start")
    p.box(30, 60, 240, 132, [], ("#f6f8fa", "#d0d7de"))
    p.text(150, 82, "the first one set decides", size=13, font="bold")
    for k, line in enumerate(
        ("generate(..., alphas=...)", "with model.alphas(...):", "model.set_alphas(...)", "BundleSpec.alpha")
    ):
        p.text(50, 108 + 22 * k, f"{k + 1}  {line}", size=13, anchor="start", font="code")
    p.arrow((270, 126), (310, 126))
    p.box(310, 84, 180, 84, ["names and shapes", "checked, kept for", "this thread's call"], BLUE, size=13)
    p.arrow((490, 126), (530, 126))
    p.box(530, 84, 180, 84, ["a gate for each layer", "number, or a tensor", "rows x tokens x units"], BLUE, size=13)
    p.arrow((710, 126), (750, 126))
    p.box(750, 84, 180, 84, ["a plan for each layer", "mu, D, E: weights", "folded, numbers in E"], BLUE, size=13)
    for x, label in (
        (400, "core/gates.py: parse_alphas"),
        (620, "core/gates.py: layer_alphas"),
        (840, "core/inference.py"),
    ):
        p.text(x, 190, label, size=12, color=GREY)
    p.arrow((840, 200), (840, 230), (560, 230), (560, 282))
    p.box(30, 284, 120, 66, ["block", "frozen"])
    p.arrow((150, 317), (190, 317))
    p.text(170, 308, "h", size=14, font="bold")
    p.box(190, 284, 150, 66, ["hook of the block", "BundleLayer.forward"], size=13)
    p.arrow((340, 317), (380, 317))
    p.box(
        380,
        284,
        360,
        66,
        ["y = h + (alpha * act((h - mu) D)) E", "all bundles in two thin matrix products"],
        GREEN,
        size=14,
    )
    p.arrow((740, 317), (780, 317))
    p.box(780, 284, 150, 66, ["next block"])
    p.text(265, 374, "core/layer.py", size=12, color=GREY)
    p.text(
        560, 374, "core/functional.py; on a GPU, few tokens: one Triton kernel, core/kernels.py", size=12, color=GREY
    )
    p.text(
        480,
        416,
        "If every alpha of a layer is the number 0, h itself is returned: the base model, bit for bit.",
        size=13.5,
        font="bold",
    )
    return p


if __name__ == "__main__":
    for picture in (overview(), block(), batch(), alpha()):
        picture.save(Path(__file__).resolve().parent)
