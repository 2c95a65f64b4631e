"""The numbers of docs/results, each computed from a committed record.

tests/docs/test_results.py holds the pages to them and studies/figures.py draws them. Lists have one value a seed.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("chat", "code", "licences", "manual", "news", "wiki")
FAMILIES = ("chain_sum", "family_relationships", "number_sequence", "products", "simple_equations")
KINDS = ("biographies", "codes", "reasoning", "gsm", "plays")  # of rows, in the learning benchmark
TASKS = ("memory", "logic", "meta")
ORDERS = {"A": TASKS, "B": ("logic", "meta", "memory"), "C": ("meta", "memory", "logic")}
Record = dict[str, Any]


@cache
def read(path: str) -> Any:
    """A record file: what a .json holds, or the list of a .jsonl's lines."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.endswith(".jsonl") else json.loads(text)


# ---- speed: benchmarks/results/speed_*.json ----


def times(card: str, shape: str, section: str, cell: str) -> list[float]:
    """Milliseconds of every round; all cells of a section were measured in turn within a round."""
    return read(f"benchmarks/results/speed_{card}.json")["results"][shape][section]["cells"][cell]["ms"]


def time_ratio(card: str, shape: str, section: str, cell: str, other: str) -> float:
    """Median over rounds of the ratio within a round."""
    pairs = zip(times(card, shape, section, cell), times(card, shape, section, other))
    return median(a / b for a, b in pairs)


def memory_ratio(card: str, shape: str, cell: str, other: str = "base") -> float:
    """Peak memory in training, the base model's weights included."""
    job = read(f"benchmarks/results/speed_{card}.json")["results"][shape]["train"]
    peaks = [job["cells"][c]["peak_over_base_weights_gib"] + job["base_weights_gib"] for c in (cell, other)]
    return peaks[0] / peaks[1]


# ---- learning: studies/quality/results/cells.jsonl ----


def _learning_score(step: Record, prefix: str = "") -> float:
    reasoning = fmean(step[f"{prefix}learn/{family}"] for family in FAMILIES)
    return (step[f"{prefix}learn/biographies"] + step[f"{prefix}learn/codes"] + 2 * reasoning) / 4


@cache
def _quality() -> tuple[Record, dict[tuple[str, float], list[Record]]]:
    """The untouched model at the end of the file, and (method, rate) -> cells that finished."""
    records = read("studies/quality/results/cells.jsonl")
    base = [record["300"] for record in records if record["method"] == "base"][-1]
    cells: dict[tuple[str, float], list[Record]] = {}
    for record in records:
        if record["method"] != "base" and "300" in record and "error" not in record:
            cells.setdefault((record["method"], record["lr"]), []).append(record)
    return base, cells


def learning(method: str, rate: float, measure: str) -> list[float]:
    """`measure`: "score", "rise" (of the loss on six domains), "parameters", or a name of the record.

    For methods with a bundle for every kind of row also "own score" (every set of items runs with its own kind's bundle
    alone) and "one on" (rise with one bundle on, mean over the five).
    """
    base, cells = _quality()

    def value(record: Record) -> float:
        last = record["300"]
        if measure == "parameters":
            return record["trainable"]
        if measure == "score":
            return _learning_score(last)
        if measure == "own score":
            return _learning_score(last, "tag/")
        if measure == "rise":
            return fmean(last[f"domain/{name}"] - base[f"domain/{name}"] for name in DOMAINS)
        if measure == "one on":
            return fmean(last[f"{k}/domain/{name}"] - base[f"domain/{name}"] for k in KINDS for name in DOMAINS)
        return last[measure]

    return [value(record) for record in cells[method, rate]]


def disturbance_ratio(method: str, rate: float) -> float:
    """Rise over that of LoRA r16 without a penalty at the same learning score.

    Straight lines between LoRA's rates up to its best, 0.002; from the score of that rate on, its rise there.
    """
    front: list[tuple[float, float]] = []
    for lora_rate in sorted(lr for name, lr in _quality()[1] if name == "lora_r16" and lr <= 0.002):
        point = fmean(learning("lora_r16", lora_rate, "score")), fmean(learning("lora_r16", lora_rate, "rise"))
        if not front or point[0] > front[-1][0]:
            front.append(point)
    goal, rise = fmean(learning(method, rate, "score")), fmean(learning(method, rate, "rise"))
    for (x0, y0), (x1, y1) in pairwise(front):
        if x0 <= goal < x1:
            return rise / (y0 + (y1 - y0) * (goal - x0) / (x1 - x0))
    assert goal >= front[-1][0], f"{method} {rate:g} learns less than LoRA at its lowest rate: nothing to compare with"
    return rise / front[-1][1]


# ---- continual learning: recipes/results/continual/ ----


@cache
def _continual() -> list[Record]:
    """The cells by seed; a cell that a later line repeats is that line."""
    cells = {}
    for r in read("recipes/results/continual/cells.jsonl"):
        if r["stage"] in ("grid", "final") and "error" not in r:
            cells[r["condition"], r["schedule"], tuple(r["order"]), r["seed"], r["lr"]] = r
    return sorted(cells.values(), key=lambda r: r["seed"])


def continual(
    condition: str, rate: float, mode: str, measure: str = "average", schedule: str = "sequence", order: str = "A"
) -> list[float]:
    """Accuracy at the end: "average" of the three tasks, or of one; "learnt" and "forgetting" of a sequence.

    learnt: mean of the tasks just after their own phases. forgetting (Chaudhry et al. 2018): mean over the tasks before
    the last of the best accuracy so far minus that at the end. mode: which parts are on ("tag": the task's own alone).
    """
    found = []
    for r in _continual():
        if (r["condition"], r["schedule"], tuple(r["order"]), r["lr"]) != (condition, schedule, ORDERS[order], rate):
            continue
        phases = [{task: p["modes"][mode][task]["accuracy"] for task in TASKS} for p in r["phases"]]
        if measure == "average":
            found.append(fmean(phases[-1].values()))
        elif measure == "learnt":
            found.append(fmean(phase[task] for phase, task in zip(phases, r["order"])))
        elif measure == "forgetting":
            earlier = r["order"][:-1]
            found.append(fmean(max(p[t] for p in phases[n:-1]) - phases[-1][t] for n, t in enumerate(earlier)))
        else:
            found.append(phases[-1][measure])
    return found


def removal(variant: str, rate: float = 0.0) -> list[Record]:
    """Runs of recipes/removal.py by seed."""
    records = read("recipes/results/continual/removal_cells.jsonl")
    found = [r for r in records if (r["variant"], r["rate"]) == (variant, rate) and "error" not in r]
    return sorted(found, key=lambda r: r["seed"])


def others_kept(record: Record, when: str = "after") -> float:
    """Mean accuracy on the two kinds of questions that were not to be removed."""
    return fmean(v for kind, v in record[when]["accuracy"].items() if kind != record["settings"]["forget"])


def steps_to_relearn(record: Record) -> float:
    """Steps of a fresh LoRA to half of what one LoRA knew before removal, on straight lines between measurements.

    Infinite where 80 steps, the last measurement, were not enough.
    """
    taught = fmean(r["before"]["accuracy"]["codes"] for r in removal("none"))
    points = record["relearn"]["all"]
    if points[0][1] >= taught / 2:
        return points[0][0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 >= taught / 2:
            return x0 + (x1 - x0) * (taught / 2 - y0) / (y1 - y0)
    return float("inf")


# ---- recipes/results/rl_separate, recipes/results/semantic ----


def separate(variant: str, forward: str, rate: float, setting: str, column: str) -> list[float]:
    """One cell of the tables of recipes/rl_separate.py, a value a run."""
    paths = sorted((ROOT / "recipes/results/rl_separate").glob(f"{variant}_{forward}_{rate:g}_*.json"))
    return [read(path.relative_to(ROOT).as_posix())["table"][setting][column] for path in paths]


def topic_change(cell: Record, topic: str, bundles: str) -> list[float]:
    """Change of held-out loss on a topic's text against no topic bundle on, a value a seed. cell: what differs from the
    default. bundles: a topic, or "all"."""
    records = [r for r in read("recipes/results/semantic/cells.jsonl") if r["cell"] == cell]
    return [r["matrix"][topic][bundles] - r["matrix"][topic]["none"] for r in records]


def topics_of(cell: Record) -> list[str]:
    records = [r for r in read("recipes/results/semantic/cells.jsonl") if r["cell"] == cell]
    return [topic for topic in records[0]["matrix"] if topic != "other"]


def own_topic(cell: Record) -> float:
    return fmean(fmean(topic_change(cell, topic, topic)) for topic in topics_of(cell))


def another_topic(cell: Record) -> float:
    names = topics_of(cell)
    return fmean(fmean(topic_change(cell, a, b)) for a in names for b in names if a != b)


def all_topics(cell: Record) -> float:
    return fmean(fmean(topic_change(cell, topic, "all")) for topic in topics_of(cell))


# ---- heads and topics ----


@cache
def _head_parts() -> Record:
    """Part -> what was measured; parts of the two older files were not measured again."""
    folder = "studies/heads/results/meta_heads"
    files = [read(f"{folder}_consistency.json"), read(f"{folder}_texts.json"), *read(f"{folder}.jsonl")]
    return {part: measured for record in files for part, measured in record["signals"].items()}


def head(part: str, *path: str) -> Record:
    """A measure of a head with its 95 % interval: "value", "low", "high"."""
    found = _head_parts()[part]
    for key in path:
        found = found[key]
    return found


def topic_source(source: str, measure: str) -> float:
    return read("studies/topics/results/topic_sources.json")["sources"][source][measure]


def topic_mask(mask: str, measure: str) -> list[float]:
    """Change of held-out loss against no topic bundle on, a value a seed."""
    cells = read("studies/topics/results/topic_masks.json")["cells"]
    return [cell[measure] for cell in cells if cell["mask"] == mask]
