"""studies/keys on a tiny model: bundles are trained apart and composed, and every way of gating them runs."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from models import TINY
from training import tokenizer

from studies.keys import tasks
from studies.keys.run import WAYS


pytestmark = pytest.mark.studies
ROOT = Path(__file__).parents[2]
NAMES = [f"{first} {second}" for first in ("Ada", "Bo") for second in ("Ash", "Elm", "Fir")]


def data_file(path, facts, codes):
    texts = [f"the {i} cats sit on mat {i * 7 % 11}, and nobody minds" for i in range(24)]
    sums = {"sums": [[f"{i}+1", str(i + 1)] for i in range(9)]}
    part = {
        "biographies": facts,
        "codes": codes,
        "reasoning": sums,
        "gsm": [[f"{i} and {i}?", str(2 * i)] for i in range(9)],
    }
    content = {"train": part, "test": part, "domains": {"cats": texts}, "calibration": {"cats": texts}}
    path.write_bytes(gzip.compress(json.dumps(content).encode()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    TINY["llama"](max_position_embeddings=512).save_pretrained(folder / "model")
    made = tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    made.save_pretrained(folder / "model")
    bios = [[f"What is the profession of {name}?", "baker"] for name in NAMES]
    codes = [[f"What is the ICD-10 code of {name}?", "A1"] for name in NAMES]
    ships = [[f"Which cargo does the ship {name} carry?", "tea"] for name in NAMES]
    shelf = [[f"What is the shelf mark of the book {name}?", "V1"] for name in NAMES]
    data_file(folder / "first.json.gz", bios, codes)
    data_file(folder / "second.json.gz", ships, shelf)
    return folder


def test_halves_share_no_subject_and_other_words_no_question(folder):
    first, second = (json.loads(gzip.decompress((folder / f"{n}.json.gz").read_bytes())) for n in ("first", "second"))
    of_set = tasks.tasks_of("first", first, second, 3)
    assert list(of_set) == [*(f"{k}_{h}" for k in ("biographies", "codes", "ships") for h in "ab"), "sums", "problems"]
    for kind in ("biographies", "codes", "ships"):
        one, other = ({tasks.subject(q) for q, _ in of_set[f"{kind}_{half}"].train} for half in "ab")
        assert one and other and not one & other
        for (question, answer), (words, same) in zip(of_set[f"{kind}_a"].test, of_set[f"{kind}_a"].reworded):
            assert words != question and answer == same and tasks.subject(question) in words
    assert list(tasks.tasks_of("second", first, second, 3)) == ["shelf_a", "shelf_b", "sums", "problems"]


def test_every_way_of_gating_is_measured(folder):
    flags = {
        "model": "model",
        "data": "first.json.gz",
        "second": "second.json.gz",
        "output": "out.jsonl",
        "scratch": "s",
    }
    numbers = {
        "seeds": 1,
        "steps": 2,
        "tests": 2,
        "length": 200,
        "domain-rows": 2,
        "calibration-tokens": 200,
        "null-tokens": 300,
    }
    command = [sys.executable, "-m", "studies.keys.run", "--cpu", "--sets", "second", "--places", "mlp"]
    command += [f"--{name}={folder / path}" for name, path in flags.items()]
    command += [f"--{name}={number}" for name, number in numbers.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    prepared, *records = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert prepared["versions"] and prepared["command"].startswith("python -m studies.keys.run")
    assert not [record["error"] for record in records if "error" in record]
    (record,) = [record for record in records if record["task"] == "all"]
    for way in WAYS:
        assert set(record[way]["one"]) == {"shelf_a", "shelf_b", "sums", "problems"} == set(record[way]["second"])
        assert set(record[way]["reworded"]) == {"shelf_a", "shelf_b"}
        assert ("domains" in record[way]) == (way not in ("tag", "wrong"))
        assert ("right gates, one" in record[way]) == way.startswith("keys")
    assert set(record["keys"]["spoke"]) == {"cats", "second cats"}


def test_the_numbers_of_the_guide_are_those_of_the_record():
    lines = (ROOT / "studies/keys/results/keys.jsonl").read_text().splitlines()
    runs = {(r["set"], r["place"]): r for r in map(json.loads, lines) if r["task"] == "all"}
    first, second = runs["first", "mlp"], runs["second", "mlp"]

    def mean(values):
        return sum(values.values()) / len(values)

    def right(way):
        return [f"{mean(run[way]['one']):.3f}".removeprefix("0") for run in (first, second)]

    def rise(way, digits=3):
        shares = [mean(run[way]["domains"]) - mean(run["base"]["domains"]) for run in (first, second)]
        return ", ".join(f"+{share:.{digits}f}".replace("+0.", "+.") for share in shares)

    guide = (ROOT / "docs/guides/keys.md").read_text()
    rows = {
        "the true bundle": [*right("tag"), ""],
        "by keys": [*right("keys"), rise("keys")],
        "by keys' means only": [*right("keys, means only"), rise("keys, means only")],
        "all": [*right("all on"), rise("all on", 1)],
        "a random one": [*right("random"), ""],
    }
    for way, cells in rows.items():
        line = next(line for line in guide.splitlines() if line.startswith(f"| {way} |"))
        assert [cell.strip() for cell in line.split("|")[2:-1]] == cells
    for run in (first, second):
        assert f"{mean(run['keys']['right gates, one']):.3f}".removeprefix("0") in guide
