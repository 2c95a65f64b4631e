"""The pages in recipes/results are what the report scripts make of the committed runs."""

import importlib.util
from pathlib import Path

import pytest


RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize("recipe", ["rl_separate", "semantic"])
def test_the_page_is_the_one_that_the_runs_give(recipe):
    spec = importlib.util.spec_from_file_location(f"{recipe}_report", RECIPES / f"{recipe}_report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    assert (RECIPES / f"results/{recipe}.md").read_text(encoding="utf-8") == report.page(report.read())
