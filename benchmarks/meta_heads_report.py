"""The table of docs/signals.md, from the records of meta_heads.py.

    python benchmarks/meta_heads_report.py     # writes the page; tests/test_meta_heads.py holds both together

A number is the mean over seeds; in brackets the lowest lower and the highest upper end of the seeds' 95% intervals. In
how many seeds the interval lies on the better side of chance is said for each kind of training.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "meta_heads.jsonl"
PAGE = ROOT / "docs" / "signals.md"
START, END = "<!-- made by benchmarks/meta_heads_report.py -->\n", "<!-- until here -->\n"
WHERE = {"subspace": "frozen", "whole state": "frozen", "trained": "trained"}  # column -> mode


class Line(NamedTuple):
    """What is held out; the cell; the path to its measures and the measure; chance; measures or paths of baselines."""

    label: str
    part: str
    path: Sequence[str]
    measure: str
    chance: float
    baselines: Sequence[str] = ()
    lower: bool = False  # lower is better


def sides(label: str, part: str, kinds: Sequence[str]) -> list[Line]:
    """A row a way of reading: the baselines do not depend on it and stand in the first."""
    found = []
    for kind in kinds:
        base = () if found else ("the likelier side", "the shorter side")
        cell = f"{part}, {kind}"
        found.append(Line(f"meta_correctness: {label}, {kind}", cell, (cell,), "accuracy", 0.5, base))
    return found


OWN = "AUC, own answers within a family"
BOTH = ("last token", "with surprise")
LINES = [
    Line("confusion: is the answer right, AUC", "confusion", ("confusion",), "AUC", 0.5),
    Line("the same, the model's own answers to one family of questions", "confusion", ("confusion",), OWN, 0.5),
    Line("confusion: entropy, R2", "confusion", ("confusion",), "entropy: R2", 0),
    Line("calibration: Brier score less that of the constant share, lower is better", "calibration", ("calibration",),
         "brier less the constant's", 0, ("brier", "brier of the constant share", "brier before"), lower=True),
    Line("calibration: ECE, lower is better", "calibration", ("calibration",), "ece", float("nan"), ("ece before",),
         lower=True),
    *(Line(f"meta_correctness: single answers, {kind}, AUC", f"single answers, {kind}", (f"single answers, {kind}",),
           "AUC", 0.5, ("by probability/AUC",)) for kind in BOTH),
    *(Line(f"the same, own answers within a family, {kind}", f"single answers, {kind}", (f"single answers, {kind}",),
           OWN, 0.5, (f"by probability/{OWN}",)) for kind in BOTH),
    *sides("A/B of derivations with one wrong step", "derivations", ("last token", "mean of tokens", "with surprise")),
    *sides("A/B of own answers to one question", "own answers", BOTH),
    *sides("A/B of solutions of GSM8K by two models", "solutions", BOTH),
    Line("consistency: pairs, AUC", "consistency, pairs", ("consistency, pairs",), "AUC", 0.5),
    Line("consistency: sequences of five, AUC", "consistency, sequences", ("consistency, sequences",), "AUC", 0.5),
    Line("contrastive: the other piece among 16, accuracy", "contrastive", ("contrastive",), "accuracy", 0.0625,
         ("untrained/accuracy",)),
    Line("temporal: the next segment among 64, accuracy", "temporal", ("temporal",), "accuracy", 0.0156,
         ("by a row's own mean",)),
    Line("advantage in its group: correlation on new prompts", "rollouts", ("advantage", "group"), "correlation", 0,
         ("simple/all but the length", "simple/length of the whole")),
    Line("the same, with surprise", "rollouts", ("advantage", "group, with surprise"), "correlation", 0),
    Line("the same at the last token, without", "rollouts", ("advantage", "group"),
         "correlation at the last token", 0),
    Line("the same, R2 of all tokens", "rollouts", ("advantage", "group"), "R2", 0),
    Line("advantage of a value baseline (GAE): correlation", "rollouts", ("advantage", "gae"), "correlation", 0,
         ("simple/all but the length", "simple/length of the whole")),
    Line("the same, with surprise", "rollouts", ("advantage", "gae, with surprise"), "correlation", 0),
    Line("curiosity: next state, R2", "rollouts", ("curiosity",), "R2", 0),
]  # fmt: skip


@functools.cache
def records() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(part, mode) -> its records, a seed each."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in map(json.loads, RECORDS.read_text(encoding="utf-8").splitlines()):
        found.setdefault((record["part"], record["mode"]), []).append(record)
    return found


def measures(line: Line, mode: str, *keys: str) -> list[dict[str, float]]:
    """The measure with its interval, a seed each; empty where a cell has none."""
    found = []
    for record in records().get((line.part, mode), ()):
        value: Any = record["signals"]
        for key in (*line.path, *keys):
            value = value.get(key) if isinstance(value, dict) else None
        found += [value] if value is not None else []
    return found


def shown(values: Sequence[dict[str, float]]) -> str:
    if not values:
        return "-"
    low, high = min(v["low"] for v in values), max(v["high"] for v in values)
    return f"{statistics.fmean(v['value'] for v in values):.2f} ({low:.2f} to {high:.2f})".replace("-0.00", "0.00")


def beats(line: Line, values: Sequence[dict[str, float]]) -> int:
    """Seeds whose interval lies on the better side of chance."""
    return sum(v["high"] < line.chance if line.lower else v["low"] > line.chance for v in values)


def baseline(line: Line, name: str) -> str:
    """A baseline is a measure beside the line's own, or with a slash one of another place."""
    keys = name.split("/") if name.startswith("simple/") else ["subspace", *name.split("/")]
    label = name.rpartition("/")[2] if name.startswith("simple/") else name.partition("/")[0]
    return f"{label} {shown(measures(line, 'frozen', *keys))}"


def table() -> str:
    head = ["held out", "chance; baselines", "owners' subspace", "whole state", "trained with the bundles",
            "seeds better than chance"]  # fmt: skip
    rows = [head, ["---"] * len(head)]
    for line in LINES:
        found = {where: measures(line, mode, where, line.measure) for where, mode in WHERE.items()}
        if not any(found.values()):
            continue
        chance = [] if line.chance != line.chance else [f"{line.chance:.2f}".replace("0.00", "0")]
        counts = "-" if not chance else ", ".join(f"{beats(line, v)} of {len(v)}" if v else "-" for v in found.values())
        base = "; ".join([*chance, *(baseline(line, name) for name in line.baselines)])
        rows.append([line.label, base, *(shown(v) for v in found.values()), counts])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page() -> str:
    """The page with its table made anew."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return before + START + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
