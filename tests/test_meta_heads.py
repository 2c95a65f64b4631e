"""benchmarks/meta_heads.py: that it runs, and that docs/signals.md says what its records say."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from models import TINY
from training import tokenizer


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import meta_heads  # noqa: E402


RECORDS = sorted((ROOT / "benchmarks" / "results").glob("meta_heads_*.json"))


def test_an_interval_is_that_of_groups_and_not_of_rows():
    marks = np.repeat([0.0, 1.0] * 10, 50)  # twenty groups, each all right or all wrong
    wide = meta_heads.interval(meta_heads.mean(marks), np.repeat(np.arange(20), 50))
    narrow = meta_heads.interval(meta_heads.mean(marks), np.arange(1000))
    assert wide["value"] == narrow["value"] == 0.5
    assert wide["high"] - wide["low"] > 5 * (narrow["high"] - narrow["low"])
    assert meta_heads.auc(np.array([1.0, 2.0]), np.array([0.0, 1.0]))(np.arange(2)) == 1.0


@pytest.mark.slow
def test_a_part_runs_and_finds_nothing_in_a_random_model(tmp_path, monkeypatch, capsys):
    """On a tiny model with random weights the head cannot know; with sixteen sequences the interval says so."""
    bare = meta_heads.AutoModelForCausalLM.from_config

    class Model:
        from_pretrained = staticmethod(lambda *_, **__: TINY["llama"]())
        from_config = staticmethod(bare)

    monkeypatch.setattr(meta_heads._data, "model_folder", lambda: tmp_path)
    monkeypatch.setattr(meta_heads, "AutoModelForCausalLM", Model)
    monkeypatch.setattr(meta_heads.AutoTokenizer, "from_pretrained", lambda *_: tokenizer())
    output = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["meta_heads.py", "consistency", "--output", str(output), "--scale", "0.01"])
    meta_heads.main()
    record = json.loads(output.read_text())
    for name in ("consistency, pairs", "consistency, sequences"):
        found = record["signals"][name]["subspace"]["AUC"]
        assert found["low"] <= found["value"] <= found["high"] and found["low"] < 0.65
    assert "AUC" in capsys.readouterr().out


def test_the_page_says_what_the_records_say():
    """Every number with an interval is in a committed record."""
    known = set()

    def collect(value):
        if isinstance(value, dict):
            if {"value", "low", "high"} == value.keys():
                known.add("{value:.2f} ({low:.2f} to {high:.2f})".format(**value))
            for part in value.values():
                collect(part)

    for path in RECORDS:
        collect(json.loads(path.read_text())["signals"])
    page = (ROOT / "docs" / "signals.md").read_text()
    cells = re.findall(r"-?\d\.\d\d \(-?\d\.\d\d to -?\d\.\d\d\)", page)
    assert len(RECORDS) == 4 and len(cells) >= 25
    assert not [cell for cell in cells if cell not in known]
