"""What rl_separate.py measures: rewards of greedy completions, preferences, losses on held-out text; by bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

import peft_bundles
from peft_bundles.core.basis import bundle_shapes, support_overlap
from peft_bundles.objectives import Outputs, Preference
from peft_bundles.objectives.data import prompt_ids
from peft_bundles.objectives.preference import sequence_logprobs
from peft_bundles.trainer import BundleTrainer
from studies.measures.text import text_loss
from studies.rl_separate import cards, tasks


CHUNK = 32  # rows of a forward when measuring


@torch.no_grad()
def pair_logprobs(model: nn.Module, objective: Preference) -> Tensor:
    """log p of the chosen and the rejected completion of each held-out pair, (N, 2)."""
    found, count = [], len(objective.eval_rows)
    for start in range(0, count, CHUNK):
        batch = objective.collate([objective.eval_rows[i] for i in range(start, min(start + CHUNK, count))])
        batch = {name: value.to(model.device) for name, value in batch.items() if isinstance(value, Tensor)}
        found.append(logprobs(model, batch).view(2, -1).T)
    return torch.cat(found)


def logprobs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """log p of every row's completion, (B,)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return sequence_logprobs(Outputs(logits, logits), batch)


def prompt_batch(rows: list[dict[str, Any]], tokenizer: Any) -> dict[str, Any]:
    """Prompts padded on the left, and the answers."""
    ids = [prompt_ids(row, tokenizer) for row in rows]
    prompts = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    return {**prompts, "answer": [row["answer"] for row in rows]}


@torch.no_grad()
def batch_rewards(model: nn.Module, tokenizer: Any, batch: dict[str, Any], length: int) -> list[float]:
    """The reward of every row's greedy completion."""
    prompts = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    options = {"do_sample": False, "max_new_tokens": length, "use_cache": True}
    made = model.generate(**prompts, **options, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(made[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    scores = [f(texts, answer=batch["answer"]) for f in tasks.REWARDS]
    return [sum(w * s for w, s in zip(tasks.WEIGHTS, row)) for row in zip(*scores)]


@torch.no_grad()
def task_rewards(model: nn.Module, tokenizer: Any, rows: list[dict[str, Any]], length: int) -> tuple[float, float]:
    """Mean reward of greedy completions, and the share that is the right number and nothing else."""
    rewards = []
    for start in range(0, len(rows), CHUNK):
        rewards += batch_rewards(model, tokenizer, prompt_batch(rows[start : start + CHUNK], tokenizer), length)
    return sum(rewards) / len(rewards), sum(r > 0.999 for r in rewards) / len(rewards)


def numbers(
    model: nn.Module, trainer: BundleTrainer, held: dict[str, Tensor], sums: list[dict[str, Any]], reference: Tensor
) -> dict[str, float]:
    """A row of the table. A preference that has not moved from the reference counts a half."""
    ppo, preference = trainer.objectives["ppo"], trainer.objectives["preference"]
    reward, exact = task_rewards(model, trainer.processing_class, sums, ppo.max_completion_length)
    logprobs = pair_logprobs(model, preference)
    margin = (logprobs - reference).diff(dim=1).neg()
    return {
        "reward": reward,
        "exact": exact,
        "preference": float((margin.sign() + 1).mean() / 2),
        "chosen_likelier": float((logprobs[:, 0] > logprobs[:, 1]).float().mean()),
        **{f"{kind}_loss": text_loss(model, ids) for kind, ids in held.items()},
    }


def measured_bundles(
    model: PeftModel,
    trainer: BundleTrainer,
    held: dict[str, Tensor],
    sums: list[dict[str, Any]],
    reference: Tensor,
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """Every bundle in a folder of its own, measured alone and left out, with its alpha sweep drawn."""
    config, tokenizer = trainer.bundle_config, trainer.processing_class
    ppo, preference, names = trainer.objectives["ppo"], trainer.objectives["preference"], list(config.bundles or ())
    pairs = preference.collate([preference.eval_rows[i] for i in range(len(preference.eval_rows))])
    kinds = cards.sweep_tasks(held, pairs, prompt_batch(sums, tokenizer))

    def score(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        length = ppo.max_completion_length
        return cards.scores(model, batch, lambda m, b: batch_rewards(m, tokenizer, b, length), logprobs)

    overlap = support_overlap(bundle_shapes(config, model.config.hidden_size)).tolist()
    found = {}
    for name, shared in zip(names, overlap):
        signals = config.bundles[name].signals
        same = [f"{other} {share:.0%}" for other, share in zip(names, shared) if share and other != name]
        rate = trainer.args.learning_rate * (trainer.args.lr_multipliers or {}).get(name, 1.0)
        peft_bundles.save_bundle(
            model,
            name,
            folder / name,
            {
                "script": "recipes/rl_separate.py",
                "losses": ", ".join(signals),
                "columns of U shared with": ", ".join(same) or "no other bundle of the run",
                "steps": trainer.state.global_step,
                "learning rate": rate,
                "seed": trainer.args.seed,
                "base weights": cards.base_weights(model.get_base_model()),
            },
        )
        found[name] = {}
        for setting, alphas in (("alone", cards.alone(name, names)), ("without", {name: 0.0})):
            with model.alphas(alphas):
                found[name][setting] = numbers(model, trainer, held, sums, reference)
        sweep = cards.sweep(model, name, names, kinds, score)
        sweep.plot(folder / name / "sweep.png")
        found[name]["sweep"] = sweep.to_dict()
    return found


class HeldOut(TrainerCallback):
    """Held-out LM loss under every setting, before training and while it goes on, in the trainer's own history."""

    def __init__(self, alphas: dict[str, dict[str, float]], ids: Tensor) -> None:
        self.alphas, self.ids = alphas, ids
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % int(args.eval_steps) == 0:
            self.measure(state)

    def measure(self, state: Any) -> None:
        entry: dict[str, Any] = {"step": state.global_step}
        model, forward = self.trainer.model, self.trainer.forward
        with forward.eval_mode(), forward.autocast():
            for name, alphas in self.alphas.items():
                with model.alphas(alphas):
                    entry[f"held_out/{name}"] = text_loss(model, self.ids)
        state.log_history.append(entry)
