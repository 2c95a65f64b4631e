"""Numbers, tables and the figure of the cells that `python -m studies.quality.run` measured.

    python -m studies.quality.report     # writes tables.md and front.svg beside this file

Learning score: biographies, codes and twice the mean of five reasoning families, over 4. Rise: mean rise of the loss
over six domains that nobody trained on. Ratio: the rise over LoRA r16's at equal learning. ±: over seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from studies import records
from studies.tables import Table, mean_sd, write_tables


HERE = Path(__file__).parent
CELLS, SWEEPS = HERE / "results" / "cells.jsonl", HERE / "sweeps.json"
# Places, and controls with the same penalty; and the second data file, with other families and domains.
PLACES = (HERE / "results" / "places.jsonl", ("places", "front"))
CONFIRM = (HERE / "results" / "confirm.jsonl", ("confirm",))
DOMAINS = ("chat", "code", "licences", "manual", "news", "wiki")
FAMILIES = ("chain_sum", "family_relationships", "number_sequence", "products", "simple_equations")
KINDS = ("biographies", "codes", "reasoning", "gsm", "plays")
TUNED = 0.002  # LoRA r16's front ends here: twice this rate learns no more, and disturbs twice as much
LORA, BUNDLES = ("lora_r16", TUNED), ("bundles:quiet=20", TUNED)
SEPARATE = ("bundles:quiet=20,routed=1", "bundles:quiet=20,owners=1")  # a bundle a kind of row
CURVES = """lora_r16|LoRA r16|#1f5fa8|o / lora_r64|LoRA r64 (19.5 M)|#6aa5dc|o / dora_r16|DoRA r16|#3aa6a0|s
rslora_r16|rsLoRA r16|#7d6bc4|D / osf_r16|OSF r16|#8a8d94|v / shira_r16|SHiRA r16|#3c3e43|^ / ia3|IA3 (0.06 M)|#b9bbc1|P
full|full (134.5 M)|#2f8f46|X / lora_r16_kl1.0|LoRA r16 + KL|#0b2e59|* / bundles:quiet=0|bundles, quiet=0|#f0b48a|o
bundles:quiet=10|bundles, quiet=10|#f08c3a|o / bundles:quiet=20|bundles, quiet=20 (default)|#d94a10|o
bundles:quiet=30|bundles, quiet=30|#a02c0c|o / bundles:quiet=10,scaling=1|bundles, quiet=10, scaling=1|#d9b38c|d
bundles:quiet=10,kl=1.0|bundles, quiet=10, + KL|#6b1d04|*"""
Key = tuple[str, float]  # method, learning rate
Cell = dict[str, Any]


@dataclass
class Results:
    """Attributes:
    base: the base model's measures.
    families, domains: of reasoning, and of text that nobody trained on.
    cells: key -> its cells, a seed each, with "score", "reasoning", "rise" and the rise of every domain at each step.
    diverged, failed: the cells without measures.
    """

    base: dict[str, float]
    families: tuple[str, ...]
    domains: tuple[str, ...]
    cells: dict[Key, list[Cell]]
    diverged: dict[Key, list[Cell]]
    failed: dict[Key, list[Cell]]

    def mean(self, key: Key, measure: str, step: str = "300") -> float:
        return fmean(cell[step][measure] for cell in self.cells[key])

    def spread(self, key: Key, measure: str) -> float:
        """Standard deviation over seeds; 0 for one seed."""
        values = [cell["300"][measure] for cell in self.cells[key]]
        return stdev(values) if len(values) > 1 else 0.0

    def lora_at(self, score: float, measure: str = "rise") -> float:
        """LoRA r16's rise at a learning score: its front, interpolated; NaN below it, its end above it."""
        front: list[tuple[float, float]] = []
        for key in sorted(key for key in self.cells if key[0] == "lora_r16" and key[1] <= TUNED):
            if not front or self.mean(key, "score") > front[-1][0]:
                front.append((self.mean(key, "score"), self.mean(key, measure)))
        for (x0, y0), (x1, y1) in pairwise(front):
            if x0 <= score < x1:
                return y0 + (y1 - y0) * (score - x0) / (x1 - x0)
        return front[-1][1] if score >= front[-1][0] else math.nan

    def ratio(self, key: Key, measure: str = "rise") -> float:
        """Rise over LoRA r16's at equal learning; NaN where it learns less than any LoRA."""
        return self.mean(key, measure) / self.lora_at(self.mean(key, "score"), measure)


def read(path: Path = CELLS) -> Results:
    """Every cell with its derived measures.

    Raises:
        ValueError: no cell of the base model.
    """
    found = records.read(path)
    bases = [r["300"] for r in found if r["method"] == "base"]
    if not bases:
        raise ValueError(f"{path}: no cell of method 'base'; `python -m studies.quality.run` measures it first.")
    base = bases[-1]
    learnt, domains = (
        tuple(sorted(name.split("/")[1] for name in base if name.startswith(start))) for start in ("learn/", "domain/")
    )
    families = tuple(name for name in learnt if name not in KINDS)
    results = Results(base, families, domains, {}, {}, {})
    for record in found:
        key = record["method"], record["lr"]
        if "error" in record:
            results.failed.setdefault(key, []).append(record)
        elif "diverged" in record:
            results.diverged[key] = [record]
        elif record["method"] != "base":
            for step in (record["150"], record["300"]):
                step["reasoning"] = fmean(step[f"learn/{family}"] for family in families)
                step["score"] = (step["learn/biographies"] + step["learn/codes"] + 2 * step["reasoning"]) / 4
                step |= {name: step[f"domain/{name}"] - results.base[f"domain/{name}"] for name in domains}
                step["rise"] = fmean(step[name] for name in domains)
            results.cells.setdefault(key, []).append(record)
    return results


def with_tag(results: Results, cell: Cell) -> dict[str, float]:
    """A cell with a bundle a kind of row: each set measured with its own kind's bundle alone, and the mean rise of the
    domains with one bundle on."""
    last = cell["300"]
    reasoning = fmean(last[f"tag/learn/{family}"] for family in FAMILIES)
    score = (last["tag/learn/biographies"] + last["tag/learn/codes"] + 2 * reasoning) / 4
    rises = [last[f"{kind}/domain/{name}"] - results.base[f"domain/{name}"] for kind in KINDS for name in DOMAINS]
    rise = fmean(rises)
    return {"score": score, "plays": last["tag/text/plays"], "rise": rise, "ratio": rise / results.lora_at(score)}


# ---- tables ----


def seeds(results: Results, key: Key, measure: str, digits: int = 2) -> str:
    return mean_sd([cell["300"][measure] for cell in results.cells[key]], digits)


def ratio(results: Results, key: Key, measure: str = "rise") -> str:
    """The ratio; "below" where it learns less than any LoRA, and marked where it learns more than the best."""
    value = results.ratio(key, measure)
    mark = "†" if results.mean(key, "score") > results.mean(LORA, "score") else ""
    return "below" if math.isnan(value) else f"{value:.2f}{mark}"


def methods(results: Results) -> Table:
    """All methods but the forms, at every rate."""
    base = results.base
    known = f"{base['known/capitals']:.2f} / {base['known/elements']:.2f}"
    rows = [["base", "", "", "0", "0", "0", "0", f"{base['learn/gsm']:.2f}", "0", f"{base['text/plays']:.2f}", "0"]]
    rows[0] += ["", "0", known]
    for key in sorted(key for key in results.cells if not key[0].startswith("form:")):
        cells = results.cells[key]
        row = [f"`{key[0]}`", f"{key[1]:g}", str(len(cells)), f"{cells[0]['trainable'] / 1e6:.2f}"]
        row += [seeds(results, key, m) for m in ("learn/biographies", "learn/codes", "reasoning", "learn/gsm")]
        row += [seeds(results, key, "score", 3), seeds(results, key, "text/plays"), seeds(results, key, "rise", 3)]
        row += [ratio(results, key), seeds(results, key, "kl/samples", 3)]
        row += [f"{results.mean(key, 'known/capitals'):.2f} / {results.mean(key, 'known/elements'):.2f}"]
        rows.append(row)
    head = "method|lr|seeds|trainable, M|biographies|codes|reasoning|gsm|learning|plays, loss|rise|ratio"
    return Table("All methods († learns more than LoRA r16)", f"{head}|KL|capitals / elements".split("|"), rows)


def domains(results: Results) -> Table:
    """Rise of the loss on every domain, and its ratio there."""
    keys = sorted(key for key in results.cells if not key[0].startswith("form:"))
    rows = [
        [f"`{key[0]}`", f"{key[1]:g}"]
        + [f"{results.mean(key, name):.3f} ({ratio(results, key, name)})" for name in DOMAINS]
        for key in keys
    ]
    return Table("Rise of the loss by domain (ratio there)", ["method", "lr", *DOMAINS], rows)


def forms(results: Results) -> Table:
    """The forms of `studies.quality.forms` that were tried; one that diverged has no measures."""
    rows = []
    lora = results.cells[LORA][0]["trainable"] if LORA in results.cells else math.nan
    for key in sorted(key for key in (*results.cells, *results.diverged) if key[0].startswith("form:")):
        if key in results.diverged:
            [cell] = results.diverged[key]
            numbers = [f"diverged by step {cell['diverged']}", "", ""]
        else:
            cell = results.cells[key][0]
            numbers = [f"{results.mean(key, 'score'):.3f}", f"{results.mean(key, 'rise'):.3f}", ratio(results, key)]
        rows.append([f"`{key[0]}`", f"{key[1]:g}", f"{cell['trainable'] / lora:.2f}", *numbers])
    return Table("Forms", ["form", "lr", "parameters / LoRA's", "learning", "rise", "ratio"], rows)


def separate(results: Results) -> Table:
    """A bundle for every kind of row: all on, and each set with its own bundle alone."""
    rows = []
    for key in [(method, TUNED) for method in SEPARATE] + [BUNDLES]:
        if key not in results.cells:
            continue
        row = [f"`{key[0]}`", str(len(results.cells[key]))]
        row += [
            seeds(results, key, measure, digits) for measure, digits in (("score", 3), ("text/plays", 2), ("rise", 3))
        ]
        row.append(ratio(results, key))
        tags = [with_tag(results, cell) for cell in results.cells[key]] if key != BUNDLES else []
        row += [
            mean_sd([t[name] for t in tags], d) for name, d in (("score", 3), ("plays", 2), ("rise", 3), ("ratio", 2))
        ]
        rows.append(row)
    head = "method|seeds|learning|plays, loss|rise|ratio|learning, own|plays, own|rise, one on|ratio, one on"
    return Table("A bundle for every kind of row", head.split("|"), rows)


def against_lora(results: Results, heading: str) -> Table:
    """Every method beside LoRA r16 at its own rate: what it learns, and what share of LoRA's rise is left.

    The share of the worst domain is the largest one. Known facts, kind by kind, are of the base's where it is named.
    Seconds are of the training alone, over LoRA's; cells ran side by side, so they compare roughly.
    """
    known = sorted(name for name in results.base if name.startswith("known/"))
    rows = [["base", "", "", "", "", "", "", "", "0", *(f"{results.base[name]:.2f}" for name in known), ""]]
    for key in sorted(results.cells):
        cells = results.cells[key]
        row = [f"`{key[0]}`", f"{key[1]:g}", str(len(cells)), f"{cells[0]['trainable'] / 1e6:.2f}"]
        row += [seeds(results, key, "score", 3), seeds(results, key, "rise", 3)]
        if LORA in results.cells:
            shares = [results.mean(key, name) / results.mean(LORA, name) for name in results.domains]
            row += [f"{results.mean(key, 'rise') / results.mean(LORA, 'rise'):.2f}", f"{max(shares):.2f}"]
            of_lora = fmean(cell["seconds"] for cell in results.cells[LORA])
            seconds_ratio = f"{fmean(cell['seconds'] for cell in cells) / of_lora:.2f}"
        else:
            row, seconds_ratio = [*row, "-", "-"], "-"
        row += [seeds(results, key, "kl/samples", 3), *(seeds(results, key, name) for name in known), seconds_ratio]
        rows.append(row)
    head = "method|lr|seeds|trainable, M|learning|rise|of LoRA's rise|in the worst domain|KL"
    names = [name.split("/")[1] for name in known]
    return Table(heading, [*head.split("|"), *names, "seconds over LoRA's"], rows)


def missing(results: Results, sweeps: Sequence[str] = (), heading: str = "Not run") -> Table:
    """The cells without a result of these sweeps of sweeps.json; of none: of all that have no file of their own."""
    have = {
        (*key, cell["seed"]) for d in (results.cells, results.diverged) for key, cells in d.items() for cell in cells
    }
    lacking: dict[Key, set[str]] = {}
    elsewhere = {"tiny", *PLACES[1], *CONFIRM[1]}
    known = json.loads(SWEEPS.read_text())
    for blocks in [known[name] for name in sweeps or [name for name in known if name not in elsewhere]]:
        for method, lr, seed in (
            (m, lr, s) for b in blocks for m in b["methods"] for lr in b["lrs"] for s in b["seeds"]
        ):
            if (method, lr, seed) not in have:
                lacking.setdefault((method, lr), set()).add(str(seed))
    rows = [
        [f"`{method}`", f"{lr:g}", ", ".join(sorted(some)), "failed" if (method, lr) in results.failed else ""]
        for (method, lr), some in lacking.items()
    ]
    return Table(heading, ["method", "lr", "seeds", ""], rows)


# ---- the figure ----


def draw(results: Results, path: Path) -> None:
    """Learning score against rise of the loss, a curve a method; hollow marks are step 150."""
    import matplotlib.pyplot as plt

    plt.switch_backend("svg")
    plt.rcParams.update({"svg.hashsalt": "peft_bundles", "font.size": 9})
    figure, ax = plt.subplots(figsize=(10, 5.6), layout="constrained")
    for curve in CURVES.replace(" / ", "\n").splitlines():
        method, label, color, marker = curve.split("|")
        keys = sorted(key for key in results.cells if key[0] == method)
        x, y = ([results.mean(key, measure) for key in keys] for measure in ("score", "rise"))
        sx, sy = ([results.spread(key, measure) for key in keys] for measure in ("score", "rise"))
        ax.errorbar(x, y, sy, sx, label=label, capsize=2, elinewidth=0.8, color=color, marker=marker)
        if method == "lora_r16":
            ax.plot(x[:-1], [value / 2 for value in y[:-1]], "--", color=color, linewidth=0.9, label="half of LoRA r16")
        x, y = ([results.mean(key, measure, "150") for key in keys] for measure in ("score", "rise"))
        ax.plot(x, y, linestyle="", color=color, marker=marker, markersize=4, fillstyle="none", markeredgewidth=0.8)
    ax.set_yscale("log")
    ax.set_yticks([], minor=True)
    ax.set_yticks([0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1], ["0.02", "0.03", "0.05", "0.1", "0.2", "0.3", "0.5", "1"])
    ax.set(xlabel="learning score (higher is better)", ylabel="rise of loss, mean of six domains (lower is better)")
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    results = read()
    made_from = f"`python -m studies.quality.report` from `results/{CELLS.name}` (`python -m studies.quality.run`)."
    tables = [make(results) for make in (methods, domains, separate, forms, missing)]
    headings = ("Places and controls with the same penalty", "The second data file")
    for heading, (path, sweeps) in zip(headings, (PLACES, CONFIRM)):
        if path.exists():
            found = read(path)
            tables += [against_lora(found, heading), missing(found, sweeps, f"{heading}: not run")]
    write_tables(HERE / "tables.md", made_from, tables)
    draw(results, HERE / "front.svg")
