"""The heads' study: intervals and states are right, every kind of part runs, every committed record has a row."""

import gzip
import json
import sys

import numpy as np
import pytest
import torch
from meta_rows import made
from models import TINY
from training import tokenizer

from peft_bundles.objectives.heads import subspace
from peft_bundles.objectives.rollout_heads import Curiosity
from peft_bundles.objectives.tokens import token_logprobs
from studies.heads import bench as heads_bench
from studies.heads import make_data, report, rollouts
from studies.heads import run as heads


pytestmark = pytest.mark.studies


def test_an_interval_is_that_of_groups_and_not_of_rows():
    marks = np.repeat([0.0, 1.0] * 10, 50)  # twenty groups, each all right or all wrong
    wide = heads_bench.interval(heads_bench.mean(marks), np.repeat(np.arange(20), 50))
    narrow = heads_bench.interval(heads_bench.mean(marks), np.arange(1000))
    assert wide["value"] == narrow["value"] == 0.5
    assert wide["high"] - wide["low"] > 5 * (narrow["high"] - narrow["low"])


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    scores, marks = rng.integers(0, 9, 60).astype(float), rng.integers(0, 2, 60).astype(float)
    gaps = scores[marks > 0][:, None] - scores[marks < 1][None, :]
    wanted = ((gaps > 0) + 0.5 * (gaps == 0)).mean()
    assert heads_bench.auc(scores, marks)(np.arange(60)) == pytest.approx(wanted)
    within = heads_bench.auc_within(100 * marks + scores, marks, marks)  # each kind of one class: nothing to tell
    assert np.isnan(within(np.arange(60)))


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The command on a tiny model with random weights and little data: parts -> the records of both modes."""

    class Model:
        from_pretrained = staticmethod(lambda *_, **__: TINY["llama"](max_position_embeddings=256))
        from_config = staticmethod(heads_bench.AutoModelForCausalLM.from_config)

    for module in (heads, heads_bench):
        monkeypatch.setattr(module, "AutoModelForCausalLM", Model)
    monkeypatch.setattr(heads.AutoTokenizer, "from_pretrained", lambda *_: tokenizer())
    monkeypatch.setattr(rollouts, "SAMPLES", 2)
    solutions = [
        {"question": f"{i} + {i}?", "answer": f"It is {2 * i + wrong}", "correct": not wrong, "model": model}
        for i in range(160)
        for wrong, model in enumerate("ab" if i % 2 else "ba")
    ]
    text = [f"piece {i} of a text with {i * i} words in it" for i in range(14)]
    data = {
        "documents": {f"document {d}": [f"{d} {piece}" for piece in text] for d in range(30)},
        "calibration": [f"the {i} cats sit on the mat and {i * 7 % 11} dogs lie on it" for i in range(160)],
        "solutions": solutions,
    }
    with gzip.open(tmp_path / "data.json.gz", "wt") as file:
        json.dump(data, file)

    def run(*parts, **options):
        given = {"data": tmp_path / "data.json.gz", "output": tmp_path / "cells.jsonl", "model": tmp_path, "seeds": 1,
                 "scale": 0.01, "steps": 2, **options}  # fmt: skip
        flags = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["run.py", *flags, "--parts", *parts])
        heads.main()
        return [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]

    return run


def test_what_is_sampled_from_a_cache_is_what_a_forward_says():
    """States, log-probabilities and advantages of completions, against plain forwards of the whole rows."""
    on = made(max_position_embeddings=256)  # bundles that are not the identity: they are off while it samples
    bench = heads_bench.Bench(on, tokenizer(), {}, 0, 0.01, 2)
    curiosity = Curiosity(subspace(on, "curiosity"), bench.forward.output_embeddings.weight, "x")
    families = [make_data.questions(name, 6, 1, 0)[0] for name in ("sums", "products")]
    torch.manual_seed(0)
    found = rollouts.sampled(bench, curiosity, families)
    rollouts.with_group(found)
    place, rewards = 0, []
    for batch in found.batches:
        outputs = bench.forward.reference(batch)
        mask = batch["completion_mask"][:, 1:] > 0
        here = slice(place, place + int(mask.sum()))
        place = here.stop
        torch.testing.assert_close(found.before[here], outputs.hidden[:, :-1][mask], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.after[here], outputs.hidden[:, 1:][mask], rtol=1e-4, atol=1e-5)
        logs = token_logprobs(outputs.logits, batch["input_ids"])[mask]
        said = torch.from_numpy(found.simple["log-probability"][here])
        torch.testing.assert_close(said, logs, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.ids[here, 1], batch["input_ids"][:, 1:][mask])
        lengths = mask.sum(1)
        assert int(found.last[here].sum()) == len(mask) and lengths.max() <= rollouts.LENGTH
        rewards += [row[m][0].item() for row, m in zip(batch["returns"], mask)]
    assert place == len(found.ids) and len(rewards) == 12 * rollouts.SAMPLES
    first = np.r_[True, found.last[:-1]]
    group = rollouts.tokens(found, "group")[first].reshape(12, -1)
    wanted = np.array(rewards).reshape(12, -1)
    wanted = (wanted - wanted.mean(1, keepdims=True)) / (wanted.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(group, wanted, rtol=1e-3, atol=1e-4)
    assert [len(set(p)) for p in found.prompt[first].reshape(12, -1)] == [1] * 12


def test_a_near_number_is_rewarded_less_than_the_right_one():
    said = [" 50\n", " 45\n", " 50 apples", " x", " -50\n"]
    assert make_data.rewarded(said, ["50"] * 5) == pytest.approx([1.2, 0.65, 1.0, 0.0, 0.2])


@pytest.mark.slow
def test_every_kind_of_part_runs_and_what_is_there_is_not_run_again(bench, monkeypatch):
    """One part of each kind of rows."""
    parts = ["rollouts", "confusion", "single answers, last token", "derivations, mean of tokens",
             "own answers, with surprise", "solutions, last token", "contrastive", "temporal"]  # fmt: skip

    def own(self, prompts, answers, greedy):
        """A random model is never right: this one is right every other time, and else off by one."""
        right = [eval(prompt.splitlines()[-1].removesuffix(" =")) for prompt in prompts]
        return [[str(number + (i + n) % 2) for i in range(answers)] for n, number in enumerate(right)]

    monkeypatch.setattr(heads_bench.Bench, "sample", own)
    for module, name, value in ((heads_bench, "STEPS", 4), (heads_bench, "DRAWS", 20),
                                (rollouts, "EPOCHS", 2)):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    records = bench(*parts)
    wanted = {(part, "frozen") for part in parts} | {(part, "trained") for part in parts if part not in heads.ALONE}
    assert {(r["part"], r["mode"]) for r in records} == wanted
    assert len(bench(*parts)) == len(records)
    for record in records:
        for cells in record["signals"].values():
            where = {"frozen": {"subspace", "whole state"}, "trained": {"trained"}}[record["mode"]]
            assert where <= cells.keys() or where <= cells["group"].keys()


@pytest.mark.slow
def test_a_head_finds_nothing_in_a_random_model(bench):
    """On a tiny model with random weights the head cannot know; with few sequences the interval says so."""
    for record in bench("consistency, pairs", "consistency, sequences", modes="frozen"):
        found = record["signals"][record["part"]]["subspace"]["AUC"]
        assert found["low"] <= found["value"] <= found["high"] and found["low"] < 0.65


def test_every_committed_record_has_a_row():
    labels = [row[0] for row in report.table().rows]
    parts = {part for part, _ in report.records()}
    assert parts == {line.part for line in report.LINES if line.label in labels}


def test_bold_is_what_every_seed_says():
    line = report.Line("x", "x", ("x",), "AUC", 0.5)
    seeds = [{"value": 0.6, "low": 0.51, "high": 0.7}, {"value": 0.56, "low": 0.52, "high": 0.6}]
    assert report.shown(seeds, report.beats(line, seeds)) == "**0.58 (0.51 to 0.70)**"
    assert not report.beats(line, [*seeds, {"value": 0.55, "low": 0.49, "high": 0.6}])
    assert not report.beats(line._replace(lower=True), seeds) and not report.beats(line, [])
