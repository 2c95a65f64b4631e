"""Pairs of conditions of the continual study, compared by their final average; and the judging of own answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from studies.continual import study as s
from studies.continual.study import TASKS, Key, Study
from studies.continual.tables import title
from studies.measures.continual import Interval
from studies.tables import Table, interval, mean_sd


# One condition and mode against another, and in words. "m" stands for mixture, all others are sequences.
KIND = """bundles tag : lora_separate tag : True tag
bundles all : lora_separate all : No tag, all on
bundles uniform : lora_separate uniform : No tag, all at a third
bundles_loud tag : lora_separate tag : True tag, without the penalty
bundles_loud all : lora_separate all : No tag, all on, without the penalty
bundles_loud uniform : lora_separate uniform : No tag, all at a third, without the penalty
bundles tag : lora_separate_kl tag : True tag, the LoRAs with a KL penalty on the same text
bundles all : lora_separate_kl all : No tag, all on, the LoRAs with a KL penalty on the same text
bundles_kl tag : lora_separate_kl tag : True tag, both with that KL penalty
bundles_kl all : lora_separate_kl all : No tag, all on, both with that KL penalty
bundles_all all : lora_separate all : No tag, all on, learning with the earlier ones on
bundles_all_loud all : lora_separate all : The same, without the penalty
overlap_all all : lora_separate all : The same, supports half common
mistag tag : lora_separate_mistag tag : A fifth of the rows mis-tagged, true tag at test
mistag all : lora_separate_mistag all : A fifth of the rows mis-tagged, no tag at test
mistag m tag : lora_separate_mistag m tag : Mixture, a fifth mis-tagged, true tag at test"""
BEYOND = """bundles_all all : bundles all : No tag: learning with the earlier ones on, against only the own one
overlap tag : bundles tag : True tag: supports half common against apart
overlap all : bundles all : No tag: supports half common against apart
overlap_all all : bundles_all all : No tag, the earlier ones on in training: supports half common against apart
bundles_trunk tag : bundles tag : True tag: trunk trained against frozen
bundles_trunk all : bundles all : No tag: trunk trained against frozen
bundles_trunk_projected tag : bundles_trunk tag : True tag: the trunk's gradients projected by signal against not
bundles_trunk_projected all : bundles_trunk all : No tag: the trunk's gradients projected by signal against not"""
CONTROLS = """bundles all : bundles_loud all : No tag: with the penalty on what they add to other text, against without
bundles all : bundles_kl all : No tag: with that penalty, against KL to the base on the same text
bundles all : unrouted all : No tag: routing against none
bundles all : random all : No tag: routing by task against random routing
bundles_trunk tag : full all : Trunk trained, true tag: against full fine-tuning
bundles_trunk all : full all : Trunk trained, no tag: against full fine-tuning
bundles_trunk m tag : full m all : Mixture, trunk trained, true tag: against full fine-tuning
bundles_all all : lora_replay all : No tag: learning with the earlier ones on, against one LoRA with a tenth of replay
bundles_all m all : lora m all : Mixture, no tag, all on in training: against one LoRA
bundles m all : random m all : Mixture, no tag: routing by task against random routing
bundles m all : unrouted m all : Mixture, no tag: routing against none
bundles m tag : unrouted m all : Mixture: routing with the true tag against none, without a tag
bundles m tag : shared m all : Mixture: routing with the true tag against one big bundle, without a tag
bundles m tag : bundles tag : True tag: taught together (10 rows each a step) against one after another (30)
mistag m tag : bundles m tag : Mixture, true tag at test: a fifth of the rows mis-tagged against none"""
GROUPS = {
    "Bundles against one LoRA a task": KIND,
    "Beyond parts that learn alone": BEYOND,
    "Controls": CONTROLS,
}


@dataclass
class Comparison:
    """One condition against another.

    Attributes:
        words: what is compared.
        difference: of the final average, over all runs that both have.
        by_order: the same of each order, where there are several.
    """

    words: str
    difference: Interval
    by_order: dict[str, Interval]


def compared(study: Study, lines: str) -> list[Comparison]:
    """The comparisons whose two sides were run."""
    comparisons = []
    for line in lines.splitlines():
        ours, theirs, words = line.split(" : ")
        sides: list[tuple[Key, str]] = []
        for side in (ours, theirs):
            condition, *schedule, mode = side.split()
            sides.append(((condition, "mixture" if schedule else "sequence"), mode))
        if not all(mode in s.modes(study, key) for key, mode in sides):
            continue
        difference = s.difference(study, *sides[0], *sides[1])
        if difference is not None:
            orders = s.shared_orders(study, sides[0][0], sides[1][0])
            each = {order: s.difference(study, *sides[0], *sides[1], order=order) for order in orders}
            by_order = {order: found for order, found in each.items() if found is not None}
            comparisons.append(Comparison(words, difference, by_order if len(by_order) > 1 else {}))
    return comparisons


def comparison_tables(study: Study) -> list[Table]:
    """Differences in final average, group by group."""
    tables = []
    for heading, lines in GROUPS.items():
        rows = [
            [
                c.words,
                interval(c.difference),
                "; ".join(f"{order} {interval(found)}" for order, found in c.by_order.items()),
                str(c.difference.runs),
            ]
            for c in compared(study, lines)
        ]
        tables.append(Table(heading, ["compared", "difference", "by order", "runs"], rows))
    return tables


def task_by_task(study: Study) -> Table:
    """Bundles against one LoRA of equal size, task by task."""
    rows = []
    for key, mode, against in (
        (s.M1, "tag", s.MULTI),
        (s.M1, "all", s.MULTI),
        (s.M3, "tag", s.M0),
        (s.M3, "all", s.M0),
    ):
        found = [s.difference(study, key, mode, against, "all", [task]) for task in TASKS]
        if found[0] is not None:
            rows.append([f"{title(key)}, {mode}", title(against), *map(interval, found), str(found[0].runs)])
    return Table("Accuracy minus that of one LoRA", ["condition", "LoRA", *TASKS, "runs"], rows)


# ---- own answers judged ----


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


def judged_answers(study: Study) -> Table:
    """How well the model judges its own answers, over meta's alpha."""
    rows = []
    for key in s.keys(study):
        for task in ("memory", "logic"):
            found = reflections(study, key, task)
            for others in ("others_off", "others_on") if found else ():
                if not any(f[others] for f in found):
                    continue
                auc = [mean_sd(at(found, others, a, "auc"), 2) for a in ("0.0", "0.5", "1.0")]
                brier = [mean_sd(at(found, others, a, "brier"), 2) for a in ("0.0", "1.0")]
                kept = [mean_sd(at(found, others, "1.0", name), 2) for name in ("kept", "kept_accuracy")]
                cells = [title(key), task, others[7:], *auc, *brier, mean_sd(constant(found), 2), *kept]
                rows.append([*cells, mean_sd([f["accuracy"] for f in found], 2), str(len(found))])
    head = "condition|answers to|others|AUC at 0|at 0.5|at 1|Brier at 0|at 1|of a constant|kept at 1|right of these"
    return Table("Judging its own answers", f"{head}|right of all|n".split("|"), rows)
