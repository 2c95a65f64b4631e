"""The tables of docs/study.md, a function each; a dash for what was not run."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from studies.continual import study as s
from studies.continual.study import ALL_ON, M0, M1, M3, MULTI, ORDERS, SEPARATE, TASKS, Key, Study, ci, pm
from studies.measures.continual import interference_matrix


def table(head: str, rows: list[list[str]]) -> str:
    names = head.split("|")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [names, ["---"] * len(names), *rows])


def title(key: Key) -> str:
    return f"`{key[0]}`" + ("" if key[1] == "sequence" else ", mixture")


def after_every_phase(study: Study) -> str:
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
                    cells = [pm([float(t[phase, n]) for t in tables], 2) for n in range(3)]
                    where = "before" if phase == 0 else f"after {tasks[phase - 1]}"
                    if phase or (key == M0 and order == "A"):
                        rows.append([title(key) if phase else "the base", mode, order, where, *cells, str(len(runs))])
    return table("condition|mode|order|when|memory|logic|meta|n", rows)


def interference(study: Study) -> str:
    """What each phase changed, order A."""
    shown = [(M0, "all"), (("full", "sequence"), "all"), (("lora_replay", "sequence"), "all"), (M3, "all"), (M3, "tag")]
    rows = []
    for key, mode in shown:
        runs = [r for r in s.finals(study, key, ORDERS["A"]) if mode in s.modes_of(r)]
        matrices = [interference_matrix(s.scores(study, r, mode)) for r in runs]
        for phase, task in enumerate(ORDERS["A"] if runs else ()):
            cells = [pm([float(m[phase, n]) for m in matrices], 2, sign=True) for n in range(len(TASKS))]
            rows.append([title(key), mode, task, *cells, str(len(runs))])
    return table("condition|mode|phase|memory|logic|meta|n", rows)


def specialisation(study: Study) -> str:
    """Each bundle (or LoRA) alone on, at the end."""
    rows = []
    for key in (M1, M3, SEPARATE):
        runs = [r for r in s.finals(study, key, ORDERS["A"]) if r["phases"][-1].get("alone")]
        for bundle in TASKS if runs else ():
            found = [r["phases"][-1]["alone"].get(bundle, {}) for r in runs]
            cells = [pm([f[task] for f in found if task in f], 2) for task in TASKS]
            rows.append([title(key), bundle, *cells, str(len(runs))])
    return table("condition|alone on|memory|logic|meta|n", rows) if rows else "Not run."


def conditions(study: Study) -> str:
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
                cells += [pm(v[m], 2) for m in ("average", *TASKS, "learnt")]
                cells += [pm(v[m], 2, sign=m != "forgetting") for m in ("forgetting", "bwt", "fwt")]
                cells += [pm(v["rise"], 3, sign=True), pm(v["auc"], 2), pm(v["brier"], 3), pm(v["f1"], 2)]
                rows.append([*cells, pm([s.mean(v["seconds"])], 0), str(len(found))])
    rows.append(["M2, learned router: later work", *["-"] * 16])
    head = "condition|mode|rate|trained, M|average|memory|logic|meta|learnt|forgetting|BWT|FWT|text|meta AUC|meta Brier"
    return table(head + "|memory F1|s|n", [row + ["-"] * (18 - len(row)) for row in rows])


def against_m0(study: Study) -> str:
    rows = []
    for key in s.keys(study, "sequence"):
        for mode in s.modes(study, key):
            reduced, gained = s.reduction(study, key, mode), s.difference(study, key, mode, M0, "all")
            if reduced is None or gained is None or key == M0:
                continue
            notes = []
            if s.untouched(study, key, mode):
                notes.append("trivial: not one answer changed after its phase")
            if s.too_little_learnt(study, key, mode):
                notes.append("learnt less than 0.8 of what M0 did: little to forget")
            early = ci(s.reduction_before_meta(study, key, mode))
            rows.append([title(key), mode, ci(reduced), early, ci(gained, 3), str(reduced.runs), "; ".join(notes)])
    head = "condition|mode|reduction of forgetting|of memory by logic alone, order A|final average minus M0's|runs|note"
    return table(head, rows)


def families(study: Study) -> str:
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
                cells.append(pm([float(f[of].mean()) for f in found if len(f) == len(kinds[task])], 2))
            rows.append([task, family, str(len(of)), "-" if majority is None else f"{majority:.2f}", *cells])
    return table("task|family|items|majority|" + "|".join(f"{title(k)}, {m}" for k, m in shown), rows)


def rates(study: Study, runs: list[dict[str, Any]]) -> str:
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
    return table("condition|rate: mean accuracy on validation items|chosen|", rows)


def alphas(study: Study) -> str:
    rows = []
    for key in s.keys(study, "sequence"):
        for others in ("others_off", "others_on"):
            for task in TASKS:
                found = s.control(study, key, others, task)
                if found is not None:
                    cells = [pm(found[name], 2) for name in ("spearman", "own", "cross")]
                    rows.append([title(key), others[7:], task, *cells, str(len(found["own"]))])
    return (
        table("condition|others|alpha of|Spearman|own task moves|others, share of that|n", rows) if rows else "Not run."
    )


def shrink(study: Study) -> str:
    rows = []
    for key, state in ((M3, "all"), *((M3, task) for task in TASKS), (ALL_ON, "all")):
        found = s.shrunk(study, key, state)
        if not found:
            continue
        cells = [pm([r[name] for r in found], 2) for name in ("goal", "scale", "average", *TASKS)]
        best = f"{pm([r['best'] for r in found], 2)} at {pm([r['best_scale'] for r in found], 2)}"
        words = f"{title(key)}, " + ("all on" if state == "all" else f"{state}'s alone")
        rows.append([words, *cells, pm([r["rise"] for r in found], 3, sign=True), best, str(len(found))])
    head = "as far as|distance|factor|average|memory|logic|meta|text|best average, at factor|n"
    return table(head, rows) if rows else "Not run."


def h4_spaces(study: Study) -> dict[str, str]:
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


def h4_seeds(study: Study) -> list[str]:
    """Those of which there are bundles' features and M0's."""
    roles = h4_spaces(study)
    if study.spaces is None or not {"M0", "bundle space (the three side by side)"} <= roles.keys():
        return []
    ours = study.spaces["spaces"][roles["bundle space (the three side by side)"]]
    return [seed for seed in ours if seed in study.spaces["spaces"][roles["M0"]]]


def spaces(study: Study) -> str:
    if study.spaces is None:
        return "Not run."
    rows = []
    for role, name in h4_spaces(study).items():
        for n, depth in enumerate(study.spaces["depths"]):
            for at in ("last", "mean"):
                got = [of_seed[at][n] for of_seed in study.spaces["spaces"][name].values()]
                tasks = [[g["cka_tasks"].get(p) for g in got] for p in ("memory-logic", "memory-meta", "logic-meta")]
                each = [[g["silhouette"] for g in got], *tasks, [g["cka_trunk"] for g in got]]
                numbers = [pm([value for value in values if value is not None], 2) for values in each]
                rows.append([role, str(depth), at, pm([g["accuracy"] for g in got]), *numbers, str(len(got))])
    head = "space|layer|token|probe|silhouette|memory-logic|memory-meta|logic-meta|CKA to the trunk|n"
    return table(head, rows)


def code(study: Study) -> str:
    rows = []
    place = {key: n for n, key in enumerate([("base", None), *s.keys(study)])}
    for r in sorted(study.code, key=lambda r: place.get((r["condition"], r.get("schedule")), len(place))):
        name = "the base" if r["condition"] == "base" else title((r["condition"], r["schedule"]))
        solved = ", ".join(f"{phase['code']['passed']:g}" for phase in r["phases"])
        rows.append([name, solved, f"{r['phases'][-1]['code']['tasks']}"])
    if not rows:
        return "Not run."
    shares = [phase["code"]["pass@1"] for r in study.code for phase in r["phases"]]
    few = "\n\nA model of this size solves next to none of them: the rows do not differ." if max(shares) < 0.05 else ""
    return table("condition|solved after each phase|problems", rows) + few


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


def removal(study: Study) -> str:
    if not study.removal:
        return "Not run."
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
            cells = [f"{mark}{words}{mark}", f"{rate:g}" if rate else "", pm(before, 2), pm(kept, 2)]
            cells += [pm([r["after"]["accuracy"][forget] for r in found], 2), pm([s.retained(r) for r in found], 2)]
            cells += [pm([r["after"]["forget_kl"] for r in found], 2), pm(text, 3, sign=True)]
            cells += [f"{count} of {len(found)}, {pm(took, 0)}" if took else ""]
            rows.append([*cells, str(len(found))])
            if rate == s.removal_key(study, variant):
                at = [point[0] for point in found[0]["relearn"]["all"]]
                curve = [pm([r["relearn"]["all"][n][1] for r in found], 2) for n in range(len(at))]
                rest = pm([r["relearn"]["part"][-1][2] for r in found], 2)
                start = pm([r["relearn"]["part"][0][2] for r in found], 2)
                more.append([words, *curve, half_way(study, found, forget), start, rest])
    head = "removed by|rate|before: it|before: the rest|after: it|after: the rest|KL to the base on it|text"
    steps = [str(p[0]) for p in study.removal[0]["relearn"]["all"]]
    back = f"relearnt after|{'|'.join(f'{n} steps' for n in steps)}|steps to half|unseen part, at first|and at the end"
    return f"{table(head + '|removed in, steps|n', rows)}\n\n{table(back, more)}"


def half_way(study: Study, found: list[Any], forget: str) -> str:
    """Steps until half of what the taught LoRA knew is there again."""
    taught = [r["before"]["accuracy"][forget] for r in study.removal if r["variant"] == "none"]
    if not taught:
        return "-"
    steps = [s.steps_to(r["relearn"]["all"], fmean(taught) / 2) for r in found]
    reached = [x for x in steps if x is not None]
    late = len(steps) - len(reached)
    return pm(reached, 0) + (f" ({late} of {len(steps)} not at all)" if late else "")
