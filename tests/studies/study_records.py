"""Records as recipes/continual.py and recipes/removal.py write them, made by hand: who knows what is given."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np


TASKS = ("memory", "logic", "meta")
ORDERS = {"A": ["memory", "logic", "meta"], "B": ["logic", "meta", "memory"], "C": ["meta", "memory", "logic"]}
ITEMS = 40
DOMAINS = {"wiki": 3.0, "news": 3.2}


def answers(share: float, rng: random.Random) -> str:
    """ITEMS answers, so many of them right; the first items are the easy ones in every run."""
    right = round(share * ITEMS)
    marks = ["1"] * right + ["0"] * (ITEMS - right)
    for _ in range(2):  # runs differ in a few
        a, b = rng.randrange(ITEMS), rng.randrange(ITEMS)
        marks[a], marks[b] = marks[b], marks[a]
    return "".join(marks)


def results(shares: dict[str, float], rng: random.Random) -> dict[str, Any]:
    found = {}
    for task, share in shares.items():
        items = answers(share, rng)
        found[task] = {"accuracy": items.count("1") / ITEMS, "items": items}
    found["memory"]["f1"] = shares["memory"]
    found["meta"] |= {"auc": 0.5 + shares["meta"] / 2, "brier": 0.25}
    return found


def base() -> dict[str, Any]:
    rng = random.Random("base")
    shares = {"memory": 0.0, "logic": 0.1, "meta": 0.5}
    return {
        "stage": "base",
        "condition": "base",
        "phases": [
            {"task": None, "modes": {"all": results(shares, rng)}, "domains": {"all": dict(DOMAINS)}},
        ],
        "validation": {**shares, "mean": 0.2},
        "items": {task: [f"{task}_easy"] * 20 + [f"{task}_hard"] * 20 for task in TASKS},
        "majority": {task: {"all": 0.1, f"{task}_easy": 0.2, f"{task}_hard": 0.1} for task in TASKS},
        "counts": {"train": dict.fromkeys(TASKS, 400), "test": dict.fromkeys(TASKS, ITEMS)},
        "tag": "nearest centroid",
        "device": "cpu",
        "date": "2026-01-01",
        "versions": {"torch": "2"},
    }


def cell(
    condition: str = "lora",
    *,
    schedule: str = "sequence",
    order: str = "A",
    seed: int = 0,
    lr: float = 1e-3,
    stage: str = "final",
    keeps: float = 0.4,
    learns: float = 0.8,
    modes: dict[str, float] | None = None,
    valid: float = 0.5,
    **fields: Any,
) -> dict[str, Any]:
    """One record. keeps: the share of what a task knew that each later phase leaves; modes: mode -> its own `keeps`;
    with 1.0 not one answer changes."""
    rng = random.Random(f"{condition} {schedule} {order} {seed} {lr}")
    start = {"memory": 0.0, "logic": 0.1, "meta": 0.5}
    tasks = ORDERS[order] if schedule == "sequence" else ["mixture"]
    kept = modes or {"all": keeps}
    phases: list[dict[str, Any]] = []
    now = {mode: dict(start) for mode in kept}
    for task in tasks:
        found = {}
        for mode, share in kept.items():
            for known in TASKS:
                if task in (known, "mixture"):
                    now[mode][known] = learns
                else:
                    now[mode][known] = start[known] + share * (now[mode][known] - start[known])
            found[mode] = results(now[mode], rng)
            if share == 1.0 and phases:  # what was not trained now is what it was
                found[mode] |= {t: phases[-1]["modes"][mode][t] for t in TASKS if t != task}
        states = ["all", *(TASKS if "tag" in kept else []), *(["uniform"] if "uniform" in kept else [])]
        domains = {state: {name: loss + 0.1 for name, loss in DOMAINS.items()} for state in states}
        alone = {t: {u: now["tag"][u] if t == u else start[u] for u in TASKS} for t in TASKS} if "tag" in kept else None
        phase = {"task": task, "steps": 10, "seconds": 1.0, "graph": True, "modes": found, "domains": domains}
        phases.append({**phase, "alone": alone})
    group = "bundles" if condition.startswith("bundles") else "peer"
    return {
        "stage": stage,
        "condition": condition,
        "label": f"the condition {condition}",
        "group": group,
        "schedule": schedule,
        "order": ORDERS[order],
        "seed": seed,
        "lr": lr,
        "settings": {"steps": 10},
        "trainable": 1000,
        "budget": 1000,
        "updated": [1000] * len(tasks),
        "primary": "tag" if "tag" in kept else "all",
        "validation": {"mean": valid},
        "phases": phases,
        "norms": {state: {"memory": 0.2, "logic": 0.2, "meta": 0.2, "text": 0.1} for state in ("all", *TASKS)},
        "tag_accuracy": {"memory": 1.0, "logic": 0.9, "meta": 0.95},
        "seconds": {"setup": 1, "train": 2, "evaluate": 1, "total": 4.0},
        "device": "gpu",
        "date": "2026-01-02",
        "versions": {"torch": "2"},
        **fields,
    }


def alphas(own: float = 0.8, other: float = 0.02) -> dict[str, Any]:
    """Sweeps in which the own task rises with alpha by `own` and the others by `other`."""
    sweep = {}
    for bundle in TASKS:
        sweep[bundle] = {
            str(a): {t: {"accuracy": 0.1 + a * (own if t == bundle else other)} for t in TASKS}
            for a in (0.0, 0.25, 0.5, 0.75, 1.0)
        }
    return {"others_on": sweep, "others_off": sweep}


def reflection(accuracy: float = 0.6, low: float = 0.5, high: float = 0.9, parts: bool = True) -> dict[str, Any]:
    """Own answers judged: the AUC goes from `low` to `high` with meta's alpha; without `parts` there is one state."""
    on = {str(a): {"auc": low + a * (high - low), "brier": 0.3 - 0.1 * a, "kept": 0.5} for a in (0.0, 0.5, 1.0)}
    on["1.0"] = {**on["1.0"], "kept_accuracy": accuracy + 0.2}
    states = {"others_off": on, "others_on": on} if parts else {"others_off": {}, "others_on": {"1.0": on["1.0"]}}
    return {task: {"items": ITEMS, "accuracy": accuracy, **states} for task in TASKS[:2]}


def shrink() -> list[dict[str, Any]]:
    """M0 scaled: its distance to the base is 0.4 of the factor, its accuracies half of it."""
    return [
        {
            "scale": scale,
            "modes": {"all": {t: {"accuracy": 0.5 * scale} for t in TASKS}},
            "domains": {"all": {name: loss + 0.2 * scale for name, loss in DOMAINS.items()}},
            "norms": {"all": {**dict.fromkeys(TASKS, 0.4 * scale), "text": 0.1}},
        }
        for scale in (0.1, 0.3, 0.6, 0.9)
    ]


RUNS = [
    {"condition": "lora", "schedule": "sequence", "rates": [5e-4, 1e-3, 2e-3], "seeds": 3},
    {"condition": "bundles", "schedule": "sequence", "rates": [5e-4, 1e-3, 2e-3], "orders": {"A": 3, "B": 2}},
    {"condition": "bundles", "schedule": "mixture", "rate_of": ["bundles", "sequence"]},
]


def write_runs(folder: Path) -> Path:
    path = folder / "runs.yaml"
    path.write_text(json.dumps({"runs": RUNS}))  # JSON is YAML
    return path


TAGGED = {"tag": 1.0, "nearest": 0.95, "uniform": 0.5, "all": 0.7}


def study(seeds: tuple[int, ...] = (0, 1, 2)) -> list[dict[str, Any]]:
    """Base, M0 and bundles with a rate search and every order, and some others."""
    made = [base()]
    for lr, valid in ((5e-4, 0.4), (1e-3, 0.6), (2e-3, 0.5)):
        made.append(cell("lora", lr=lr, valid=valid, stage="grid"))
        made.append(cell("bundles", lr=lr, valid=valid, stage="grid", modes=TAGGED))
    for seed in seeds:
        for order in ORDERS:
            if seed or order != "A":  # seed 0 of order A is the search's
                made.append(cell("lora", seed=seed, order=order, shrink=shrink() if seed else None))
                extra = {"alphas": alphas()} if seed else {}
                made.append(cell("bundles", seed=seed, order=order, modes=TAGGED, **extra))
        for key in ("lora", "bundles"):
            kept = TAGGED if key == "bundles" else None
            made.append(cell(key, schedule="mixture", seed=seed, modes=kept))
        made.append(cell("lora_separate", seed=seed, modes=TAGGED))
        made.append(cell("lora_replay", seed=seed, keeps=0.9))
        made.append(cell("full", seed=seed, keeps=0.3))
    return made


def removal(variant: str, rate: float = 0.0, seed: int = 0, after: float = 0.0, back: float = 0.1) -> dict[str, Any]:
    """One record of removal.py; `back`: the part that was not shown again, at the end."""
    measured = {"accuracy": {"codes": after, "biographies": 0.8}, "text": {"wiki": 3.1}, "forget_kl": 0.5}
    record: dict[str, Any] = {"variant": variant, "rate": rate, "seed": seed, "settings": {"forget": "codes"}}
    if variant not in ("base", "never"):
        record["before"] = {**measured, "accuracy": {"codes": 0.8, "biographies": 0.9}}
    if rate:
        record["unlearn"] = {"steps": 9, "removed": after < 0.02, "curve": [[0, 0.8], [9, after]]}
    if variant in ("owners", "all"):
        record["off_is_base"] = True
    curves = {"all": [[0, after], [40, 0.6], [80, 0.9]], "part": [[0, 0.0, 0.0], [40, 0.8, 0.1], [80, 0.9, back]]}
    return {**record, "after": measured, "relearn": curves, "seconds": 9.0, "device": "gpu"}


def write(folder: Path, records: list[dict[str, Any]], name: str = "cells.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def features(folder: Path, name: str, gap: float, bundles: bool = False) -> None:
    """A file of features: three clusters, `gap` apart, at three depths."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(len(name))
    labels = np.repeat([0, 1, 2], 10)

    def some(gap: float) -> np.ndarray:
        return (rng.standard_normal((3, 30, 8)) + gap * np.eye(3, 8)[labels]).astype(np.float16)

    arrays = {f"hidden_{at}": some(gap) for at in ("last", "mean")}
    if bundles:
        arrays |= {f"delta_{task}_{at}": some(6.0) for task in TASKS for at in ("last", "mean")}
    np.savez(folder / name, depths=np.array([7, 15, 22]), task=labels, **arrays)
