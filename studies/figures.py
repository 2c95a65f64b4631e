"""The figures of docs/results, drawn from the committed records.

python -m studies.figures [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from studies import page_numbers as numbers


BUNDLES, LORA, GREY, DARK = "#d94a10", "#1f5fa8", "#9a9da3", "#3c3e43"


def speed(pyplot: Any) -> Any:
    cells = {"LoRA r16": "lora_r16", "1 bundle": "bundles_1", "15 bundles, routed": "bundles_15_routed"}
    cells["64 bundles"] = "bundles_64"
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 2.6), layout="constrained", sharey=True)
    for axis, shape, title in ((axes[0], "1.2b", "1.2 B parameters"), (axes[1], "135m", "135 M parameters")):
        ratios = [numbers.time_ratio("h200", shape, "train", cell, "base") for cell in cells.values()]
        bars = axis.barh(list(cells), ratios, color=[LORA, BUNDLES, BUNDLES, BUNDLES])
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.axvline(1, color=DARK, linewidth=1)
        axis.set(title=title, xlim=(0, max(ratios) * 1.15), xlabel="training step, times the frozen base")
    axes[0].invert_yaxis()
    return figure


def learning(pyplot: Any) -> Any:
    points = {
        "LoRA r16": ("lora_r16", 0.002, LORA, "o", "left"),
        "LoRA r16 + KL": ("lora_r16_kl1.0", 0.002, LORA, "*", "left"),
        "one bundle, no penalty": ("bundles:quiet=0", 0.002, BUNDLES, "x", "right"),
        "one bundle (default)": ("bundles:quiet=20", 0.002, BUNDLES, "o", "left"),
        "one bundle + KL": ("bundles:quiet=20,kl=1.0", 0.002, BUNDLES, "*", "right"),
        "full fine-tuning": ("full", 0.0001, GREY, "s", "left"),
        "five bundles, each taught alone, all on": ("bundles:quiet=20,owners=1", 0.002, DARK, "^", "left"),
    }
    figure, axis = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    for label, (method, rate, color, marker, side) in points.items():
        x, y = (fmean(numbers.learning(method, rate, measure)) for measure in ("score", "rise"))
        axis.plot(x, y, marker, color=color, markersize=9, linestyle="none")
        offset = (9 if side == "left" else -9, -4)
        axis.annotate(label, (x, y), xytext=offset, textcoords="offset points", ha=side)
    axis.set(xlabel="learning score (right is better)", ylabel="rise of loss elsewhere\n(down is better)")
    axis.set(xlim=(0.2, 0.8), ylim=(-0.04, 0.85))
    return figure


def continual(pyplot: Any) -> Any:
    rows: list[tuple[str, tuple[Any, ...], str]] = [
        ("one LoRA, tasks mixed", ("lora", 0.002, "all", "average", "mixture"), LORA),
        ("one bundle, tasks mixed", ("shared", 0.001, "all", "average", "mixture"), BUNDLES),
        ("bundle a task, tasks mixed, told the task", ("bundles", 0.002, "tag", "average", "mixture"), BUNDLES),
        ("bundle a task, in sequence, told the task", ("bundles", 0.004, "tag"), BUNDLES),
        ("LoRA a task, in sequence, told the task", ("lora_separate", 0.004, "tag"), LORA),
        ("LoRA a task + KL, in sequence, all on", ("lora_separate_kl", 0.004, "all"), LORA),
        ("bundle a task, in sequence, all on", ("bundles", 0.004, "all"), BUNDLES),
        ("LoRA a task, in sequence, all on", ("lora_separate", 0.004, "all"), LORA),
        ("one LoRA, in sequence", ("lora", 0.002, "all"), LORA),
    ]
    figure, axis = pyplot.subplots(figsize=(8, 3.4), layout="constrained")
    found = [numbers.continual(*key) for _, key, _ in rows]
    axis.barh(
        [label for label, _, _ in rows],
        [fmean(v) for v in found],
        xerr=[stdev(v) for v in found],
        color=[color for *_, color in rows],
        error_kw={"ecolor": DARK, "capsize": 3},
    )
    axis.invert_yaxis()
    axis.set(xlabel="accuracy over three tasks at the end", xlim=(0, 0.9))
    return figure


def removal(pyplot: Any) -> Any:
    lines = [
        ("LoRA, gradient ascent", "ascent", 0.0001, LORA, "-"),
        ("LoRA, RMU", "rmu", 0.0003, LORA, "--"),
        ("LoRA that never knew them", "never", 0.0, GREY, "-"),
        ("bundle switched off", "owners", 0.0, BUNDLES, "-"),
    ]
    figure, axis = pyplot.subplots(figsize=(7, 3), layout="constrained")
    for label, variant, rate, color, style in lines:
        for n, record in enumerate(numbers.removal(variant, rate)):
            curve = record["relearn"]["all"]
            axis.plot(*zip(*curve), color=color, linestyle=style, marker=".", label=None if n else label)
    axis.set(xlabel="steps of teaching the facts again", ylabel="facts answered", ylim=(-0.03, 1.03))
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def rl_separate(pyplot: Any) -> Any:
    runs = [
        ("bundles, text rows see their own", ("separate", "owners", 5e-4), BUNDLES),
        ("bundles, text rows see all", ("separate", "all", 5e-4), "#f0a878"),
        ("the same bundles, not routed", ("unrouted", "all", 5e-4), GREY),
        ("one adapter (all on only)", ("shared_adapter", "all", 2.5e-4), LORA),
    ]
    panels = {"exact": "right answers (RL)", "preference": "preference accuracy", "plays_loss": "LM loss"}
    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    for axis, (column, title) in zip(axes, panels.items()):
        for n, (label, key, color) in enumerate(runs):
            states = ["all on", "RL off"] if key[0] != "shared_adapter" else ["all on"]
            found = [numbers.separate(*key, state, column) for state in states]
            places = [m + 0.2 * (n - 1.5) for m in range(len(states))]
            heights, spreads = [fmean(v) for v in found], [stdev(v) for v in found]
            axis.bar(places, heights, 0.2, yerr=spreads, color=color, label=label, error_kw={"ecolor": DARK})
        axis.set_xticks([0, 1], ["all on", "RL's bundles off"])
        axis.set_title(title)
    axes[2].set_ylim(3.5, 4.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def semantic(pyplot: Any) -> Any:
    topics = numbers.topics_of({})
    rows, columns = [*topics, "other"], [*topics, "all"]
    table = [[fmean(numbers.topic_change({}, row, column)) for column in columns] for row in rows]
    figure, axis = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    axis.imshow(table, cmap="RdBu_r", vmin=-0.2, vmax=0.2, aspect="auto")
    for y, line in enumerate(table):
        for x, value in enumerate(line):
            axis.text(x, y, f"{value:+.2f}", ha="center", va="center", color="white" if abs(value) > 0.14 else "black")
    axis.set_xticks(range(len(columns)), [*topics, "all six"])
    axis.set_yticks(range(len(rows)), [*topics, "no topic"])
    axis.set(xlabel="bundle that is on", ylabel="text")
    return figure


def heads(pyplot: Any) -> Any:
    surprise, last = "with surprise", "last token"
    rows = [
        ("do two statements contradict", ("consistency, pairs", "subspace", "AUC")),
        ("is this answer right: last token", (f"single answers, {last}", "subspace", "AUC")),
        ("... and how expected each token was", (f"single answers, {surprise}", "subspace", "AUC")),
        ("which derivation has the wrong step: last token", (f"derivations, {last}", "subspace", "accuracy")),
        ("... and how expected each token was", (f"derivations, {surprise}", "subspace", "accuracy")),
        ("which GSM8K solution is right", (f"solutions, {surprise}", "subspace", "accuracy")),
    ]
    figure, axis = pyplot.subplots(figsize=(8, 2.8), layout="constrained")
    for y, (_, path) in enumerate(rows):
        found = numbers.head(*path)
        low, high = found["value"] - found["low"], found["high"] - found["value"]
        axis.errorbar(found["value"], y, xerr=[[low], [high]], fmt="o", color=BUNDLES, capsize=3)
    axis.axvline(0.5, color=DARK, linestyle=":", linewidth=1)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows])
    axis.invert_yaxis()
    axis.set(xlabel="AUC or accuracy on held-out items (dotted: chance)", xlim=(0.4, 1))
    return figure


def topics(pyplot: Any) -> Any:
    sources = {"lexicon": "lexicon", "embedding": "embedding", "clusters": "clusters"}
    sources["clusters of embeddings"] = "clusters of\nembeddings"
    kinds = {"held_out": "held-out documents", "other_sources": "other sources"}
    figure, axis = pyplot.subplots(figsize=(7, 2.8), layout="constrained")
    for n, (kind, label) in enumerate(kinds.items()):
        values = [numbers.topic_source(source, kind) for source in sources]
        places = [m + 0.38 * (n - 0.5) for m in range(len(sources))]
        bars = axis.bar(places, values, 0.38, color=[GREY, BUNDLES][n], label=label)
        axis.bar_label(bars, fmt="%.2f", padding=2)
    axis.set_xticks(range(len(sources)), list(sources.values()))
    axis.set(ylabel="right topic is the largest", ylim=(0, 1.15))
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def distill(pyplot: Any) -> Any:
    scores = numbers.read("benchmarks/results/distill.json")["over_seeds"]["scores"]
    labels = {"base": ("base", GREY), "bundles": ("two bundles", BUNDLES), "lora": ("one LoRA, distilled", LORA)}
    figure, axis = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    for n, (name, (label, color)) in enumerate(labels.items()):
        found = [scores[text][name] for text in scores]
        places = [m + 0.26 * (n - 1) for m in range(len(found))]
        axis.bar(places, [-f[0] for f in found], 0.26, yerr=[f[1] for f in found], color=color, label=label)
    axis.set_xticks(range(len(scores)), list(scores))
    axis.set(ylabel="held-out loss", ylim=(3, 4.8))
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def distributed(pyplot: Any) -> Any:
    record = numbers.read("benchmarks/results/distributed_check.json")
    figure, axis = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    steps = range(1, len(record["one_process"]["loss"]) + 1)
    axis.plot(steps, record["one_process"]["loss"], color=DARK, linewidth=4, alpha=0.35, label="one GPU")
    axis.plot(steps, record["ddp"]["loss"], "o", color=BUNDLES, markersize=9, label="two GPUs, DDP")
    axis.plot(steps, record["fsdp2"]["loss"], "x", color=LORA, markersize=7, label="two GPUs, FSDP2")
    axis.set(xlabel="step", ylabel="training loss")
    axis.legend(frameon=False)
    return figure


FIGURES = (speed, learning, continual, removal, rl_separate, semantic, heads, topics, distill, distributed)


def draw(folder: Path) -> None:
    """One SVG a page, the same bytes every time for one version of matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "peft_bundles", "font.size": 10, "axes.spines.top": False})
    pyplot.rcParams.update({"axes.spines.right": False, "figure.facecolor": "white"})
    for make in FIGURES:
        figure = make(pyplot)
        figure.savefig(folder / f"{make.__name__}.svg", metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else numbers.ROOT / "docs/results")
