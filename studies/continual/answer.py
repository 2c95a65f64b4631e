"""The short answer at the top of docs/study.md, from the same numbers as the rest."""

from __future__ import annotations

from typing import Any

from studies.continual import study as s
from studies.continual.routing import beyond, without_penalty
from studies.continual.study import ALL_ON, CRITERION, LOUD, M0, M1, M3, MULTI, SEPARATE, TASKS, Key, Study, ci
from studies.continual.tables import h4_seeds
from studies.continual.words import HYPOTHESES, told


def verdicts(study: Study, name: str) -> str:
    return HYPOTHESES[name][1](study)[0]


def has(study: Study, *sides: tuple[Key, str]) -> bool:
    return all(mode in s.modes(study, key) for key, mode in sides)


def average(study: Study, key: Key, mode: str) -> str:
    return f"{s.mean(s.values(study, key, mode, 'average')):.2f}"


def short_answer(study: Study) -> list[str]:
    parts = (trivial, without_tag, why, replay, mixture, mistagged, routing, alphas, spaces, removal)
    return [line for line in (part(study) for part in parts) if line]


def trivial(study: Study) -> str:
    if not s.untouched(study, M3, "tag"):
        return ""
    found = "With a frozen trunk and the true tag nothing is forgotten: that is how it is built, and is no finding."
    if s.untouched(study, SEPARATE, "tag"):
        found += " One LoRA a task has it too."
    if has(study, (M3, "tag"), (M0, "all")):
        found += f" End average {average(study, M3, 'tag')}, of M0 {average(study, M0, 'all')} (order A)."
    return found


def without_tag(study: Study) -> str:
    """H1 where it is open."""
    found = s.reduction(study, M3, "all")
    if found is None:
        return ""
    orders = s.shared_orders(study, M3, M0)
    line = f"Without a tag, all bundles on, M0's forgetting is reduced by {ci(found)}"
    if "A" in orders and len(orders) > 1:
        line += f", in order A by {ci(s.reduction(study, M3, 'all', 'A'))}"
    little = [order for order in orders if s.too_little_learnt(study, M3, "all", order)]
    line += f" (in order {' and '.join(little)} they learn less than 0.8 of what M0 does)." if little else "."
    by_rate = [f.estimate for f in s.reduction_by_rate(study, M3, "all").values()]
    if len(by_rate) > 1:
        line += (
            " It depends on M0's rate: of those that validate alike the one that learns most is taken; over them it is "
            f"{min(by_rate):+.2f} to {max(by_rate):+.2f} on the search's seed."
        )
    return line


def why(study: Study) -> str:
    """What the reduction without a tag comes from."""
    found, loud = s.reduction(study, M3, "all"), s.reduction(study, LOUD, "all")
    beside = [
        (LOUD, "bundles without the penalty on what they add to general text"),
        (("bundles_kl", "sequence"), "bundles with a KL penalty on that text instead"),
        (SEPARATE, "one LoRA a task, all on"),
        (("lora_separate_kl", "sequence"), "the same with that KL penalty"),
        (ALL_ON, "bundles that learn with the earlier ones on"),
    ]
    more = [f"{words} {ci(f)}" for key, words in beside if (f := s.reduction(study, key, "all")) is not None]
    if found is None or not more:
        return ""
    most = loud is not None and loud.estimate < CRITERION <= found.estimate
    return f"The same of {'; '.join(more)}." + (" Most of it is the penalty's doing." if most else "")


def replay(study: Study) -> str:
    key = ("lora_replay", "sequence")
    found = s.difference(study, M3, "all", key, "all") if has(study, (M3, "all"), (key, "all")) else None
    if found is None:
        return ""
    word = {"better": "better than", "worse": "worse than", "not told apart": "level with"}[told(found)]
    return f"Bundles, all on, end {word} one LoRA with a tenth of replay: final average {ci(found)}."


def mixture(study: Study) -> str:
    """H2: the price."""
    if not has(study, (M1, "tag"), (M1, "all"), (MULTI, "all")):
        return ""
    found = {task: s.difference(study, M1, "tag", MULTI, "all", [task]) for task in TASKS}
    each = ", ".join(f"{task} {ci(f)}" for task, f in found.items())
    return (
        f"On the mixture, with the true tag, bundles have average {average(study, M1, 'tag')}, one LoRA without a tag "
        f"{average(study, MULTI, 'all')} ({each}), and bundles without a tag {average(study, M1, 'all')}. H2: "
        f"{verdicts(study, 'H2')}."
    )


def mistagged(study: Study) -> str:
    found = s.reduction(study, ("mistag", "sequence"), "tag")
    if found is None:
        return ""
    word = "nearly as much as M0" if found.estimate < CRITERION else "less than M0"
    begin = f"With a fifth of the sequence's rows mis-tagged, bundles forget {word}"
    return f"{begin}, though tested with the true tag: reduction {ci(found)}."


def routing(study: Study) -> str:
    return " ".join(filter(None, (without_penalty(study), beyond(study))))


def alphas(study: Study) -> str:
    found: dict[str, Any] = {task: s.control(study, M3, "others_on", task) for task in TASKS}
    if any(f is None for f in found.values()):
        return ""
    each = ", ".join(f"{task}'s {s.mean(f['cross']):.2f}" for task, f in found.items())
    return f"H3: {verdicts(study, 'H3')}. With all on, an alpha moves the other tasks, as a share of its own: {each}."


def spaces(study: Study) -> str:
    found = verdicts(study, "H4")
    seeds = len(h4_seeds(study))
    many = "one seed" if seeds == 1 else f"{seeds} seeds"
    return "" if found == "not run" else f"H4 (tasks further apart in bundle space): {found}, {many}."


def removal(study: Study) -> str:
    """What an alpha of 0 takes away, and what it costs."""
    rates = {v: s.removal_key(study, v) for v in ("ascent", "ascent_retain", "rmu", "owners", "all", "never")}
    found = {v: s.removal_cells(study, v, rate) for v, rate in rates.items() if rate is not None}
    unlearning = [v for v in ("ascent", "ascent_retain", "rmu") if v in found]
    if not unlearning or not {"owners", "all"} <= found.keys():
        return ""

    def span(values: list[float]) -> str:
        low, high = f"{min(values):.2f}", f"{max(values):.2f}"
        return low if low == high else f"{low} to {high}"

    back = {v: s.mean([r["relearn"]["part"][-1][2] for r in cells]) for v, cells in found.items()}
    rest = {v: s.mean([s.retained(r) for r in cells]) for v, cells in found.items()}
    before = {v: s.mean([s.retained(r, "before") for r in cells]) for v, cells in found.items() if v != "never"}
    ours = ["owners", "all"]
    never = f", in a LoRA that never knew them {back['never']:.2f}" if "never" in back else ""
    return (
        "After a bundle's alpha is set to 0, a third of its facts taught again brings back "
        f"{span([back[v] for v in ours])} of the others{never}; after unlearning a LoRA "
        f"{span([back[v] for v in unlearning])}. What was to stay is then at {span([rest[v] for v in ours])} "
        f"(before: {span([before[v] for v in ours])}), after unlearning at {span([rest[v] for v in unlearning])} "
        f"(before: {span([before[v] for v in unlearning])})."
    )
