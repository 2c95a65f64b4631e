"""Writes recipes/results/semantic.md and its plots from the cells in recipes/results/semantic/cells.jsonl.

    python studies/semantic/report.py

A cell is what recipes/semantic.py leaves: the held-out loss of every topic without any topic bundle ("none"), with
each alone, with all.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any


RESULTS = Path(__file__).resolve().parent / "results"
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
    mean = lambda values: fmean(values) if values else float("nan")  # noqa: E731
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


def draw(records: list[Record], folder: Path) -> None:
    """A plot for every knob that has more than one value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "peft_bundles"
    if not (found := sweeps(records)):
        return
    figure, axes = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3.5), squeeze=False, layout="constrained")
    for axis, (knob, values) in zip(axes.flat, found.items()):
        for quantity, label in QUANTITIES.items():
            rows = [row[quantity] for row in values.values()]
            means, spreads = list(map(fmean, rows)), list(map(spread, rows))
            axis.errorbar(list(values), means, spreads, marker="o", capsize=3, label=label)
        axis.axhline(0, color="gray", linewidth=0.5)
        axis.set(xlabel=knob, ylabel="change of held-out loss")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(folder / "sweeps.png", dpi=120)
    figure.savefig(folder / "sweeps.svg", metadata={"Date": None})
    pyplot.close(figure)


# ---- the page ----


def cell(values: list[float]) -> str:
    if math.isnan(values[0]):  # neighbours, where one of the two is not among the topics
        return "-"
    return f"{fmean(values):+.3f}" + (f" ± {spread(values):.3f}" if len(values) > 1 else "")


def row(label: str, found: dict[str, list[float]]) -> str:
    return f"| {label} | {len(found['own'])} | {' | '.join(cell(found[name]) for name in QUANTITIES)} |"


def head(label: str) -> str:
    return f"| {label} | seeds | {' | '.join(QUANTITIES.values())} |\n|{'---|' * (len(QUANTITIES) + 2)}"


def matrix(records: list[Record]) -> str:
    """The loss of every topic with no topic bundle, and what each alone, and all, change; means over seeds."""
    topics = [topic for topic in records[0]["matrix"] if topic != "other"]

    def mean(topic: str, column: str) -> float:
        return fmean(record["matrix"][topic][column] for record in records)

    lines = [f"| loss on | base | none | {' | '.join(topics)} | all |", f"|{'---|' * (len(topics) + 4)}"]
    for topic in (*topics, "other"):
        changes = [f"{mean(topic, column) - mean(topic, 'none'):+.3f}" for column in (*topics, "all")]
        lines.append(f"| {topic} | {mean(topic, 'base'):.3f} | {mean(topic, 'none'):.3f} | {' | '.join(changes)} |")
    return "\n".join(lines)


def read() -> list[Record]:
    return [json.loads(line) for line in (RESULTS / "semantic/cells.jsonl").read_text().splitlines()]


def page(records: list[Record]) -> str:
    default = [record for record in records if not record["cell"]]
    swept = sweeps(records)
    tables = [
        "\n".join([head(knob), *(row(f"{value:g}", found) for value, found in values.items())])
        for knob, values in swept.items()
    ]
    others: dict[str, list[Record]] = {}
    for record in records:
        if set(record["cell"]) - set(SWEPT):
            others.setdefault(", ".join(f"{k}: {v}" for k, v in record["cell"].items()), []).append(record)
    rest = [row("default", quantities(default)), *(row(name, quantities(found)) for name, found in others.items())]
    own = {value: fmean(found["own"]) for value, found in swept["overlap"].items()}
    harm = {value: fmean(found["transfer"]) for value, found in swept["overlap"].items()}
    low, high = min(own), max(own)
    together = [fmean(found["all"]) for values in swept.values() for found in values.values()]
    trained_together = quantities([r for r in records if r["cell"] == {"gate_forward": False}])
    devices = sorted({f"{record['device']}, {record['date'][:10]}" for record in records})
    versions = sorted({", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in records})
    return f"""# semantic: what came out

`python studies/semantic/report.py` writes this page from [`semantic/cells.jsonl`](semantic/cells.jsonl): {len(records)}
cells of {default[0]["settings"]["steps"]} steps on SmolLM2-135M ({"; ".join(devices)}; {"; ".join(versions)}). The
settings are in [semantic.yaml](../semantic.yaml), what the columns mean in [README.md](../README.md). Numbers are
changes of held-out loss against *none* (no topic bundle), mean ± standard deviation over seeds.

## The matrix

The default, mean over {len(default)} seeds: the loss of the base model and with no topic bundle, and what each topic's
bundle alone, and all together, change.

{matrix(default)}

## Overlap, sizes, number of topics, signal rank

{(chr(10) * 2).join(tables)}

![The sweeps](semantic/sweeps.svg)

## Masks and sources of tau

{head("setting")}
{chr(10).join(rest)}

`gate_forward: False` trains every row with all topic bundles on.

## What it says

- A bundle helps its own topic ({own[low]:+.3f} at overlap {low:g}, {own[high]:+.3f} at {high:g}) and harms every other
  ({harm[low]:+.3f}, {harm[high]:+.3f}): common columns make both larger and do not turn harm into transfer.
- All on changes the loss by {min(together):+.3f} to {max(together):+.3f} against none over all settings above: bundles
  that were trained apart do not add up. Use them with their topic's gate.
- Trained with all on, they do: all on {cell(trained_together["all"])}, but one alone then
  {cell(trained_together["own"])} on its own topic and {cell(trained_together["transfer"])} on another's.
"""


if __name__ == "__main__":
    found = read()
    (RESULTS / "semantic.md").write_text(page(found), encoding="utf-8")
    draw(found, RESULTS / "semantic")
    (RESULTS / "semantic/sweeps.png").unlink()
