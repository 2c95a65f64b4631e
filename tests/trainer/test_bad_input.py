"""Every wrong input has an error that names objective, row and fix, before the model moves."""

import re
import tempfile
import warnings

import pytest
import torch
from datasets import Dataset
from models import TINY, VOCABULARY, layers, snapshot, unchanged
from peft import PeftModel
from training import arguments, config, model, pairs, texts, tokenizer, trainer
from transformers import AutoModelForCausalLM, TrainingArguments

from peft_bundles.objectives import LM, PPO, Preference
from peft_bundles.trainer import BundleTrainer


PROMPTS = [{"prompt": "a"}, {"prompt": "bb"}]


def ones(completions, **_) -> list[float]:
    return [1.0] * len(completions)


def refused(tmp_path, objectives, message: str, made: PeftModel | None = None, error=ValueError, **fields) -> None:
    """Making the trainer raises; nothing has moved."""
    made = made or model()
    before = snapshot(made.state_dict())
    with pytest.raises(error, match=message):
        trainer(tmp_path, objectives, made, **fields)
    assert unchanged(before, made.state_dict())


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            LM([{"txt": "a"}]),
            r"'lm' needs the columns input_ids or prompt\+completion or messages or text, but .*\['txt'\]",
        ),
        (Preference([{"prompt": "a", "chosen": "b"}]), r"'preference' needs the columns chosen\+rejected"),
        (Preference([{"prompt": "a"}], loss="kto"), r"chosen\+rejected or prompt\+completion\+label"),
        (PPO([{"question": "a"}], ones), r"'ppo' needs the columns prompt, but the dataset has \['question'\]"),
        (LM([{"text": "a"}, {"text": None}]), r"'lm': row 1 has no 'text' \(None\); drop or fill"),
        (LM([]), r"'lm': the train dataset is empty; give at least one row"),
        (LM(["a", "b"]), r"'lm': row 0 of the train dataset is a str; give a dict of columns, such as \{'text': ...\}"),
        (PPO([*PROMPTS, "c"], ones), r"'ppo': row 2 of the train dataset is a str; give a dict"),
        (LM([{"text": "a"}, {"text": 1}]), r"'lm': row 1: 'text' is 1; give text, or a list of messages"),
        (LM(texts(), eval_dataset=[]), r"'lm': the eval dataset is empty"),
        (LM(iter(texts())), r"'lm': the train dataset is a list_iterator; give a datasets.Dataset"),
        (PPO([{"prompt": "a"}, {"prompt": ""}], ones), r"'ppo': the prompt of row 1 has no token; drop that row"),
        (LM([{"prompt": "abcdef", "completion": "x"}], max_length=4), r"'lm': none of the 1 train rows has a token"),
        (LM([{"input_ids": [5, 6], "token_weights": [1.0, 0.0]}]), r"'lm': none of the 1 train rows has a token"),
        (
            LM([{"input_ids": [5, 6], "token_weights": [1.0]}]),
            r"row 0 has 2 input_ids and token_weights=\[1.0\]; give a number a token",
        ),
        (
            LM([{"input_ids": [5, 6], "token_weights": [1.0, -1.0]}]),
            r"token_weights=\[1.0, -1.0\]; give finite numbers >= 0",
        ),
        (Preference([{"prompt": "abcdef", "chosen": "x", "rejected": "y"}], max_length=4), r"none of the 1 train rows"),
        (PPO(PROMPTS, ones, max_completion_length=500), r"max_completion_length=500 exceed the model's 128 positions"),
    ],
)
def test_datasets(tmp_path, objective, message):
    refused(tmp_path, objective, message)


def test_rows_without_a_token_to_learn_from_are_counted(tmp_path):
    rows = [{"prompt": "abcdef", "completion": "x"}, {"prompt": "a", "completion": "x"}]
    with pytest.warns(UserWarning, match="'lm': 1 of 2 train rows are left out"):
        trainer(tmp_path, objective := LM(rows, max_length=4))
    assert len(objective.rows) == 1


def test_signals_and_names(tmp_path):
    refused(
        tmp_path, LM(texts(), signal="poetry"), r"objective 'poetry': no bundle takes part in signal\(s\) \['poetry'\]"
    )
    bundles = config().bundles
    del bundles["b_kl"]
    refused(
        tmp_path, PPO(PROMPTS, ones), r"objective 'ppo': no bundle takes part in .*\['kl'\]", model(bundles=bundles)
    )
    refused(tmp_path, [LM(texts()), LM(texts())], r"objectives are named \['lm', 'lm'\]")
    refused(tmp_path, [], r"objectives are named \[\]; give at least one")
    for field, value in (("rows", {"lmm": 2}), ("lr_multipliers", {"b_x": 2.0}), ("max_grad_norms", {"b_x": 2.0})):
        refused(tmp_path, LM(texts()), rf"{field} names \['{next(iter(value))}'\]; it takes some of", **{field: value})
    refused(tmp_path, LM(texts()), r"mixing_weights names \['x'\]", mixing="ratio", mixing_weights={"x": 1.0})
    refused(tmp_path, LM(texts()), r"mixing_weights belong to mixing='ratio'", mixing_weights={"lm": 1.0})
    plain = AutoModelForCausalLM.from_config(model().config)
    with pytest.raises(ValueError, match="has no bundles; use get_peft_model"):
        BundleTrainer(plain, arguments(tmp_path), LM(texts()), tokenizer())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixing": "sometimes"}, "mixing='sometimes' is unknown; choose one of together, ratio, alternate"),
        ({"trunk": "half"}, "trunk='half' is unknown"),
        ({"rows": {"lm": 0}}, r"rows\['lm'\]=0 must be a positive int"),
        ({"lr_multipliers": {"b_lm": -1.0}}, r"lr_multipliers\['b_lm'\]=-1.0 must be a positive number"),
        ({"trunk_ranks": {"lm": 2}}, r"need trunk='full'; it is 'frozen'"),
        ({"trunk_refresh": 0}, "trunk_refresh=0 must be at least 1"),
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant=True loses gradients"),
    ],
)
def test_arguments(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **fields)


@pytest.mark.parametrize("launched", [True, False])
def test_deepspeed_is_refused_by_its_argument_and_by_its_launcher(tmp_path, monkeypatch, launched):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", str(launched).lower())
    settings = {} if launched else {"deepspeed": {"zero_optimization": {"stage": 2}}}
    with pytest.raises(ValueError, match=r"deepspeed.* not supported .*: DeepSpeed gives bundles .* use DDP or FSDP2"):
        arguments(tmp_path, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LM(texts(), prompt_weight=-1.0), "prompt_weight=-1.0 must be a number >= 0"),
        (lambda: Preference(pairs(), loss="dpo"), "loss='dpo' is unknown; choose one of sigmoid"),
        (lambda: Preference(pairs(), beta=0.0), "beta=0.0 must be positive"),
        (lambda: Preference(pairs(), loss="ipo", dpop=1.0), "dpop=1.0 belongs to loss='sigmoid'"),
        (lambda: PPO(PROMPTS, ones, advantages="gea"), "advantages='gea' is unknown"),
        (lambda: PPO(PROMPTS, ones, advantages="grpo"), "num_generations must be >= 2"),
        (lambda: PPO(PROMPTS, ones, kl_estimator="k1"), "kl_estimator='k1' has no gradient as a loss"),
        (lambda: PPO(PROMPTS, []), r"0 reward_funcs and 0 reward_weights"),
        (lambda: PPO(PROMPTS, ones, reward_weights=[1.0, 2.0]), r"1 reward_funcs and 2 reward_weights"),
        (lambda: PPO(PROMPTS, ones, epochs=0), "epochs=0 must be a whole number of at least 1"),
        (lambda: PPO(PROMPTS, ones, temperature=0.0), "temperature=0.0 must be a number > 0"),
    ],
)
def test_objectives(make, message):
    with pytest.raises(ValueError, match=f"objective '(lm|preference|ppo)': .*{message}"):
        make()


def wrong(kind: str):
    def reward(completions, **_):
        if kind == "raises":
            raise KeyError("answer")
        if kind == "scalar":
            return 1.0
        rewards = [1.0] * len(completions)
        return {"short": rewards[1:], "nan": [*rewards[:-1], float("nan")], "none": [*rewards[:-1], None]}[kind]

    def strict(completions):
        return [1.0] * len(completions)

    strict.__name__ = "reward"
    return strict if kind == "strict" else reward


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            "raises",
            RuntimeError,
            r"reward function 'reward' raised KeyError: 'answer'.*called with 2 completions.*cope with any text",
        ),
        ("strict", RuntimeError, r".*'reward' raised TypeError: .*argument.*write it as f\(completions, \*\*kwargs\)"),
        ("scalar", ValueError, r"reward function 'reward' returned 1\.0, a float; return a list, one number per"),
        ("short", ValueError, r"reward function 'reward' returned 1 rewards for 2 completions"),
        ("nan", ValueError, r"reward function 'reward' gave row 1 the reward nan \(prompt '(a|bb)'"),
        ("none", ValueError, r"no reward function applies to row 1"),
    ],
)
def test_reward_functions(tmp_path, kind, error, message):
    made = model()
    before = snapshot(made.state_dict())
    run = trainer(tmp_path, PPO(PROMPTS, wrong(kind), max_completion_length=3), made)
    with pytest.raises(error, match=f"objective 'ppo': {message}"):
        run.train()
    assert unchanged(before, made.state_dict())


@pytest.mark.parametrize("given", [None, "some/reward-model", [ones, None]])
def test_reward_functions_that_are_none(given):
    with pytest.raises(ValueError, match=r"'ppo': reward_funcs has (None|'some/reward-model'); give functions"):
        PPO(PROMPTS, given)


def test_what_is_no_objective_and_no_config(tmp_path):
    refused(tmp_path, texts(), r"objectives has a dict; give objectives, e.g. \[LM\(rows\)\]")
    plain = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="args is a TrainingArguments; give a BundleTrainingConfig"):
        BundleTrainer(model(), plain, [LM(texts())], tokenizer())  # type: ignore[arg-type]


def test_rollouts(tmp_path):
    run = trainer(tmp_path, PPO(PROMPTS, ones, num_generations=3, advantages="rloo", max_completion_length=3))
    with pytest.raises(ValueError, match="'ppo': num_generations=3 does not divide the 2 completions of a rollout"):
        run.train()
    endless = PPO(PROMPTS, ones, max_completion_length=3, generation={"eos_token_id": VOCABULARY})
    with pytest.warns(UserWarning, match="'ppo': none of the 2 completions of a rollout has an end token within"):
        trainer(tmp_path, endless, max_steps=1).train()
    tok = tokenizer()
    tok.eos_token = None
    with pytest.raises(
        ValueError, match="'ppo': neither the tokenizer nor the model's generation_config has an end token"
    ):
        made = model()
        made.get_base_model().generation_config.eos_token_id = None
        BundleTrainer(made, arguments(tmp_path), PPO(PROMPTS, ones), tok)


def test_a_penalty_that_would_learn_at_the_full_rate_is_told_of(tmp_path):
    with pytest.warns(
        UserWarning, match=r"\['b_entropy', 'b_kl'\] are updated by the penalties \['entropy', 'kl'\] alone"
    ):
        trainer(tmp_path, PPO(PROMPTS, ones, entropy_coef=0.01))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*penalties.*")
        trainer(tmp_path, PPO(PROMPTS, ones), lr_multipliers={"b_kl": 0.01})


def test_evaluate_takes_no_dataset(tmp_path):
    run = trainer(tmp_path, LM(texts(), eval_dataset=texts(2)))
    with pytest.raises(ValueError, match="takes no dataset; give held-out rows to an objective"):
        run.evaluate(texts(2))
    assert torch.isfinite(torch.tensor(run.evaluate()["eval_loss"]))


def test_without_held_out_rows_there_is_no_evaluation(tmp_path):
    """Neither a perfect score of 0 nor an argument that this trainer does not have."""
    with pytest.raises(ValueError, match=r"no objective has held-out rows; give .* LM\(rows, eval_dataset=held_out\)"):
        trainer(tmp_path, LM(texts())).evaluate()
    refused(tmp_path, LM(texts()), "eval_strategy='epoch', but no objective has held-out rows", eval_strategy="epoch")
    refused(tmp_path, LM(texts()), "eval_on_start=True, but no objective has held-out rows", eval_on_start=True)
    for rows in (texts(3), Dataset.from_list(texts(3))):
        with pytest.raises(ValueError, match=r"has no predict\(\); use model.generate\(\), or evaluate\(\)"):
            trainer(tmp_path, LM(texts())).predict(rows)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda: model(),
            r"not calibrated, so there is no penalty .*\(quiet=20\).* call peft_bundles.calibrate",
        ),
        (
            lambda: model(calibrated=True),
            r"kept [\d,]+ of up to 4,096 states, so there is only a weak .* with more text",
        ),
        (lambda: loaded(), r"no states were kept with it, so there is no penalty .*, states_only=True\)"),
    ],
)
def test_a_penalty_without_states_is_said_once(tmp_path, made, message):
    with pytest.warns(UserWarning) as seen:
        trainer(tmp_path, LM(texts()), made()).train()
    (said,) = [str(w.message) for w in seen if "penalty on what bundles do" in str(w.message)]
    assert re.search(message, said) and said.endswith("set BundleConfig(quiet=0) to train without it.")


def loaded() -> PeftModel:
    with tempfile.TemporaryDirectory() as folder:
        model(calibrated=True).save_pretrained(folder)
        return PeftModel.from_pretrained(TINY["llama"](), folder, is_trainable=True)


def test_a_penalty_with_enough_states_or_of_weight_0_is_not_mentioned(tmp_path):
    enough = model(calibrated=True)
    for layer in layers(enough):
        states = layer.bundle_states["default"]
        layer.bundle_states["default"] = states.repeat(2048 // len(states) + 1, 1)[:2048]
    for made in (enough, model(quiet=0.0), model(bundles={}, sub_bases={}, moved=False)):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*penalty on what bundles do.*")
            trainer(tmp_path, LM(texts()), made)
