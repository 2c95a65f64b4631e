"""docs/speed.md is what benchmarks/speed_report.py makes of the committed measurements."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("speed_report", ROOT / "benchmarks/speed_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_one_that_the_measurements_give(report):
    records = report.read()
    assert (ROOT / "docs/speed.md").read_text(encoding="utf-8") == report.page(records)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == report.readme(readme, records) and report.MARKS[1] in readme


def test_a_goal_is_met_at_its_bound_and_not_above(report):
    assert report.verdict(report.Goal("", "1.05", [1.2, 1.05, 0.9])) == "met"
    assert report.verdict(report.Goal("", "1.05", [1.2, 1.0501, 0.9])) == "**not met**"
    assert report.verdict(report.Goal("", "1.05", None)) == "not measured"


def test_a_missed_goal_is_on_the_page_with_by_how_much(report):
    run = {"device": "NVIDIA Some GPU", "date": "2030-01-01", "command": "", "versions": {}, "load": None}
    ms = {"base": [10.0], "lora_r16": [13.0], "bundles_15": [11.0], "bundles_15_routed": [12.0]}
    found = {name: {"ms": value, "trainable": 0, "peak_over_base_weights_gib": 1.0} for name, value in ms.items()}
    found["base"]["parts_ms"] = {"forward": 4.0, "backward": 6.0}
    found["bundles_15_routed"]["parts_ms"] = {"forward": 4.5, "backward": 6.25, "optimizer": 0.5}
    job = {"cells": found, "batch": [8, 1024], "base_weights_gib": 2.0, "run": 0}
    page = report.page({"benchmarks/results/speed_some.json": {"runs": [run], "results": {"1.2b": {"train": job}}}})
    assert "| 15 bundles routed / base | 1.05 | 1.200 (1.200 to 1.200) | **not met** |" in page
    assert "0.150 above. Part by part, each waited for: forward +0.5 ms, backward +0.2 ms, optimizer +0.5 ms." in page
    assert "| peak memory, 15 bundles / base | 1.05 | 1.000 (1.000 to 1.000) | met |" in page


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
