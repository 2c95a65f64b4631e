"""The quiet penalty in trainers that are not ours: each step is the trainer's own, and the penalty's gradient once."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from models import layers, weights
from training import arguments, completions, model, pairs, texts, tokenizer, trainer
from transformers import Trainer, TrainingArguments

from peft_bundles.core.quiet import DRAW
from peft_bundles.core.walking import state_of
from peft_bundles.objectives import LM
from peft_bundles.trainer import BundleTrainer, QuietLogging


RATE, ROWS = 1e-2, 4


@pytest.fixture(scope="module")
def made():
    """It keeps so few states that every step looks at all of them."""
    made = model(calibrated=True, quiet=5.0)
    for layer in layers(made):
        layer.bundle_states["default"] = layer.bundle_states["default"][:DRAW]
    return made


def reward(completions, **_):
    return [float(sum(map(ord, c)) % 7) for c in completions]


def tokenised():
    ids = [tokenizer()(row["text"][:12]).input_ids for row in texts(8)]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def prompts():
    return Dataset.from_list([{"prompt": "a" * (n % 3 + 1)} for n in range(16)])


def smoothed(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].transpose(1, 2)
    return F.cross_entropy(logits, labels[:, 1:], label_smoothing=0.2, reduction="sum") / num_items_in_batch


RL = {"num_generations": 2, "max_completion_length": 3}
KTO = [{"prompt": f"{i}+{i}=", "completion": f"{i * 2}", "label": bool(i % 2)} for i in range(8)]

# name -> its class, its arguments' class and more of them, its data, more of its own arguments
TRAINERS = {
    "Trainer": (Trainer, TrainingArguments, {}, tokenised, {}),
    "label smoothing": (Trainer, TrainingArguments, {"label_smoothing_factor": 0.1}, tokenised, {}),
    "compute_loss_func": (Trainer, TrainingArguments, {}, tokenised, {"compute_loss_func": smoothed}),
    "SFT": (trl.SFTTrainer, trl.SFTConfig, {}, lambda: Dataset.from_list(texts(8)), {}),
    "SFT, checkpointing": (
        trl.SFTTrainer,
        trl.SFTConfig,
        {"gradient_checkpointing": True},
        lambda: Dataset.from_list(completions(8)),
        {},
    ),
    "DPO": (trl.DPOTrainer, trl.DPOConfig, {}, lambda: Dataset.from_list(pairs(8)), {}),
    "KTO": (trl.KTOTrainer, trl.KTOConfig, {}, lambda: Dataset.from_list(KTO), {}),
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig, {**RL, "beta": 0.1}, prompts, {"reward_funcs": reward}),
    "RLOO": (trl.RLOOTrainer, trl.RLOOConfig, RL, prompts, {"reward_funcs": reward}),
}


def step(made, folder, name, quiet, parts, *, steps=1, **more):
    """The trainer after some steps of plain SGD on the same weights and rows."""
    cls, args_cls, fields, data, own = TRAINERS[name]
    on = copy.deepcopy(made)
    state_of(on).configs["default"].quiet = quiet
    common = {
        "use_cpu": True,
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": ROWS // parts,
        "gradient_accumulation_steps": parts,
    }
    args = args_cls(str(folder), **{**common, **fields, **more})
    run = cls(
        model=on, args=args, train_dataset=data(), processing_class=tokenizer(), callbacks=[QuietLogging()], **own
    )
    run.train()
    return run


def penalty_of(made) -> dict:
    other = copy.deepcopy(made).train()
    other(torch.arange(5, 9)[None])
    other.quiet_loss().backward()
    return {name: p.grad for name, p in weights(other).items()}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_moves_by_the_penaltys_gradient_more(made, tmp_path, name, parts):
    wanted = penalty_of(made)
    with_penalty, without = (step(made, tmp_path, name, quiet, parts) for quiet in (5.0, 0.0))
    bare, before = weights(without.model), weights(made)
    assert not all(torch.equal(p, before[n]) for n, p in bare.items())  # the trainer's own loss moves them too
    for key, parameter in weights(with_penalty.model).items():
        torch.testing.assert_close((bare[key] - parameter) / RATE, wanted[key], rtol=1e-3, atol=2e-4)
    logged = [entry for entry in with_penalty.state.log_history if "loss" in entry]
    other = copy.deepcopy(made).train()
    other(torch.arange(5, 9)[None])
    assert logged[0]["loss/quiet"] == pytest.approx(other.quiet_loss().item(), rel=1e-4)
    assert not any("loss/quiet" in entry for entry in without.state.log_history)
    assert logged[0]["loss"] == pytest.approx(
        next(entry["loss"] for entry in without.state.log_history if "loss" in entry), rel=1e-3
    )
