"""recipes/semantic.py on a tiny model with a tokenizer of characters, without a network."""

import gzip
import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from models import TINY
from training import tokenizer
from transformers import AutoModelForCausalLM

from peft_bundles.core.basis import bundle_shapes
from peft_bundles.taxonomy import TOPICS
from recipes import semantic
from studies.measures.text import text_loss
from studies.semantic import report
from studies.semantic.cells import bundle_config
from studies.semantic.report import summary
from studies.semantic.texts import encoded, write_texts


pytestmark = pytest.mark.studies
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run it: a folder for the output, further flags, settings of the cells."""
    folder = tmp_path_factory.mktemp("semantic")
    TINY["llama"]().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    rng = random.Random(0)

    def text(topic):
        return " ".join(rng.choices([f"{topic}{i}" for i in range(5)], k=20))

    kinds = [*TOPICS, "other"]
    texts = {
        "train": {t: [text(t) for _ in range(20)] for t in kinds},
        "test": {t: [text(t) for _ in range(6)] for t in kinds},
    }
    texts["tau"] = {"lexicon": {t: [[0.9 * (t == k) for k in TOPICS] for _ in range(20)] for t in TOPICS}}
    write_texts(texts, folder / "texts.json.gz")
    assert not list(folder.glob("*.part"))

    def called(output, *flags, cells=None):
        given = yaml.safe_load((RECIPES / "semantic.yaml").read_text())
        given["smoke"] |= {"steps": 3, "rows": 6, "length": 24, "test_rows": 4}
        given["smoke"]["calibration"] = {"tokens": 600, "max_length": 48, "own": 2}
        given["smoke"]["sweep"] = {"seeds": [0], "cells": cells or [{}, {"overlap": 0.5}]}
        (folder / "small.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
        paths = [f"--config={folder / 'small.yaml'}", f"--model={folder / 'model'}", f"--output={folder / output}"]
        return semantic.main([*paths, f"--data={folder / 'texts.json.gz'}", "--smoke", *flags])

    called.folder = folder
    return called


@pytest.fixture(scope="module")
def whole(run):
    return run("whole")


def test_the_matrix_has_every_topic_and_column(whole, run):
    for record in whole:
        assert list(record["matrix"]) == [*TOPICS, "other"]
        assert all(list(row) == ["base", "none", *TOPICS, "all"] for row in record["matrix"].values())
    lines = (run.folder / "whole" / "cells.jsonl").read_text().splitlines()
    assert [json.loads(line)["cell"] for line in lines] == [{}, {"overlap": 0.5}]
    assert all((run.folder / "whole" / f"sweeps.{kind}").stat().st_size for kind in ("png", "svg"))


def test_base_is_the_base_model_and_a_bundle_moves_its_topic(whole, run):
    base = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32).eval()
    texts = json.loads(gzip.decompress((run.folder / "texts.json.gz").read_bytes()))
    ids, _ = encoded(tokenizer(), texts["test"]["law"], 24)
    row = whole[0]["matrix"]["law"]
    assert row["base"] == text_loss(base, ids[:4])
    assert len(set(row.values())) == len(row)  # every bundle, and none of them, says something else
    assert summary(whole[0]["matrix"])["own"] < 0


def test_a_resumed_sweep_runs_what_is_missing_and_is_the_sweep(run, whole):
    first = run("parts", cells=[{}])
    with pytest.raises(ValueError, match=r"has 1 cells; give --resume"):
        run("parts")
    resumed = run("parts", "--resume")
    assert resumed[0] == first[0]
    assert [record["matrix"] for record in resumed] == [record["matrix"] for record in whole]
    again = (run.folder / "parts" / "cells.jsonl").read_bytes()
    run("parts", "--resume")
    assert (run.folder / "parts" / "cells.jsonl").read_bytes() == again


def test_every_knob_and_mask_runs(run):
    cells = [{"topics": 2}, {"signal_rank": 0}, {"mask": "rate", "tau": "lexicon"}, {"gate_forward": False}]
    cells += [{"mask": "soft", "tau": "lexicon"}]  # with tags all masks are 0 or 1 and the same
    records = run("knobs", cells=cells)
    assert list(records[0]["matrix"]) == ["animals", "ml", "other"]
    no_general = records[1]["matrix"]["law"]
    assert no_general["none"] == no_general["base"]  # without the bundles that are always on
    assert len({json.dumps(record["matrix"]) for record in records}) == len(cells)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
def test_supports_have_the_overlap_that_is_asked_for(overlap):
    given = {"topics": 6, "overlap": overlap, "rank": 0.08, "size": 2.0, "signal_rank": 0.1, "seed": 0}
    shapes = {n: s for n, s in bundle_shapes(bundle_config(given, 576), 576).items() if n.startswith("b_sem")}
    supports = [set(s.support.tolist()) for s in shapes.values()]
    assert {len(s) for s in supports} == {46}
    assert all(abs(len(a & b) / 46 - overlap) <= 0.5 / 46 + 1e-9 for a in supports for b in supports if a is not b)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"topics": 9}, "topics: 9 must be from 2 to 6"),
        ({"mask": "fuzzy"}, "mask='fuzzy' is unknown"),
        ({"colour": 1}, r"names \['colour'\]"),
        ({"tau": "embedding"}, r"tau: 'embedding': the texts have \['lexicon'\]"),
        ({"test_rows": 40}, "test_rows: 40, but only 6 test texts of 'animals'"),
        ({"overlap": 1.0}, "no column of its own"),
    ],
)
def test_bad_settings(run, cell, message):
    with pytest.raises(ValueError, match=message):
        run(f"bad-{next(iter(cell))}", cells=[cell])


def test_only_some_settings(run):
    with pytest.raises(ValueError, match="has 2 settings"):
        run("only", "--only", "2")


def test_tables_are_means_over_seeds_and_settings_that_differ_in_one_knob():
    def cell(seed, own, **changed):
        matrix = {t: {"base": 3.0, "none": 2.0, "a": 2.1, "b": 2.1, "all": 2.0} for t in ("a", "b", "other")}
        matrix["a"]["a"] = matrix["b"]["b"] = 2.0 - own
        settings = {"overlap": 0.0, "size": 1, "rank": 0.1, "topics": 2, "signal_rank": 0.1, **changed}
        return {"cell": changed, "seed": seed, "settings": settings, "matrix": matrix}

    cells = [cell(0, 0.1), cell(1, 0.3), cell(0, 0.4, overlap=0.5), cell(0, 0.2, mask="soft")]
    assert summary(cells[0]["matrix"]) | {"neighbours": 0} == pytest.approx(
        {"own": -0.1, "transfer": 0.1, "neighbours": 0, "all": 0.0, "other": 0.0}
    )
    matrix, overlap, others = report.tables(cells)
    assert matrix.rows[0] == ["a", "3.000", "2.000", "-0.200", "+0.100", "+0.000"]
    assert [row[:3] for row in overlap.rows] == [["0", "2", "-0.200 ± 0.141"], ["0.5", "1", "-0.400"]]
    assert [row[0] for row in others.rows] == ["default", "mask: soft"]
