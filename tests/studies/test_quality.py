"""The numbers and tables of the learning study, on cells made by hand."""

import json
import math

import pytest

from studies.quality import methods, report
from studies.quality.run import cells_of


pytestmark = pytest.mark.studies


def step(learnt, rise):
    learn = {f"learn/{name}": learnt for name in ("biographies", "codes", "gsm", *report.FAMILIES)}
    known = {"known/capitals": 0.5, "known/elements": 0.5, "text/plays": 3.0, "kl/samples": 0.1}
    return {**learn, **known, **{f"domain/{name}": 2.0 + rise for name in report.DOMAINS}}


def cell(method, lr, learnt, rise, seed=0, **more):
    measured = {"150": step(learnt, rise), "300": step(learnt, rise)}
    return {"method": method, "lr": lr, "seed": seed, "trainable": 100, **measured, **more}


@pytest.fixture
def results(tmp_path):
    own = {f"tag/learn/{name}": 0.6 for name in ("biographies", "codes", *report.FAMILIES)}
    own |= {f"{kind}/domain/{name}": 2.1 for kind in report.KINDS for name in report.DOMAINS}
    routed = cell(report.SEPARATE[1], 0.002, 0.5, 0.4)
    routed["300"] |= {**own, "tag/text/plays": 2.5}
    cells = [
        {"method": "base", "lr": 0.0, "seed": 0, "300": step(0.0, 0.0)},
        *(
            cell("lora_r16", lr, learnt, rise)
            for lr, learnt, rise in ((5e-4, 0.4, 0.1), (1e-3, 0.6, 0.2), (2e-3, 0.8, 0.4))
        ),
        *(cell("bundles:quiet=20", 2e-3, 0.7, rise, seed) for seed, rise in enumerate((0.1, 0.2))),
        cell("form:rank=0.5", 2e-3, 0.7, 0.1, trainable=50),
        routed,
        {"method": "form:act=x", "lr": 2e-3, "seed": 0, "trainable": 100, "diverged": 25},
        {"method": "full", "lr": 2e-3, "seed": 0, "error": "x"},
    ]
    path = tmp_path / "cells.jsonl"
    path.write_text("".join(json.dumps(c) + "\n" for c in cells))
    return report.read(path)


def test_the_ratio_of_lora_to_itself_is_one(results):
    for measure in ("rise", *report.DOMAINS):
        assert [results.ratio(("lora_r16", lr), measure) for lr in (5e-4, 1e-3, 2e-3)] == pytest.approx([1.0] * 3)


def test_between_two_points_of_the_front_lora_is_between_them(results):
    assert results.lora_at(0.7) == pytest.approx(0.3)
    assert results.lora_at(0.9) == pytest.approx(0.4)  # who learns more than LoRA is compared with its best
    assert math.isnan(results.lora_at(0.3))  # no LoRA that learnt so little
    assert results.ratio(report.BUNDLES) == pytest.approx(0.15 / 0.3)


def test_one_bundle_alone_is_measured_on_its_own_kind(results):
    [routed] = results.cells[report.SEPARATE[1], 0.002]
    found = report.with_tag(results, routed)
    assert found["score"] == pytest.approx(0.6) and found["rise"] == pytest.approx(0.1)
    assert found["ratio"] == pytest.approx(0.5)


def test_tables_have_a_row_of_every_cell(results):
    assert [row[0] for row in report.methods(results).rows] == [
        "base",
        "`bundles:quiet=20`",
        "`bundles:quiet=20,owners=1`",
        *["`lora_r16`"] * 3,
    ]
    [diverged, form] = report.forms(results).rows
    assert diverged[3] == "diverged by step 25" and form[2] == "0.50" and form[-1] == "0.33"
    for table in (report.methods, report.domains, report.separate, report.forms, report.missing):
        made = table(results)
        assert all(len(row) == len(made.columns) for row in made.rows)


def test_shares_of_loras_rise_need_no_name_of_a_family_or_domain(tmp_path):
    """The second data file has others than the first."""

    def other(rises):
        learn = {f"learn/{name}": 0.5 for name in ("biographies", "codes", "gsm", "lcm")}
        domains = {f"domain/{name}": 1.0 + rise for name, rise in zip(("headers", "tutorials"), rises)}
        return {**learn, **domains, "known/cities": 0.7, "text/plays": 3.0, "kl/samples": 0.1}

    def row(method, rises, seconds):
        steps = {"150": other(rises), "300": other(rises)}
        return {"method": method, "lr": 2e-3, "seed": 0, "trainable": 10**6, "seconds": seconds, **steps}

    cells = [
        {"method": "base", "lr": 0.0, "seed": 0, "300": other((0.0, 0.0))},
        row("lora_r16", (0.1, 0.3), 50.0),
        row("lora_r16_local10", (0.02, 0.02), 60.0),
    ]
    path = tmp_path / "confirm.jsonl"
    path.write_text("".join(json.dumps(c) + "\n" for c in cells))
    results = report.read(path)
    assert results.families == ("lcm",) and results.domains == ("headers", "tutorials")
    table = report.against_lora(results, "x")
    assert all(len(row) == len(table.columns) for row in table.rows)
    [base, lora, gentle] = [dict(zip(table.columns, row)) for row in table.rows]
    assert base["cities"] == "0.70" and lora["of LoRA's rise"] == lora["in the worst domain"] == "1.00"
    assert gentle["of LoRA's rise"] == "0.10" and gentle["in the worst domain"] == "0.20"
    assert gentle["seconds over LoRA's"] == "1.20" and gentle["learning"] == "0.500"


def test_sweeps_of_the_second_file_and_of_places_are_well_formed():
    cells = {name: cells_of([name]) for name in ("places", "front", "confirm")}
    assert len(cells["places"]) <= 24 and {seed for _, _, seed in cells["places"]} == {0}
    assert {seed for _, _, seed in cells["front"]} == {0, 1, 2}
    for method, _, _ in {cell for some in cells.values() for cell in some}:
        if method.startswith("bundles:"):
            methods.options_of(method[8:], methods.BUNDLE_OPTIONS, ("quiet",))
        else:
            methods.lora_options(method)


def test_without_a_base_nothing_can_be_said(tmp_path):
    with pytest.raises(ValueError, match="no cell of method 'base'"):
        report.read(tmp_path / "none.jsonl")
