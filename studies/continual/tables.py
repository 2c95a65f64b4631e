"""The tables of the continual study, a function each; a dash for what was not run."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from studies.continual import study as s
from studies.continual.study import ALL_ON, M0, M1, M3, MULTI, ORDERS, SEPARATE, TASKS, Key, Study
from studies.measures.continual import interference_matrix
from studies.tables import Table, interval, mean, mean_sd


def title(key: Key) -> str:
    return f"`{key[0]}`" + ("" if key[1] == "sequence" else ", mixture")


def after_every_phase(study: Study) -> Table:
    rows = []
    by_order = ((M0, "all"), (M3, "tag"), (M3, "all"))
    for key in s.keys(study, "sequence"):
        if key not in (
            M0,
            ("full", "sequence"),
            M3,
            SEPARATE,
            ("lora_replay", "sequence"),
            ("bundles_trunk", "sequence"),
        ):
            continue
        for order, tasks in ORDERS.items():
            runs = s.finals(study, key, tasks)
            for mode in (m for m in s.modes(study, key) if runs and (order == "A" or (key, m) in by_order)):
                tables = [s.scores(study, r, mode) for r in runs]
                for phase in range(4):
                    cells = [mean_sd([float(t[phase, n]) for t in tables], 2) for n in range(3)]
                    where = "before" if phase == 0 else f"after {tasks[phase - 1]}"
                    if phase or (key == M0 and order == "A"):
                        rows.append([title(key) if phase else "the base", mode, order, where, *cells, str(len(runs))])
    return Table(
        "Accuracy after every phase", ["condition", "mode", "order", "when", "memory", "logic", "meta", "n"], rows
    )


def interference(study: Study) -> Table:
    """What each phase changed, order A."""
    shown = [(M0, "all"), (("full", "sequence"), "all"), (("lora_replay", "sequence"), "all"), (M3, "all"), (M3, "tag")]
    rows = []
    for key, mode in shown:
        runs = [r for r in s.finals(study, key, ORDERS["A"]) if mode in s.modes_of(r)]
        matrices = [interference_matrix(s.scores(study, r, mode)) for r in runs]
        for phase, task in enumerate(ORDERS["A"] if runs else ()):
            cells = [mean_sd([float(m[phase, n]) for m in matrices], 2, sign=True) for n in range(len(TASKS))]
            rows.append([title(key), mode, task, *cells, str(len(runs))])
    return Table(
        "What each phase changed, order A", ["condition", "mode", "phase", "memory", "logic", "meta", "n"], rows
    )


def specialisation(study: Study) -> Table:
    """Each bundle (or LoRA) alone on, at the end."""
    rows = []
    for key in (M1, M3, SEPARATE):
        runs = [r for r in s.finals(study, key, ORDERS["A"]) if r["phases"][-1].get("alone")]
        for bundle in TASKS if runs else ():
            found = [r["phases"][-1]["alone"].get(bundle, {}) for r in runs]
            cells = [mean_sd([f[task] for f in found if task in f], 2) for task in TASKS]
            rows.append([title(key), bundle, *cells, str(len(runs))])
    return Table(
        "Each part alone on, at the end of order A", ["condition", "alone on", "memory", "logic", "meta", "n"], rows
    )


def conditions(study: Study) -> Table:
    rows = []
    for schedule in ("mixture", "sequence"):
        for key in s.keys(study, schedule):
            for mode in s.modes(study, key):
                v = {
                    m: s.values(study, key, mode, m) for m in ("average", *TASKS, "learnt", "forgetting", "bwt", "fwt")
                }
                v |= {m: s.values(study, key, mode, m) for m in ("rise", "auc", "brier", "f1", "seconds")}
                mark = "**" if mode == s.primary(study, key) else ""
                found = s.finals(study, key, ORDERS["A"] if schedule == "sequence" else None)
                if not found:
                    continue
                sizes = f"{found[0]['trainable'] / 1e6:.2f}"
                cells = [f"{title(key)}: {s.label(study, key[0])}", f"{mark}{mode}{mark}", f"{found[0]['lr']:g}", sizes]
                cells += [mean_sd(v[m], 2) for m in ("average", *TASKS, "learnt")]
                cells += [mean_sd(v[m], 2, sign=m != "forgetting") for m in ("forgetting", "bwt", "fwt")]
                cells += [
                    mean_sd(v["rise"], 3, sign=True),
                    mean_sd(v["auc"], 2),
                    mean_sd(v["brier"], 3),
                    mean_sd(v["f1"], 2),
                ]
                rows.append([*cells, mean_sd([mean(v["seconds"])], 0), str(len(found))])
    head = "condition|mode|rate|trained, M|average|memory|logic|meta|learnt|forgetting|BWT|FWT|text|meta AUC|meta Brier"
    return Table("All conditions", f"{head}|memory F1|s|n".split("|"), rows)


def against_m0(study: Study) -> Table:
    rows = []
    for key in s.keys(study, "sequence"):
        for mode in s.modes(study, key):
            reduced, gained = s.reduction(study, key, mode), s.difference(study, key, mode, M0, "all")
            if reduced is None or gained is None or key == M0:
                continue
            notes = []
            if s.untouched(study, key, mode):
                notes.append("no answer changed after its phase")
            if s.too_little_learnt(study, key, mode):
                notes.append("learnt less than 0.8 of what M0 did")
            early = interval(s.reduction_before_meta(study, key, mode))
            rows.append(
                [title(key), mode, interval(reduced), early, interval(gained, 3), str(reduced.runs), "; ".join(notes)]
            )
    head = "condition|mode|reduction of forgetting|of memory by logic alone, order A|final average minus M0's|runs|note"
    return Table("Against M0, one LoRA in sequence", head.split("|"), rows)


def families(study: Study) -> Table:
    """Accuracy of each family of test items at the end."""
    kinds = study.base.get("items") or {}
    shown = [(MULTI, "all"), (M1, "tag"), (M1, "all"), (M0, "all"), (M3, "tag"), (M3, "all")]
    shown = [(key, mode) for key, mode in shown if mode in s.modes(study, key)]
    rows = []
    for task in TASKS:
        for family in dict.fromkeys(kinds.get(task, [])):
            of = [n for n, name in enumerate(kinds[task]) if name == family]
            majority = (study.base.get("majority") or {}).get(task, {}).get(family)
            cells = []
            for key, mode in shown:
                runs = s.finals(study, key, None if key[1] == "mixture" else ORDERS["A"])
                found = [s.run_of(study, r, mode).items[task][-1] for r in runs]
                cells.append(mean_sd([float(f[of].mean()) for f in found if len(f) == len(kinds[task])], 2))
            rows.append([task, family, str(len(of)), "-" if majority is None else f"{majority:.2f}", *cells])
    columns = ["task", "family", "items", "majority", *(f"{title(k)}, {m}" for k, m in shown)]
    return Table("Families of test items", columns, rows)


def rates(study: Study, runs: list[dict[str, Any]]) -> Table:
    sources = {(run["condition"], run["schedule"]): run["rate_of"] for run in runs if "rate_of" in run}
    asked = {(run["condition"], run["schedule"]): run.get("rates", []) for run in runs}
    rows = []
    for key in s.keys(study):
        found = s.grid(study, key)
        tried = ", ".join(f"{lr:g}: {fmean(v):.3f}" for lr, v in found.items())
        if not tried:
            tried = f"that of {title(tuple(sources[key]))}" if key in sources else "no search"
        notes = ["at the edge of what was tried"] if s.at_the_edge(study, key) else []
        if missing := [f"{lr:g}" for lr in map(float, asked.get(key, [])) if lr not in found]:
            notes.append(f"without a result: {', '.join(missing)}")
        rows.append([title(key), tried, f"{s.chosen(study, key):g}", "; ".join(notes)])
    return Table("Learning rates", ["condition", "rate: mean accuracy on validation items", "chosen", ""], rows)


def alphas(study: Study) -> Table:
    rows = []
    for key in s.keys(study, "sequence"):
        for others in ("others_off", "others_on"):
            for task in TASKS:
                found = s.control(study, key, others, task)
                if found is not None:
                    cells = [mean_sd(found[name], 2) for name in ("spearman", "own", "cross")]
                    rows.append([title(key), others[7:], task, *cells, str(len(found["own"]))])
    return Table(
        "What an alpha moves",
        ["condition", "others", "alpha of", "Spearman", "own task moves", "others, share of that", "n"],
        rows,
    )


def shrink(study: Study) -> Table:
    rows = []
    for key, state in ((M3, "all"), *((M3, task) for task in TASKS), (ALL_ON, "all")):
        found = s.shrunk(study, key, state)
        if not found:
            continue
        cells = [mean_sd([r[name] for r in found], 2) for name in ("goal", "scale", "average", *TASKS)]
        best = f"{mean_sd([r['best'] for r in found], 2)} at {mean_sd([r['best_scale'] for r in found], 2)}"
        words = f"{title(key)}, " + ("all on" if state == "all" else f"{state}'s alone")
        rows.append([words, *cells, mean_sd([r["rise"] for r in found], 3, sign=True), best, str(len(found))])
    head = "as far as|distance|factor|average|memory|logic|meta|text|best average, at factor|n"
    return Table("M0 scaled to the distance of the bundles", head.split("|"), rows)


def space_names(study: Study) -> dict[str, str]:
    """What is compared, by role -> name in spaces.json; those that are there."""
    wanted = {
        "trunk": "trunk",
        "M0": "lora/sequence/hidden",
        "bundles' hidden states": "bundles/sequence/hidden",
        "what memory's bundle adds": "bundles/sequence/memory",
        "what logic's bundle adds": "bundles/sequence/logic",
        "what meta's bundle adds": "bundles/sequence/meta",
        "bundle space (the three side by side)": "bundles/sequence/bundles",
    }
    return {role: name for role, name in wanted.items() if study.spaces and name in study.spaces["spaces"]}


def spaces(study: Study) -> Table:
    rows: list[list[str]] = []
    for role, name in space_names(study).items():
        for n, depth in enumerate(study.spaces["depths"] if study.spaces else ()):
            for at in ("last", "mean"):
                got = [of_seed[at][n] for of_seed in study.spaces["spaces"][name].values()]
                tasks = [[g["cka_tasks"].get(p) for g in got] for p in ("memory-logic", "memory-meta", "logic-meta")]
                each = [[g["silhouette"] for g in got], *tasks, [g["cka_trunk"] for g in got]]
                numbers = [mean_sd([value for value in values if value is not None], 2) for values in each]
                rows.append([role, str(depth), at, mean_sd([g["accuracy"] for g in got]), *numbers, str(len(got))])
    head = "space|layer|token|probe|silhouette|memory-logic|memory-meta|logic-meta|CKA to the trunk|n"
    return Table("Where the tasks lie", head.split("|"), rows)


def code(study: Study) -> Table:
    rows = []
    place = {key: n for n, key in enumerate([("base", None), *s.keys(study)])}
    for r in sorted(study.code, key=lambda r: place.get((r["condition"], r.get("schedule")), len(place))):
        name = "the base" if r["condition"] == "base" else title((r["condition"], r["schedule"]))
        solved = ", ".join(f"{phase['code']['passed']:g}" for phase in r["phases"])
        rows.append([name, solved, f"{r['phases'][-1]['code']['tasks']}"])
    return Table("HumanEval, all parts on", ["condition", "solved after each phase", "problems"], rows)


# ---- removal ----

REMOVAL_WORDS = {
    "none": "LoRA, nothing removed",
    "ascent": "LoRA, gradient ascent",
    "ascent_retain": "LoRA, ascent and descent on the rest",
    "rmu": "LoRA, RMU-style",
    "owners": "bundles, alpha 0 (trained with only the own one on)",
    "all": "bundles, alpha 0 (trained with all on)",
    "never": "LoRA that was never taught it",
    "base": "the base",
}


def removal(study: Study) -> list[Table]:
    """What removal takes away and keeps; and how fast the removed facts are learnt again."""
    if not study.removal:
        return []
    base = next((r for r in study.removal if r["variant"] == "base"), None)
    base_text = base["after"]["text"] if base else None
    rows, more = [], []
    for variant, words in REMOVAL_WORDS.items():
        for rate in sorted({r["rate"] for r in study.removal if r["variant"] == variant}):
            found = s.removal_cells(study, variant, rate)
            forget = found[0]["settings"]["forget"]
            before = [r["before"]["accuracy"][forget] for r in found if "before" in r]
            kept = [s.retained(r, "before") for r in found if "before" in r]
            mark = "**" if rate == s.removal_key(study, variant) and rate else ""
            text = [fmean(r["after"]["text"][d] - base_text[d] for d in base_text) for r in found] if base_text else []
            count = sum(r["unlearn"]["removed"] for r in found if "unlearn" in r)
            took = [float(r["unlearn"]["steps"]) for r in found if "unlearn" in r]
            cells = [f"{mark}{words}{mark}", f"{rate:g}" if rate else "", mean_sd(before, 2), mean_sd(kept, 2)]
            cells += [
                mean_sd([r["after"]["accuracy"][forget] for r in found], 2),
                mean_sd([s.retained(r) for r in found], 2),
            ]
            cells += [mean_sd([r["after"]["forget_kl"] for r in found], 2), mean_sd(text, 3, sign=True)]
            cells += [f"{count} of {len(found)}, {mean_sd(took, 0)}" if took else ""]
            rows.append([*cells, str(len(found))])
            if rate == s.removal_key(study, variant):
                at = [point[0] for point in found[0]["relearn"]["all"]]
                curve = [mean_sd([r["relearn"]["all"][n][1] for r in found], 2) for n in range(len(at))]
                rest = mean_sd([r["relearn"]["part"][-1][2] for r in found], 2)
                start = mean_sd([r["relearn"]["part"][0][2] for r in found], 2)
                more.append([words, *curve, half_way(study, found, forget), start, rest])
    head = "removed by|rate|before: it|before: the rest|after: it|after: the rest|KL to the base on it|text"
    steps = [str(p[0]) for p in study.removal[0]["relearn"]["all"]]
    back = f"relearnt after|{'|'.join(f'{n} steps' for n in steps)}|steps to half|unseen part, at first|and at the end"
    return [
        Table("Removal", f"{head}|removed in, steps|n".split("|"), rows),
        Table("Learnt again after removal", back.split("|"), more),
    ]


def half_way(study: Study, found: list[Any], forget: str) -> str:
    """Steps until half of what the taught LoRA knew is there again."""
    taught = [r["before"]["accuracy"][forget] for r in study.removal if r["variant"] == "none"]
    if not taught:
        return "-"
    steps = [s.steps_to(r["relearn"]["all"], fmean(taught) / 2) for r in found]
    reached = [x for x in steps if x is not None]
    late = len(steps) - len(reached)
    return mean_sd(reached, 0) + (f" ({late} of {len(steps)} not at all)" if late else "")


# ---- what is missing ----


def missing(study: Study, runs: list[dict[str, Any]]) -> Table:
    """Runs of continual.yaml without a result at the chosen rate, and every cell that failed."""
    rows = []
    for run in runs:
        key = run["condition"], run["schedule"]
        for order, count in run.get("orders", {"A": run.get("seeds", 3)}).items():
            have = {r["seed"] for r in s.finals(study, key, ORDERS[order])}
            if lacking := [str(seed) for seed in range(count) if seed not in have]:
                rows.append([title(key), order, ", ".join(lacking), "not run"])
    for r in study.failed:
        rows.append([title((r["condition"], r["schedule"])), s.order_name(r), str(r["seed"]), last_line(r)])
    for r in study.removal_failed:
        rows.append([f"removal `{r['variant']}` {r['rate']:g}", "", str(r["seed"]), last_line(r)])
    return Table("Not run, or failed", ["condition", "order", "seeds", "why"], rows)


def last_line(record: s.Record) -> str:
    """The last line of a record's error."""
    return (record["error"].strip().splitlines() or ["no message"])[-1][:200].replace("`", "'").replace("|", "/")
