"""The table of the heads' study, from the records of `python -m studies.heads.run`.

    python -m studies.heads.report     # writes tables.md beside this file

A number is the mean over seeds; in brackets the lowest lower and the highest upper end of the seeds' 95% intervals. It
is bold where the interval of every seed lies on the better side of chance.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from studies.tables import Table, write_tables


RECORDS = Path(__file__).parent / "results" / "meta_heads.jsonl"
EARLIER = ("meta_heads_consistency.json", "meta_heads_texts.json")  # parts that were not measured again since
COLUMNS = {"subspace": "owners' subspace", "whole state": "whole state", "trained": "trained with the bundles"}
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
    """A row a way of reading."""
    base = ("the likelier side", "the shorter side")
    cells = {kind: f"{part}, {kind}" for kind in kinds}
    return [Line(f"meta_correctness: {label}, {k}", c, (c,), "accuracy", 0.5, base) for k, c in cells.items()]


OWN = "AUC, own answers within a family"
BOTH = ("last token", "with surprise")
SINGLE = {kind: f"single answers, {kind}" for kind in BOTH}
LINES = [
    Line("confusion: is the answer right, AUC", "confusion", ("confusion",), "AUC", 0.5),
    Line("the same, own answers within a family", "confusion", ("confusion",), OWN, 0.5),
    Line("confusion: entropy, R2", "confusion", ("confusion",), "entropy: R2", 0),
    Line("calibration: Brier score less that of the constant share, lower is better", "calibration", ("calibration",),
         "brier less the constant's", 0, ("brier", "brier of the constant share", "brier before"), lower=True),
    Line("calibration: ECE, lower is better", "calibration", ("calibration",), "ece", float("nan"), ("ece before",),
         lower=True),
    *(Line(f"meta_correctness: single answers, {kind}, AUC", cell, (cell,), "AUC", 0.5, ("by probability/AUC",))
      for kind, cell in SINGLE.items()),
    *(Line(f"own answers within a family, {kind}, AUC", cell, (cell,), OWN, 0.5, (f"by probability/{OWN}",))
      for kind, cell in SINGLE.items()),
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
    for name in EARLIER:
        record = json.loads((RECORDS.parent / name).read_text(encoding="utf-8"))
        for part, cells in record["signals"].items():
            earlier = {"signals": {part: cells}, "device": "cpu, not calibrated"}
            found.setdefault((part, "frozen"), [earlier])
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


def shown(values: Sequence[dict[str, float]], bold: bool = False) -> str:
    if not values:
        return "-"
    low, high = min(v["low"] for v in values), max(v["high"] for v in values)
    text = f"{statistics.fmean(v['value'] for v in values):.2f} ({low:.2f} to {high:.2f})".replace("-0.00", "0.00")
    return f"**{text}**" if bold else text


def beats(line: Line, values: Sequence[dict[str, float]]) -> bool:
    """Whether the interval of every seed lies on the better side of chance."""
    return bool(values) and all(v["high"] < line.chance if line.lower else v["low"] > line.chance for v in values)


def baseline(line: Line, name: str) -> str:
    """A baseline is a measure beside the line's own, or with a slash one of another place."""
    keys = name.split("/") if name.startswith("simple/") else ["subspace", *name.split("/")]
    label = name.rpartition("/")[2] if name.startswith("simple/") else name.partition("/")[0]
    return f"{label} {shown(measures(line, 'frozen', *keys))}"


def measured(line: Line) -> str:
    """Seeds, rows to train on and held out, and the device of a line's records."""
    found = [r for mode in ("frozen", "trained") for r in records().get((line.part, mode), ())]
    cells = next(iter(found[0]["signals"].values()))
    rows = cells["completions"] if "completions" in cells else (cells["rows"], cells["held_out"])
    seeds = max(len(records().get((line.part, mode), ())) for mode in ("frozen", "trained"))
    what = "completions" if "completions" in cells else "rows"
    return f"{seeds} seed{'s' * (seeds > 1)}, {rows[0]} and {rows[1]} {what}, {found[0]['device'].split(' 80GB')[0]}"


def table() -> Table:
    """A row of every line that has a record."""
    lines = [(line, {w: measures(line, mode, w, line.measure) for w, mode in WHERE.items()}) for line in LINES]
    lines = [(line, found) for line, found in lines if any(found.values())]
    there = [where for where in WHERE if any(found[where] for _, found in lines)]
    rows = []
    for line, found in lines:
        chance = [] if line.chance != line.chance else [f"{line.chance:.2f}".replace("0.00", "0")]
        base = "; ".join([*chance, *(baseline(line, name) for name in line.baselines)])
        rows.append([line.label, base, *(shown(found[w], beats(line, found[w])) for w in there), measured(line)])
    columns = ["held out", "chance; baselines", *(COLUMNS[w] for w in there), "measured on"]
    return Table("Heads on held-out rows", columns, rows)


if __name__ == "__main__":
    made_from = f"`python -m studies.heads.report` from `results/{RECORDS.name}` (`python -m studies.heads.run`)."
    write_tables(Path(__file__).with_name("tables.md"), made_from, [table()])
