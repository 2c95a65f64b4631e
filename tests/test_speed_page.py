"""docs/speed.md is what benchmarks/speed_report.py makes of the committed measurements."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("speed_report", ROOT / "benchmarks/speed_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_one_that_the_measurements_give(report):
    assert (ROOT / "docs/speed.md").read_text(encoding="utf-8") == report.page(report.read())


def test_a_goal_is_met_at_its_bound_and_not_above(report):
    assert report.verdict("1.05", [1.2, 1.05, 0.9]) == "met"
    assert report.verdict("1.05", [1.2, 1.0501, 0.9]) == "**not met**"
    assert report.verdict("1.05", None) == "not measured"


def test_the_floor_is_of_one_forward_and_four_backwards(report):
    cells = {"forward": {"ms": [10.0, 20.0]}, "one_loss": {"ms": [30.0, 80.0]}}
    assert report.floors(cells) == pytest.approx([90 / 30, 260 / 80])


@pytest.mark.slow
def test_a_run_writes_its_cells_and_a_second_one_finds_them(report, tmp_path):
    output = tmp_path / "speed.json"
    options = ["--shapes", "tiny", "--sections", "train,same_rows", "--cells", "base,lora_r16,bundles_15,bundles_64"]
    command = [sys.executable, "benchmarks/speed.py", "--output", output, *options, "--batch", "8x8", "--seconds", "0"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    first = json.loads(output.read_text())
    training = first["results"]["tiny"]["train"]["cells"]
    assert all("error" not in cell and len(cell["ms"]) == 3 for cell in training.values())
    parameters = {name: training[name]["trainable"] for name in ("lora_r16", "bundles_15", "bundles_64")}
    assert parameters["bundles_15"] == parameters["bundles_64"]  # however many
    assert 0.97 < parameters["bundles_15"] / parameters["lora_r16"] <= 1
    assert "The floor" in report.page({"cpu": first})
    again = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout
    assert again.count("there already") == 2
    assert json.loads(output.read_text())["results"] == first["results"]
