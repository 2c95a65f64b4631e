"""The cells of continual.py: which are run, in what order, and at which rate.

A cell is (condition, schedule, order, rate, seed). Rates come from one seed's validation items; the other seeds run at
the best of them.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

from studies import records
from studies.continual.study import ORDERS, best_of, training_loss
from studies.workers import claim


# Of a condition, what is no setting of its training.
LABELS = ("label", "group", "alphas", "shrink", "reflection", "features")
Cell = dict[str, Any]


def cells_of(config: dict[str, Any]) -> list[Cell]:
    """All cells in the order in which they are started; only those of the grid have a rate of their own yet.

    Runs come in blocks (`block` in the YAML): the grid of a block, then the finals of the block before. With --code a
    cell of every run follows that is trained once more, as seed 1 of order A, for HumanEval alone: with generation and
    164 programs to run it takes as long as all the other measures.
    """
    grid: dict[int, list[Cell]] = {}
    final: dict[int, list[Cell]] = {}
    for run in config["runs"]:
        condition = config["conditions"][run["condition"]]
        what = {**config["common"], **{k: v for k, v in condition.items() if k not in LABELS}}
        seeds = run.get("orders", {"A": run.get("seeds", 3)})
        cell = {"condition": run["condition"], "schedule": run["schedule"], "settings": what}
        block = run.get("block", 1)
        key = [run["condition"], run["schedule"]]
        source = run.get("rate_of", key)
        if "rates" in run:
            grid.setdefault(block, []).extend(
                {**cell, "stage": "grid", "order": "A", "seed": 0, "lr": float(lr)} for lr in run["rates"]
            )
        first = 1 if source == key else 0  # the best of the grid is seed 0 of order A
        for order, count in seeds.items():
            final.setdefault(block, []).extend(
                {**cell, "stage": "final", "order": order, "seed": seed, "rate_of": source}
                for seed in range(first if order == "A" else 0, count)
            )
    cells = []
    for block in range(1, max([*grid, *final]) + 2):
        if not config["final"]:
            cells += grid.get(block, [])
        if not config["grid"]:
            cells += final.get(block - 1, [])
    finals = [cell for block in final.values() for cell in block] if config["code"] and not config["grid"] else []
    return cells + [{**cell, "stage": "code"} for cell in finals if (cell["order"], cell["seed"]) == ("A", 1)]


def name_of(cell: Cell) -> str:
    name = "|".join(str(cell.get(key, "best")) for key in ("condition", "schedule", "order", "seed", "lr"))
    return f"{name}|code" if cell["stage"] == "code" else name


def settings_of(config: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """What makes a cell, beside its name; as JSON gives it back."""
    return json.loads(json.dumps({**cell["settings"], "data_md5": config["md5"]}))


def cell_of(record: dict[str, Any]) -> Cell:
    """A record with its order's letter, as the cell had it."""
    return {**record, "order": next(k for k, v in ORDERS.items() if list(v) == record["order"])}


def grid_rates(config: dict[str, Any], source: list[str]) -> list[float]:
    """Rates that are tried for (condition, schedule).

    Raises:
        ValueError: no run has rates for it.
    """
    for run in config["all_runs"]:
        if [run["condition"], run["schedule"]] == source and "rates" in run:
            return [float(lr) for lr in run["rates"]]
    raise ValueError(f"rate_of: {source} has no rates; name a run that has.")


def best_rate(config: dict[str, Any], source: list[str]) -> float | None:
    """The tried rate that is `best_of` their scores; None while some rate has no score yet.

    Scores are files beside the claims, so that workers see each other's. A cell that failed scores -1; where all did,
    NaN says so.
    """
    scores: dict[float, tuple[float, float]] = {}
    for lr in grid_rates(config, source):
        path = config["scores"] / f"{source[0]}|{source[1]}|{lr}"
        if not path.exists():
            return None
        accuracy, loss = map(float, path.read_text().split())
        scores[lr] = (accuracy, loss)
    best = best_of(scores)
    return best if scores[best][0] >= 0 else math.nan


def write_score(config: dict[str, Any], record: dict[str, Any]) -> None:
    """Leave a cell's validation accuracy and training loss for all workers."""
    failed = "error" in record
    mean, loss = (-1.0, math.inf) if failed else (record["validation"]["mean"], training_loss(record))
    path = config["scores"] / f"{record['condition']}|{record['schedule']}|{record['lr']}"
    records.write_bytes(path, f"{mean} {loss}".encode())


def next_cell(config: dict[str, Any], cells: list[Cell]) -> Cell | None:
    """The first cell that nobody has claimed and whose rate is known; waits while others are finding it out."""
    while time.time() < config["until"]:
        waiting = False
        for cell in cells:
            lr = cell["lr"] if cell["stage"] == "grid" else best_rate(config, cell["rate_of"])
            if lr is None:
                waiting = True
            elif not math.isnan(lr) and claim(config["claims"] / name_of(ready := {**cell, "lr": lr})):
                return ready
        if not waiting:
            return None
        time.sleep(1.0)
    return None
