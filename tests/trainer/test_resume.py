"""Checkpoints: a resumed run is the run; a killed save leaves the last one; two processes are one."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import snapshot, unchanged, weights
from safetensors.torch import load_file, save_file
from training import (
    arguments,
    config,
    everywhere,
    greedy,
    losses_of,
    model,
    pairs,
    texts,
    tokenizer,
    trainer,
    two_processes,
)
from transformers.trainer_utils import get_last_checkpoint

from peft_bundles import BundleConfig
from peft_bundles.objectives import LM, PPO, Preference
from peft_bundles.trainer import BundleTrainer
from peft_bundles.trainer.checkpoint import STAGING, RunState


PROMPTS = [{"prompt": "a" * n} for n in (3, 1, 5, 2)]


def length(completions, **_) -> list[float]:
    return [float(len(c)) for c in completions]


def objectives(**ppo):
    options = {"max_completion_length": 4, "epochs": 2, "minibatches": 2, "kl_target": 0.01, "kl_horizon": 8, **ppo}
    return [LM(texts()), Preference(pairs()), PPO(PROMPTS, length, entropy_coef=0.01, **options)]


@pytest.mark.parametrize(
    "fields", [{}, {"mixing": "ratio"}, {"trunk": "full", "trunk_ranks": {"lm": 3}, "trunk_refresh": 4}]
)
def test_a_resumed_run_is_the_run(tmp_path, fields):
    """Step 3 is in the middle of a rollout; dropout, momentum, a schedule and an adaptive coefficient are at work."""
    common = {"max_steps": 7, "lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": 3, **fields}
    whole = trainer(tmp_path, objectives(), model(dropout=0.1, calibrated=True), **common)
    whole.train()
    kept = snapshot(whole.model.state_dict()), losses_of(whole)
    resumed = trainer(tmp_path, objectives(), model(dropout=0.1, calibrated=True), **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 7
    assert losses_of(resumed) == kept[1]
    assert kept[1][0]["loss/quiet"] > 0
    assert unchanged(kept[0], resumed.model.state_dict())
    heads = [run.objectives["ppo"].value_head.weight for run in (whole, resumed)]
    assert torch.equal(*heads) and heads[0].any()


def test_what_is_in_a_checkpoint_loads_without_the_trainer(tmp_path):
    run = trainer(tmp_path, objectives(), max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    folder = tmp_path / "checkpoint-2"
    assert {"adapter_model.safetensors", "heads.safetensors", "run.json", "objectives-0.safetensors"} <= set(
        os.listdir(folder)
    )
    assert json.loads((folder / "run.json").read_text())["objectives"]["ppo"] == ["policy", "value", "entropy", "kl"]
    head = load_file(folder / "heads.safetensors")["ppo.weight"]
    assert torch.equal(head, run.objectives["ppo"].value_head.weight)
    assert not (tmp_path / STAGING).exists()


def test_the_limit_on_checkpoints_and_the_best_one_hold(tmp_path):
    rows = LM(texts(), eval_dataset=texts(3))
    run = trainer(
        tmp_path, rows, max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="eval_loss/lm", greater_is_better=True,
    )  # fmt: skip
    run.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")


# ---- a save that is killed ----


def _save_until_killed(folder: str) -> None:
    torch.set_num_threads(1)
    run = trainer(Path(folder), objectives(), max_steps=200, save_strategy="steps", save_steps=1)
    run.train()


@pytest.mark.slow
def test_kill_9_while_saving_leaves_the_last_checkpoint(tmp_path):
    """Killed when the optimizer of the third checkpoint is being written: what is called a checkpoint is complete."""
    child = multiprocessing.get_context("spawn").Process(target=_save_until_killed, args=(str(tmp_path),))
    child.start()
    deadline = time.monotonic() + 600  # starting a process takes minutes on a busy machine
    while time.monotonic() < deadline and child.is_alive():
        if (tmp_path / "checkpoint-2").exists() and list((tmp_path / STAGING).glob("*/optimizer.pt")):
            break
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    last = int(get_last_checkpoint(str(tmp_path)).rpartition("-")[2])
    run = trainer(tmp_path, objectives(), max_steps=last + 1, save_strategy="steps", save_steps=1)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == last + 1 and (tmp_path / f"checkpoint-{last + 1}").exists()
    assert not (tmp_path / STAGING).exists()


def test_an_unfinished_save_is_not_taken_for_a_checkpoint(tmp_path):
    run = trainer(tmp_path, objectives(), max_steps=2, save_strategy="steps", save_steps=1)
    run.train()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / STAGING / "checkpoint-3")
    (tmp_path / STAGING / "checkpoint-3" / "trainer_state.json").unlink()
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    again = trainer(tmp_path, objectives(), max_steps=3, save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").exists() and not (tmp_path / STAGING).exists()


# ---- a checkpoint of another run ----


def other_bundles() -> BundleConfig:
    changed = config()
    changed.bundles["b_lm"].signals["preference"] = 0.5
    return changed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixing": "alternate"}, r"another mixing: was \['together', None\], is \['alternate', None\]"),
        ({"forward": {"lm": "owners"}}, r"another forward table: lm\.b_preference was None, is 0\.0"),
        ({"seed": 1}, r"another seed: was 42, is 1"),
        ({"per_device_train_batch_size": 3}, r"another per_device_train_batch_size or rows: lm was 2, is 3"),
        ({"rows": {"ppo": 4}}, r"another per_device_train_batch_size or rows: ppo was 2, is 4"),
        (
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
            r"another per_device_train_batch_size or rows: lm was 2, is 1",
        ),
        ({"gradient_accumulation_steps": 2}, r"another gradient_accumulation_steps: was 1, is 2"),
        ({"fewer": True}, r"another number of training rows: lm was 12, is 11"),
        ({"bundles": True}, r"another bundle config: bundles\.b_lm\.signals\.preference was None, is 0\.5"),
        ({"objectives": True}, r"another objectives: preference was \['preference'\], is None"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_before_anything_moves(tmp_path, fields, message):
    trainer(tmp_path, objectives(), max_steps=1, save_strategy="steps", save_steps=1).train()
    fields = dict(fields)
    made = model(bundles=other_bundles().bundles) if fields.pop("bundles", False) else model()
    kept = objectives()[::2] if fields.pop("objectives", False) else objectives()
    if fields.pop("fewer", False):
        kept[0] = LM(texts(11))
    run = trainer(tmp_path, kept, made, max_steps=2, **fields)
    before = snapshot(made.state_dict())
    with pytest.raises(ValueError, match=message):
        run.train(resume_from_checkpoint=True)
    assert unchanged(before, made.state_dict())


def test_settings_with_tuples_and_sets_equal_those_in_their_checkpoint(tmp_path):
    settings = {"topics": {"topics": ("law", "ml")}, "bundle config": {"target_modules": {"b", "a"}}}
    run = RunState(settings, {}, None, 0, 1)
    run.save_weights(tmp_path)
    run.save_objectives(tmp_path)
    run.check(tmp_path)
    with pytest.raises(ValueError, match=r"another topics: .*law"):
        RunState({**settings, "topics": {"topics": ("law",)}}, {}, None, 0, 1).check(tmp_path)


def test_a_checkpoint_of_another_trainer_or_of_more_processes_is_refused(tmp_path):
    trainer(tmp_path, LM(texts()), max_steps=1, save_strategy="steps", save_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    save_file({}, folder / "objectives-1.safetensors", {"values": "{}"})
    with pytest.raises(ValueError, match=r"saved by 2 process\(es\), but 1 run now"):
        trainer(tmp_path, LM(texts()), max_steps=2).train(resume_from_checkpoint=True)
    (folder / "run.json").unlink()
    with pytest.raises(ValueError, match=r"has no run\.json, so BundleTrainer did not save it"):
        trainer(tmp_path, LM(texts()), max_steps=2).train(resume_from_checkpoint=True)


# ---- two processes ----


def _run(folder: str, world: int, **fields) -> BundleTrainer:
    """Greedy rollouts: what is sampled would differ with the rows a process has."""
    kept = objectives(minibatches=1)
    kept[2] = greedy(kept[2])
    trunk = {"trunk": "full", "trunk_ranks": {"lm": 4}, "trunk_refresh": 2}
    rate = {"per_device_train_batch_size": 4 // world, "optim": "sgd", "learning_rate": 0.05}
    args = arguments(Path(folder), **rate, **trunk, **fields)
    rows = [*texts(), {"text": "z" * 50}]
    kept[0] = LM(rows, eval_dataset=texts(3))
    kept[1] = Preference(pairs(), eval_dataset=pairs(1))  # fewer rows than processes
    made = model(calibrated=True, bundles=everywhere())
    if dist.is_initialized():  # each process draws its own first weights; the first one's count
        for parameter in weights(made).values():
            parameter.data += dist.get_rank()
    return BundleTrainer(made, args, kept, tokenizer())


def _worker(rank: int, folder: str) -> None:
    run = _run(folder, 2, ddp_backend="gloo", save_strategy="steps", save_steps=2)
    run.train()
    found = run.evaluate()
    heads = run.objectives["ppo"].value_head.state_dict()
    torch.save(
        {"state": run.model.state_dict(), "heads": heads, "log": losses_of(run), "eval": found}, f"{folder}/{rank}.pt"
    )
    again = _run(folder, 2, ddp_backend="gloo", save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    torch.save(again.model.state_dict(), f"{folder}/resumed-{rank}.pt")


@pytest.mark.slow
def test_two_processes_equal_one_and_resume(tmp_path):
    first, second = two_processes(_worker, tmp_path / "two")
    assert unchanged(first["state"], second["state"]) and unchanged(first["heads"], second["heads"])
    for rank in (0, 1):
        assert unchanged(first["state"], torch.load(tmp_path / "two" / f"resumed-{rank}.pt"))
    alone = _run(str(tmp_path / "one"), 1)
    alone.train()
    for key, value in alone.model.state_dict().items():
        torch.testing.assert_close(first["state"][key], value, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    torch.testing.assert_close(
        first["heads"], dict(alone.objectives["ppo"].value_head.state_dict()), rtol=1e-3, atol=1e-5
    )
    for a, b in zip(first["log"], losses_of(alone)):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    found = alone.evaluate()
    for name in ("eval_loss/lm", "eval_loss/preference", "eval_preference/rewards/margin"):
        assert first["eval"][name] == pytest.approx(found[name], rel=1e-4, abs=1e-6)
