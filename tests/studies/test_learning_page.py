"""docs/learning.md is what studies/quality/report.py makes of the committed cells."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("quality_report", ROOT / "studies/quality/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.read()
    return module


def test_the_page_is_the_one_that_the_cells_give(report):
    assert (ROOT / "docs/learning.md").read_text(encoding="utf-8") == report.page()


def test_the_ratio_of_lora_to_itself_is_one(report):
    rates = [lr for method, lr in report.RUN["cells"] if method == "lora_r16" and lr <= report.TUNED]
    assert len(rates) > 2
    for measure in ("rise", *report.DOMAINS):
        assert [report.ratio(("lora_r16", lr), measure) for lr in rates] == pytest.approx([1.0] * len(rates))


def test_between_two_points_of_the_front_lora_is_between_them(report):
    (x0, y0), (x1, y1) = ([report.mean(("lora_r16", lr), m) for m in ("score", "rise")] for lr in (0.001, 0.002))
    assert report.lora_at((x0 + x1) / 2) == pytest.approx((y0 + y1) / 2)
    assert report.lora_at(x1 + 0.1) == y1  # who learns more than LoRA is compared with its best
    assert report.lora_at(0.0) != report.lora_at(0.0)  # NaN: no LoRA that learnt so little
