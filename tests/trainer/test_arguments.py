"""Each of transformers' training arguments acts or is refused, and the page says which."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from training import arguments, bundles_of, losses_of, model, pairs, texts, trainer
from transformers import TrainingArguments

from peft_bundles.objectives import LM, Preference
from peft_bundles.trainer import BundleTrainingConfig
from peft_bundles.trainer.arguments import ACTS, REFUSED, default_of


PAGE = Path(__file__).parents[2] / "docs" / "training-arguments.md"


def table() -> list[str]:
    rows = {name: ("acts", text) for name, text in ACTS.items()} | {name: ("refused", r) for name, r in REFUSED.items()}
    return [f"| `{name}` | {kind} | {text} |" for name, (kind, text) in sorted(rows.items())]


def test_every_argument_of_transformers_is_in_the_table():
    names = {field.name for field in fields(TrainingArguments)}
    assert names == ACTS.keys() | REFUSED.keys() and not ACTS.keys() & REFUSED.keys()


def test_the_page_shows_the_table():
    assert [line for line in PAGE.read_text().splitlines() if line.startswith("| `")] == table()


OTHER = {
    "include_num_input_tokens_seen": "all",
    "dataloader_pin_memory": 0.5,
    "train_sampling_strategy": "group_by_length",
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_has_no_effect_is_refused(tmp_path, name):
    """In one sentence with the argument's name, and before transformers looks at it."""
    default = default_of(name)
    value = OTHER.get(name, not default if isinstance(default, bool) else 3)
    with pytest.raises(
        ValueError, match=rf"^{name}={value!r} is not supported by BundleTrainer: .*Leave {name} out\.$"
    ):
        arguments(tmp_path, **{name: value})
    arguments(tmp_path, **{name: default})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optim": "galore_adamw", "optim_args": "rank=2"}, "optim='galore_adamw' is not supported"),
        ({"optim": "lomo"}, "optim='lomo' is not supported"),
        ({"push_to_hub": True}, r"hub_strategy='every_save' .* set hub_strategy='end'"),
    ],
)
def test_values_without_effect_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **fields)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "ACCELERATE_DYNAMO_BACKEND",
            "INDUCTOR",
            r"launch sets torch_compile \(ACCELERATE_DYNAMO_BACKEND='IND",
        ),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "launch sets mixed_precision='fp16'"),
    ],
)
def test_what_the_launcher_sets_is_refused_too(tmp_path, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path)


def test_checked_arguments_can_be_copied(tmp_path):
    args = arguments(tmp_path, lr_multipliers={"b_lm": 2.0}, include_num_input_tokens_seen=False)
    assert replace(args, max_steps=9).max_steps == 9
    assert BundleTrainingConfig(str(tmp_path), report_to="none").gradient_accumulation_steps == 1


CHANGES = [
    {"learning_rate": 2e-2},
    {"optim": "sgd"},
    {"adam_beta1": 0.5},
    {"adam_epsilon": 1.0},
    {"weight_decay": 0.5},
    {"lr_scheduler_type": "linear"},
    {"warmup_steps": 3, "lr_scheduler_type": "constant_with_warmup"},
    {"max_grad_norm": 1e-3, "optim": "sgd"},
    {"gradient_accumulation_steps": 2},
    {"per_device_train_batch_size": 4},
    {"neftune_noise_alpha": 50.0},
    {"seed": 7},
    {"bf16": True},
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    made = {}
    for optim in ("adamw_torch_fused", "sgd"):
        on = model()
        trainer(tmp_path_factory.mktemp("plain"), LM(texts()), on, optim=optim).train()
        made[optim] = bundles_of(on)["b_lm"]
    return made


@pytest.mark.parametrize("fields", CHANGES, ids=lambda f: next(iter(f)))
def test_what_acts_changes_what_is_learnt(tmp_path, plain, fields):
    on = model()
    trainer(tmp_path, LM(texts()), on, **fields).train()
    before = plain["sgd" if "max_grad_norm" in fields else "adamw_torch_fused"]
    assert not all(torch.equal(a, b) for a, b in zip(before, bundles_of(on)["b_lm"]))


def test_held_out_rows_come_in_batches_of_the_eval_size_and_before_the_first_step(tmp_path):
    objectives = [LM(texts(), eval_dataset=texts(5)), Preference(pairs())]
    run = trainer(tmp_path, objectives, max_steps=1, per_device_eval_batch_size=3, eval_on_start=True)
    sizes = []
    kept = run.objectives["lm"].collate
    run.objectives["lm"].collate = lambda rows: sizes.append(len(rows)) or kept(rows)
    run.train()
    assert sizes == [3, 2, 2]  # five held-out rows, then the step's
    assert next(iter(run.state.log_history))["eval_loss/lm"] > 0 and len(losses_of(run)) == 1
