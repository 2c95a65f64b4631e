"""Writes docs/study.md and its pictures from what recipes/continual.py and recipes/removal.py recorded.

    python studies/continual/report.py                        # the page and its plots
    python studies/continual/report.py --features FOLDER      # spaces.json and spaces.svg first, from features

All records are in recipes/results/continual/. What was not run is a dash in the tables and a line at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from studies.continual import plots as plots
from studies.continual import reflection as reflection
from studies.continual import spaces as _spaces
from studies.continual import study as s
from studies.continual import tables as tables
from studies.continual.answer import short_answer
from studies.continual.routing import section as routing
from studies.continual.study import M3, ORDERS, Study
from studies.continual.words import HYPOTHESES, costs, removal_claims, surprises, weaknesses


ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "recipes/results/continual", ROOT / "docs/study.md"
RUNS = ROOT / "recipes/continual.yaml"


def asked() -> list[dict[str, Any]]:
    return yaml.safe_load(RUNS.read_text(encoding="utf-8"))["runs"]


def bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "- Nothing that these records show."


def not_there(study: Study, runs: list[dict[str, Any]]) -> list[str]:
    """Runs of continual.yaml without a result at the chosen rate, and every cell that failed."""
    said = []
    for run in runs:
        key = run["condition"], run["schedule"]
        for order, count in run.get("orders", {"A": run.get("seeds", 3)}).items():
            have = {r["seed"] for r in s.finals(study, key, ORDERS[order])}
            if missing := [str(seed) for seed in range(count) if seed not in have]:
                where = "" if order == "A" else f", order {order}"
                said.append(f"{tables.title(key)}{where}: seed {', '.join(missing)} not run")
    if not any(r.get("reflection") for r in study.records):
        said.append("Judging its own answers (reflection): not run yet")
    coded = {(r["condition"], r.get("schedule")) for r in (*study.code, *study.failed) if r["stage"] == "code"}
    if missing := [tables.title(key) for key in s.keys(study) if key not in coded]:
        said.append(f"HumanEval: {'; '.join(missing)}")
    for r in study.failed:
        cell = f"{tables.title((r['condition'], r['schedule']))}, {s.order_name(r)}, seed {r['seed']}, rate {r['lr']:g}"
        said.append(f"{'HumanEval, ' if r['stage'] == 'code' else ''}{cell}: failed: `{last_line(r)}`")
    for r in study.removal_failed:
        said.append(f"removal `{r['variant']}` {r['rate']:g}, seed {r['seed']}: failed: `{last_line(r)}`")
    return said


def progress(study: Study, runs: list[dict[str, Any]]) -> str:
    """How much of what is asked for there is; the page of a part must not read like that of the whole."""
    wanted = have = 0
    for run in runs:
        for order, count in run.get("orders", {"A": run.get("seeds", 3)}).items():
            seeds = {r["seed"] for r in s.finals(study, (run["condition"], run["schedule"]), ORDERS[order])}
            wanted, have = wanted + count, have + len(seeds & set(range(count)))
    removal = "removal is measured" if study.removal else "removal is not measured yet"
    if have == wanted:
        return f"All {wanted} runs of `continual.yaml` are here; {removal}."
    return (
        f"**A part: {have} of {wanted} runs of `continual.yaml` are here, and {removal}.** Where a row has one\n"
        "seed, its interval is over test items only, and a verdict of fewer than three runs is called preliminary."
    )


def last_line(record: s.Record) -> str:
    return (record["error"].strip().splitlines() or ["no message"])[-1][:200].replace("`", "'")


def times(study: Study) -> str:
    total = [r["seconds"]["total"] for r in study.records if r.get("seconds")]
    gone = [r["seconds"] for r in study.removal]
    if not total:
        return "Seconds were not recorded."
    return (
        f"{len(total)} cells of `continual.py` took {sum(total):.0f} s in all, {s.mean(total):.0f} s each in the mean"
        + (f"; {len(gone)} of `removal.py` {sum(gone):.0f} s" if gone else "")
        + ". They ran side by side, several a GPU, so these are not GPU seconds."
    )


def environment(study: Study) -> str:
    found = [r for r in (study.base, *study.records) if r.get("versions")]
    if not found:
        return "versions not recorded"
    last = found[-1]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    tests = (study.base.get("counts") or {}).get("test", {})
    items = ", ".join(f"{n} of {task}" for task, n in tests.items())
    return f"{last.get('device')}, {versions}, {str(last.get('date'))[:10]}. Test items: {items or 'not recorded'}"


def page(study: Study, runs: list[dict[str, Any]]) -> str:
    """The page; `runs` are those of continual.yaml."""
    verdicts = {name: (words, *judge(study)) for name, (words, judge) in HYPOTHESES.items()}
    n_main = len({r["seed"] for r in s.finals(study, M3, ORDERS["A"])})
    picture = (
        "\n\n![Tasks in hidden states and in bundle space](../recipes/results/continual/spaces.svg)"
        if study.spaces
        else ""
    )
    relearning = "\n\n![Relearning](../recipes/results/continual/removal.svg)" if study.removal else ""
    alphas = "\n\n![Accuracy over alpha](../recipes/results/continual/alphas.svg)"
    sweeps = alphas if plots.has_alphas(study) else ""
    own = f"\n\n- {claimed}" if (claimed := reflection.claim(study)) else ""
    orders = "; ".join(f"{name}: {', '.join(order)}" for name, order in ORDERS.items())
    return f"""# Does separation reduce interference?

`python studies/continual/report.py` writes this page from the records in
[`recipes/results/continual/`](../recipes/results/continual/), which `recipes/continual.py` and `recipes/removal.py`
left: SmolLM2-135M-Instruct, {environment(study)}.

Three tasks are learnt, together ("mixture") or one after another: **memory** (facts), **logic** (reasoning), **meta**
(telling right answers from wrong). Orders: {orders}.
Mean ± standard deviation over seeds ({n_main} for the main contrast); intervals are 95 %, bootstrapped over test items
and over runs, in pairs of one seed and order.

{progress(study, runs)}

## Short answer

{bullets(short_answer(study))}

## Verdicts

{tables.table("|hypothesis|verdict", [[name, words, verdict] for name, (words, verdict, _) in verdicts.items()])}

{(chr(10) * 2).join(f"**{name}.** {text}" for name, (_, _, text) in verdicts.items())}

A bundle that nobody touches again cannot forget: with a frozen trunk and the true tag a forgetting of 0 is how it is
built, and is called trivial, no finding. Separate LoRAs with a tag have it too.

## What routing adds to separate parameters

{routing(study)}

## What separation costs, and gives, family by family

Bundles with the true tag against one LoRA, both on the mixture; families of test items that differ by more than 0.1.

{bullets(costs(study))}

## What surprised

{bullets(surprises(study))}

## What is weak

{bullets(weaknesses(study))}

## All conditions

Modes: *tag*, the task's own bundle (or LoRA) alone; *nearest*, the same with a tag predicted from the prompt;
*prefix*, it and those learnt before; *uniform*, all at a third; *all*, all at 1. Bold: the mode in which the rate was
chosen. *average*: accuracy over the three tasks at the end; *learnt*: of every task just after its own phase;
*forgetting* after Chaudhry et al. (2018), *BWT* and *FWT* after Lopez-Paz & Ranzato (2017); *text*: rise of the loss on
text nobody trained on. Order A; *s*: seconds of a cell, side by side with others.

{tables.conditions(study)}

{times(study)}

![Accuracy after every phase](../recipes/results/continual/phases.svg)

## Against M0

M0 is one LoRA, trained on the tasks in turn. All orders and seeds that both have.

{tables.against_m0(study)}

## After every phase

{tables.after_every_phase(study)}

## What each phase changed

The interference matrix, order A: the accuracy after a phase minus that before it.

{tables.interference(study)}

## What each bundle can do alone

{tables.specialisation(study)}

## Families of test items

{tables.families(study)}

## Learning rates

The best mean accuracy on validation items at the end; of rates within {s.TIE} of it the one with the lowest training
loss. (Before the second rule, which came when 27 cells were there, an M0 that had learnt half of memory was taken.)

{tables.rates(study, runs)}

## What an alpha moves

Accuracy over alpha from 0 to 1; the others all off, or all on.

{tables.alphas(study)}{sweeps}

## Judging its own answers

Reflection: with its own part on the model answers items of memory and logic, then it is asked of each of its answers
whether it is right, as meta's rows ask, over meta's alpha. *AUC*, *Brier*: of P("Yes"), against whether the answer was
right; *of a constant*: the Brier score of the share of right answers; *kept*: the share that it calls right. Meta was
taught to judge neither codes nor family relationships.

{reflection.rows(study)}{own}

## M0, only smaller

LoRA in sequence, its update scaled so that its last hidden state is as far from the base's, in lengths of it, as the
bundles' is: what separation must beat. Factor 1.00: the bundles are as far as the whole of M0, or further, and nothing
is made smaller.

{tables.shrink(study)}

## Where the tasks lie

Hidden states of test prompts (output of a layer; at the last token, or the mean over the prompt), and what bundles add
there. *probe*: cross-validated accuracy of a linear classifier of the task; *silhouette* in 30 principal components;
then the linear CKA of two tasks' covariances (1: they vary along the same directions), and of the same rows in this
space and in the trunk.

{tables.spaces(study)}{picture}

## Taking a capability out

Three kinds of questions taught at once, one of them removed (`recipes/removal.py`). *the rest*: accuracy on the others.
Bold: the rate that removes in most seeds and keeps most of the rest. Then a fresh LoRA is taught the removed facts
again: all of them (accuracy after so many steps), or a third (accuracy on the two thirds it is not shown).

{tables.removal(study)}

{bullets(removal_claims(study))}{relearning}

## Code

Problems of HumanEval that greedy completions solve, all parts on: order A or the mixture, trained once more as seed 1.

{tables.code(study)}

## Not run, or failed

{bullets(not_there(study, runs))}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the records; the pictures go there too"
    )
    parser.add_argument("--features", type=Path, help="folder of features: makes spaces.json and spaces.svg anew")
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args(argv)
    study = s.read(given.results)
    if given.features is not None:
        study.spaces = _spaces.write(given.features, study.records, given.results, study.spaces)
    given.page.write_text(page(study, asked()), encoding="utf-8")
    plots.draw(study, given.results)
    failed = len(study.failed) + len(study.removal_failed)
    print(f"wrote {given.page} from {len(study.records)} + {len(study.removal)} cells, {failed} failed")


if __name__ == "__main__":
    main()
