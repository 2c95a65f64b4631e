"""PPO on the bundled model: rollouts with the model's own generation, rewards, advantages, and the losses on them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from trl.data_utils import is_conversational
from trl.trainer.utils import pad

from . import ppo
from .base import ROW, TAU, Batch, Objective, Outputs, Share, draw, has_topics, seed_of
from .data import prompt_ids, require
from .forward import Forward, seeded
from .heads import SubspaceHead, subspace
from .intrinsic import Curiosity, advantage_error
from .rewards import name_of, score
from .tokens import masked_mean, masked_sum, token_entropy, token_logprobs, wide


ADVANTAGES = ("gae", "grpo", "rloo")
# Per completion (n, ...) tensors of a rollout; those of tokens are (n, T) or, aligned with token t >= 1, (n, T - 1).
_BY_TOKEN = ("input_ids", "attention_mask", "completion_mask")
_BY_NEXT = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")
_CURIOUS = "next_states"  # (n, T - 1, r), with curiosity only
_TOPICS = "topics"  # (n, K), on the CPU, with topics only


class PPO(Objective):
    """Proximal policy optimisation (Schulman et al. 2017), or with group-relative advantages GRPO and RLOO.

    Signals: "policy"; "value" with "gae"; "entropy", "kl" (only if it is a loss), "advantage" and "curiosity" where
    their coefficients are not 0. A row of the batch plan is a completion. A rollout has `rows * accumulation *
    minibatches` completions a process and is used for `epochs * minibatches` steps; log-probabilities of the old policy
    and of the reference, and values, are computed once, when it is made.

    Failure mode: where no sample is ever rewarded there is nothing to reinforce, and reward does not move (look at
    `reward_std`; a worked example in the prompt may do). With a reward that can be had otherwise, it is; look at
    completions. k3 explodes where the policy left a sampled token; clipping holds the gradient, not the log. Those of
    advantage and curiosity: `intrinsic.py`.

    Args:
        dataset: rows with a `prompt`, text or conversation; other columns go to the reward functions.
        reward_funcs: TRL-style reward functions (`rewards.py`).
        reward_weights: one a function; None is 1 each.
        eval_dataset: held-out prompts.
        name: of the objective.
        advantages: "gae" (with a value head), "grpo" or "rloo".
        num_generations: completions a prompt.
        max_prompt_length: tokens kept of a prompt, its last ones. max_completion_length: tokens generated at most.
        temperature: of sampling; log-probabilities are taken at it too.
        generation: further arguments of `model.generate`.
        gamma, lam: of GAE. whiten: bring GAE's advantages to mean 0 and deviation 1.
        clip, value_clip: of the ratio and of values. value_coef, entropy_coef: factors of the losses.
        kl_coef: factor of KL to the adapter-off model. kl_in: "loss" (signal "kl") or "reward" (of each token).
        kl_estimator: "k1", "k2" or "k3" (`ppo.kl_estimate`); "k1" only in the reward: as a loss it has no gradient.
        kl_target, kl_horizon: lead the coefficient to this KL a completion, in nats (`ppo.KLController`).
        epochs, minibatches: passes over a rollout, and steps a pass.
        advantage_coef: factor of the error of a head that regresses a token's advantage (`intrinsic.py`).
        curiosity_coef: factor of the error of a head that predicts the next state; curiosity_reward: what a token gets
            per unit of that error, as an intrinsic reward.
        missing_eos_penalty: taken off the reward of a completion without end token.

    Raises:
        ValueError: on values that cannot be; the message names field, value and fix.
    """

    def __init__(
        self,
        dataset: Any,
        reward_funcs: Callable[..., Any] | Sequence[Callable[..., Any]],
        *,
        reward_weights: Sequence[float] | None = None,
        eval_dataset: Any = None,
        name: str = "ppo",
        advantages: str = "gae",
        num_generations: int = 1,
        max_prompt_length: int = 512,
        max_completion_length: int = 64,
        temperature: float = 1.0,
        generation: Mapping[str, Any] | None = None,
        gamma: float = 1.0,
        lam: float = 0.95,
        whiten: bool = True,
        clip: float = 0.2,
        value_clip: float | None = 0.2,
        value_coef: float = 0.1,
        entropy_coef: float = 0.0,
        kl_coef: float = 0.05,
        kl_in: str = "loss",
        kl_estimator: str = "k3",
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        epochs: int = 4,
        minibatches: int = 1,
        advantage_coef: float = 0.0,
        curiosity_coef: float = 0.0,
        curiosity_reward: float = 0.0,
        missing_eos_penalty: float | None = None,
    ) -> None:
        given: Any = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        self.functions: list[Callable[..., Any]] = list(given)
        self.weights = [1.0] * len(self.functions) if reward_weights is None else list(reward_weights)
        me = f"objective {name!r}"
        for field, value, choices in (
            ("advantages", advantages, ADVANTAGES),
            ("kl_in", kl_in, ("loss", "reward")),
            ("kl_estimator", kl_estimator, ppo.KL_ESTIMATORS),
        ):
            if value not in choices:
                raise ValueError(f"{me}: {field}={value!r} is unknown; choose one of {', '.join(choices)}.")
        if wrong := [f for f in self.functions if not callable(f)]:
            raise ValueError(f"{me}: reward_funcs has {wrong[0]!r}; give functions of completions (rewards.py).")
        if not self.functions or len(self.weights) != len(self.functions):
            raise ValueError(f"{me}: {len(self.functions)} reward_funcs and {len(self.weights)} reward_weights.")
        if kl_in == "loss" and kl_coef and kl_estimator == "k1":
            raise ValueError(
                f"{me}: kl_estimator='k1' has no gradient as a loss; take 'k2' or 'k3', or kl_in='reward'."
            )
        if advantages != "gae" and num_generations < 2:
            raise ValueError(f"{me}: advantages={advantages!r} compares completions; num_generations must be >= 2.")
        for field, number in (
            ("num_generations", num_generations),
            ("max_completion_length", max_completion_length),
            ("epochs", epochs),
            ("minibatches", minibatches),
            ("max_prompt_length", max_prompt_length),
        ):
            if number < 1:
                raise ValueError(f"{me}: {field}={number!r} must be at least 1.")
        for field, factor in (
            ("advantage_coef", advantage_coef),
            ("curiosity_coef", curiosity_coef),
            ("curiosity_reward", curiosity_reward),
        ):
            if not 0 <= factor < math.inf:
                raise ValueError(f"{me}: {field}={factor!r} must be a number >= 0.")
        if curiosity_reward and not curiosity_coef:
            raise ValueError(
                f"{me}: curiosity_reward={curiosity_reward!r} is paid for the error of a head that nothing trains; set "
                "curiosity_coef, e.g. 1.0."
            )
        if not temperature > 0:
            raise ValueError(f"{me}: temperature={temperature!r} must be positive.")
        emitted = ["policy"]
        emitted += ["value"] if advantages == "gae" else []
        emitted += ["entropy"] if entropy_coef else []
        emitted += ["kl"] if kl_coef and kl_in == "loss" else []
        emitted += ["advantage"] if advantage_coef else []
        emitted += ["curiosity"] if curiosity_coef else []
        super().__init__(name, emitted, dataset, eval_dataset)
        self.penalties = tuple(s for s in ("entropy", "kl") if s in emitted)
        self.advantages, self.num_generations, self.generation = advantages, num_generations, dict(generation or {})
        self.max_prompt_length, self.max_completion_length = max_prompt_length, max_completion_length
        self.temperature, self.gamma, self.lam, self.whiten = temperature, gamma, lam, whiten
        self.clip, self.value_clip, self.value_coef, self.entropy_coef = clip, value_clip, value_coef, entropy_coef
        self.kl = ppo.KLController(kl_coef, kl_target, kl_horizon)
        self.kl_in, self.kl_estimator = kl_in, kl_estimator
        self.epochs, self.minibatches, self.missing_eos_penalty = epochs, minibatches, missing_eos_penalty
        self.advantage_coef, self.curiosity_coef = advantage_coef, curiosity_coef
        self.curiosity_reward = curiosity_reward
        self.value_head: nn.Linear | None = None
        self.advantage_head: SubspaceHead | None = None
        self.curiosity: Curiosity | None = None
        self._rollout: dict[str, Tensor] | None = None
        self._index = -1

    # ---- set-up ----

    def setup(self, tokenizer: Any, model: nn.Module) -> None:
        me = f"objective {self.name!r}"
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{me}: the tokenizer has no end token, so no completion could end; set its eos_token.")
        super().setup(tokenizer, model)
        config: Any = model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        longest = max(len(row["prompt_ids"]) for row in self.rows)
        if limit is not None and longest + self.max_completion_length > limit:
            raise ValueError(
                f"{me}: a prompt of {longest} tokens and max_completion_length={self.max_completion_length} exceed the "
                f"model's {limit} positions; lower max_prompt_length or max_completion_length."
            )
        if self.advantages == "gae":
            width = model.get_output_embeddings().weight.shape[1]  # type: ignore[operator]
            self.value_head = nn.Linear(width, 1)
            nn.init.zeros_(self.value_head.weight)  # values start at 0 instead of at noise
            nn.init.zeros_(self.value_head.bias)
        if "advantage" in self.signals:
            self.advantage_head = SubspaceHead(subspace(model, "advantage"), 1, self.name)
        if "curiosity" in self.signals:
            weight = model.get_output_embeddings().weight  # type: ignore[operator]
            self.curiosity = Curiosity(subspace(model, "curiosity"), weight, self.name)

    def prepare(self, dataset: Dataset, split: str) -> list[dict[str, Any]]:
        require(self.name, dataset, ("prompt",))
        rows = []
        for number, row in enumerate(dataset):
            ids = prompt_ids(row["prompt"], self.tokenizer)[-self.max_prompt_length :]
            if not ids:
                raise ValueError(f"objective {self.name!r}: the prompt of row {number} has no token; drop that row.")
            rows.append({**row, "prompt_ids": ids, ROW: number})
        return rows

    def head(self) -> nn.Module | None:
        if self.advantage_head is None and self.curiosity is None:
            return self.value_head
        heads = {"value": self.value_head, "advantage": self.advantage_head, "curiosity": self.curiosity}
        return nn.ModuleDict({name: head for name, head in heads.items() if head is not None})

    def steps(self, share: Share) -> int:
        completions = len(self.rows) * self.num_generations
        return -(-completions // (share.step_rows * self.minibatches)) * self.minibatches * self.epochs

    # ---- rollouts ----

    def batches(self, forward: Forward, step: int, share: Share) -> list[Batch]:
        count = share.rows * share.accumulation * self.minibatches  # completions of a rollout of this process
        if count % self.num_generations:
            raise ValueError(
                f"objective {self.name!r}: num_generations={self.num_generations} does not divide the {count} "
                "completions of a rollout (rows * accumulation * minibatches); change one of them."
            )
        index, inner = divmod(step, self.epochs * self.minibatches)
        if index != self._index:
            prompts = count // self.num_generations
            start = (index * share.world + share.rank) * prompts
            numbers = draw(len(self.rows), start, prompts, share.seed, self.name)
            key = (share.seed, "rollout", self.name, index, share.rank)
            self._rollout = self.rollout(forward, [self.rows[i] for i in numbers], key, share.rows, reduce=True)
            self._index = index
            self.kl.update(float(self._rollout["metric.kl_per_completion"]), count * share.world)
        assert self._rollout is not None
        epoch, minibatch = divmod(inner, self.minibatches)
        generator = torch.Generator().manual_seed(seed_of(share.seed, self.name, index, epoch, share.rank))
        order = torch.randperm(count, generator=generator)[minibatch * (count // self.minibatches) :]
        draws = self.topics.draws(count * share.world, self.name, step) if _TOPICS in self._rollout else None  # type: ignore
        found = []
        for m in range(share.accumulation):
            chosen = order[m * share.rows : (m + 1) * share.rows]
            found.append(_rows(self._rollout, chosen.to(forward.device)))
            if draws is not None:
                found[-1]["draws"] = draws[share.rank * count + chosen]
        return found

    def eval_batches(self, forward: Forward, share: Share) -> Iterator[Batch]:
        for start, rows, weight in self.held_out(share, max(share.rows // self.num_generations, 1)):
            found = self.rollout(forward, rows, (share.seed, "eval", start, share.rank), share.rows, reduce=False)
            yield {**_rows(found, torch.arange(len(found["input_ids"]), device=forward.device)), "weight": weight}

    @torch.no_grad()
    def rollout(
        self, forward: Forward, rows: list[dict[str, Any]], key: tuple[int | str, ...], chunk: int, *, reduce: bool
    ) -> dict[str, Tensor]:
        """Completions of the rows' prompts with all that the losses need, and `metric.` scalars.

        Args:
            key: seed of the sampling.
            chunk: rows of a forward.
            reduce: advantages and metrics over all processes.
        """
        rows = [row for row in rows for _ in range(self.num_generations)]
        found, completion_ids = self._generate(forward, rows, key)
        by_row = (*_BY_TOKEN, *({_TOPICS} & found.keys()))
        table = self._score(rows, completion_ids)
        ended = torch.tensor([ids[-1] == self.tokenizer.eos_token_id for ids in completion_ids])
        if not ended.any():
            warnings.warn(
                f"objective {self.name!r}: none of the {len(ended)} completions of a rollout has an end token within "
                f"max_completion_length={self.max_completion_length}; they are scored as they are cut off. Raise "
                "it, or set missing_eos_penalty.",
                stacklevel=2,
            )
        rewards = (table.nan_to_num(0.0) * torch.tensor(self.weights)).sum(1)
        if self.missing_eos_penalty is not None:
            rewards = rewards - self.missing_eos_penalty * ~ended
        rewards = rewards.to(forward.device)

        parts: dict[str, list[Tensor]] = {"old_logprobs": [], "ref_logprobs": [], "old_values": []}
        parts |= {_CURIOUS: [], "intrinsic": []} if self.curiosity is not None else {}
        for start in range(0, len(rows), chunk):
            part = {k: found[k][start : start + chunk] for k in by_row}
            now = forward.current(self.name, part)
            parts["old_logprobs"].append(token_logprobs(now.logits, part["input_ids"], self.temperature))
            parts["old_values"].append(self._values(now))
            reference = forward.reference(part)
            parts["ref_logprobs"].append(token_logprobs(reference.logits, part["input_ids"], self.temperature))
            if self.curiosity is not None:
                parts[_CURIOUS].append(self.curiosity.target(reference.hidden))
                parts["intrinsic"].append(self.curiosity(now.hidden, part["input_ids"], parts[_CURIOUS][-1]))
        found |= {name: torch.cat(tensors) for name, tensors in parts.items()}

        mask = found["completion_mask"][:, 1:].float()
        kl = ppo.kl_estimate(found["old_logprobs"], found["ref_logprobs"], self.kl_estimator)
        kl = torch.where(mask > 0, kl, 0.0)
        by_token = -self.kl.coefficient * kl if self.kl_in == "reward" else torch.zeros_like(kl)
        intrinsic = mask * found.pop("intrinsic", torch.zeros_like(mask))
        self._advantages(found, rewards, by_token + self.curiosity_reward * intrinsic, mask, reduce)
        exact = ppo.kl_estimate(found["old_logprobs"], found["ref_logprobs"], "k3")
        metrics = {
            "reward": rewards.mean(),
            "reward_std": rewards.std(unbiased=False),
            "kl_per_completion": masked_sum(exact, mask).mean(),
            "completion_length": mask.sum(1).mean(),
            "ended": ended.float().mean().to(mask.device),
            **{f"reward/{name_of(f)}": table[:, i].nanmean().to(mask.device) for i, f in enumerate(self.functions)},
        }
        if self.curiosity is not None:
            metrics["intrinsic_reward"] = self.curiosity_reward * intrinsic.sum(1).mean()
        if self.value_head is not None:
            metrics["explained_variance"] = ppo.explained_variance(found["old_values"], found["returns"], mask)
        if reduce and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.stack(list(metrics.values()))
            dist.all_reduce(flat)
            metrics = dict(zip(metrics, flat / dist.get_world_size()))
        return found | {f"metric.{name}": value for name, value in metrics.items()}

    def _generate(
        self, forward: Forward, rows: list[dict[str, Any]], key: tuple[int | str, ...]
    ) -> tuple[dict[str, Tensor], list[list[int]]]:
        """Prompts and completions side by side, padded on the right, and the completions' ids up to their end."""
        pad_id, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        prompts = [torch.tensor(row["prompt_ids"]) for row in rows]
        options = {
            "max_new_tokens": self.max_completion_length,
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": 0,  # transformers' default of 50 would sample from another policy than the losses see
            "top_p": 1.0,
            "pad_token_id": pad_id,
            "eos_token_id": eos,
            **self.generation,
        }
        ids = pad(prompts, padding_value=pad_id, padding_side="left").to(forward.device)
        mask = pad([torch.ones_like(p) for p in prompts], padding_side="left").to(forward.device)
        tau = torch.tensor([row[TAU] for row in rows], dtype=torch.float64) if has_topics(rows) else None
        with seeded(forward.device, *key):
            generated = forward.generate(self.name, ids, mask, tau, **options)[:, ids.shape[1] :].tolist()
        completions = [c[: c.index(eos) + 1] if eos in c else c for c in generated]
        whole = [torch.tensor([*row["prompt_ids"], *c]) for row, c in zip(rows, completions)]
        masks = [torch.tensor([0] * len(row["prompt_ids"]) + [1] * len(c)) for row, c in zip(rows, completions)]
        found = {
            "input_ids": pad(whole, padding_value=pad_id),
            "attention_mask": pad([torch.ones_like(w) for w in whole]),
            "completion_mask": pad(masks),
        }
        found = {name: t.to(forward.device) for name, t in found.items()}
        return found if tau is None else found | {_TOPICS: tau}, completions

    def _score(self, rows: list[dict[str, Any]], completion_ids: list[list[int]]) -> Tensor:
        texts: list[Any] = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        if is_conversational({"prompt": rows[0]["prompt"]}):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        columns = {
            k: [row[k] for row in rows] for k in rows[0] if k not in ("prompt", "prompt_ids", "completion", ROW, TAU)
        }
        return score(self.name, self.functions, [row["prompt"] for row in rows], texts, completion_ids, columns)

    def _advantages(
        self, found: dict[str, Tensor], rewards: Tensor, by_token: Tensor, mask: Tensor, reduce: bool
    ) -> None:
        """Add `advantages` and `returns`, (n, T - 1), of rewards (n,) and those of every token (n, T - 1)."""
        if self.advantages != "gae":
            found["advantages"] = mask * ppo.group_advantages(
                rewards + by_token.sum(1), self.num_generations, self.advantages
            ).unsqueeze(1)
            found["returns"] = torch.zeros_like(mask)
            return
        last = mask * (mask.flip(1).cumsum(1).flip(1) == 1)
        by_token = by_token + rewards[:, None] * last
        advantages, found["returns"] = ppo.gae(by_token, found["old_values"], mask, self.gamma, self.lam)
        found["advantages"] = ppo.whiten(advantages, mask, reduce=reduce) if self.whiten else advantages

    def _values(self, outputs: Outputs) -> Tensor:
        """V of the state before each token t >= 1, (B, T - 1)."""
        hidden = wide(outputs.hidden[:, :-1])
        return hidden.new_zeros(hidden.shape[:2]) if self.value_head is None else self.value_head(hidden).squeeze(-1)

    # ---- losses ----

    def collate(self, rows: list[Mapping[str, Any]]) -> Batch:
        raise NotImplementedError("rollouts are made, not collated")

    def items(self, batch: Batch) -> Tensor:
        return batch["completion_mask"][:, 1:].sum().float()

    def losses(self, outputs: Outputs, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        mask, ids = batch["completion_mask"][:, 1:].float(), batch["input_ids"]
        logprobs, old = token_logprobs(outputs.logits, ids, self.temperature), batch["old_logprobs"]
        metrics = {name.removeprefix("metric."): value for name, value in batch.items() if name.startswith("metric.")}
        losses = {"policy": ppo.policy_loss(logprobs, old, batch["advantages"], mask, self.clip)}
        if "value" in self.signals:
            values = self._values(outputs)
            losses["value"] = self.value_coef * ppo.value_loss(
                values, batch["old_values"], batch["returns"], mask, self.value_clip
            )
        with torch.set_grad_enabled("entropy" in self.signals and torch.is_grad_enabled()):
            entropy = masked_mean(token_entropy(outputs.logits, self.temperature), mask)
        if "entropy" in self.signals:
            losses["entropy"] = -self.entropy_coef * entropy
        if "kl" in self.signals:
            kl = ppo.kl_estimate(logprobs, batch["ref_logprobs"], self.kl_estimator)
            losses["kl"] = self.kl.coefficient * masked_mean(kl, mask)
        if self.advantage_head is not None:
            error, said = advantage_error(self.advantage_head, outputs.hidden, batch["advantages"])
            losses["advantage"] = self.advantage_coef * masked_mean(error, mask)
            metrics["advantage_explained"] = ppo.explained_variance(said, batch["advantages"], mask)
        if self.curiosity is not None:
            error = self.curiosity(outputs.hidden, ids, batch[_CURIOUS])
            losses["curiosity"] = self.curiosity_coef * masked_mean(error, mask)
        seen = logprobs.detach()
        metrics |= {
            "entropy": entropy.detach(),
            "kl": masked_mean(ppo.kl_estimate(seen, batch["ref_logprobs"], "k3"), mask),
            "kl_to_old": masked_mean(ppo.kl_estimate(seen, old, "k3"), mask),
            "clip_fraction": ppo.clip_fraction(seen, old, mask, self.clip),
            "kl_coefficient": torch.tensor(self.kl.coefficient, device=mask.device),
        }
        return losses, metrics

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        rollout = {f"rollout.{k}": v for k, v in (self._rollout or {}).items()}
        return {**rollout, "index": self._index, "kl_coefficient": self.kl.coefficient}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._index, self.kl.coefficient = state["index"], state["kl_coefficient"]
        self._rollout = {k.removeprefix("rollout."): v for k, v in state.items() if k.startswith("rollout.")} or None


def _rows(rollout: Mapping[str, Tensor], rows: Tensor) -> Batch:
    """Some rows of a rollout, without the columns that none of them uses; `metric.` scalars as they are."""
    length = int(rollout["attention_mask"][rows.to(rollout["attention_mask"].device)].sum(1).max())
    batch: Batch = {k: v for k, v in rollout.items() if k.startswith("metric.")}
    for name in (*_BY_TOKEN, *_BY_NEXT, *({_CURIOUS} & rollout.keys())):
        batch[name] = rollout[name].to(rows.device)[rows, : length - (name not in _BY_TOKEN)]
    return batch | ({_TOPICS: rollout[_TOPICS][rows.cpu()]} if _TOPICS in rollout else {})
