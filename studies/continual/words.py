"""The sentences of docs/study.md: verdicts and statements whose words depend on the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

from studies.continual import study as s
from studies.continual.study import (
    ALL_ON,
    CRITERION,
    LOUD,
    M0,
    M1,
    M3,
    MARGIN,
    MULTI,
    SEPARATE,
    TASKS,
    Key,
    Study,
    ci,
    pm,
)
from studies.continual.tables import REMOVAL_WORDS, h4_seeds, h4_spaces, title


# Where forgetting is not excluded by how the thing is built, and what keeps it from being so.
OPEN_CASES: list[tuple[Key, str, str]] = [
    (M3, "all", "no tag, all on"),
    (LOUD, "all", "no tag, all on, without the penalty on general text"),
    (("bundles_kl", "sequence"), "all", "no tag, all on, with a KL penalty instead"),
    (M3, "uniform", "no tag, all at a third"),
    (M3, "nearest", "predicted tag"),
    (ALL_ON, "all", "no tag, trained with all on"),
    (("bundles_trunk", "sequence"), "tag", "trunk trained, true tag"),
    (("bundles_trunk", "sequence"), "all", "trunk trained, no tag"),
    (("bundles_trunk_projected", "sequence"), "tag", "trunk trained with projected gradients, true tag"),
    (("bundles_trunk_projected", "sequence"), "all", "trunk trained with projected gradients, no tag"),
    (("mistag", "sequence"), "tag", "a fifth of the rows mis-tagged, true tag at test"),
    (("overlap", "sequence"), "all", "supports half common, no tag"),
    (("overlap_all", "sequence"), "all", "supports half common, no tag, trained with all on"),
    (SEPARATE, "all", "no bundles but one LoRA a task, no tag, all on"),
    (("lora_separate_kl", "sequence"), "all", "no bundles but one LoRA a task, with a KL penalty, no tag, all on"),
]
HEADS = (  # the cases of H1 that the table of verdicts names
    "frozen trunk, true tag",
    "no tag, all on",
    "no tag, all on, without the penalty on general text",
    "no tag, trained with all on",
    "trunk trained, true tag",
    "a fifth of the rows mis-tagged, true tag at test",
)


def told(found: Any) -> str:
    """What an interval of a difference says. An end that prints as 0.00 is 0: other draws would move it over."""
    return "better" if round(found.low, 2) > 0 else "worse" if round(found.high, 2) < 0 else "not told apart"


def better(found: Any, *notes: str) -> str:
    if found is None:
        return "no run in common"
    return f"**{preliminary(found.runs)}{told(found)}**, {ci(found)} ({'; '.join([f'n = {found.runs}', *notes])})"


def preliminary(runs: int) -> str:
    """Of fewer than three runs all is preliminary: an interval is over little more than test items."""
    return "" if runs >= 3 else "preliminary: "


def judged(good: bool, runs: int) -> str:
    return preliminary(runs) + ("supported" if good else "not supported")


def grouped(verdicts: list[tuple[str, str]]) -> str:
    """(case, verdict) by verdict."""
    by_verdict: dict[str, list[str]] = {}
    for words, verdict in verdicts:
        by_verdict.setdefault(verdict, []).append(words)
    return "; ".join(f"**{verdict}** ({'; '.join(words)})" for verdict, words in by_verdict.items())


# ---- the hypotheses ----


def h1_cases(study: Study) -> list[tuple[str, Any, str]]:
    """(case, interval of the reduction, verdict), what should be the trivial one first."""
    cases = []
    for key, mode, words in [(M3, "tag", "frozen trunk, true tag"), *OPEN_CASES]:
        found = s.reduction(study, key, mode)
        if found is None:
            continue
        if s.untouched(study, key, mode):
            verdict = "trivial"
        elif math.isnan(found.estimate):
            verdict = "open, M0 forgets nothing"
        elif s.too_little_learnt(study, key, mode):
            verdict = "open, learns too little to forget"
        else:
            verdict = judged(found.estimate >= CRITERION and found.low > 0, found.runs)
        cases.append((words, found, verdict))
    return cases


def h1(study: Study) -> tuple[str, str]:
    cases = h1_cases(study)
    if not cases:
        return "not run", "No sequence of bundles beside M0."
    parts = {v: [f"{words} ({ci(found)})" for words, found, verdict in cases if verdict == v] for *_, v in cases}
    text = ". ".join(f"**{verdict[0].upper()}{verdict[1:]}**: {'; '.join(words)}" for verdict, words in parts.items())
    return grouped([(words, v) for words, _, v in cases if words in HEADS]) or "see below", " ".join(
        [
            f"Reduction of M0's forgetting: an estimate of at least {CRITERION:.0%} is asked, and an interval above 0. "
            f"{text}.",
            *h1_by_order(study, M3, "No tag, all on"),
            *h1_by_order(study, ALL_ON, "Trained with all on"),
        ]
    )


def h1_by_order(study: Study, key: Key, words: str) -> list[str]:
    """The same with all on, order by order: what is not learnt in an order cannot be forgotten there."""
    orders = s.shared_orders(study, key, M0)
    if len(orders) < 2:
        return []
    said, little = [], []
    for order in orders:
        learnt = s.learnt_beside_m0(study, key, "all", order)
        if learnt is None:
            continue
        said.append(f"{order} {ci(s.reduction(study, key, 'all', order))} ({learnt[0]:.2f} and {learnt[1]:.2f})")
        little += [order] if s.too_little_learnt(study, key, "all", order) else []
    found = f"{words}, by order (learnt by bundles and by M0): {'; '.join(said)}."
    if little:
        found += (
            f" In order {' and '.join(little)} bundles that are all on learn less than 0.8 of what M0 does: there an "
            "earlier bundle stands in the way of a later task, which this measure does not count."
        )
    return [found]


def h2(study: Study) -> tuple[str, str]:
    """Against the LoRA that has the same parameters and data, in the mixture and in the sequence."""
    said, verdicts = [], []
    for key, mode, against, words in (
        (M1, "tag", MULTI, "mixture, true tag"),
        (M1, "all", MULTI, "mixture, no tag"),
        (M3, "tag", M0, "end of the sequence, true tag"),
        (M3, "all", M0, "end of the sequence, no tag"),
        (M3, "tag", MULTI, "end of the sequence, true tag, against LoRA on the mixture"),
    ):
        found = {task: s.difference(study, key, mode, against, "all", [task]) for task in TASKS}
        if any(f is None for f in found.values()):
            continue
        good = all(f.low >= -MARGIN for f in found.values() if f is not None)
        verdict = judged(good, min(f.runs for f in found.values() if f is not None))
        lost = [task for task, f in found.items() if f is not None and f.high < 0]
        each = ", ".join(f"{task} {ci(f)}" for task, f in found.items())
        tail = "" if good else f" (surely worse: {', '.join(lost)})" if lost else " (the intervals allow a loss)"
        said.append(f"{words}: {each}: **{verdict}**{tail}")
        verdicts.append((words, verdict))
    if not said:
        return "not run", "No bundles beside LoRA."
    return grouped(verdicts), (
        f"Accuracy minus that of one LoRA of equal size; at least as good: the interval's lower end is -{MARGIN} or "
        f"more: {'; '.join(said)}. At the end of its sequence M0 has forgotten; what is better than that is H1 again."
    )


def h3(study: Study) -> tuple[str, str]:
    """memory's and logic's alpha: own accuracy monotone (Spearman >= 0.9) and the others moved less (cross < 1)."""

    def met(found: dict[str, list[float]]) -> bool:
        return s.mean(found["spearman"]) >= 0.9 and s.mean(found["cross"]) < 1

    said, verdicts = [], []
    for key, others, words in (
        (M3, "others_off", "the others off"),
        (M3, "others_on", "the others on"),
        (ALL_ON, "others_on", "trained with all on, the others on"),
    ):
        found = {task: s.control(study, key, others, task) for task in TASKS}
        if any(found[task] is None for task in ("memory", "logic")):
            continue
        good = all(met(f) for task, f in found.items() if f is not None and task != "meta")
        each = ", ".join(
            f"{task} moves {pm(f['own'], 2)}, others {pm(f['cross'], 2)} of that, Spearman {pm(f['spearman'], 2)}"
            for task, f in found.items()
            if f is not None
        )
        failed = [task for task, f in found.items() if f is not None and not met(f)]
        said.append(f"{words}: {each}" + (f" (**not met by {' and '.join(failed)}**)" if failed else ""))
        verdicts.append((words, judged(good, min(len(f["own"]) for f in found.values() if f is not None))))
    if not said:
        return "not run", "No sweep of alphas."
    return grouped(verdicts), (
        "Alphas from 0 to 1; *moves*: mean distance of the accuracy from that at alpha 0. Asked, in the mean over "
        f"seeds: Spearman at least 0.9, and the others moved less: {'; '.join(said)}. The verdict is on memory and "
        "logic. With the others off it says little: the other tasks, at the base's level, have little to lose."
    )


def h4(study: Study) -> tuple[str, str]:
    roles = h4_spaces(study)
    seeds = h4_seeds(study)
    if study.spaces is None or not seeds:
        return "not run", "No features of bundles, M0 and the trunk."
    spaces, depths = study.spaces["spaces"], range(len(study.spaces["depths"]))
    ours, m0, trunk = spaces[roles["bundle space (the three side by side)"]], spaces[roles["M0"]], spaces["trunk"]["0"]

    def higher(at: str, n: int) -> bool:
        """In every seed."""
        rivals = {seed: max(m0[seed][at][n]["silhouette"], trunk[at][n]["silhouette"]) for seed in seeds}
        return all(ours[seed][at][n]["silhouette"] > rival for seed, rival in rivals.items())

    wins = {at: [higher(at, n) for n in depths] for at in ("last", "mean")}
    won = wins["last"]
    probes = [one["last"][n]["accuracy"] for name in roles.values() for one in spaces[name].values() for n in depths]
    flat = "Probes tell the tasks apart nearly everywhere" if min(probes) > 0.95 else "Probes differ"
    of = "One seed" if len(seeds) == 1 else f"In all of {len(seeds)} seeds"
    return f"**{judged(all(won), len(seeds))}**", (
        f"{of}: silhouette of the tasks higher in bundle space than in trunk and M0 at {sum(won)} of {len(won)} "
        f"depths, last token of the prompt; in the mean over the prompt at {sum(wins['mean'])}. {flat} "
        f"(accuracy {min(probes):.2f} to {max(probes):.2f}): that alone says little."
    )


HYPOTHESES: dict[str, tuple[str, Callable[[Study], tuple[str, str]]]] = {
    "H1": (
        f"Separation reduces forgetting by at least {CRITERION:.0%} against one adapter (M0: LoRA, in sequence)",
        h1,
    ),
    "H2": ("Every task family is at least as good as with the monolith at equal parameters", h2),
    "H3": ("A bundle's alpha changes its own task more than others, monotonically", h3),
    "H4": ("Tasks lie further apart in bundle space than in the trunk or M0", h4),
}


def removal_claims(study: Study) -> list[str]:
    keys = {variant: s.removal_key(study, variant) for variant in REMOVAL_WORDS}
    found = {variant: s.removal_cells(study, variant, rate) for variant, rate in keys.items() if rate is not None}
    said = []
    bundles = found.get("owners", []) + found.get("all", [])
    if bundles and all(r["off_is_base"] for r in bundles):
        said.append("With all bundles off the hidden states are the base's to the bit, in every run: an invariant.")
    forget = bundles[0]["settings"]["forget"] if bundles else ""

    def unseen(variant: str) -> float:
        return fmean(r["relearn"]["part"][-1][2] for r in found[variant])

    for variant in ("owners", "all"):
        if variant in found and "base" in found:
            after, base = (fmean(r["after"]["accuracy"][forget] for r in found[v]) for v in (variant, "base"))
            rest = [fmean(s.retained(r, when) for r in found[variant]) for when in ("before", "after")]
            said.append(
                f"{REMOVAL_WORDS[variant]}: {after:.3f} on the forgotten task with the others on, the base {base:.3f}; "
                f"the rest goes from {rest[0]:.2f} to {rest[1]:.2f}."
            )
    if alone := [r["alone"][forget][forget] for r in found.get("owners", []) if forget in r.get("alone", {})]:
        said.append(
            f"Trained with only the own one on, the removed bundle alone had {fmean(alone):.2f}, with the others on "
            f"{fmean(r['before']['accuracy'][forget] for r in found['owners']):.2f}: they disturb each other."
        )
    if bundles:
        said.append(
            "That nothing is left is how it is built: only the removed bundle was ever updated on the facts. One LoRA "
            "a kind, one of them dropped, would do the same and was not run."
        )
    for variant in ("ascent", "ascent_retain", "rmu"):
        if {variant, "owners", "never"} <= found.keys():
            word = "more" if unseen(variant) > unseen("owners") + MARGIN else "no more"
            said.append(
                f"Taught a part of the facts again, {REMOVAL_WORDS[variant]} answers {unseen(variant):.2f} of the part "
                f"it was not shown, {word} than bundles with alpha 0 ({unseen('owners'):.2f}); a LoRA that never knew "
                f"them {unseen('never'):.2f}. The rest is then at {fmean(s.retained(r) for r in found[variant]):.2f}."
            )
    return said


# ---- statements ----


def have(study: Study, *pairs: tuple[Key, str]) -> bool:
    return all(mode in s.modes(study, key) for key, mode in pairs)


def surprises(study: Study) -> list[str]:
    """Sentences whose words depend on the numbers."""
    said = []
    control = s.reduction(study, SEPARATE, "all")
    if control is not None and control.estimate >= CRITERION:
        said.append(f"What H1 asks for is met without bundles: one LoRA a task, no tag, all on: {ci(control)}.")
    shrunk = s.shrunk(study)
    if shrunk and have(study, (M3, "all")):
        ours = s.values(study, M3, "all", "average")
        same, best = fmean(r["average"] for r in shrunk), fmean(r["best"] for r in shrunk)
        if all(r["scale"] == 1 for r in shrunk):
            goal = fmean(r["goal"] for r in shrunk)
            said.append(
                f"Bundles, all on, are further from the base ({goal:.2f}) than the whole of M0, so they do not forget "
                f"less by being small. M0 at its best factor has average {best:.3f}, they {pm(ours, 3)}."
            )
        else:
            word = "more" if same > fmean(ours) else "less"
            said.append(
                f"M0 made as small as the bundles (all on) are has average {same:.3f}, {word} than theirs "
                f"({pm(ours, 3)}); at its best factor {best:.3f}."
            )
    for condition, words in (
        ("lora_replay", "A tenth of replay"),
        ("lora_kl", "One LoRA with a KL penalty on general text"),
        ("olora", "O-LoRA"),
        ("osf", "OSF"),
        ("full", "Full fine-tuning"),
        ("unrouted", "The same bundles without routing"),
        ("random", "Random routing"),
        ("shared", "One big bundle"),
        ("full_kind", "Bundles without a projector"),
        ("dropout", "Bundles with dropout"),
    ):
        key = (condition, "sequence")
        if have(study, (key, "all"), (M3, "all"), (M0, "all")):
            gained = s.difference(study, M3, "all", key, "all")
            said.append(
                f"{words}: M0's forgetting reduced by {ci(s.reduction(study, key, 'all'))}"
                f"{' (it learns less than 0.8 of what M0 does)' if s.too_little_learnt(study, key, 'all') else ''}. "
                "Bundles, all on, against "
                f"it, final average: {better(gained)}."
            )
    if have(study, (M3, "nearest")):
        rate = [fmean(r["tag_accuracy"].values()) for r in s.finals(study, M3) if r.get("tag_accuracy")]
        if rate:
            near = "nearly trivial too" if s.mean(rate) > 0.99 else "no longer trivial"
            said.append(
                f"The tag predicted from the prompt is right {s.mean(rate):.3f} of the time: that mode is {near}."
            )
    return said


def form_lost(study: Study) -> list[str]:
    """Conditions that in order A end, with all on, with both first tasks at nearly 0, though they had learnt them."""
    lost = []
    for key in s.keys(study, "sequence"):
        v = {m: s.values(study, key, "all", m) for m in ("memory", "logic", "learnt")}
        if v["learnt"] and s.mean(v["learnt"]) > 0.3 and max(s.mean(v["memory"]), s.mean(v["logic"])) <= MARGIN:
            lost.append(title(key))
    return lost


def costs(study: Study) -> list[str]:
    """Families of test items in which bundles (mixture, true tag) and one LoRA differ by more than 0.1."""
    kinds = study.base.get("items") or {}
    if not have(study, (M1, "tag"), (MULTI, "all")):
        return ["Bundles and LoRA on the mixture were not run beside each other."]
    said = []
    for task in kinds:
        ours, theirs = s.runs_of(study, M1, "tag"), s.runs_of(study, MULTI, "all")
        shared = [k for k in ours if k in theirs and ours[k].items[task].shape[1] == len(kinds[task])]
        shared = [k for k in shared if theirs[k].items[task].shape[1] == len(kinds[task])]
        for family in dict.fromkeys(kinds[task] if shared else ()):
            of = [n for n, name in enumerate(kinds[task]) if name == family]
            a, b = (fmean(float(side[k].items[task][-1][of].mean()) for k in shared) for side in (ours, theirs))
            if abs(a - b) > 0.1:
                word = "worse" if a < b else "better"
                said.append(f"{task}, {family}: {word}, {a:.2f} against {b:.2f} ({len(of)} items, n = {len(shared)}).")
    return said or ["No family differs by more than 0.1."]


def best_without_tag(study: Study) -> list[str]:
    """Of bundles and of one LoRA a task: the best average with all on over the rates of the search, and its rate."""
    said = []
    for key in (M3, SEPARATE):
        found = [r for r in study.records if (r["condition"], r["schedule"]) == key and r["stage"] == "grid"]
        averages = {r["lr"]: s.measures(study, r, "all")["average"] for r in found if "all" in s.modes_of(r)}
        if averages:
            best, taken = max(averages, key=lambda lr: averages[lr]), s.chosen(study, key)
            said.append(f"{title(key)} {averages[best]:.2f} at {best:g}, {averages[taken]:.2f} as chosen")
    return said if len(said) == 2 else []


def weaknesses(study: Study) -> list[str]:
    said = [
        "One model of 135 M parameters, three groups of tasks, one length of training: nothing here says how it scales."
    ]
    seeds = {key: len({r["seed"] for r in s.finals(study, key)}) for key in s.keys(study)}
    if few := [f"{title(key)} ({n})" for key, n in seeds.items() if n < 3]:
        said.append(f"Fewer than three seeds: {'; '.join(few)}.")
    if edge := [title(key) for key in s.keys(study) if s.at_the_edge(study, key)]:
        said.append(f"The chosen rate is the lowest or highest tried, a better one may lie beyond: {'; '.join(edge)}.")
    if borrowed := [title(key) for key in s.keys(study) if s.finals(study, key) and not s.grid(study, key)]:
        said.append(f"At another condition's rate, without a search of their own: {'; '.join(borrowed)}.")
    if best := best_without_tag(study):
        said.append(
            "Bundles and one LoRA a task are compared without a tag too, at rates that were chosen with it. Best with "
            f"all on, of the rates searched (seed 0, on test items, so a little flattered): {'; '.join(best)}."
        )
    if ("lora_separate_kl", "sequence") in seeds and ("bundles_kl", "sequence") not in seeds:
        said.append("Bundles with the KL penalty that LoRAs were given, instead of their own, were not run.")
    if LOUD in seeds and SEPARATE in seeds and ("lora_separate_kl", "sequence") not in seeds:
        said.append(
            "No LoRA was trained with a penalty on general text (`lora_separate_kl`): what it gives one is not known."
        )
    if alone := sorted(set(s.shared_orders(study, ALL_ON, M0)) - set(s.shared_orders(study, SEPARATE, M0))):
        said.append(f"One LoRA a task was not run in order {' and '.join(alone)}.")
    said.append(
        "Three runs make a narrow bootstrap, and nothing is corrected for the number of comparisons: differences whose "
        "interval ends within a few hundredths of 0 may be chance."
    )
    if lost := form_lost(study):
        others = sorted({s.order_name(r) for r in s.finals(study, M0)} - {"A"})
        beside = f"orders {' and '.join(others)} are beside it" if others else "orders B and C were not run"
        said.append(
            f"With memory and logic at nearly 0, not merely lower, end in order A: {', '.join(lost)}. So would a model "
            "that gives every question one of the two answers of meta, the last phase. Then much of what is called "
            f"forgetting is the form of the answer, and order A flatters whatever keeps parameters apart; {beside}."
        )
    said.append(
        "Rates are chosen on seed 0's validation items; seed 0 is among the final runs, its test items are not."
    )
    sizes = {key: s.finals(study, key)[0]["trainable"] for key in s.keys(study) if s.finals(study, key)}
    goal = sizes.get(M0)
    if goal and (off := [f"{title(k)} ({n / goal:.2f})" for k, n in sizes.items() if abs(n / goal - 1) > 0.05]):
        said.append(f"Not at M0's number of trained parameters (share of it): {'; '.join(off)}.")
    few, kinds = study.base.get("settings", {}).get("alpha_items"), study.base.get("items") or {}
    for task in TASKS if few and s.alpha_curves(study, M3, "others_on") else ():
        if missed := [k for k in dict.fromkeys(kinds.get(task, [])) if k not in kinds[task][:few]]:
            said.append(f"The sweeps of alphas are over the first {few} items: of {task} without {', '.join(missed)}.")
    if study.removal:
        said.append("Removal: one kind of facts, and the rates of unlearning are chosen on the items of the table.")
    base = study.base["phases"][0]["modes"]["all"]
    majority = study.base.get("majority") or {}
    for task in TASKS:
        top = majority.get(task, {}).get("all")
        learnt = s.values(study, MULTI, "all", task) or s.values(study, M0, "all", task)
        if top is not None and learnt and s.mean(learnt) < top + 0.1:
            said.append(
                f"{task}: LoRA ends at {s.mean(learnt):.2f}, the majority answer has {top:.2f} and the base "
                f"{base[task]['accuracy']:.2f}: what is not learnt cannot be forgotten."
            )
    by_rate = s.reduction_by_rate(study, M3, "all")
    if len(by_rate) > 1:
        each = ", ".join(f"{lr:g}: {ci(found)}" for lr, found in by_rate.items())
        said.append(
            "M0's rates that validate alike differ in what they learn, so in what they forget; bundles, all on, reduce "
            f"the forgetting of M0 at {each}."
        )
    graphless = sorted(
        {title((r["condition"], r["schedule"])) for r in study.records if not all(p.get("graph") for p in r["phases"])}
    )
    if graphless:
        said.append(f"Trained without a CUDA graph, so slower: {'; '.join(graphless)}.")
    return said
