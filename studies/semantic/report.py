"""Numbers, tables and the figure of semantic.py's cells.

    python -m studies.semantic.report [FOLDER]    # writes tables.md beside this file, and FOLDER's sweeps.svg

FOLDER holds cells.jsonl; by default the committed one. A quantity is a change of held-out loss against no topic bundle
(negative: better); the unit is the seed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from studies import records
from studies.tables import Table, mean, mean_sd, write_tables


RESULTS = Path("recipes/results/semantic")  # in a checkout
SWEPT = ("overlap", "size", "rank", "topics", "signal_rank")
NEIGHBOURS = ("ml", "programming")  # the two topics that are near each other
QUANTITIES = {
    "own": "own",
    "transfer": "another's",
    "neighbours": "ml and programming",
    "all": "all",
    "other": "text of no topic",
}
Record = dict[str, Any]


def summary(matrix: dict[str, dict[str, float]]) -> dict[str, float]:
    """What the matrix says, all as differences of held-out loss (negative: better).

    own: a topic with its own bundle alone, against none. transfer: with another topic's bundle alone. neighbours:
    the same between ml and programming only (NaN without them). all: with all six. other: text of no topic, all.
    """
    topics = [topic for topic in matrix if topic != "other"]
    gain = {t: {c: matrix[t][c] - matrix[t]["none"] for c in (*topics, "all")} for t in matrix}
    pairs = [(a, b) for a in topics for b in topics if a != b]
    near = [(a, b) for a, b in pairs if {a, b} == set(NEIGHBOURS)]
    return {
        "own": mean([gain[t][t] for t in topics]),
        "transfer": mean([gain[a][b] for a, b in pairs]),
        "neighbours": mean([gain[a][b] for a, b in near]),
        "all": mean([gain[t]["all"] for t in topics]),
        "other": gain["other"]["all"],
    }


def spread(values: list[float]) -> float:
    """Standard deviation over seeds; 0 for one seed."""
    return stdev(values) if len(values) > 1 and not math.isnan(values[0]) else 0.0


def quantities(records: list[Record]) -> dict[str, list[float]]:
    """Quantity -> its value in every record."""
    rows = [summary(record["matrix"]) for record in records]
    return {name: [row[name] for row in rows] for name in rows[0]}


def sweeps(records: list[Record]) -> dict[str, dict[Any, dict[str, list[float]]]]:
    """Knob -> its value -> quantity -> a number a seed, of cells that differ from the default in that knob only."""
    found: dict[str, dict[Any, dict[str, list[float]]]] = {}
    for knob in SWEPT:
        rows: dict[Any, list[Record]] = {}
        for record in records:
            if set(record["cell"]) <= {knob}:
                rows.setdefault(record["settings"][knob], []).append(record)
        if len(rows) > 1:
            found[knob] = {value: quantities(rows[value]) for value in sorted(rows)}
    return found


def draw(records: list[Record], folder: Path, kinds: Sequence[str] = ("png", "svg")) -> None:
    """A plot for every knob that has more than one value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "peft_bundles"
    if not (swept := sweeps(records)):
        return
    figure, axes = pyplot.subplots(1, len(swept), figsize=(4 * len(swept), 3.5), squeeze=False, layout="constrained")
    for axis, (knob, values) in zip(axes.flat, swept.items()):
        for quantity, label in QUANTITIES.items():
            rows = [row[quantity] for row in values.values()]
            means, spreads = list(map(fmean, rows)), list(map(spread, rows))
            axis.errorbar(list(values), means, spreads, marker="o", capsize=3, label=label)
        axis.axhline(0, color="gray", linewidth=0.5)
        axis.set(xlabel=knob, ylabel="change of held-out loss")
    axes[0, 0].legend(fontsize="small")
    for kind in kinds:
        figure.savefig(folder / f"sweeps.{kind}", dpi=120, metadata={"Date": None} if kind == "svg" else None)
    pyplot.close(figure)


def cells_of(found: dict[str, list[float]]) -> list[str]:
    return [str(len(found["own"])), *(mean_sd(found[name], sign=True) for name in QUANTITIES)]


def matrix(cells: list[Record]) -> Table:
    """The loss on every topic with no topic bundle, and what each alone, and all, change; means over seeds."""
    topics = [topic for topic in cells[0]["matrix"] if topic != "other"]

    def loss(topic: str, column: str) -> float:
        return fmean(record["matrix"][topic][column] for record in cells)

    rows = []
    for topic in (*topics, "other"):
        changes = [f"{loss(topic, column) - loss(topic, 'none'):+.3f}" for column in (*topics, "all")]
        rows.append([topic, f"{loss(topic, 'base'):.3f}", f"{loss(topic, 'none'):.3f}", *changes])
    return Table(f"The default, {len(cells)} seeds", ["loss on", "base", "none", *topics, "all"], rows)


def tables(cells: list[Record]) -> list[Table]:
    """The matrix of the default, a table of every swept knob, and one of the other settings."""
    default = [record for record in cells if not record["cell"]]
    columns = ["seeds", *QUANTITIES.values()]
    made = [matrix(default)]
    for knob, values in sweeps(cells).items():
        made.append(
            Table(knob, [knob, *columns], [[f"{value:g}", *cells_of(found)] for value, found in values.items()])
        )
    others: dict[str, list[Record]] = {"default": default}
    for record in cells:
        if set(record["cell"]) - set(SWEPT):
            others.setdefault(", ".join(f"{k}: {v}" for k, v in record["cell"].items()), []).append(record)
    rows = [[name, *cells_of(quantities(found))] for name, found in others.items()]
    return [*made, Table("Masks and sources of tau", ["setting", *columns], rows)]


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if sys.argv[1:] else RESULTS
    cells = records.read(folder / "cells.jsonl")
    made_from = f"`python -m studies.semantic.report` from `{folder}/cells.jsonl` (`recipes/semantic.py`)."
    write_tables(Path(__file__).with_name("tables.md"), made_from, tables(cells))
    draw(cells, folder, ["svg"])
