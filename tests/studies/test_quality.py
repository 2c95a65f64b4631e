"""The numbers and tables of the learning study, on cells made by hand."""

import json
import math

import pytest

from studies.quality import report


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


def test_without_a_base_nothing_can_be_said(tmp_path):
    with pytest.raises(ValueError, match="no cell of method 'base'"):
        report.read(tmp_path / "none.jsonl")
