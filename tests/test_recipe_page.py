"""recipes/results/rl_separate.md is what recipes/rl_separate_report.py makes of the committed runs."""

import importlib.util
from pathlib import Path


RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def test_the_page_is_the_one_that_the_runs_give():
    spec = importlib.util.spec_from_file_location("rl_separate_report", RECIPES / "rl_separate_report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    assert (RECIPES / "results/rl_separate.md").read_text(encoding="utf-8") == report.page(report.read())
