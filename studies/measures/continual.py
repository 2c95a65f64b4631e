"""What training on one task does to the others: forgetting, transfer, and what an alpha moves. Arrays in, numbers out.

A run trains its tasks one after another. Its scores are an array (P + 1, T, ...): row 0 before training, row p after
phase p, a column a task; what comes after is carried along (bootstrap draws). Higher is better: give losses negated.
`order` says which column each of the P phases trained, no column twice.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np


Scores = Any  # what numpy makes an array of floats of


# ---- one run ----


def interference_matrix(scores: Scores) -> np.ndarray:
    """What each phase changed in each task, (P, T, ...): the scores after it minus those before it."""
    return np.diff(_checked(scores), axis=0)


def average_accuracy(scores: Scores) -> Any:
    """ACC of Lopez-Paz & Ranzato (2017), eq. 2: the mean over tasks after the last phase."""
    return _checked(scores)[-1].mean(0)


def backward_transfer(scores: Scores, order: Sequence[int]) -> Any:
    """BWT of Lopez-Paz & Ranzato (2017), eq. 3: mean over the tasks of all phases but the last of R[P, i] - R[i, i].

    R[i, i] is a task's score just after its own phase. Negative: later phases cost it something.
    """
    table, order = _checked(scores, order, phases=2)
    return np.mean([table[-1, task] - table[phase, task] for phase, task in enumerate(order[:-1], 1)], axis=0)


def forward_transfer(scores: Scores, order: Sequence[int]) -> Any:
    """FWT of Lopez-Paz & Ranzato (2017), eq. 4: mean over the tasks of all phases but the first of R[i-1, i] - R[0, i].

    What earlier phases gave a task before its own; their b_i, of a model at random, is here the model before training.
    """
    table, order = _checked(scores, order, phases=2)
    return np.mean([table[phase - 1, task] - table[0, task] for phase, task in enumerate(order[1:], 2)], axis=0)


def forgetting_by_task(scores: Scores, order: Sequence[int]) -> dict[int, Any]:
    """f of Chaudhry et al. (2018), eq. 3, by task: the best score after any phase but the last, minus the last one.

    The tasks are those of all phases but the last. Below 0 where the last phase helped.
    """
    table, order = _checked(scores, order, phases=2)
    return {task: table[1:-1, task].max(0) - table[-1, task] for task in order[:-1]}


def forgetting(scores: Scores, order: Sequence[int]) -> Any:
    """F of Chaudhry et al. (2018): the mean of `forgetting_by_task`."""
    return np.mean([*forgetting_by_task(scores, order).values()], axis=0)


def _checked(scores: Scores, order: Sequence[int] | None = None, phases: int = 1) -> Any:
    table = np.asarray(scores, dtype=float)
    if table.ndim < 2 or len(table) < phases + 1:
        raise ValueError(
            f"scores have shape {table.shape}; give (phases + 1, tasks, ...), the first row before training, for at "
            f"least {phases} phase(s)."
        )
    if order is None:
        return table
    if len(order) != len(table) - 1 or len(set(order)) != len(order) or not set(order) <= set(range(table.shape[1])):
        raise ValueError(
            f"order={list(order)} must name one of {table.shape[1]} columns a phase ({len(table) - 1}), none twice."
        )
    return table, list(order)


# ---- two conditions ----


@dataclass(frozen=True)
class Run:
    """One run of a condition.

    Attributes:
        order: the task that each of the P phases trained.
        items: task -> (P + 1, N) scores of its N test items, the same items in every run; N = 1 is a mean alone, and
            then items add nothing to the interval.
    """

    order: Sequence[str]
    items: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Interval:
    """An estimate and the percentile interval of its bootstrap draws. `runs`: how many runs of each side it is from."""

    estimate: float
    low: float
    high: float
    runs: int


Runs = Mapping[Hashable, Run]  # (order, seed), say -> run


def forgetting_reduction(reference: Runs, other: Runs, *, draws: int = 2000, seed: int = 0) -> Interval:
    """1 - F(other) / F(reference), F the mean of `forgetting` over runs, with a 95 % interval.

    1: nothing is forgotten; 0: as much as the reference; below 0: more. NaN where the reference forgets nothing. A draw
    where it does not counts as minus infinity, so that no reduction can be claimed from it. See `_resample` for what is
    drawn.
    """

    def forgot(scores: np.ndarray, run: Run, tasks: list[str]) -> np.ndarray:
        return forgetting(scores, [tasks.index(task) for task in run.order])

    def reduction(found: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(found[0] > 0, 1 - found[1] / found[0], -np.inf)

    return _interval(reference, other, forgot, reduction, draws, seed)


def score_difference(
    reference: Runs, other: Runs, tasks: Sequence[str], *, draws: int = 2000, seed: int = 0
) -> Interval:
    """Final score of `other` minus that of `reference`, mean over the tasks and runs, with a 95 % interval."""

    def final(scores: np.ndarray, run: Run, names: list[str]) -> np.ndarray:
        return scores[-1, [names.index(task) for task in tasks]].mean(0)

    return _interval(reference, other, final, lambda found: found[1] - found[0], draws, seed)


def _interval(reference: Runs, other: Runs, measure: Any, compare: Any, draws: int, seed: int) -> Interval:
    shared = [key for key in reference if key in other]
    if not shared:
        raise ValueError(f"no run in both: the reference has {[*reference]}, the other {[*other]}.")
    tasks = list(reference[shared[0]].items)
    picked, chosen = _resample([side[key] for side in (reference, other) for key in shared], tasks, draws, seed)
    values = np.stack([measure(scores, run, tasks) for scores, run in picked]).reshape(2, len(shared), draws + 1)
    drawn = compare((values * chosen[None]).sum(1) / len(shared))
    estimate, rest = float(drawn[0]), drawn[1:]
    if math.isinf(estimate):
        return Interval(math.nan, math.nan, math.nan, len(shared))
    low, high = np.quantile(rest, [0.025, 0.975], method="inverted_cdf")
    # Sums in another order must not turn a 0 into a difference.
    return Interval(round(estimate, 9), round(float(low), 9), round(float(high), 9), len(shared))


def _resample(runs: list[Run], tasks: list[str], draws: int, seed: int) -> tuple[list[tuple[np.ndarray, Run]], Any]:
    """Scores (P + 1, T, draws + 1) of every run, and how often each pair of runs is drawn, (runs / 2, draws + 1).

    Draw 0 is the data themselves. A draw takes test items with replacement, the same for all runs, which were all
    tested on them, and runs with replacement, in pairs of one key: the two levels of a crossed design, each drawn by
    itself (Owen 2007, the pigeonhole bootstrap), which if anything gives too wide an interval.
    """
    weights: dict[str, np.ndarray] = {}
    for task in tasks:
        counts = {np.shape(run.items[task])[1] for run in runs}
        if len(counts) != 1:
            raise ValueError(f"{task!r} has {sorted(counts)} test items in different runs; use the same items.")
        weights[task] = _item_weights(*counts, draws, seed + 1 + len(weights))
    pairs = len(runs) // 2
    chosen = np.random.default_rng(seed).multinomial(pairs, np.full(pairs, 1 / pairs), size=draws).T
    made = [np.stack([np.asarray(run.items[t], dtype=float) @ weights[t] for t in tasks], 1) for run in runs]
    return list(zip(made, runs)), np.concatenate([np.ones((pairs, 1), dtype=int), chosen], 1)


@lru_cache(maxsize=16)
def _item_weights(count: int, draws: int, seed: int) -> np.ndarray:
    """(count, draws + 1): each item's weight in the mean of each draw; in draw 0 all have the same."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws).T / count
    return np.concatenate([np.full((count, 1), 1 / count), drawn], 1)


# ---- alphas ----


def sensitivity(alphas: Sequence[float], scores: Scores) -> np.ndarray:
    """How much an alpha moves each task, (T,): mean of |score(alpha) - score(0)| over the others; scores are (V, T).

    `evaluation.sweeps.AlphaSweep.effect` is this of a sweep in hand.
    """
    table = np.asarray(scores, dtype=float)
    if table.ndim != 2 or len(table) != len(alphas) or 0.0 not in alphas or len(alphas) < 2:
        raise ValueError(f"alphas={list(alphas)} need 0 and another one, and scores {table.shape} a row for each.")
    return np.abs(table - table[list(alphas).index(0.0)]).sum(0) / (len(alphas) - 1)


def cross_sensitivity(alphas: Sequence[float], scores: Scores, own: int) -> float:
    """How much an alpha moves the other tasks, as a share of what it moves its own: mean over others / own.

    0: only its own moves; 1: the others move as much; NaN: its own does not move. Tasks must have one unit.
    """
    moved = sensitivity(alphas, scores)
    if not 0 <= own < len(moved) or len(moved) < 2:
        raise ValueError(f"own={own} must be a column of {len(moved)} tasks, and there must be another one.")
    return float(np.delete(moved, own).mean() / moved[own]) if moved[own] else math.nan
