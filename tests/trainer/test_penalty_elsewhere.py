"""The quiet penalty in trainers that are not ours: each step is the trainer's own, and the penalty's gradient once."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import trl
from datasets import Dataset
from models import batch, layers, weights
from torch.nn.parallel import DistributedDataParallel
from training import completions, everywhere, model, pairs, texts, tokenizer, trainer, two_processes
from transformers import Trainer, TrainingArguments

from peft_bundles.core.quiet import DRAW
from peft_bundles.core.walking import state_of
from peft_bundles.objectives import LM, Preference
from peft_bundles.trainer import QuietLogging


RATE, ROWS = 1e-2, 4


@pytest.fixture(scope="module")
def made():
    """It keeps so few states that every step looks at all of them."""
    made = model(calibrated=True, quiet=5.0)
    for layer in layers(made):
        layer.bundle_states["default"] = layer.bundle_states["default"][:DRAW]
    return made.double()  # so that nothing that a test looks for is hidden by rounding


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


def step(made, folder, name, quiet, parts, *, steps=1, fresh=True, **more):
    """The trainer after some steps of plain SGD on the same weights and rows."""
    cls, args_cls, fields, data, own = TRAINERS[name]
    on = copy.deepcopy(made) if fresh else made
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
        torch.testing.assert_close((bare[key] - parameter) / RATE, wanted[key], rtol=1e-7, atol=1e-9)
    logged = [entry for entry in with_penalty.state.log_history if "loss" in entry]
    other = copy.deepcopy(made).train()
    other(torch.arange(5, 9)[None])
    assert logged[0]["loss/quiet"] == pytest.approx(other.quiet_loss().item(), rel=1e-9)
    assert not any("loss/quiet" in entry for entry in without.state.log_history)
    assert logged[0]["loss"] == pytest.approx(
        next(entry["loss"] for entry in without.state.log_history if "loss" in entry), rel=1e-3
    )


def test_our_own_trainer_moves_by_the_same(made, tmp_path):
    found = []
    for quiet in (5.0, 0.0):
        on = copy.deepcopy(made)
        state_of(on).configs["default"].quiet = quiet
        fields = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 1e9, "gradient_accumulation_steps": 2}
        trainer(tmp_path, [LM(texts()), Preference(pairs())], on, **fields).train()
        found.append(weights(on))
    for key, wanted in penalty_of(made).items():
        learns = key.endswith(("b_lm", "b_preference"))
        moved = (found[1][key] - found[0][key]) / RATE
        torch.testing.assert_close(moved, wanted if learns else torch.zeros_like(wanted), rtol=1e-7, atol=1e-9)


def test_every_step_of_several_iterations_and_micro_batches_has_it_once(made, tmp_path):
    """A fused optimizer changes weights without telling torch."""
    for name, fields in (("GRPO", {"num_iterations": 2}), ("SFT", {}), ("Trainer", {"optim": "adamw_torch_fused"})):
        run = step(made, tmp_path, name, 5.0, 2, steps=4, logging_steps=100, **fields)
        assert state_of(run.model).penalty.count == run.state.global_step == 4


def test_our_trainer_after_another_and_another_after_ours(made, tmp_path):
    on = copy.deepcopy(made)
    step(on, tmp_path, "SFT", 5.0, 1, fresh=False)
    ours = trainer(tmp_path, LM(texts()), on, max_steps=2)
    ours.train()
    assert [entry["loss/quiet"] > 0 for entry in ours.state.log_history if "loss" in entry] == [True, True]
    same = copy.deepcopy(made)
    same.load_state_dict(on.state_dict())
    wanted, bare = penalty_of(same), weights(step(same, tmp_path, "SFT", 0.0, 1).model)
    step(on, tmp_path, "SFT", 5.0, 1, fresh=False)
    for key, parameter in weights(on).items():
        torch.testing.assert_close((bare[key] - parameter) / RATE, wanted[key], rtol=1e-7, atol=1e-9)


def two_ranks(rank, folder):
    """A plain loop in DDP: a micro-batch without synchronisation, then one with it."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    on = model(calibrated=True, quiet=5.0, bundles=everywhere()).double().train()
    wrapped = DistributedDataParallel(on)
    for number, context in enumerate((wrapped.no_sync, nullcontext)):
        ids = batch(2, 6, seed=2 * rank + number)
        with context():
            (wrapped(input_ids=ids).logits.logsumexp(-1).mean() / 2).backward()
    torch.save({name: p.grad for name, p in weights(on).items()}, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_of_another_trainer_end_with_the_same_gradient(tmp_path):
    first, second = two_processes(two_ranks, tmp_path)
    on = model(calibrated=True, quiet=0.0, bundles=everywhere()).double().train()
    for seed in range(4):
        (on(input_ids=batch(2, 6, seed=seed)).logits.logsumexp(-1).mean() / 4).backward()
    for name, parameter in weights(on).items():
        assert torch.equal(first[name], second[name])
        assert (first[name] - parameter.grad).norm() > 0.1 * first[name].norm()
