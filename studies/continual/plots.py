"""Figures of the continual study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from studies.continual import study as s
from studies.continual.study import M0, ORDERS, TASKS, Study


COLORS = {"memory": "#d94a10", "logic": "#1f5fa8", "meta": "#2f8f46"}
CURVES = [
    (M0, "all", "M0: LoRA", "#7d8491", "-"),
    (("full", "sequence"), "all", "full fine-tuning", "#3c3e43", "-"),
    (("lora_replay", "sequence"), "all", "LoRA, 10 % replay", "#6aa5dc", "-"),
    (("bundles", "sequence"), "tag", "bundles, true tag", "#d94a10", "-"),
    (("bundles", "sequence"), "nearest", "bundles, predicted tag", "#d94a10", "--"),
    (("bundles", "sequence"), "all", "bundles, all on", "#f0a878", "-"),
    (("bundles_all", "sequence"), "all", "bundles trained with all on, all on", "#a02c0c", "-"),
]
REMOVERS = {
    "none": ("LoRA, nothing removed", "#3c3e43"),
    "ascent": ("ascent", "#6aa5dc"),
    "ascent_retain": ("ascent and retain", "#1f5fa8"),
    "rmu": ("RMU-style", "#7d6bc4"),
    "owners": ("bundle at 0 (own on)", "#d94a10"),
    "all": ("bundle at 0 (all on)", "#f0a878"),
    "never": ("never taught", "#2f8f46"),
    "base": ("base", "#b9bbc1"),
}


def draw(study: Study, folder: Path) -> None:
    """phases.svg, and where there is something to see alphas.svg and removal.svg."""
    from matplotlib import pyplot

    pyplot.switch_backend("svg")
    pyplot.rcParams.update({"svg.hashsalt": "peft_bundles", "font.size": 9})
    for name, paint, there in (
        ("phases", phases, True),
        ("alphas", alphas, has_alphas(study)),
        ("removal", removal, bool(study.removal)),
    ):
        if not there:
            continue
        figure = paint(pyplot, study)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def has_alphas(study: Study) -> bool:
    return any(s.alpha_curves(study, ("bundles", "sequence"), others) for others in ("others_off", "others_on"))


def legend(figure: Any, axes: Any, columns: int) -> None:
    handles: dict[str, Any] = {}
    for axis in np.ravel(axes):
        for handle, name in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(name, handle)
    if handles:
        figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=columns, frameon=False)


def phases(pyplot: Any, study: Study) -> Any:
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 4), layout="constrained", sharey=True)
    for key, mode, name, color, style in CURVES:
        tables = [s.scores(study, r, mode) for r in s.finals(study, key, ORDERS["A"]) if mode in s.modes_of(r)]
        if not tables:
            continue
        stacked = np.stack(tables)
        mean, low, high = stacked.mean(0), stacked.min(0), stacked.max(0)
        for n, axis in enumerate(axes):
            axis.plot(range(4), mean[:, n], color=color, linestyle=style, marker="o", markersize=3, label=name)
            axis.fill_between(range(4), low[:, n], high[:, n], color=color, alpha=0.12, linewidth=0)
    for n, (axis, task) in enumerate(zip(axes, TASKS)):
        axis.axvspan(n, n + 1, color="0.93", zorder=0)
        axis.set(title=f"{task} (its phase is grey)", xticks=range(4), xticklabels=["base", *ORDERS["A"]])
    axes[0].set_ylabel("accuracy; band: least to most over seeds")
    legend(figure, axes, 4)
    return figure


def alphas(pyplot: Any, study: Study) -> Any:
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained", sharex=True)
    for row, others in zip(axes, ("others_off", "others_on")):
        curves = s.alpha_curves(study, ("bundles", "sequence"), others)
        for axis, bundle in zip(row, TASKS):
            axis.set(title=f"{bundle}'s bundle, {others.replace('_', ' ')}", xlabel="alpha", ylabel="accuracy")
            known = [curve[bundle] for curve in curves if bundle in curve]
            for n, task in enumerate(TASKS):
                for number, (at, table) in enumerate(known):
                    width = 2.0 if task == bundle else 1.0
                    axis.plot(at, table[:, n], color=COLORS[task], linewidth=width, label=None if number else task)
    legend(figure, axes, 3)
    return figure


def removal(pyplot: Any, study: Study) -> Any:
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for variant, (name, color) in REMOVERS.items():
        found = s.removal_cells(study, variant, s.removal_key(study, variant))
        for axis, which, column in ((axes[0], "all", 1), (axes[1], "part", 2)):
            if found:
                at = [point[0] for point in found[0]["relearn"][which]]
                lines = np.array([[point[column] for point in r["relearn"][which]] for r in found])
                axis.plot(at, lines.mean(0), color=color, marker="o", markersize=3, label=name)
    axes[0].set(title="taught all of it again", xlabel="steps", ylabel="accuracy on the removed task")
    axes[1].set(title="taught a third again: the two thirds not shown", xlabel="steps")
    legend(figure, axes, 4)
    return figure
