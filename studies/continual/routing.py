"""What routing adds to separate parameters, in docs/study.md: one condition against another, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from studies.continual import study as s
from studies.continual.study import MARGIN, SEPARATE, TASKS, Key, Study, ci
from studies.continual.words import better, told
from studies.measures.continual import Interval
from studies.rl_separate import report as rl


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
KL = ", the LoRAs with a KL penalty on the same text"
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


@dataclass
class Comparison:
    """Attributes:
    words: of the line. found: the difference in final average. orders: the same of each order, where there are several.
    notes: what the difference of averages hides.
    """

    words: str
    found: Interval
    orders: dict[str, Interval]
    notes: list[str]

    def __str__(self) -> str:
        orders = [f"order {o} {ci(found)}" for o, found in self.orders.items()]
        return f"- {self.words}: {better(self.found, *orders, *self.notes)}."


def compared(study: Study, lines: str) -> list[Comparison]:
    """Those of which both sides were run."""
    made = []
    for line in lines.splitlines():
        ours, theirs, words = line.split(" : ")
        sides: list[tuple[Key, str]] = []
        for side in (ours, theirs):
            condition, *schedule, mode = side.split()
            sides.append(((condition, "mixture" if schedule else "sequence"), mode))
        if not all(mode in s.modes(study, key) for key, mode in sides):
            continue
        found = s.difference(study, *sides[0], *sides[1])
        if found is not None:
            shared = s.shared_orders(study, sides[0][0], sides[1][0])
            orders = {o: f for o in shared if (f := s.difference(study, *sides[0], *sides[1], order=o)) is not None}
            made.append(Comparison(words, found, orders if len(orders) > 1 else {}, notes(study, sides)))
    return made


def notes(study: Study, sides: list[tuple[Key, str]]) -> list[str]:
    said = []
    gone = [t for t in TASKS if all(s.mean(s.values(study, *side, t, None)) <= MARGIN for side in sides)]
    if gone:
        said.append(f"{' and '.join(gone)} at 0 on both sides")
    (key, mode) = sides[1]
    if key[1] == "sequence" and s.too_little_learnt(study, key, mode):
        said.append("the other learns less than 0.8 of what M0 does")
    return said


def without_penalty(study: Study) -> str:
    """Whether bundles are better than one LoRA a task where they have no penalty either, in words; "" if not run."""
    kind = [c for c in compared(study, KIND) if c.words.endswith("without the penalty")]
    if not kind:
        return ""
    won = [c.words.removesuffix(", without the penalty") for c in kind if told(c.found) == "better"]
    if won:
        said = f"**Without the penalty bundles are better than one LoRA a task, too** ({'; '.join(won)})."
    else:
        said = (
            "**Without the penalty bundles are in no mode shown to be better than one LoRA a task.** What is better "
            "with it is the doing of the adapter and its penalty, not of routing."
        )
    penalised = [c for c in compared(study, KIND) if c.words.endswith(KL)]
    lost = [f"{c.words.removesuffix(KL)} {ci(c.found)}" for c in penalised if told(c.found) == "worse"]
    if lost:
        said += (
            " **LoRAs with a penalty of their own, KL to the base on the same text, end better than bundles** "
            f"(bundles against them: {'; '.join(lost)}); it costs passes through the trunk, which `quiet` does not."
        )
    elif penalised:
        said += " LoRAs with a KL penalty on the same text are not shown to be better than bundles."
    return said


def beyond(study: Study) -> str:
    """Whether any of BEYOND is better, over all orders or in some; "" if none was run."""
    all_of_them = compared(study, BEYOND)
    if not all_of_them:
        return ""
    won = [c.words for c in all_of_them if told(c.found) == "better"]
    said = (
        f"**Routing adds something: {'; '.join(won)}.**"
        if won
        else f"**Of {len(all_of_them)} settings that go beyond separate parameters none is better in final average.**"
    )
    for c in all_of_them:
        orders: dict[str, list[str]] = {}
        for order, found in c.orders.items():
            orders.setdefault(told(found), []).append(order)
        if len(orders) > 1:
            each = ", ".join(f"{word} in order {' and '.join(of)}" for word, of in orders.items())
            said += f' It depends on the order: "{c.words}" is {each}.'
    return said


def section(study: Study) -> str:
    parts = {
        "Bundles against one LoRA a task. In a sequence where only the own bundle is on, a bundle is a part by itself "
        "as a LoRA with a tag is, and routing has nothing to do. What differs is the kind of adapter, and the penalty "
        "on what bundles add to general text (`quiet`); LoRAs have one where the line says so.": (
            KIND,
            without_penalty(study),
        ),
        "Beyond parts that learn each by itself: with the earlier ones on (as O-LoRA's do), with common supports, with "
        "a common trunk.": (BEYOND, beyond(study)),
        "Controls.": (CONTROLS, ""),
    }
    said = ["Differences in final average, over the runs that both sides have."]
    if SEPARATE not in s.keys(study):
        said.append("**Not answered yet:** one LoRA a task (`lora_separate`) was not run beside bundles.")
    for words, (lines, verdict) in parts.items():
        if rows := compared(study, lines):
            said += [words, "\n".join(map(str, rows)), *([verdict] if verdict else [])]
    return "\n\n".join([*said, text_and_rl()])


def text_and_rl() -> str:
    """Signals of several kinds at once are another recipe's study; its numbers."""
    runs = rl.read()
    shared, unrouted = ("shared_adapter", "all", 2.5e-4), ("unrouted", "all", 5e-4)

    def value(key: Any, setting: str, column: str) -> str:
        return rl.cell([run["table"][setting][column] for run in runs[key]])

    return (
        "Text, preferences and RL at once are the study of another recipe, "
        "[rl_separate](../recipes/results/rl_separate.md). There routing gives a switch: with RL's bundles off "
        f"{value(rl.MAIN, 'RL off', 'exact')} of {value(rl.MAIN, 'all on', 'exact')} exact answers are left, without "
        f"routing {value(unrouted, 'RL off', 'exact')} of {value(unrouted, 'all on', 'exact')}. It gives no better "
        f"model: with all on the LM loss is {value(rl.MAIN, 'all on', 'plays_loss')} and preference accuracy "
        f"{value(rl.MAIN, 'all on', 'preference')}, of one adapter {value(shared, 'all on', 'plays_loss')} and "
        f"{value(shared, 'all on', 'preference')}. One adapter a signal was not run there, so it does not tell routing "
        "from separate parameters."
    )
