"""The numbers and tables of the continual study, on records made by hand."""

import json
import math

import pytest
import study_records as made

from studies.continual import report, spaces, tables
from studies.continual import study as s
from studies.continual.comparisons import BEYOND, KIND, compared, judged_answers, task_by_task


pytestmark = pytest.mark.studies


@pytest.fixture
def read(tmp_path):
    return lambda records: s.read(made.write(tmp_path, records))


def rows(table):
    return [list(row) for row in table.rows]


def test_a_whole_study(tmp_path):
    records = made.study()
    records += [made.removal(v, r, seed) for seed in (0, 1) for v, r in (("none", 0.0), ("owners", 0.0), ("base", 0.0))]
    records += [made.removal("ascent", 1e-3, 0, back=0.7), made.removal("never"), made.removal("ascent", 1e-4, 0, 0.5)]
    for record in records:
        if record.get("seed") == 1 and record.get("order") == made.ORDERS["A"] and record.get("schedule") == "sequence":
            record["features"] = f"{record['condition']}.npz"
    made.write(tmp_path / "results", records)
    for name, gap, bundles in (("base.npz", 1.0, False), ("lora.npz", 1.5, False), ("bundles.npz", 1.5, True)):
        made.features(tmp_path / "features", name, gap, bundles)
    runs = made.write_runs(tmp_path)
    given = [f"--results={tmp_path / 'results'}", f"--output={tmp_path / 'tables.md'}", f"--runs={runs}"]
    report.main([*given, f"--features={tmp_path / 'features'}"])
    first = (tmp_path / "tables.md").read_text()
    assert "nan" not in first.lower()
    for picture in ("phases", "alphas", "removal", "spaces"):
        assert (tmp_path / f"results/{picture}.svg").stat().st_size
    headings = ("All conditions", "Against M0", "Removal", "Where the tasks lie", "What an alpha moves")
    assert all(f"## {heading}" in first for heading in headings)
    again = s.read(tmp_path / "results")  # without features: from spaces.json
    assert tables.spaces(again).markdown() in first


def test_the_rate_is_the_one_that_validates_best_and_its_search_cell_is_seed_0(read):
    study = read(made.study())
    assert s.chosen(study, s.M3) == 1e-3
    assert [r["seed"] for r in s.finals(study, s.M3, s.ORDERS["A"])] == [0, 1, 2]
    assert len(s.finals(study, s.M3)) == 9
    assert not s.at_the_edge(study, s.M3)


def test_of_rates_that_validate_alike_the_one_that_learns_most_is_chosen(read):
    cells = []
    for lr, valid, loss in ((5e-4, 0.232, 0.6), (1e-3, 0.228, 0.4), (2e-3, 0.227, 0.2), (4e-3, 0.17, 0.1)):
        record = made.cell("lora", lr=lr, valid=valid, stage="grid")
        for phase in record["phases"]:
            phase["loss"] = [[30, 2.0, 0.0], [120, loss, 0.0]]
        cells.append(record)
    study = read([made.base(), *cells, made.cell("bundles", modes=made.TAGGED)])
    assert s.chosen(study, s.M0) == 2e-3
    assert s.best_of({1e-3: (-1.0, math.inf), 2e-3: (0.2, 0.5)}) == 2e-3


def test_code_is_a_cell_of_its_own(read):
    def solved(condition, *passed, tasks=164):
        phases = [{"task": None, "code": {"pass@1": n / tasks, "passed": float(n), "tasks": tasks}} for n in passed]
        return {"stage": "code", "condition": condition, "phases": phases}

    lora = {"schedule": "sequence", "order": made.ORDERS["A"], "seed": 1, "lr": 1e-3}
    lines = [solved("base", 20), {**solved("lora", 5, 2, 0), **lora}]
    again = [{**solved("lora", 1, tasks=2), **lora}, {**lora, "stage": "code", "condition": "lora", "error": "x"}]
    study = read([*made.study(), *lines, *again])
    assert study.records == read(made.study()).records and not study.failed
    assert rows(tables.code(study)) == [["the base", "20", "164"], ["`lora`", "5, 2, 0", "164"]]
    failed = read([*made.study(), again[1], made.cell(lr=7.0, stage="grid", error="x")])
    assert rows(tables.missing(failed, [])) == [["`lora`", "A", "0", "x"], ["`lora`", "A", "1", "x"]]


def test_a_rate_that_diverged_is_not_chosen(read):
    cells = [made.cell(lr=lr, valid=v, stage="grid") for lr, v in ((1e-4, 0.2), (1e-3, math.nan))]
    assert s.chosen(read([made.base(), *cells]), s.M0) == 1e-4


def test_forgetting_of_a_run_made_by_hand(read):
    study = read([made.base(), made.cell(keeps=0.5, learns=0.8)])
    [record] = s.finals(study, s.M0)
    found = s.measures(study, record, "all")
    # memory: .8, then half of it twice (.2); logic: .8, then half of what is above the base's .1 (.45)
    assert found["forgetting"] == pytest.approx(((0.8 - 0.2) + (0.8 - 0.45)) / 2)
    assert found["bwt"] == pytest.approx(-found["forgetting"])
    assert found["average"] == pytest.approx((0.2 + 0.45 + 0.8) / 3, abs=0.01)
    assert found["learnt"] == pytest.approx(0.8)
    assert found["rise"] == pytest.approx(0.1)


def test_what_cannot_forget_is_told_from_what_forgets_less(read):
    study = read(made.study())
    assert s.reduction(study, s.M3, "tag").estimate == pytest.approx(1.0) and s.untouched(study, s.M3, "tag")
    less = s.reduction(study, s.M3, "all")  # 0.7 kept a phase against 0.4
    assert 0.3 < less.estimate < 1 and less.low > 0 and not s.untouched(study, s.M3, "all")
    worse = [made.cell("bundles", seed=n, modes={**made.TAGGED, "all": 0.35}) for n in range(3)]
    study = read([made.base(), *worse, *(made.cell(seed=n) for n in range(3))])
    assert s.reduction(study, s.M3, "all").estimate < 0.1
    notes = {(row[0], row[1]): row[-1] for row in tables.against_m0(read(made.study())).rows}
    assert notes["`bundles`", "tag"] == "no answer changed after its phase" and notes["`bundles`", "all"] == ""


def test_nothing_to_forget_is_no_reduction(read):
    still = [made.cell("lora", seed=n, modes={"all": 1.0}) for n in range(2)]
    study = read([made.base(), *still, *(made.cell("bundles", seed=n, modes=made.TAGGED) for n in range(2))])
    assert math.isnan(s.reduction(study, s.M3, "all").estimate)


def test_order_by_order_what_is_not_learnt_is_said(read):
    cells = [made.cell(seed=n, order=o) for n in range(3) for o in "AC"]
    cells += [made.cell("bundles", seed=n, order="A", modes=made.TAGGED) for n in range(3)]
    cells += [made.cell("bundles", seed=n, order="C", learns=0.4, modes=made.TAGGED) for n in range(3)]
    study = read([made.base(), *cells])
    assert s.reduction(study, s.M3, "all", "A").runs == 3
    assert s.learnt_beside_m0(study, s.M3, "all", "C") == pytest.approx((0.4, 0.8))
    assert s.too_little_learnt(study, s.M3, "all", "C") and not s.too_little_learnt(study, s.M3, "all", "A")
    assert s.shared_orders(study, s.M3, s.M0) == ["A", "C"]


@pytest.mark.parametrize(("loud", "sign"), [(0.1, -1), (0.95, 1)])
def test_conditions_are_compared_with_and_without_the_penalty(read, loud, sign):
    cells = [made.cell("bundles_loud", seed=n, modes={**made.TAGGED, "all": loud}) for n in range(3)]
    found = {c.words: c.difference for c in compared(read([*made.study(), *cells]), KIND)}
    difference = found["No tag, all on, without the penalty"]
    assert difference.estimate * sign > 0 and difference.runs == 3
    assert found["True tag"].estimate == pytest.approx(0, abs=0.03)  # bundles and separate LoRAs were made alike
    assert "True tag, both with that KL penalty" not in found  # one side was not run


def test_orders_that_disagree_are_told_apart(read):
    cells = [made.cell("bundles", seed=n, order=o, modes=made.TAGGED) for n in range(3) for o in "AB"]
    cells += [made.cell("bundles_all", seed=n, order="A", keeps=0.1) for n in range(3)]
    cells += [made.cell("bundles_all", seed=n, order="B", keeps=1.0) for n in range(3)]
    [found] = compared(read([made.base(), *cells]), BEYOND)
    assert found.by_order["A"].high < 0 < found.by_order["B"].low


def test_m0_that_is_nearer_than_the_bundles_is_not_made_smaller(read):
    norms = {"all": dict.fromkeys(made.TASKS, 0.1)}
    cells = [made.cell(seed=1, shrink=made.shrink()[:1], norms=norms), made.cell("bundles", seed=1)]
    [found] = s.shrunk(read([made.base(), *cells]))
    assert found["scale"] == 1.0 and found["goal"] == pytest.approx(0.2)


def test_m0_made_as_small_as_the_bundles(read):
    norms = {"all": dict.fromkeys(made.TASKS, 0.4)}
    cells = [made.cell(seed=1, shrink=made.shrink(), norms=norms), made.cell("bundles", seed=1)]
    [found] = s.shrunk(read([made.base(), *cells]))
    assert found["scale"] == pytest.approx(0.5)  # 0.2 of the bundles, 0.4 of the whole M0
    assert found["average"] == pytest.approx(0.25)
    assert found["rise"] == pytest.approx(0.1)
    assert (found["best_scale"], found["best"]) == (0.9, pytest.approx(0.45))  # M0 itself: 0.43


def test_forgetting_before_the_last_phase(read):
    study = read([made.base(), made.cell(keeps=0.5), made.cell("bundles", modes={"all": 0.75})])
    found = s.reduction_before_meta(study, s.M3, "all")
    assert found.estimate == pytest.approx(1 - 0.25 / 0.5)  # memory alone, after logic alone
    assert s.reduction_before_meta(read([made.base(), made.cell(order="B")]), s.M0, "all") is None


def test_families_are_those_of_the_items(read):
    cells = [made.base(), *(made.cell("lora", schedule="mixture", seed=n, learns=1.0) for n in range(2))]
    cells += [made.cell("bundles", schedule="mixture", seed=n, learns=0.5, modes={"tag": 1.0}) for n in range(2)]
    table = tables.families(read(cells))
    lora, ours = (list(table.columns).index(name) for name in ("`lora`, mixture, all", "`bundles`, mixture, tag"))
    for row in table.rows:
        assert row[lora].startswith("1.00") or row[lora].startswith("0.9")
        if row[1].endswith("_hard"):
            assert float(row[ours].split()[0]) < 0.2  # the easy half is known to both


def test_a_task_that_is_lost_is_seen_task_by_task(read):
    cells = [made.cell("lora", schedule="mixture", seed=n, learns=0.6) for n in range(3)]
    for n in range(3):
        record = made.cell("bundles", schedule="mixture", seed=n, learns=0.7, modes={"tag": 1.0})
        items = "1" * 8 + "0" * (made.ITEMS - 8)
        record["phases"][0]["modes"]["tag"]["logic"] |= {"items": items, "accuracy": 0.2}
        cells.append(record)
    [row] = task_by_task(read([made.base(), *cells])).rows
    assert row[:2] == ["`bundles`, mixture, tag", "`lora`, mixture"]
    assert [float(cell.split()[0]) > 0 for cell in row[2:5]] == [True, False, True]


def test_an_alpha_that_moves_its_own_task(read):
    def control(**moves):
        sweeps = made.alphas(**moves)
        cells = [made.cell("bundles", seed=n, modes=made.TAGGED, alphas=sweeps) for n in (1, 2, 3)]
        return s.control(read([made.base(), *cells]), s.M3, "others_off", "memory")

    assert control()["spearman"] == pytest.approx([1.0] * 3) and max(control()["cross"]) < 0.1
    assert min(control(own=0.1, other=0.3)["cross"]) > 1
    assert control(own=-0.5)["spearman"] == pytest.approx([-1.0] * 3)
    assert s.control(read(made.study((0,))), s.M3, "others_off", "memory") is None


def test_own_answers_judged(read):
    cells = [
        made.cell("bundles", seed=n, modes=made.TAGGED, reflection=made.reflection(high=h))
        for n, h in ((1, 0.8), (2, 0.9), (3, 1.0))
    ]
    cells.append(made.cell("lora", schedule="mixture", reflection=made.reflection(parts=False)))
    found = [" | ".join(row) for row in judged_answers(read([made.base(), *cells])).rows]
    row = "`bundles` | logic | off | 0.50 ± 0.00 | 0.70 ± 0.05 | 0.90 ± 0.10 | 0.30 ± 0.00 | 0.20 ± 0.00"
    assert f"{row} | 0.24 ± 0.00 | 0.50 ± 0.00 | 0.80 ± 0.00 | 0.60 ± 0.00 | 3" in found
    assert "`lora`, mixture | memory | on | - | - | 0.90 | - | 0.20 | 0.24 | 0.50 | 0.80 | 0.60 | 1" in found
    assert not any(line.startswith("`lora`, mixture | memory | off") for line in found)
    assert judged_answers(read(made.study())).rows == []


def test_own_answers_of_one_class_have_no_auc(read):
    found = made.reflection(accuracy=1.0)
    for task in found.values():
        for others in ("others_off", "others_on"):
            task[others] = {a: {k: v for k, v in p.items() if k != "auc"} for a, p in task[others].items()}
    table = judged_answers(read([made.base(), made.cell("bundles", modes=made.TAGGED, reflection=found)]))
    assert table.rows[0][:9] == ["`bundles`", "memory", "off", "-", "-", "-", "0.30", "0.20", "0.00"]


def test_a_cell_that_is_run_again_keeps_what_only_the_earlier_one_has(read):
    again = made.cell(keeps=0.9, reflection=made.reflection())
    [record] = read([made.base(), made.cell(features="a.npz"), again]).records
    assert record["features"] == "a.npz" and record["reflection"] and record["phases"] == again["phases"]
    [record] = read([made.base(), made.cell(features="a.npz"), {**again, "settings": {"steps": 11}}]).records
    assert "features" not in record


@pytest.mark.parametrize(("gap", "apart"), [(1.0, True), (20.0, False)])
def test_bundle_space_is_compared_with_trunk_and_m0(read, tmp_path, gap, apart):
    def files(folder, seeds):
        for name, bundles in (
            ("base", False),
            *((f"lora{n}", False) for n in seeds),
            *((f"bundles{n}", True) for n in seeds),
        ):
            made.features(tmp_path / folder, f"{name}.npz", gap, bundles)

    def cells(seeds):
        found = [made.base(), *(made.cell(seed=n, features=f"lora{n}.npz") for n in seeds)]
        return [*found, *(made.cell("bundles", seed=n, modes=made.TAGGED, features=f"bundles{n}.npz") for n in seeds)]

    files("one", [1])
    first = spaces.measured(tmp_path / "one", read(cells([1])).records)
    ours, m0, trunk = (first["spaces"][name] for name in ("bundles/sequence/bundles", "lora/sequence/hidden", "trunk"))
    for n in range(3):
        rival = max(m0["1"]["last"][n]["silhouette"], trunk["0"]["last"][n]["silhouette"])
        assert (ours["1"]["last"][n]["silhouette"] > rival) == apart
    # Two seeds more, from another machine that has not the first one's files.
    files("more", [2, 3])
    kept = json.dumps(first)
    study = read(cells([1, 2, 3]))
    study.spaces = spaces.measured(tmp_path / "more", study.records, first)
    assert json.dumps(first) == kept
    assert list(study.spaces["spaces"]["bundles/sequence/bundles"]) == ["1", "2", "3"]
    assert study.spaces["spaces"]["bundles/sequence/bundles"]["1"] == ours["1"]
    assert {row[-1] for row in tables.spaces(study).rows if row[0].startswith("bundle space")} == {"3"}


def test_what_is_missing_has_a_row(read):
    broken = {**made.cell("osf", seed=1), "error": "Traceback\n`x`\nRuntimeError: out of memory"}
    del broken["phases"]
    few = [made.base(), made.cell(), broken, {**made.removal("rmu", 1e-3), "error": ""}]
    found = rows(tables.missing(read(few), made.RUNS))
    assert ["`osf`", "A", "1", "RuntimeError: out of memory"] in found
    assert ["`bundles`", "B", "0, 1", "not run"] in found and ["`lora`", "A", "1, 2", "not run"] in found
    assert ["removal `rmu` 0.001", "", "0", "no message"] in found
    whole = read(made.study((0, 1, 2)))
    assert not tables.missing(whole, made.RUNS[:2]).rows


def test_a_later_line_mends_an_error_and_not_the_other_way_round(read):
    good = made.cell()
    bad = {**{k: v for k, v in good.items() if k != "phases"}, "error": "RuntimeError: x"}
    for lines in ([bad, good], [good, bad], [bad, good, bad]):
        study = read([made.base(), *lines])
        assert (len(study.records), len(study.failed)) == (1, 0)


@pytest.mark.parametrize("lost", ["items", "domains", "auc", "versions", "norms", "seconds"])
def test_tables_without_one_of_the_fields(read, lost):
    def without(value):
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k != lost}
        return [without(v) for v in value] if isinstance(value, list) else value

    first, *rest = made.study((0,))
    found = report.all_tables(read([first, *map(without, rest)]), made.RUNS)
    assert "All conditions" in [table.heading for table in found]
    for table in found:
        assert all(len(row) == len(table.columns) and "nan" not in row for row in table.rows), table.heading


def test_a_study_of_means_and_one_of_items_have_the_same_estimates(read):
    whole = read(made.study())
    bare = made.study()
    for record in bare[1:]:
        for phase in record["phases"]:
            for mode in phase["modes"].values():
                for result in mode.values():
                    result.pop("items", None)
    means = read(bare)
    for mode in made.TAGGED:
        a, b = (s.reduction(study, s.M3, mode) for study in (whole, means))
        assert a.estimate == pytest.approx(b.estimate) and a.runs == b.runs == 9


def test_no_base(read):
    with pytest.raises(ValueError, match="no record with stage 'base'"):
        read([made.cell()])


def test_removal(read):
    cells = [made.base(), made.removal("none", after=0.8), made.removal("never"), made.removal("base")]
    cells += [made.removal("ascent", 1e-4, after=0.5), made.removal("ascent", 1e-3, back=0.7), made.removal("owners")]
    study = read(cells)
    assert s.removal_key(study, "ascent") == 1e-3  # the other did not remove
    removed, again = tables.removal(study)
    assert ["**LoRA, gradient ascent**", "0.001"] in [row[:2] for row in rows(removed)]
    assert {row[0]: row[-1] for row in again.rows}["LoRA, gradient ascent"] == "0.70"
    curve = [[0, 0.0], [10, 0.4], [20, 0.4], [40, 0.8]]
    assert s.steps_to(curve, 0.2) == pytest.approx(5.0)
    assert s.steps_to(curve, 0.6) == pytest.approx(30.0)
    assert s.steps_to(curve, 0.0) == 0.0
    assert s.steps_to(curve, 0.9) is None
