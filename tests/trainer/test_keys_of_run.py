"""Keys that the trainer makes at the end: those of the rows of each bundle's signals."""

from __future__ import annotations

import pytest
import torch
from models import batch, weights
from training import arguments, model, pairs, texts, tokenizer, trainer

from peft_bundles import KeyRouter, learn_keys, learn_null
from peft_bundles.objectives import LM, PPO, Preference
from peft_bundles.trainer import BundleTrainer
from peft_bundles.trainer.keys import ROWS, TOKENS, token_ids


def length(completions, **_) -> list[float]:
    return [float(len(c)) for c in completions]


def prompts() -> list[dict[str, str]]:
    return [{"prompt": "a" * n} for n in (3, 4, 5, 2)]


def keys_of(trained) -> dict[str, torch.Tensor]:
    return {bundle: key.mean for (_, bundle), key in trained.base_model._state.keys.items()}


def test_every_bundle_has_the_key_of_its_rows(tmp_path):
    ppo = PPO(prompts(), length, max_completion_length=4, entropy_coef=0.01)
    run = trainer(tmp_path, [LM(texts()), Preference(pairs()), ppo], max_steps=1)
    run.train()
    keys, counts = keys_of(run.model), run.model.peft_config["default"].keys
    assert counts["b_lm"]["rows"] == 12 and counts["b_preference"]["rows"] == 10 and counts["b_value"]["rows"] == 4
    for bundle, objective in (("b_lm", "lm"), ("b_preference", "preference"), ("b_policy", "ppo")):
        rows = [{"input_ids": token_ids(row)} for row in run.objectives[objective].rows]
        learn_keys(run.model, {bundle: rows}, progress=False)
        assert torch.equal(keys_of(run.model)[bundle], keys[bundle])
    assert torch.equal(keys["b_value"], keys["b_entropy"]) and not torch.equal(keys["b_lm"], keys["b_value"])


def test_keys_change_nothing_of_the_training(tmp_path):
    runs = [trainer(tmp_path / str(keys), LM(texts()), max_steps=2, keys=keys) for keys in (True, False)]
    for run in runs:
        torch.manual_seed(0)
        run.train()
    with_keys, without = (weights(run.model) for run in runs)
    assert all(torch.equal(with_keys[name], without[name]) for name in without)
    assert keys_of(runs[0].model) and not keys_of(runs[1].model)


def test_a_run_that_ended_goes_on_from_its_checkpoint(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    run = trainer(tmp_path, LM(texts()), max_steps=1, **saving)
    run.train()
    longer = trainer(tmp_path, LM(texts()), on=run.model, max_steps=2, **saving)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 2 and keys_of(longer.model)


def test_many_rows_are_thinned(tmp_path):
    run = trainer(tmp_path, LM([{"text": f"row {n}"} for n in range(ROWS + 40)]), max_steps=1)
    run.train()
    assert run.model.peft_config["default"].keys["b_lm"]["rows"] == ROWS
    run = trainer(tmp_path, LM([{"text": "row " * 20 + str(n)} for n in range(ROWS)], max_length=None), max_steps=1)
    run.train()
    counts = run.model.peft_config["default"].keys["b_lm"]
    assert counts["rows"] == ROWS // 6 + 1 and counts["tokens"] <= TOKENS  # every sixth


def test_a_topic_bundle_has_the_key_of_its_topics_rows(tmp_path):
    bundles = {
        f"b_{topic}": {"rank": 4, "sub_bases": ["a"], "signals": {"lm": 1.0}, "role": "semantic", "topic": topic}
        for topic in ("cats", "dogs")
    }
    rows = [{"text": f"row {n} of {n % 3}", "topics": ["cats"] if n % 3 else ["dogs"]} for n in range(9)]
    on = model(bundles=bundles)
    topics = {"topics": ["cats", "dogs"], "mask": "hard"}
    run = BundleTrainer(on, arguments(tmp_path, max_steps=1, topics=topics), LM(rows), tokenizer())
    run.train()
    assert {name: counts["rows"] for name, counts in on.peft_config["default"].keys.items()} == {
        "b_cats": 6,
        "b_dogs": 3,
    }


def test_a_model_with_a_router_is_not_trained(tmp_path):
    on = model()
    learn_null(on, [{"input_ids": row} for row in batch(16, 16).tolist()], tokens=200, progress=False)
    on.set_router(KeyRouter(always_on=list(on.peft_config["default"].bundles)))
    with pytest.raises(ValueError, match="the model has a router"):
        trainer(tmp_path, LM(texts()), on=on)
    on.set_router(None)
    trainer(tmp_path, LM(texts()), on=on, max_steps=1).train()
