"""Every number on the pages of docs/results is what its record says.

A decimal number, or any number in a table, that no claim covers is an error: a number cannot be added or changed
without its record (claims.py has the rules).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import pytest
from claims import Claim, missing, one_line, uncovered

from studies import figures
from studies.page_numbers import (
    ROOT,
    all_topics,
    another_topic,
    continual,
    disturbance_ratio,
    head,
    learning,
    memory_ratio,
    others_kept,
    own_topic,
    read,
    removal,
    separate,
    steps_to_relearn,
    time_ratio,
    times,
    topic_change,
    topic_mask,
    topic_source,
)


FOLDER = ROOT / "docs/results"
PAGES = sorted(path.name for path in FOLDER.glob("*.md"))
Claims = list[Claim]
CLAIMS: dict[str, Callable[[], Claims]] = {}
# Settings, not results.
ALLOWED = {
    "speed.md": ["1.2 B"],
    "learning.md": ["rate 0.002 (", "fine-tuning 0.0001"],
    "index.md": ["1.2 B", "135 M"],
}


def claims(page: str) -> Callable[[Callable[[], Claims]], Callable[[], Claims]]:
    """Puts what a function returns into CLAIMS."""

    def add(function: Callable[[], Claims]) -> Callable[[], Claims]:
        CLAIMS[page] = function
        return function

    return add


def mean_sd(values: list[float]) -> tuple[float, float]:
    return round(fmean(values), 9), round(stdev(values), 9)


@claims("index.md")
def index_claims() -> Claims:
    one, other = ("separate", "owners", 5e-4), ("shared_adapter", "all", 2.5e-4)
    return [
        ("1.2 B parameters {:.2f} of", time_ratio("h200", "1.2b", "train", "bundles_15_routed", "base")),
        ("step, LoRA r16 {:.2f};", time_ratio("h200", "1.2b", "train", "lora_r16", "base")),
        ("at 135 M bundles {:.2f}", time_ratio("h200", "135m", "train", "bundles_15", "base")),
        (", LoRA {:.2f}. |", time_ratio("h200", "135m", "train", "lora_r16", "base")),
        ("disturbs {:.2f} of what", disturbance_ratio("bundles:quiet=20", 0.002)),
        ("penalty disturbs {:.2f}.", disturbance_ratio("lora_r16_kl1.0", 0.002)),
        ("bundles reach {:.2f},", fmean(continual("bundles", 0.002, "tag", schedule="mixture"))),
        ("one LoRA {:.2f}. |", fmean(continual("lora", 0.002, "all", schedule="mixture"))),
        ("LM loss {:.2f},", fmean(separate(*one, "all on", "plays_loss"))),
        ("one adapter {:.2f}. |", fmean(separate(*other, "all on", "plays_loss"))),
        ("nearly: {:.2f} of", read("benchmarks/results/distill.json")["over_seeds"]["agreement"]["lora"][0]),
    ]


@claims("speed.md")
def speed_claims() -> Claims:
    def tokens(cell: str) -> float:
        found = sorted(times("h200", "1.2b", "decode", cell))
        return found[len(found) // 2]

    def on_cpu(card: str) -> float:
        return time_ratio(card, "135m", "train", "bundles_15", "lora_r16")

    rows = {
        "step: LoRA r16, all linear layers": ("train", "lora_r16", "base"),
        "step: 15 bundles": ("train", "bundles_15", "base"),
        "step: 64 bundles": ("train", "bundles_64", "base"),
        "one token, batch 1: LoRA r16": ("decode", "lora_r16/1", "base/1"),
        "one token, batch 1: 15 bundles": ("decode", "bundles_15/1", "base/1"),
    }
    places = [(card, shape) for shape in ("1.2b", "135m") for card in ("h200", "h100")]
    fields = " {:.2f} |" * len(places)
    table = [(f"| {label} |{fields}", *(time_ratio(*place, *c) for place in places)) for label, c in rows.items()]
    for label, cell in (("LoRA r16", "lora_r16"), ("15 bundles", "bundles_15")):
        peaks = [memory_ratio(*place, cell) for place in places]
        table.append((f"| peak memory of a step: {label} |{fields}", *peaks))

    def h200(shape: str, cell: str, other: str = "base") -> float:
        return time_ratio("h200", shape, "train", cell, other)

    return [
        *table,
        ("routed bundles takes {:.2f} times", h200("1.2b", "bundles_15_routed")),
        ("base's and {:.2f} times LoRA r16's", h200("1.2b", "bundles_15_routed", "lora_r16")),
        ("64 bundles cost {:.2f} times one", h200("1.2b", "bundles_64", "bundles_1")),
        (
            "token takes {:.1f} ms (base {:.1f} ms, LoRA {:.1f} ms)",
            *map(tokens, ("bundles_15/1", "base/1", "lora_r16/1")),
        ),
        ("15 bundles cost {:.2f} times the base", h200("135m", "bundles_15")),
        ("LoRA costs {:.2f}, and 64", h200("135m", "lora_r16")),
        ("64 bundles cost {:.2f}, more than", h200("135m", "bundles_64")),
        ("{:.2f} times LoRA's step at 256 tokens", on_cpu("cpu")),
        ("{:.2f} at 1,024", on_cpu("cpu_4x256")),
    ]


@claims("learning.md")
def learning_claims() -> Claims:
    methods = {
        "LoRA r16": ("lora_r16", 0.002),
        "LoRA r16 + KL penalty": ("lora_r16_kl1.0", 0.002),
        "one bundle (default)": ("bundles:quiet=20", 0.002),
        "one bundle, no penalty": ("bundles:quiet=0", 0.002),
        "one bundle + KL penalty": ("bundles:quiet=20,kl=1.0", 0.002),
        "full fine-tuning, {:.0f} times the parameters": ("full", 0.0001),
        "five bundles, all on in training and test": ("bundles:quiet=20,routed=1", 0.002),
        "five bundles, each taught alone, all on in test": ("bundles:quiet=20,owners=1", 0.002),
    }
    lora, ours, together, apart = (list(methods.values())[n] for n in (0, 2, 6, 7))

    def mean(method: tuple[str, float], measure: str) -> float:
        return fmean(learning(*method, measure))

    table: Claims = []
    for label, method in methods.items():
        of_lora = [mean(method, "parameters") / mean(lora, "parameters")] if "{" in label else []
        seeds = len(learning(*method, "score"))
        found = [mean(method, "score"), mean(method, "rise"), disturbance_ratio(*method)]
        table.append((f"| {label} | {{:d}} | {{:.3f}} | {{:.3f}} | {{:.2f}} |", *of_lora, seeds, *found))
    base = read("studies/quality/results/cells.jsonl")[0]["300"]["known/capitals"]
    capitals = [mean(method, "known/capitals") for method in (lora, ours)]
    return [
        *table,
        ("(score {:.3f} against {:.3f})", mean(ours, "score"), mean(lora, "score")),
        ("other text by {:.3f} instead of {:.3f}:", mean(ours, "rise"), mean(lora, "rise")),
        (": {:.2f} of the disturbance at equal learning", disturbance_ratio(*ours)),
        ("less than the default bundle ({:.2f})", disturbance_ratio(*methods["LoRA r16 + KL penalty"])),
        ("twice as much as LoRA ({:.2f})", disturbance_ratio(*methods["one bundle, no penalty"])),
        ("all are on: {:.3f} if they", mean(together, "score")),
        ("training too, {:.3f} if each", mean(apart, "score")),
        ("loss elsewhere by {:.3f}.", mean(apart, "rise")),
        ("of {:.2f} that the base knows LoRA keeps {:.2f}, the default bundle {:.2f}", base, *capitals),
    ]


@claims("continual.md")
def continual_claims() -> Claims:
    mixed = {"schedule": "mixture"}
    rows: dict[str, list[float]] = {
        "one LoRA, tasks mixed | itself": continual("lora", 0.002, "all", **mixed),
        "one bundle with the penalty, tasks mixed | itself": continual("shared", 0.001, "all", **mixed),
        "one bundle per task, tasks mixed | the task's own": continual("bundles", 0.002, "tag", **mixed),
        "one bundle per task, in sequence | the task's own": continual("bundles", 0.004, "tag"),
        "one LoRA per task, in sequence | the task's own": continual("lora_separate", 0.004, "tag"),
        "one LoRA per task + KL penalty, in sequence | all": continual("lora_separate_kl", 0.004, "all"),
        "one bundle per task, in sequence | all": continual("bundles", 0.004, "all"),
        "one LoRA, in sequence | itself": continual("lora", 0.002, "all"),
    }
    table = [(f"| {row} | {{:.2f}} ± {{:.2f}} | {{:d}} |", *mean_sd(v), len(v)) for row, v in rows.items()]
    one_lora, one_bundle, told, _, lora_told, lora_kl, all_on, _ = (mean_sd(v)[0] for v in rows.values())
    loud, lora_all = (fmean(continual(name, 0.004, "all")) for name in ("bundles_loud", "lora_separate"))
    return [
        *table,
        ("reach {:.2f} with the task told", told),
        ("({:.2f} with all on)", fmean(continual("bundles", 0.002, "all", **mixed))),
        ("with the penalty ({:.2f}) and one LoRA ({:.2f})", one_bundle, one_lora),
        ("the same price ({:.2f} with the task told)", lora_told),
        ("bundles end at {:.2f}, LoRAs with a KL penalty at {:.2f}", all_on, lora_kl),
        ("without a penalty bundles at {:.2f} and LoRAs at {:.2f}", loud, lora_all),
        ("with all on end at {:.2f}.", fmean(continual("bundles", 0.004, "all", order="C"))),
    ]


@claims("removal.md")
def removal_claims() -> Claims:
    rows = {
        "gradient ascent on one LoRA": ("ascent", 0.0001),
        "RMU on one LoRA": ("rmu", 0.0003),
        "alpha 0, each bundle trained with the others off": ("owners", 0.0),
        "alpha 0, bundles trained with all on": ("all", 0.0),
    }

    def codes(records: list[Any], when: str) -> float:
        return fmean(record[when]["accuracy"]["codes"] for record in records)

    def steps(records: list[Any]) -> tuple[str, list[float]]:
        """Fields and numbers; where relearning never got there, the last step that was measured."""
        needed = [steps_to_relearn(record) for record in records]
        lengths = [record["relearn"]["all"][-1][0] for record in records]
        fields = ["over {:d}" if n == float("inf") else "{:.0f}" for n in needed]
        return ", ".join(fields), [length if n == float("inf") else n for n, length in zip(needed, lengths)]

    table: Claims = []
    for label, key in rows.items():
        records = removal(*key)
        kept = [fmean(others_kept(record, when) for record in records) for when in ("before", "after")]
        fields, needed = steps(records)
        facts = codes(records, "before"), codes(records, "after")
        table.append((f"| {label} | {{:.2f}} | {{:.2f}} | {{:.2f}} | {{:.2f}} | {fields} |", *facts, *kept, *needed))
    never, owners, ascent, lora = removal("never"), removal("owners"), removal("ascent", 0.0001), removal("none")
    fields, needed = steps(never)
    found = codes(never, "after"), fmean(map(others_kept, never))
    table.append((f"| never taught (a LoRA) | - | {{:.2f}} | - | {{:.2f}} | {fields} |", *found, *needed))
    within = sorted((steps_to_relearn(r) for r in owners if steps_to_relearn(r) != float("inf")), reverse=True)
    length = owners[0]["relearn"]["all"][-1][0]
    alone = fmean(record["alone"]["codes"]["codes"] for record in owners)
    return [
        *table,
        ("needs {:.0f}, {:.0f} and over {:d} steps (three seeds)", *within, length),
        ("LoRA that never knew them {:.0f}, {:.0f} and {:.0f},", *needed),
        ("ascent only {:.0f}, {:.0f} and {:.0f}.", *map(steps_to_relearn, ascent)),
        ("answers {:.2f} of its facts", codes(owners, "before")),
        ("(alone {:.2f}; one LoRA {:.2f})", alone, codes(lora, "after")),
    ]


@claims("rl_separate.md")
def rl_separate_claims() -> Claims:
    owners, everyone = ("separate", "owners", 5e-4), ("separate", "all", 5e-4)
    unrouted, adapter = ("unrouted", "all", 5e-4), ("shared_adapter", "all", 2.5e-4)
    rows = {
        "text rows see their own bundles | all": (*owners, "all on"),
        "text rows see their own bundles | all but RL's": (*owners, "RL off"),
        "text rows see all bundles | all": (*everyone, "all on"),
        "text rows see all bundles | all but RL's": (*everyone, "RL off"),
        "the same bundles, not routed | all": (*unrouted, "all on"),
        "the same bundles, not routed | all but RL's": (*unrouted, "RL off"),
        "one adapter | itself": (*adapter, "all on"),
        "base | none": (*owners, "all off"),
    }
    columns = ("reward", "exact", "preference", "plays_loss")
    table = [
        (f"| {row} |" + " {:.3f} |" * 4, *(fmean(separate(*key, column)) for column in columns))
        for row, key in rows.items()
    ]

    def both(column: str) -> list[float]:
        return [fmean(separate(*key, "all on", column)) for key in (owners, adapter)]

    def ours(setting: str, column: str) -> float:
        return fmean(separate(*owners, setting, column))

    return [
        *table,
        ("(right answers {:.2f} to {:.2f})", ours("all off", "exact"), ours("all on", "exact")),
        ("switched off {:.2f} right answers", ours("RL off", "exact")),
        ("while {:.2f} of {:.2f} in preference", ours("RL off", "preference"), ours("all on", "preference")),
        ("the same switch leaves {:.2f}", fmean(separate(*unrouted, "RL off", "exact"))),
        ("in LM loss ({:.2f} against {:.2f})", *both("plays_loss")),
        ("preferences ({:.2f} against {:.2f})", *both("preference")),
        ("better in reward ({:.2f} against {:.2f})", *both("reward")),
        ("one adapter's ({:.2f})", fmean(separate(*everyone, "all on", "plays_loss"))),
        ("rises to {:.2f}, close", fmean(separate(*everyone, "RL off", "plays_loss"))),
        ("the base's {:.2f}.", ours("all off", "plays_loss")),
    ]


@claims("semantic.md")
def semantic_claims() -> Claims:
    together = {"gate_forward": False}
    rows: dict[str, dict[str, Any]] = {
        "default": {},
        "supports overlap by a quarter": {"overlap": 0.25},
        "supports overlap by a half": {"overlap": 0.5},
        "supports overlap by three quarters": {"overlap": 0.75},
        "two topics": {"topics": 2},
        "topic vector from the lexicon, soft mask": {"mask": "soft", "tau": "lexicon"},
        "all six on in every training row": together,
    }
    table: Claims = []
    for label, cell in rows.items():
        other = topic_change(cell, "other", "all")
        found = own_topic(cell), another_topic(cell), all_topics(cell), fmean(other)
        table.append((f"| {label} | {{:d}} |" + " {:+.3f} |" * 4, len(other), *found))
    wide = {"overlap": 0.75}
    return [
        *table,
        ("its own topic by {:.3f} and", -own_topic({})),
        ("every other ({:.3f} on average)", another_topic({})),
        ("({:.3f} and {:.3f} at an overlap", -own_topic(wide), another_topic(wide)),
        ("raise the loss by {:.3f}; taught", all_topics({})),
        ("(all on {:+.3f})", all_topics(together)),
        ("on its own topic by {:.3f}.", own_topic(together)),
    ]


@claims("heads.md")
def heads_claims() -> Claims:
    right, surprise = "single answers, last token", "single answers, with surprise"
    chance = ("by probability", "AUC")
    simple = ("simple", "all but the length")
    untrained, own_mean = ("subspace", "untrained", "accuracy"), ("subspace", "by a row's own mean")
    probability, numbers = "the answer's probability", "position and log-probabilities"
    # What is held out: part, path in it, measure, baseline, path of the baseline.
    rows: dict[str, tuple[str, tuple[str, ...], str, str, tuple[str, ...]]] = {
        "right answer, last token, AUC": (right, (), "AUC", probability, ("subspace", *chance)),
        "right answer, with surprise, AUC": (surprise, (), "AUC", probability, ("subspace", *chance)),
        "the other piece of a document, of 16": ("contrastive", (), "accuracy", "untrained head", untrained),
        "the next segment, of 64": ("temporal", (), "accuracy", "a row's own mean", own_mean),
        "advantage in its group, correlation": ("advantage", ("group",), "correlation", numbers, ("group", *simple)),
        "advantage of a value baseline, correlation": ("advantage", ("gae",), "correlation", numbers, ("gae", *simple)),
    }
    table: Claims = []

    def row(label: str, part: str, path: tuple[str, ...], measure: str, baseline: str, value: float) -> None:
        ours, whole = head(part, *path, "subspace", measure), head(part, *path, "whole state", measure)
        interval = ours["value"], ours["low"], ours["high"]
        fields = f"| {label} | {{:.2f}} ({{:.2f}} to {{:.2f}}) | {{:.2f}} | {{:.2f}} {baseline} |"
        table.append((fields, *interval, whole["value"], value))

    row("contradiction in a pair, AUC", "consistency, pairs", (), "AUC", "chance", 0.5)
    for label, (part, path, measure, baseline, where) in rows.items():
        row(label, part, path, measure, baseline, head(part, *where)["value"])
    row("next state of the base, R2", "curiosity", (), "R2", "the mean state", 0.0)

    def subspace(part: str, measure: str) -> float:
        return head(part, "subspace", measure)["value"]

    last, expected = "derivations, last token", "derivations, with surprise"
    return [
        *table,
        ("contradictions (AUC {:.2f})", subspace("consistency, pairs", "AUC")),
        ("({:.2f}, or {:.2f} when", subspace(right, "AUC"), subspace(surprise, "AUC")),
        ("error from {:.2f} to {:.2f})", subspace("calibration", "ece before"), subspace("calibration", "ece")),
        ("last token ({:.2f}), but", subspace(last, "accuracy")),
        ("tokens were ({:.2f}), where", subspace(expected, "accuracy")),
        ("is no worse ({:.2f})", subspace(expected, "the likelier side")),
        ("solutions is right ({:.2f}), and", subspace("solutions, with surprise", "accuracy")),
        ("have {:d} held-out items", head(expected, "held_out")),
        ("other derivations {:d}.", head(last, "held_out")),
    ]


@claims("topics.md")
def topics_claims() -> Claims:
    measures = ("held_out", "other_sources", "none_below_half", "two_largest")
    sources = ("lexicon", "embedding", "clusters", "clusters of embeddings")
    table: Claims = [  # 1e-7: a half, kept in single precision, is rounded up
        (
            f"| {source} |" + " {:.2f} |" * 4 + " {:.1f} |",
            *(topic_source(source, measure) + 1e-7 for measure in measures),
            topic_source(source, "milliseconds"),
        )
        for source in sources
    ]
    masks = ("soft", "hard", "stochastic", "rate")
    own = sorted(fmean(topic_mask(mask, "own")) for mask in masks)
    assert min(fmean(topic_mask(mask, "all")) for mask in masks) == fmean(topic_mask("hard", "all"))
    return [
        *table,
        ("topics in {:.2f} of held-out", topic_source("embedding", "held_out")),
        ("documents and {:.2f} of sentences", topic_source("embedding", "other_sources")),
        ("(chance {:.2f})", read("studies/topics/results/topic_sources.json")["baseline"]),
        ("one half in {:.2f} of such texts at most", max(topic_source(s, "both_of_two") for s in sources[1:])),
        ("the right two ({:.2f})", topic_source("embedding", "two_largest") + 1e-7),
        ("under all four ({:.3f} to {:.3f})", own[0], own[-1]),
        ("all bundles on ({:+.3f})", fmean(topic_mask("hard", "all"))),
    ]


@claims("distill.md")
def distill_claims() -> Claims:
    record = read("benchmarks/results/distill.json")
    found = record["over_seeds"]
    labels = {"plays": "plays", "docs": "docs", "manual": "manual (the bundles were not trained on it)"}
    table = [
        (f"| {label} |" + " {:.3f} |" * 3, *(-found["scores"][text][m][0] for m in ("base", "bundles", "lora")))
        for text, label in labels.items()
    ]
    assert all(abs(s["bundles"][0] - s["lora"][0]) < 0.01 for s in found["scores"].values())
    assert len(record["seeds"]) == 2
    return [
        *table,
        ("bundles' in {:.2f} of held-out places", found["agreement"]["lora"][0]),
        ("(the base in {:.2f})", found["agreement"]["base"][0]),
        ("a KL of {:.3f} (the base {:.3f})", found["kl"]["lora"][0], found["kl"]["base"][0]),
        ("to within {:.2f} on all", 0.01),  # asserted above
    ]


@claims("distributed.md")
def distributed_claims() -> Claims:
    record = read("benchmarks/results/distributed_check.json")
    ways = [record["ddp"], record["fsdp2"]]
    differences = [max(way["difference_to_one_process_by_its_movement"].values()) for way in ways]
    assert all(way["ranks_bit_identical"] for way in ways)
    assert all(all(way["off_owner_bundles_bitwise_unchanged"].values()) for way in ways)
    assert max(differences) < 1e-6  # 0.0001 %
    megabytes = [way["local_block_bytes"] / 1e6 for way in ways]
    last = [way["loss"][-1] for way in (record["one_process"], *ways)]
    return [
        ("by less than {:.4f} % of", 0.0001),  # asserted above
        ("keeps {:.0f} MB of them instead of {:.0f} MB", *reversed(megabytes)),
        ("share of the distance moved | {:.1e} | {:.1e} |", *differences),
        ("frozen blocks on a rank, MB | {:.0f} | {:.0f} |", *megabytes),
        ("(one GPU {:.6f}) | {:.6f} | {:.6f} |", *last),
    ]


# ---- the pages against the claims ----


def text_of(page: str) -> str:
    return one_line((FOLDER / page).read_text(encoding="utf-8"))


def test_every_page_has_claims() -> None:
    assert sorted(CLAIMS) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_numbers_are_those_of_the_records(page: str) -> None:
    assert missing(text_of(page), CLAIMS[page]()) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_number_is_checked(page: str) -> None:
    assert uncovered(text_of(page), CLAIMS[page](), ALLOWED.get(page, [])) == []


def test_a_number_without_a_record_is_found() -> None:
    claims, text = [("rises by {:.2f} in", 0.271)], "It rises by 0.27 in all. `0.31` | a | 3 | "
    assert missing(text, claims) == []
    assert len(uncovered(text, claims)) == 1
    assert uncovered(text, [*claims, ("| a | {:d} |", 3)]) == []
    assert missing(text.replace("0.27", "0.28"), claims) == ["rises by 0.27 in"]
    assert len(uncovered(text.replace("0.27", "0.28"), claims)) == 2
    assert missing(text + text, claims) == ["rises by 0.27 in"]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (FOLDER / page).read_text(encoding="utf-8")
    paths = re.findall(r"`([\w./]+/[\w./]*)`", text) + re.findall(
        r"^\w.*? ((?:recipes|studies|benchmarks)/\S+\.py)", text, re.M
    )
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert page == "index.md" or (paths and len(re.findall(r"!\[[^\]]+\]\(", text)) == 1)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [link for link in links if not (FOLDER / link).exists()] == []


@pytest.mark.slow
def test_figures_are_drawn_from_the_records(tmp_path: Any) -> None:
    figures.draw(tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name for path in FOLDER.glob("*.svg")}
    assert drawn == {page.replace(".md", ".svg") for page in PAGES if page != "index.md"}
