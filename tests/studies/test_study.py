"""studies/continual/report.py on records made by hand: its numbers, its verdicts, and whatever may be missing."""

import json
import math
import sys
from pathlib import Path

import pytest
import study_records as made


RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(RECIPES), *sys.path])
        from studies.continual import report as continual_report

        yield continual_report


@pytest.fixture
def read(report, tmp_path):
    return lambda records: report.s.read(made.write(tmp_path, records))


def test_a_whole_study(report, tmp_path, monkeypatch):
    records = made.study()
    records += [made.removal(v, r, seed) for seed in (0, 1) for v, r in (("none", 0.0), ("owners", 0.0), ("base", 0.0))]
    records += [made.removal("ascent", 1e-3, 0, back=0.7), made.removal("never"), made.removal("ascent", 1e-4, 0, 0.5)]
    made.write(tmp_path / "results", records)
    for name, gap, bundles in (("base.npz", 1.0, False), ("lora.npz", 1.5, False), ("bundles.npz", 1.5, True)):
        made.features(tmp_path / "features", name, gap, bundles)
    lines = (tmp_path / "results/cells.jsonl").read_text().splitlines()
    with_features = [json.loads(line) for line in lines]
    for record in with_features:
        if record.get("seed") == 1 and record.get("order") == made.ORDERS["A"] and record.get("schedule") == "sequence":
            record["features"] = f"{record['condition']}.npz"
    made.write(tmp_path / "results", with_features)
    given = [f"--results={tmp_path / 'results'}", f"--page={tmp_path / 'study.md'}"]
    monkeypatch.setattr(report, "RUNS", made.write_runs(tmp_path))
    report.main([*given, f"--features={tmp_path / 'features'}"])
    page = (tmp_path / "study.md").read_text()
    assert "nan" not in page.lower().replace("nanochat", "")
    for picture in ("phases", "alphas", "removal", "spaces"):
        assert f"{picture}.svg" in page and (tmp_path / f"results/{picture}.svg").stat().st_size
    for name in ("H1", "H2", "H3", "H4"):
        assert f"| {name} |" in page
    assert report.page(report.s.read(tmp_path / "results"), made.RUNS) == page  # without features: from spaces.json


def test_the_rate_is_the_one_that_validates_best_and_its_search_cell_is_seed_0(report, read):
    study = read(made.study())
    assert report.s.chosen(study, report.s.M3) == 1e-3
    assert [r["seed"] for r in report.s.finals(study, report.s.M3, report.ORDERS["A"])] == [0, 1, 2]
    assert len(report.s.finals(study, report.s.M3)) == 9
    assert not report.s.at_the_edge(study, report.s.M3)


def test_of_rates_that_validate_alike_the_one_that_learns_most_is_chosen(report, read):
    cells = []
    for lr, valid, loss in ((5e-4, 0.232, 0.6), (1e-3, 0.228, 0.4), (2e-3, 0.227, 0.2), (4e-3, 0.17, 0.1)):
        record = made.cell("lora", lr=lr, valid=valid, stage="grid")
        for phase in record["phases"]:
            phase["loss"] = [[30, 2.0, 0.0], [120, loss, 0.0]]
        cells.append(record)
    study = read([made.base(), *cells, made.cell("bundles", modes=made.TAGGED)])
    assert report.s.chosen(study, report.s.M0) == 2e-3
    assert [*report.s.reduction_by_rate(study, report.s.M3, "all")] == [5e-4, 1e-3, 2e-3]
    assert "of M0 at 0.0005: " in report.page(study, made.RUNS)
    assert report.s.best_of({1e-3: (-1.0, math.inf), 2e-3: (0.2, 0.5)}) == 2e-3


def test_code_is_a_cell_of_its_own(report, read):
    def solved(condition, *passed, tasks=164):
        phases = [{"task": None, "code": {"pass@1": n / tasks, "passed": float(n), "tasks": tasks}} for n in passed]
        return {"stage": "code", "condition": condition, "phases": phases}

    lora = {"schedule": "sequence", "order": made.ORDERS["A"], "seed": 1, "lr": 1e-3}
    lines = [solved("base", 20), {**solved("lora", 5, 2, 0), **lora}]
    again = [{**solved("lora", 1, tasks=2), **lora}, {**lora, "stage": "code", "condition": "lora", "error": "x"}]
    study = read([*made.study(), *lines, *again])
    assert study.records == read(made.study()).records and not study.failed
    page = report.page(study, made.RUNS)
    assert "| the base | 20 | 164 |" in page and "| `lora` | 5, 2, 0 | 164 |" in page
    assert "next to none" not in page and "- HumanEval: `bundles`" in page
    assert "next to none" in report.page(read([*made.study(), solved("base", 8)]), made.RUNS)
    failed = report.page(read([*made.study(), again[1], made.cell(lr=7.0, stage="grid", error="x")]), made.RUNS)
    assert (
        "- HumanEval, `lora`, A, seed 1, rate 0.001: failed: `x`" in failed
        and "- `lora`, A, seed 0, rate 7: f" in failed
    )


def test_a_rate_that_diverged_is_not_chosen(report, read):
    cells = [made.cell(lr=lr, valid=v, stage="grid") for lr, v in ((1e-4, 0.2), (1e-3, math.nan))]
    assert report.s.chosen(read([made.base(), *cells]), report.s.M0) == 1e-4


def test_forgetting_of_a_run_made_by_hand(report, read):
    study = read([made.base(), made.cell(keeps=0.5, learns=0.8)])
    [record] = report.s.finals(study, report.s.M0)
    found = report.s.measures(study, record, "all")
    # memory: .8, then half of it twice (.2); logic: .8, then half of what is above the base's .1 (.45)
    assert found["forgetting"] == pytest.approx(((0.8 - 0.2) + (0.8 - 0.45)) / 2)
    assert found["bwt"] == pytest.approx(-found["forgetting"])
    assert found["average"] == pytest.approx((0.2 + 0.45 + 0.8) / 3, abs=0.01)
    assert found["learnt"] == pytest.approx(0.8)
    assert found["rise"] == pytest.approx(0.1)


def h1_cases(study):
    from studies.continual import words as _study_words

    return _study_words.h1_cases(study)


def test_h1_calls_what_cannot_forget_trivial_and_judges_the_rest(report, read):
    study = read(made.study())
    cases = {words: verdict for words, _, verdict in h1_cases(study)}
    assert cases["frozen trunk, true tag"] == "trivial"
    assert cases["no tag, all on"] == "supported"  # 0.7 kept a phase against 0.4
    assert report.s.reduction(study, report.s.M3, "tag").estimate == pytest.approx(1.0)
    worse = [made.cell("bundles", seed=n, modes={**made.TAGGED, "all": 0.35, "tag": 0.9}) for n in range(3)]
    study = read([made.base(), *worse, *(made.cell(seed=n) for n in range(3))])
    cases = {words: verdict for words, _, verdict in h1_cases(study)}
    assert cases == {
        "frozen trunk, true tag": "supported",
        "no tag, all on": "not supported",
        "no tag, all at a third": "not supported",
        "predicted tag": "supported",
    }


def verdict(report, name, study):
    return report.HYPOTHESES[name][1](study)[0]


def test_order_by_order_what_is_not_learnt_is_said(report, read):
    cells = [made.cell(seed=n, order=o) for n in range(3) for o in "AC"]
    cells += [made.cell("bundles", seed=n, order="A", modes=made.TAGGED) for n in range(3)]
    cells += [made.cell("bundles", seed=n, order="C", learns=0.4, modes=made.TAGGED) for n in range(3)]
    study = read([made.base(), *cells])
    text = report.HYPOTHESES["H1"][1](study)[1]
    assert "No tag, all on, by order (learnt by bundles and by M0): A +0." in text
    assert "In order C bundles that are all on learn less than 0.8" in text
    assert report.s.reduction(study, report.s.M3, "all", "A").runs == 3
    assert report.s.learnt_beside_m0(study, report.s.M3, "all", "C") == pytest.approx((0.4, 0.8))


def test_an_interval_that_ends_at_0_tells_nothing(report):
    from studies.continual import words as _study_words
    from studies.measures.continual import Interval

    assert _study_words.told(Interval(-0.05, -0.1, -0.004, 3)) == "not told apart"
    assert _study_words.told(Interval(-0.05, -0.1, -0.006, 3)) == "worse"
    assert _study_words.better(Interval(0.1, 0.05, 0.2, 1), "a note") == (
        "**preliminary: better**, +0.10 [+0.05, +0.20] (n = 1; a note)"
    )


def test_lists_of_cases_with_commas_are_told_apart(report, read):
    assert "(no tag, all on; no tag, trained" in verdict(
        report, "H1", read([*made.study(), *(made.cell("bundles_all", seed=n, keeps=0.9) for n in range(3))])
    )


def penalised(loud: float) -> list[dict]:
    """The study beside bundles without the penalty that end, with all on, as `loud` says."""
    return [*made.study(), *(made.cell("bundles_loud", seed=n, modes={**made.TAGGED, "all": loud}) for n in range(3))]


def test_what_comes_from_the_penalty_is_not_called_routing(report, read):
    page = report.page(read(penalised(0.1)), made.RUNS)
    assert "in no mode shown to be better than one LoRA a task" in page
    assert "- No tag, all on, without the penalty: **worse**, -0.2" in page
    assert "Most of it is the penalty's doing." in page
    page = report.page(read(penalised(0.95)), made.RUNS)
    assert "**Without the penalty bundles are better than one LoRA a task, too** (No tag, all on)." in page
    assert "Most of it is the penalty's doing." not in page
    assert "**Not answered yet:**" in report.page(read([made.base(), made.cell()]), made.RUNS)


def test_loras_with_a_penalty_of_their_own_are_compared_too(report, read):
    for ends, said in (
        (0.95, "end better than bundles** (bundles against them: No tag, all on"),
        (0.1, "are not shown"),
    ):
        separate = {**made.TAGGED, "all": ends}
        beside = [made.cell("lora_separate_kl", seed=n, modes=separate) for n in range(3)]
        page = report.page(read([*penalised(0.1), *beside]), made.RUNS)
        assert said in page
        assert ("LoRAs with a KL penalty on the same text are not shown to be better" in page) == (ends == 0.1)


def test_orders_that_disagree_are_told_apart(report, read):
    cells = [made.cell("bundles", seed=n, order=o, modes=made.TAGGED) for n in range(3) for o in "AB"]
    cells += [made.cell("bundles_all", seed=n, order="A", keeps=0.1) for n in range(3)]
    cells += [made.cell("bundles_all", seed=n, order="B", keeps=1.0) for n in range(3)]
    page = report.page(read([made.base(), *cells]), made.RUNS)
    assert 'against only the own one" is worse in order A, better in order B.' in page


def test_the_short_answer_has_the_numbers(report, read):
    records = made.study()
    records += [made.removal(v, r, seed) for seed in (0, 1) for v, r in (("none", 0.0), ("owners", 0.0), ("all", 0.0))]
    study = read([*records, made.removal("never"), made.removal("rmu", 1e-3, back=0.7)])
    said = report.short_answer(study)
    assert said[0].startswith("With a frozen trunk and the true tag nothing is forgotten: that is how it is built")
    assert "One LoRA a task has it too." in said[0] and "End average 0.80, of M0 0." in said[0]
    assert any("on the mixture" in line.lower() and "H2: " in line for line in said)
    assert (
        "brings back 0.10 of the others, in a LoRA that never knew them 0.10; after unlearning a LoRA 0.70" in said[-1]
    )
    assert report.short_answer(read([made.base(), made.cell()])) == []


def test_m0_that_is_nearer_than_the_bundles_is_not_made_smaller(report, read):
    norms = {"all": dict.fromkeys(made.TASKS, 0.1)}
    cells = [made.cell(seed=1, shrink=made.shrink()[:1], norms=norms), made.cell("bundles", seed=1)]
    page = report.page(read([made.base(), *cells]), made.RUNS)
    assert "Bundles, all on, are further from the base (0.20) than the whole of M0" in page
    assert "M0 made as small" not in page


def test_little_learnt_is_no_reduction_and_few_runs_are_preliminary(report, read):
    cells = [made.base(), made.cell(), made.cell("bundles", learns=0.55, modes={"all": 0.9, "uniform": 1.0})]
    cases = {words: verdict for words, _, verdict in h1_cases(read(cells))}
    assert cases == {"no tag, all on": "open, learns too little to forget", "no tag, all at a third": "trivial"}
    cells = [made.base(), made.cell(), made.cell("bundles", modes={"all": 0.9})]
    assert h1_cases(read(cells))[0][2] == "preliminary: supported"


def test_forgetting_before_the_last_phase(report, read):
    study = read([made.base(), made.cell(keeps=0.5), made.cell("bundles", modes={"all": 0.75})])
    found = report.s.reduction_before_meta(study, report.s.M3, "all")
    assert found.estimate == pytest.approx(1 - 0.25 / 0.5)  # memory alone, after logic alone
    assert report.s.reduction_before_meta(read([made.base(), made.cell(order="B")]), report.s.M0, "all") is None


def test_families_that_differ(report, read):
    cells = [made.base(), *(made.cell("lora", schedule="mixture", seed=n, learns=1.0) for n in range(2))]
    cells += [made.cell("bundles", schedule="mixture", seed=n, learns=0.5, modes={"tag": 1.0}) for n in range(2)]
    said = report.costs(read(cells))
    assert len(said) == 3 and all("_hard: worse, 0.0" in line for line in said)  # the easy half is known to both
    assert report.costs(read(cells[:2])) == ["Bundles and LoRA on the mixture were not run beside each other."]


def test_a_part_says_that_it_is_one(report, read):
    study = read(made.study((0, 1)))  # of lora 3 seeds are asked for, of bundles 3 and 2
    assert "**A part: 6 of 8 runs of `continual.yaml` are here, and removal is not measured yet.**" in report.page(
        study, made.RUNS[:2]
    )
    assert "All 2 runs of `continual.yaml` are here" in report.page(study, [{**made.RUNS[0], "seeds": 2}])


def test_h2_wants_every_task(report, read):
    def pair(**shares):
        cells = [made.cell("lora", schedule="mixture", seed=n, learns=0.6) for n in range(3)]
        for n in range(3):
            record = made.cell("bundles", schedule="mixture", seed=n, learns=0.7, modes={"tag": 1.0})
            for task, share in shares.items():
                items = "1" * round(share * made.ITEMS) + "0" * (made.ITEMS - round(share * made.ITEMS))
                record["phases"][0]["modes"]["tag"][task] |= {"items": items, "accuracy": items.count("1") / len(items)}
            cells.append(record)
        return read([made.base(), *cells])

    assert verdict(report, "H2", pair()) == "**supported** (mixture, true tag)"
    study = pair(logic=0.2)
    assert verdict(report, "H2", study) == "**not supported** (mixture, true tag)"
    assert "surely worse: logic" in report.HYPOTHESES["H2"][1](study)[1]


def test_h3_wants_the_own_task_to_move_more(report, read):
    def with_alphas(seeds=(1, 2, 3), **moves):
        sweeps = made.alphas(**moves)
        return read([made.base(), *(made.cell("bundles", seed=n, modes=made.TAGGED, alphas=sweeps) for n in seeds)])

    assert verdict(report, "H3", with_alphas(seeds=(1, 2))).startswith("**preliminary: supported**")
    assert verdict(report, "H3", with_alphas()).startswith("**supported**")
    assert verdict(report, "H3", with_alphas(own=0.1, other=0.3)).startswith("**not supported**")
    assert verdict(report, "H3", with_alphas(own=-0.5)).startswith("**not supported**")
    assert verdict(report, "H3", read(made.study((0,)))) == "not run"


def test_own_answers_judged(report, read):
    cells = [
        made.cell("bundles", seed=n, modes=made.TAGGED, reflection=made.reflection(high=h))
        for n, h in ((1, 0.8), (2, 0.9), (3, 1.0))
    ]
    cells.append(made.cell("lora", schedule="mixture", reflection=made.reflection(parts=False)))
    page = report.page(read([made.base(), *cells]), made.RUNS)
    row = "| `bundles` | logic | off | 0.50 ± 0.00 | 0.70 ± 0.05 | 0.90 ± 0.10 | 0.30 ± 0.00 | 0.20 ± 0.00 |"
    assert f"{row} 0.24 ± 0.00 | 0.50 ± 0.00 | 0.80 ± 0.00 | 0.60 ± 0.00 | 3 |" in page
    assert "| `lora`, mixture | memory | on | - | - | 0.90 | - | 0.20 | 0.24 | 0.50 | 0.80 | 0.60 | 1 |" in page
    assert "| `lora`, mixture | memory | off" not in page
    assert (
        "- With meta's alpha from 0 to 1, the others off, the AUC goes on answers to memory from 0.50 to 0.90, and of "
        "those it calls right 0.80 are (0.60 of all); on answers to logic" in page
    )
    assert "not run yet" not in page.split("## Judging")[1].split("## M0")[0].lower()


def test_own_answers_of_one_class_have_no_auc(report, read):
    found = made.reflection(accuracy=1.0)
    for task in found.values():
        for others in ("others_off", "others_on"):
            task[others] = {a: {k: v for k, v in p.items() if k != "auc"} for a, p in task[others].items()}
    page = report.page(read([made.base(), made.cell("bundles", modes=made.TAGGED, reflection=found)]), made.RUNS)
    assert "| `bundles` | memory | off | - | - | - | 0.30 | 0.20 | 0.00 |" in page
    assert "the AUC goes" not in page


def test_own_answers_not_judged_yet(report, read):
    page = report.page(read(made.study()), made.RUNS)
    assert "\nNot run yet.\n" in page and "- Judging its own answers (reflection): not run yet" in page


def test_a_cell_that_is_run_again_keeps_what_only_the_earlier_one_has(report, read):
    again = made.cell(keeps=0.9, reflection=made.reflection())
    [record] = read([made.base(), made.cell(features="a.npz"), again]).records
    assert record["features"] == "a.npz" and record["reflection"] and record["phases"] == again["phases"]
    [record] = read([made.base(), made.cell(features="a.npz"), {**again, "settings": {"steps": 11}}]).records
    assert "features" not in record


@pytest.mark.parametrize(("gap", "expected"), [(1.0, "supported"), (20.0, "not supported")])
def test_h4_compares_with_trunk_and_m0(report, read, tmp_path, gap, expected):
    cells = [made.base(), made.cell(seed=1, features="lora.npz")]
    cells.append(made.cell("bundles", seed=1, modes=made.TAGGED, features="bundles.npz"))
    study = read(cells)
    for name, bundles in (("base.npz", False), ("lora.npz", False), ("bundles.npz", True)):
        made.features(tmp_path / "features", name, gap, bundles)
    study.spaces = report._spaces.measured(tmp_path / "features", study.records)
    assert verdict(report, "H4", study) == f"**preliminary: {expected}**"
    # Two seeds more, from another machine that has not the first one's files.
    for seed in (2, 3):
        cells += [made.cell(seed=seed, features=f"lora{seed}.npz")]
        cells += [made.cell("bundles", seed=seed, modes=made.TAGGED, features=f"bundles{seed}.npz")]
        for name, bundles in (("base.npz", False), (f"lora{seed}.npz", False), (f"bundles{seed}.npz", True)):
            made.features(tmp_path / "more", name, gap, bundles)
    before, kept = study.spaces, json.dumps(study.spaces)
    study = read(cells)
    study.spaces = report._spaces.measured(tmp_path / "more", study.records, before)
    assert verdict(report, "H4", study) == f"**{expected}**"
    assert json.dumps(before) == kept
    assert list(study.spaces["spaces"]["bundles/sequence/bundles"]) == ["1", "2", "3"]
    assert study.spaces["spaces"]["bundles/sequence/bundles"]["1"] == before["spaces"]["bundles/sequence/bundles"]["1"]


def test_m0_made_as_small_as_the_bundles(report, read):
    norms = {"all": dict.fromkeys(made.TASKS, 0.4)}
    cells = [made.cell(seed=1, shrink=made.shrink(), norms=norms), made.cell("bundles", seed=1)]
    [found] = report.s.shrunk(read([made.base(), *cells]))
    assert found["scale"] == pytest.approx(0.5)  # 0.2 of the bundles, 0.4 of the whole M0
    assert found["average"] == pytest.approx(0.25)
    assert found["rise"] == pytest.approx(0.1)
    assert (found["best_scale"], found["best"]) == (0.9, pytest.approx(0.45))  # M0 itself: 0.43


def test_what_is_missing_is_said(report, read):
    broken = {**made.cell("osf", seed=1), "error": "Traceback\n`x`\nRuntimeError: out of memory"}
    del broken["phases"]
    few = [made.base(), made.cell(), broken, {**made.removal("rmu", 1e-3), "error": ""}]
    page = report.page(read(few), made.RUNS)
    assert "`osf`, A, seed 1, rate 0.001: failed: `RuntimeError: out of memory`" in page
    assert "- `bundles`, order B: seed 0, 1 not run" in page and "- `lora`: seed 1, 2 not run" in page
    assert "removal `rmu` 0.001, seed 0: failed: `no message`" in page
    assert page.count("not run |") == 4  # no hypothesis can be judged


def test_a_later_line_mends_an_error_and_not_the_other_way_round(report, read):
    good = made.cell()
    bad = {**{k: v for k, v in good.items() if k != "phases"}, "error": "RuntimeError: x"}
    for lines in ([bad, good], [good, bad], [bad, good, bad]):
        study = read([made.base(), *lines])
        assert (len(study.records), len(study.failed)) == (1, 0)


@pytest.mark.parametrize("lost", ["items", "domains", "auc", "versions", "norms", "seconds"])
def test_a_page_without_one_of_the_fields(report, read, lost):
    def without(value):
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k != lost}
        return [without(v) for v in value] if isinstance(value, list) else value

    first, *rest = made.study((0, 1))
    page = report.page(read([first, *map(without, rest)]), made.RUNS)
    assert "## Verdicts" in page and "nan" not in page


def test_a_study_of_means_and_one_of_items_have_the_same_estimates(report, read):
    whole = read(made.study())
    bare = made.study()
    for record in bare[1:]:
        for phase in record["phases"]:
            for mode in phase["modes"].values():
                for result in mode.values():
                    result.pop("items", None)
    means = read(bare)
    for mode in made.TAGGED:
        a, b = (report.s.reduction(study, report.s.M3, mode) for study in (whole, means))
        assert a.estimate == pytest.approx(b.estimate) and a.runs == b.runs == 9


def test_no_base(report, read):
    with pytest.raises(ValueError, match="no record with stage 'base'"):
        read([made.cell()])


def test_removal(report, read):
    cells = [made.base(), made.removal("none", after=0.8), made.removal("never"), made.removal("base")]
    cells += [made.removal("ascent", 1e-4, after=0.5), made.removal("ascent", 1e-3, back=0.7), made.removal("owners")]
    study = read(cells)
    assert report.s.removal_key(study, "ascent") == 1e-3  # the other did not remove
    said = " ".join(report.removal_claims(study))
    assert "answers 0.70 of the part it was not shown, more than bundles" in said
    assert "base's to the bit" in said
    curve = [[0, 0.0], [10, 0.4], [20, 0.4], [40, 0.8]]
    assert report.s.steps_to(curve, 0.2) == pytest.approx(5.0)
    assert report.s.steps_to(curve, 0.6) == pytest.approx(30.0)
    assert report.s.steps_to(curve, 0.0) == 0.0
    assert report.s.steps_to(curve, 0.9) is None


def test_nothing_to_forget_is_no_verdict(report, read):
    still = [made.cell("lora", seed=n, modes={"all": 1.0}) for n in range(2)]
    study = read([made.base(), *still, *(made.cell("bundles", seed=n, modes=made.TAGGED) for n in range(2))])
    assert "**open, M0 forgets nothing** (no tag, all on)" in verdict(report, "H1", study)


def test_the_page_is_the_one_that_the_records_give(report):
    """docs/study.md of the committed records."""
    assert report.PAGE.read_text(encoding="utf-8") == report.page(report.s.read(report.RESULTS), report.asked())
