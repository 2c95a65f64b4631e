"""Reflection in docs/study.md: how well the model judges its own answers, over meta's alpha."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from studies.continual import study as s
from studies.continual.study import M3, Key, Study, pm
from studies.continual.tables import table, title
from studies.continual.words import preliminary


def reflections(study: Study, key: Key, task: str) -> list[dict[str, Any]]:
    """One a run: what it recorded of its answers to that task."""
    return [r["reflection"][task] for r in s.finals(study, key) if task in (r.get("reflection") or {})]


def at(found: list[dict[str, Any]], others: str, alpha: str, measure: str) -> list[float]:
    """That measure of every run that has it: no AUC where all answers are right, or none; nothing kept where all are
    called wrong."""
    points = [f[others].get(alpha, {}) for f in found]
    return [p[measure] for p in points if measure in p]


def constant(found: list[dict[str, Any]]) -> list[float]:
    """The Brier score of the share of right answers itself, said of every answer."""
    return [f["accuracy"] * (1 - f["accuracy"]) for f in found]


def rows(study: Study) -> str:
    made = []
    for key in s.keys(study):
        for task in ("memory", "logic"):
            found = reflections(study, key, task)
            for others in ("others_off", "others_on") if found else ():
                if not any(f[others] for f in found):
                    continue
                auc = [pm(at(found, others, a, "auc"), 2) for a in ("0.0", "0.5", "1.0")]
                brier = [pm(at(found, others, a, "brier"), 2) for a in ("0.0", "1.0")]
                kept = [pm(at(found, others, "1.0", name), 2) for name in ("kept", "kept_accuracy")]
                cells = [title(key), task, others[7:], *auc, *brier, pm(constant(found), 2), *kept]
                made.append([*cells, pm([f["accuracy"] for f in found], 2), str(len(found))])
    head = "condition|answers to|others|AUC at 0|at 0.5|at 1|Brier at 0|at 1|of a constant|kept at 1|right of these"
    return table(f"{head}|right of all|n", made) if made else "Not run yet."


def claim(study: Study) -> str:
    """What meta's alpha does to it, the others off; "" if not run."""
    said, runs = [], 0
    for task in ("memory", "logic"):
        found = reflections(study, M3, task)
        runs = len(found)
        low, high = (at(found, "others_off", alpha, "auc") for alpha in ("0.0", "1.0"))
        kept = at(found, "others_off", "1.0", "kept_accuracy")
        if not (low and high):
            continue
        line = f"on answers to {task} from {fmean(low):.2f} to {fmean(high):.2f}"
        if kept:
            right = fmean(f["accuracy"] for f in found)
            line += f", and of those it calls right {fmean(kept):.2f} are ({right:.2f} of all)"
        said.append(line)
    if not said:
        return ""
    begin = f"{preliminary(runs).capitalize()}With meta's alpha from 0 to 1, the others off, the AUC goes"
    return f"{begin} {'; '.join(said)}."
