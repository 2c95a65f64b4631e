"""Numbers of the continual study: what recipes/continual.py and recipes/removal.py recorded, read and reduced.

Every function returns an empty list, or None, for what was not run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from peft_bundles.evaluation import spearman
from studies.measures import continual
from studies.measures.continual import Interval, Run


TASKS = ("memory", "logic", "meta")
MODES = ("tag", "prefix", "nearest", "uniform", "all")
ORDERS = {"A": ("memory", "logic", "meta"), "B": ("logic", "meta", "memory"), "C": ("meta", "memory", "logic")}
M0, MULTI = ("lora", "sequence"), ("lora", "mixture")
M1, M3, SEPARATE = ("bundles", "mixture"), ("bundles", "sequence"), ("lora_separate", "sequence")
ALL_ON = ("bundles_all", "sequence")  # M3, but the bundles learnt before stay on while the next one learns
Record = dict[str, Any]
Key = tuple[str, str]  # condition, schedule
TIE = 0.01  # of mean accuracy on validation items: rates so near the best are told apart by their training loss


@dataclass
class Study:
    """Attributes:
    records: of recipes/continual.py, a cell each, without the base and without errors. failed: those with errors.
    removal, removal_failed: the same of recipes/removal.py. spaces: what `studies.continual.spaces` computed, or None.
    code: what cells of one seed, trained once more, and the base solve of HumanEval.
    """

    base: Record
    records: list[Record]
    failed: list[Record] = field(default_factory=list)
    removal: list[Record] = field(default_factory=list)
    removal_failed: list[Record] = field(default_factory=list)
    spaces: dict[str, Any] | None = None
    code: list[Record] = field(default_factory=list)


def problems(record: Record) -> int:
    """Of HumanEval, that a record of it is about; 0 where it failed."""
    return 0 if "error" in record else record["phases"][-1]["code"]["tasks"]


def read(folder: Path) -> Study:
    """All *.jsonl of a folder, and spaces.json. A cell that a later line repeats is that line, with what only the
    earlier one has (hidden states are measured when asked for); an error that a later line mends is gone.

    Raises:
        ValueError: there is no record of the untouched model, which everything is measured from.
    """
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [json.loads(line) for line in lines if line.strip()]
    cells, removal, code = {}, {}, {}
    for record in found:
        if "variant" in record:
            removal[record["variant"], record["rate"], record["seed"]] = record
        elif record["stage"] == "code":
            same = record["condition"], record.get("schedule")
            if same not in code or problems(record) >= problems(code[same]):
                code[same] = record
        elif record["stage"] != "base":
            same = json.dumps([record[k] for k in ("condition", "schedule", "order", "seed", "lr")])
            if "error" not in record or "error" in cells.get(same, {"error": ""}):
                before = cells.get(same, {})
                goes_on = "error" not in before and before.get("settings") == record.get("settings")
                cells[same] = {**before, **record} if goes_on else record
    bases = [r for r in found if r.get("stage") == "base" and "error" not in r]
    if not bases:
        raise ValueError(f"{folder}: no record with stage 'base'; run recipes/continual.py, which measures it first.")
    taught = {r["seed"] for r in removal.values() if r["variant"] == "none" and "error" not in r}
    spaces = folder / "spaces.json"
    return Study(
        bases[-1],
        [r for r in cells.values() if "error" not in r],
        [r for r in (*cells.values(), *code.values()) if "error" in r],
        [r for r in removal.values() if "error" not in r],
        [r for r in removal.values() if "error" in r and not (r["variant"] == "taught" and r["seed"] in taught)],
        json.loads(spaces.read_text(encoding="utf-8")) if spaces.exists() else None,
        [r for r in code.values() if "error" not in r],
    )


# ---- which cells ----


def keys(study: Study, schedule: str | None = None) -> list[Key]:
    """(condition, schedule) that have a record, in the order of the file."""
    found = dict.fromkeys((r["condition"], r["schedule"]) for r in study.records)
    return [key for key in found if schedule in (None, key[1])]


def grid(study: Study, key: Key) -> dict[float, list[float]]:
    """Learning rate -> mean accuracies on the validation items, of the rate search."""
    rates: dict[float, list[float]] = {}
    for r in study.records:
        if (r["condition"], r["schedule"]) == key and r["stage"] == "grid":
            rates.setdefault(r["lr"], []).append(r["validation"]["mean"])
    return dict(sorted(rates.items()))


def training_loss(record: Record) -> float:
    """Mean over phases of the last training loss recorded in each; infinite where none is recorded."""
    last = [phase["loss"][-1][1] for phase in record["phases"] if phase.get("loss")]
    return fmean(last) if last else math.inf


def best_of(scores: Mapping[float, tuple[float, float]]) -> float:
    """The rate to take, of rate -> (validation accuracy, training loss): the best, and of those within TIE the one
    that learns most, by its training loss.

    What ends with two of three tasks at 0 validates alike at rates of which one learns half of what another does. As M0
    the half-learnt one forgets little, and everything beside it seems to forget much.
    """
    valid = {lr: -math.inf if math.isnan(accuracy) else accuracy for lr, (accuracy, _) in scores.items()}
    near = [lr for lr in valid if valid[lr] >= max(valid.values()) - TIE]
    return min(near, key=lambda lr: (scores[lr][1], -valid[lr]))


def chosen(study: Study, key: Key) -> float | None:
    """`best_of` the search; without a search, the rate that most records have."""
    searched = [r for r in study.records if (r["condition"], r["schedule"]) == key and r["stage"] == "grid"]
    if searched:
        tried = grid(study, key)
        losses = {lr: fmean(training_loss(r) for r in searched if r["lr"] == lr) for lr in tried}
        return best_of({lr: (fmean(tried[lr]), losses[lr]) for lr in tried})
    used = [r["lr"] for r in study.records if (r["condition"], r["schedule"]) == key]
    return max(dict.fromkeys(used), key=used.count) if used else None


def at_the_edge(study: Study, key: Key) -> bool:
    """Whether the chosen rate is the lowest or highest that was tried: a better one may lie beyond."""
    rates = [*grid(study, key)]
    return len(rates) > 1 and chosen(study, key) in (rates[0], rates[-1])


def finals(study: Study, key: Key, order: Iterable[str] | None = None) -> list[Record]:
    """The records at the chosen rate, by order and seed; of one order, or of all."""
    lr = chosen(study, key)
    found = [
        r
        for r in study.records
        if (r["condition"], r["schedule"]) == key and r["lr"] == lr and order in (None, tuple(r["order"]))
    ]
    return sorted(found, key=lambda r: (order_name(r), r["seed"]))


def order_name(record: Record) -> str:
    return next((name for name, order in ORDERS.items() if order == tuple(record["order"])), "-".join(record["order"]))


def modes_of(record: Record) -> list[str]:
    return [mode for mode in MODES if all(mode in phase["modes"] for phase in record["phases"])]


def modes(study: Study, key: Key) -> list[str]:
    found = finals(study, key)
    return [m for m in MODES if found and all(m in modes_of(r) for r in found)]


def label(study: Study, condition: str) -> str:
    return next((r["label"] for r in study.records if r["condition"] == condition), condition)


def primary(study: Study, key: Key) -> str:
    return next((r["primary"] for r in finals(study, key)), "all")


# ---- one run ----


def scores(study: Study, record: Record, mode: str) -> np.ndarray:
    """Accuracies (P + 1, 3), the first row of the untouched model."""
    rows = [study.base["phases"][0]["modes"]["all"], *(phase["modes"][mode] for phase in record["phases"])]
    return np.array([[row[task]["accuracy"] for task in TASKS] for row in rows])


def run_of(study: Study, record: Record, mode: str) -> Run:
    """With every test item where the records have them, else with means."""
    rows = [study.base["phases"][0]["modes"]["all"], *(phase["modes"][mode] for phase in record["phases"])]
    items = {}
    for task in TASKS:
        whole = [row[task].get("items") for row in rows]
        known = all(whole) and len(set(map(len, whole))) == 1
        given = [[c == "1" for c in w] for w in whole] if known else [[row[task]["accuracy"]] for row in rows]
        items[task] = np.array(given, dtype=float)
    return Run(record["order"], items)


def rise(study: Study, record: Record, mode: str, phase: int = -1) -> float | None:
    """Mean rise of the loss on domains nobody trained on; "tag": mean over the bundles, each alone on."""
    base = next(iter(study.base["phases"][0]["domains"].values()))
    domains = record["phases"][phase].get("domains", {})
    states = TASKS if mode == "tag" else (mode,)
    if not all(state in domains for state in states):
        return None
    return fmean(domains[state][name] - base[name] for state in states for name in base)


def measures(study: Study, record: Record, mode: str) -> dict[str, float]:
    """What one run comes to: "average", each task, "auc", "brier", "rise"; of a sequence also "learnt" (mean of the
    tasks just after their own phases), "forgetting", "bwt" and "fwt"."""
    table, last = scores(study, record, mode), record["phases"][-1]["modes"][mode]
    found = {"average": float(continual.average_accuracy(table)), **dict(zip(TASKS, table[-1].tolist()))}
    found |= {name: last["meta"][name] for name in ("auc", "brier") if last["meta"].get(name) is not None}
    if last["memory"].get("f1") is not None:
        found["f1"] = last["memory"]["f1"]
    if (rose := rise(study, record, mode)) is not None:
        found["rise"] = rose
    found["seconds"] = record.get("seconds", {}).get("total", math.nan)
    if len(record["phases"]) > 1:
        order = [TASKS.index(task) for task in record["order"]]
        found["learnt"] = float(np.mean([table[n, task] for n, task in enumerate(order, 1)]))
        found["forgetting"] = float(continual.forgetting(table, order))
        found["bwt"] = float(continual.backward_transfer(table, order))
        found["fwt"] = float(continual.forward_transfer(table, order))
    return found


def values(study: Study, key: Key, mode: str, measure: str, order: str | None = "A") -> list[float]:
    """One a run of that condition (order "A", or None: all orders); without NaN."""
    wanted = None if order is None or key[1] == "mixture" else ORDERS[order]
    runs = [measures(study, r, mode) for r in finals(study, key, wanted) if mode in modes_of(r)]
    return [run[measure] for run in runs if not math.isnan(run.get(measure, math.nan))]


def untouched(study: Study, key: Key, mode: str) -> bool:
    """Whether in every run every task's answers at the end are, item by item, those just after its own phase."""
    runs = [run_of(study, r, mode) for r in finals(study, key) if mode in modes_of(r)]
    return bool(runs) and all(
        np.array_equal(run.items[task][phase], run.items[task][-1])
        for run in runs
        for phase, task in enumerate(run.order, 1)
    )


# ---- two conditions ----


def learnt_beside_m0(study: Study, key: Key, mode: str, order: str | None = None) -> tuple[float, float] | None:
    """Accuracy on tasks just after their own phase, of a sequence and of M0, means over the runs that both have."""
    both = []
    for k, m in ((key, mode), (M0, "all")):
        found = [r for r in finals(study, k, ORDERS[order] if order else None) if m in modes_of(r)]
        both.append({(order_name(r), r["seed"]): measures(study, r, m).get("learnt", math.nan) for r in found})
    shared = both[0].keys() & both[1].keys()
    return (fmean(both[0][k] for k in shared), fmean(both[1][k] for k in shared)) if shared else None


def too_little_learnt(study: Study, key: Key, mode: str, order: str | None = None) -> bool:
    """Whether tasks are learnt, just after their phase, to less than 0.8 of what M0 learns: it has little to forget."""
    found = learnt_beside_m0(study, key, mode, order)
    return found is not None and found[0] < 0.8 * found[1]


def runs_of(study: Study, key: Key, mode: str) -> dict[Any, Run]:
    return {(tuple(r["order"]), r["seed"]): run_of(study, r, mode) for r in finals(study, key) if mode in modes_of(r)}


def _compared(
    study: Study, key: Any, mode: str, against: Any, against_mode: str, compare: Any, order: str | None = None
) -> Interval | None:
    reference, other = runs_of(study, against, against_mode), runs_of(study, key, mode)
    shared = {k for k in reference.keys() & other.keys() if order is None or k[0] == ORDERS[order]}
    if not shared:
        return None
    both = [{k: v for k, v in side.items() if k in shared} for side in (reference, other)]
    for task in TASKS:  # a line without items: then means alone, everywhere
        if len({run.items[task].shape[1] for side in both for run in side.values()}) > 1:
            for side in both:
                for k, run in side.items():
                    side[k] = Run(run.order, {**run.items, task: run.items[task].mean(1, keepdims=True)})
    return compare(*both)


def reduction(study: Study, key: Any, mode: str, order: str | None = None) -> Interval | None:
    """`continual.forgetting_reduction` against M0 over the runs that both have, of one order or of all."""
    return _compared(study, key, mode, M0, "all", continual.forgetting_reduction, order)


def reduction_before_meta(study: Study, key: Any, mode: str) -> Interval | None:
    """The same of order A without its last phase: what logic alone takes from memory."""

    def first_two(runs: dict[Any, Run]) -> dict[Any, Run]:
        return {k: Run(run.order[:2], {t: x[:3] for t, x in run.items.items()}) for k, run in runs.items()}

    def compare(reference: Any, other: Any) -> Interval:
        return continual.forgetting_reduction(first_two(reference), first_two(other))

    return _compared(study, key, mode, M0, "all", compare, "A")


def difference(
    study: Study,
    key: Any,
    mode: str,
    against: Any,
    against_mode: str,
    tasks: Iterable[str] = TASKS,
    order: str | None = None,
) -> Interval | None:
    """`continual.score_difference` over the runs that both have, of one order or of all."""
    wanted = list(tasks)

    def compare(reference: Any, other: Any) -> Interval:
        return continual.score_difference(reference, other, wanted)

    return _compared(study, key, mode, against, against_mode, compare, order)


def shared_orders(study: Study, key: Key, against: Key) -> list[str]:
    """Orders of which both have runs; of a mixture none."""
    if "mixture" in (key[1], against[1]):
        return []
    return [o for o, tasks in ORDERS.items() if all(finals(study, k, tasks) for k in (key, against))]


# ---- alphas, and M0 made smaller ----


def alpha_curves(study: Study, key: Key, others: str) -> list[dict[str, tuple[list[float], np.ndarray]]]:
    """One a run: bundle's task -> (alphas ascending, accuracies (V, 3))."""
    found = []
    for r in finals(study, key):
        if others in (r.get("alphas") or {}):
            curves = {}
            for task, points in r["alphas"][others].items():
                at = sorted(points, key=float)
                table = np.array([[points[a][t]["accuracy"] for t in TASKS] for a in at])
                curves[task] = ([float(a) for a in at], table)
            found.append(curves)
    return found


def control(study: Study, key: Key, others: str, task: str) -> dict[str, list[float]] | None:
    """Of one bundle's alpha from 0 to 1, a value a run: "spearman" of the own task's accuracy, "own" (how far it
    moves), "cross" (the others' share of that)."""
    curves = [curve[task] for curve in alpha_curves(study, key, others) if task in curve]
    found: dict[str, list[float]] = {"spearman": [], "own": [], "cross": []}
    for alphas, table in curves:
        kept = [n for n, a in enumerate(alphas) if a <= 1.0]
        part, own = [alphas[n] for n in kept], TASKS.index(task)
        if 0.0 not in part or len(part) < 3:
            continue
        found["spearman"].append(spearman(part, table[kept, own].tolist()))
        found["own"].append(float(continual.sensitivity(part, table[kept])[own]))
        found["cross"].append(continual.cross_sensitivity(part, table[kept], own))
    return found if found["own"] else None


def shrunk(study: Study, key: Key = ("bundles", "sequence"), state: str = "all") -> list[dict[str, float]]:
    """M0 scaled until its last hidden state is as far from the base's as the bundles' is, one a seed that has both.

    {"seed", "goal": that distance, "scale", "average", "rise", tasks; "best_scale", "best": the factor with the best
    average of those tried}.
    The norm is the mean of those at the answers of the three tasks; between two factors lines are straight, and the
    factor is at most 1, where the bundles are further away than the whole M0.
    """
    found = []
    others = {r["seed"]: r for r in finals(study, key, ORDERS["A"])}
    for r in finals(study, M0, ORDERS["A"]):
        steps, other = r.get("shrink"), others.get(r["seed"])
        if not steps or other is None or state not in other.get("norms", {}) or "all" not in r.get("norms", {}):
            continue
        steps = [*steps, {**r["phases"][-1], "norms": r["norms"], "scale": 1.0}]  # M0 as it is
        base = next(iter(study.base["phases"][0]["domains"].values()))
        goal = fmean(other["norms"][state][task] for task in TASKS)
        rows = []
        for s in sorted(steps, key=lambda s: s["scale"]):
            accuracies = [s["modes"]["all"][task]["accuracy"] for task in TASKS]
            domains = (s.get("domains") or {}).get("all")
            rose = fmean(domains[name] - base[name] for name in base) if domains else math.nan
            norm = fmean(s["norms"]["all"][task] for task in TASKS)
            rows.append([norm, s["scale"], fmean(accuracies), rose, *accuracies])
        table = np.array(rows)
        best = table[table[:, 2].argmax()]
        names = ("scale", "average", "rise", *TASKS)
        at = {name: float(np.interp(goal, table[:, 0], table[:, n])) for n, name in enumerate(names, 1)}
        found.append({"seed": r["seed"], "goal": goal, **at, "best_scale": float(best[1]), "best": float(best[2])})
    return found


# ---- removal ----


def removal_key(study: Study, variant: str) -> float | None:
    """The rate of an unlearning method: of those that removed in most seeds, the one that keeps most of the rest."""
    rates = dict.fromkeys(r["rate"] for r in study.removal if r["variant"] == variant)

    def merit(rate: float) -> tuple[float, float]:
        cells = removal_cells(study, variant, rate)
        removed = fmean(float(r.get("unlearn", {"removed": True})["removed"]) for r in cells)
        return removed, fmean(retained(r) for r in cells)

    return max(rates, key=merit) if rates else None


def removal_cells(study: Study, variant: str, rate: float | None) -> list[Record]:
    return [r for r in study.removal if r["variant"] == variant and r["rate"] == rate]


def retained(record: Record, when: str = "after") -> float:
    """Mean accuracy on what was not to be removed."""
    accuracies = record[when]["accuracy"]
    return fmean(value for kind, value in accuracies.items() if kind != record["settings"]["forget"])


def steps_to(curve: list[list[float]], goal: float, column: int = 1) -> float | None:
    """The first step, straight lines between those measured, at which the curve is at the goal; None: not within it."""
    before: list[float] | None = None
    for point in curve:
        if point[column] >= goal:
            if before is None:
                return float(point[0])
            return before[0] + (point[0] - before[0]) * (goal - before[column]) / (point[column] - before[column])
        before = point
    return None
