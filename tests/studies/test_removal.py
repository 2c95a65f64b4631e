"""recipes/removal.py on a tiny model with a tokenizer of characters, without a network: every way of removing runs."""

import gzip
import json
from pathlib import Path

import pytest
import torch
import yaml
from models import TINY
from training import tokenizer

from recipes import removal
from studies.removal import methods
from studies.removal.run import Study


pytestmark = pytest.mark.studies
ROOT = Path(__file__).parents[2]
METHODS = ("ascent", "ascent_retain", "rmu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run it in a folder; returns the records."""
    folder = tmp_path_factory.mktemp("removal")
    TINY["llama"](max_position_embeddings=256).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    pairs = {kind: [[f"{kind} {i}", chr(65 + i)] for i in range(9)] for kind in ("codes", "biographies")}
    pairs["reasoning"] = {"sums": [[f"{i}+1", str(i + 1)] for i in range(9)]}
    texts = [f"the {i} cats sit on mat {i * 7 % 11}, and nobody minds" for i in range(12)]
    data = {"train": pairs, "test": pairs, "domains": {"cats": texts}, "calibration": {"cats": texts}}
    (folder / "data.json.gz").write_bytes(gzip.compress(json.dumps(data).encode()))
    given = yaml.safe_load((ROOT / "recipes/removal.yaml").read_text())
    given |= {"rows": {"codes": 4, "biographies": 2, "reasoning": 2}, "steps": 12, "warmup": 2, "seeds": [0]}
    given |= {"calibration": 400, "text_rows": 4, "learning_rate": 1e-2}
    given["unlearn"] |= {
        "rates": {method: [1e-2] for method in METHODS},
        "rows": 4,
        "steps": 4,
        "every": 2,
        "below": -1.0,
    }
    given["relearn"] |= {"at": [0, 2, 4], "rows": 4, "learning_rate": 1e-2}
    (folder / "small.yaml").write_text(yaml.safe_dump(given, sort_keys=False))

    def called(output, *flags):
        paths = {
            "config": "small.yaml",
            "model": "model",
            "data": "data.json.gz",
            "output": output,
            "scratch": "scratch",
        }
        removal.main([*(f"--{name}={folder / path}" for name, path in paths.items()), *flags])
        return [json.loads(line) for line in (folder / output).read_text().splitlines()]

    called.folder, called.given = folder, given
    return called


@pytest.fixture(scope="module")
def records(run):
    return {record["variant"]: record for record in run("cells.jsonl")}


def test_every_cell_has_its_measures(records):
    assert set(records) == {"none", "owners", "all", "never", "base", *METHODS}
    for variant, record in records.items():
        assert "error" not in record, record["error"]
        assert set(record["after"]["accuracy"]) == {"codes", "biographies", "reasoning"}
        assert [point[0] for point in record["relearn"]["all"]] == [0, 2, 4]
        assert [len(point) for point in record["relearn"]["part"]] == [3, 3, 3]
        assert ("before" in record) == (variant not in ("base", "never"))


def test_the_unlearned_lora_is_the_taught_one_before_and_another_after(records):
    taught = records["none"]
    assert taught["before"] == taught["after"]  # nothing was removed
    for method in METHODS:
        assert records[method]["before"] == taught["before"]
        assert records[method]["after"]["forget_loss"] != taught["after"]["forget_loss"]
        assert [step for step, _ in records[method]["unlearn"]["curve"]] == [0, 2, 4]
    for method in ("ascent", "ascent_retain"):
        assert records[method]["after"]["forget_loss"] > taught["after"]["forget_loss"]


def test_bundles_that_are_off_are_the_base(records):
    assert records["owners"]["off_is_base"] and records["all"]["off_is_base"]
    for variant in ("owners", "all"):
        assert records[variant]["before"]["forget_loss"] != records[variant]["after"]["forget_loss"]
    assert records["base"]["after"]["forget_kl"] == pytest.approx(0.0, abs=1e-6)
    assert records["owners"]["trainable"] == pytest.approx(records["all"]["trainable"])


def test_all_is_taught_faster_than_nothing(records):
    for variant, record in records.items():
        first, *_, last = record["relearn"]["all"]
        assert last[1] >= first[1], variant


def test_relearning_begins_where_the_removed_model_is(records):
    """The fresh LoRA adds nothing at step 0, and the part and the rest are the whole."""
    for record in records.values():
        of_all, (_, part, rest) = record["after"]["accuracy"]["codes"], record["relearn"]["part"][0]
        assert record["relearn"]["all"][0][1] == pytest.approx(of_all)
        assert (3 * part + 6 * rest) / 9 == pytest.approx(of_all)


def test_another_call_runs_only_what_is_missing(run, records):
    path = run.folder / "cells.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["variant"] != "rmu"]
    (run.folder / "again.jsonl").write_text("".join(kept))
    again = run("again.jsonl")
    assert [record["variant"] for record in again[len(kept) :]] == ["rmu"]
    assert again[-1]["after"] == records["rmu"]["after"]
    assert again[-1]["relearn"] == records["rmu"]["relearn"]


def test_rmu_moves_the_forget_set_and_keeps_the_rest(run):
    given = {**run.given, "model": str(run.folder / "model"), "data": str(run.folder / "data.json.gz")}
    study = Study({**given, "scratch": str(run.folder)}, torch.device("cpu"))
    built = methods.lora(study.base, 0)
    rows = methods.drawn(study.pools, {"codes": 4}, 1, 0)
    loss = methods.rmu_loss(built, study.base, rows, {**given["unlearn"], "depth": 1.0}, 0)
    batch = rows.at(0)
    assert loss(batch, batch).item() > 0.5  # far from the target, and the retain set not moved at all: all is forget
    no_retain = methods.rmu_loss(built, study.base, rows, {**given["unlearn"], "depth": 1.0, "retain": 0.0}, 0)
    assert loss(batch, batch).item() == pytest.approx(no_retain(batch, batch).item())


def test_bad_settings(run):
    with pytest.raises(ValueError, match="forget: 'songs' must be one of rows"):
        (run.folder / "bad.yaml").write_text(yaml.safe_dump({**run.given, "forget": "songs"}))
        removal.main([f"--config={run.folder / 'bad.yaml'}"])
    with pytest.raises(ValueError, match="give --data FILE"):
        removal.main([f"--config={run.folder / 'small.yaml'}", "--model=x"])
