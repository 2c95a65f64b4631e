"""Where the three tasks lie in hidden states and in what bundles add: spaces.json and its picture, from features."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from studies.continual.study import TASKS, Record
from studies.measures import representations


COLORS = {"memory": "#d94a10", "logic": "#1f5fa8", "meta": "#2f8f46"}
Spaces = dict[str, Any]


def arrays_of(folder: Path, records: list[Record]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """(space, seed) -> {"last", "mean"}: (depths, N, d). "trunk" is the base model; of every cell that left features
    its hidden states, what each of its bundles adds, and the three of them side by side ("bundles")."""
    files = {("trunk", "0"): folder / "base.npz"}
    for r in records:
        if r.get("features"):
            files[f"{r['condition']}/{r['schedule']}", str(r["seed"])] = folder / Path(r["features"]).name
    found = {}
    for (name, seed), path in files.items():
        if not path.exists():
            continue
        with np.load(path) as file:
            given = {key: file[key].astype(np.float32) for key in file.files if key not in ("task", "depths")}
        parts = {"hidden": [f"hidden_{at}" for at in ("last", "mean")]}
        parts |= {task: [f"delta_{task}_{at}" for at in ("last", "mean")] for task in TASKS}
        for part, keys in parts.items():
            if all(key in given for key in keys):
                space = name if name == "trunk" else f"{name}/{part}"
                found[space, seed] = dict(zip(("last", "mean"), (given[key] for key in keys)))
        if all((f"{name}/{task}", seed) in found for task in TASKS):
            sides = [found[f"{name}/{task}", seed] for task in TASKS]
            found[f"{name}/bundles", seed] = {at: np.concatenate([s[at] for s in sides], -1) for at in ("last", "mean")}
    return found


def measured(folder: Path, records: list[Record], before: Spaces | None = None) -> Spaces | None:
    """What goes into spaces.json: space -> seed -> its numbers, over those of `before`; None without the features of
    the base model."""
    if not (folder / "base.npz").exists():
        return None
    with np.load(folder / "base.npz") as file:
        depths, labels = file["depths"].tolist(), [TASKS[n] for n in file["task"]]
    arrays = arrays_of(folder, records)
    spaces = {name: dict(seeds) for name, seeds in (before or {}).get("spaces", {}).items()}
    found: Spaces = {"depths": depths, "rows": len(labels), "spaces": spaces}
    trunk = arrays["trunk", "0"]
    for (name, seed), space in arrays.items():
        spaces.setdefault(name, {})[seed] = {
            at: [one(space[at][n], labels, trunk[at][n]) for n in range(len(depths))] for at in space
        }
    return found


def one(x: np.ndarray, labels: list[str], trunk: np.ndarray) -> dict[str, Any]:
    """One space at one depth."""
    probe = representations.linear_probe(x, labels)
    rows = {task: x[[label == task for label in labels]] for task in TASKS}
    pairs = {f"{a}-{b}": representations.covariance_cka(rows[a], rows[b]) for a, b in combinations(TASKS, 2)}
    numbers = {**probe, "silhouette": representations.silhouette(x, labels), "cka_trunk": representations.cka(x, trunk)}
    return {k: rounded(v) for k, v in numbers.items()} | {"cka_tasks": {k: rounded(v) for k, v in pairs.items()}}


def rounded(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


def write(folder: Path, records: list[Record], output: Path, before: Spaces | None = None) -> Spaces | None:
    """spaces.json, what is not measured anew as it was `before`, and spaces.svg; nothing where the features are not
    there."""
    found = measured(folder, records, before)
    if found is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "spaces.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        draw(folder, records, found["depths"], output / "spaces.svg")
    return found


def draw(folder: Path, records: list[Record], depths: list[int], path: Path) -> None:
    """A row a space (trunk, M0, the bundles' hidden states, what the bundles add): PCA at every depth, UMAP at one."""
    from matplotlib import pyplot

    with np.load(folder / "base.npz") as file:
        labels = np.array([TASKS[n] for n in file["task"]])
    arrays = arrays_of(folder, records)
    wanted = ("trunk", "lora/sequence/hidden", "bundles/sequence/hidden", "bundles/sequence/bundles")
    shown = {name: min(seeds) for name in wanted if (seeds := [seed for space, seed in arrays if space == name])}
    middle = len(depths) // 2
    pyplot.switch_backend("svg")
    pyplot.rcParams.update({"svg.hashsalt": "peft_bundles", "font.size": 8})
    size = (2.6 * (len(depths) + 1), 2.4 * len(shown))
    figure, axes = pyplot.subplots(len(shown), len(depths) + 1, figsize=size, squeeze=False, layout="constrained")
    for row, key in enumerate(shown.items()):
        name, states = key[0], arrays[key]["last"]
        pictures = [(f"PCA, layer {depth}", representations.pca(states[n])[0]) for n, depth in enumerate(depths)]
        pictures.append((f"UMAP, layer {depths[middle]}", representations.umap(states[middle])))
        for axis, (title, points) in zip(axes[row], pictures):
            for task in TASKS:
                mine = labels == task
                axis.scatter(*points[mine].T, s=7, color=COLORS[task], label=task, linewidths=0)
            axis.set(title=f"{name}: {title}", xticks=[], yticks=[])
            axis.title.set_fontsize(7)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
