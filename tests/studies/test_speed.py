"""benchmarks/speed.py and the tables of what it measures."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.studies
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("speed_report", ROOT / "benchmarks/speed_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_goal_is_met_at_its_bound_and_not_above(report):
    assert report.Goal("", 1.05, [1.2, 1.05, 0.9]).met() is True
    assert report.Goal("", 1.05, [1.2, 1.0501, 0.9]).met() is False
    assert report.Goal("", 1.05, None).met() is None


def test_a_missed_goal_is_in_the_table(report):
    run = {"device": "NVIDIA Some GPU", "date": "2030-01-01", "command": "", "versions": {}, "load": None}
    ms = {"base": [10.0], "lora_r16": [13.0], "bundles_15": [11.0], "bundles_15_routed": [12.0]}
    found = {name: {"ms": value, "trainable": 0, "peak_over_base_weights_gib": 1.0} for name, value in ms.items()}
    job = {"cells": found, "batch": [8, 1024], "base_weights_gib": 2.0, "run": 0}
    goals, runs, training = report.tables({"speed_some.json": {"runs": [run], "results": {"1.2b": {"train": job}}}})
    assert ["15 bundles routed / base", "1.05", "1.200 (1.200 to 1.200)", "no", "`speed_some.json`"] in goals.rows
    assert [
        "peak memory, 15 bundles / base",
        "1.05",
        "1.000 (1.000 to 1.000)",
        "yes",
        "`speed_some.json`",
    ] in goals.rows
    assert runs.heading.startswith("NVIDIA Some GPU") and training.heading == "1.2b, train, batch 8 x 1024"
    assert [row[3] for row in training.rows] == [f"{r:.2f} ({r:.2f} to {r:.2f})" for r in (1.0, 1.3, 1.1, 1.2)]


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
    same_rows = [t for t in report.tables({"cpu": first}) if t.heading.startswith("tiny, same_rows")]
    assert [row[0] for row in same_rows[0].rows][-1].startswith("floor")
    again = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout
    assert again.count("there already") == 2
    assert json.loads(output.read_text())["results"] == first["results"]
