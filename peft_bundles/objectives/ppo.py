"""PPO, GRPO and RLOO: rollouts that the model generates, their rewards and advantages, and the losses on them."""

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

from .base import Objective
from .batches import ROW, TAU, Batch, Outputs, Share
from .checks import require_columns, require_words, whole_number
from .data import prompt_ids
from .forward import Forward
from .heads import SubspaceHead, subspace
from .ppo_losses import (
    KL_ESTIMATORS,
    KLController,
    clip_fraction,
    explained_variance,
    gae,
    group_advantages,
    kl_estimate,
    policy_loss,
    value_loss,
    whiten,
)
from .rewards import name_of, score
from .rollout_heads import Curiosity, advantage_error
from .rollouts import NEXT_STATES, TOPICS, end_tokens, generate, generation_options, select
from .seeding import draw, seed_of
from .tokens import Sampling, masked_mean, masked_sum, token_entropy, token_logprobs, wide


ADVANTAGES = ("gae", "grpo", "rloo")


class PPO(Objective):
    """Proximal policy optimisation (Schulman et al. 2017), or with group-relative advantages GRPO and RLOO.

    Signals: "policy"; "value" with "gae"; "entropy", "kl" (where it is a loss), "advantage" and "curiosity" where their
    coefficients are not 0. A row of a batch is a completion. A rollout holds `rows * accumulation * minibatches`
    completions of this process and serves `epochs * minibatches` steps. The log-probabilities of the old policy and of
    the reference, and the values, are computed once, when the rollout is made. The reference is the model with its
    bundles off.

    Failure mode: where no sample is ever rewarded there is nothing to reinforce, and the reward does not move (look at
    `reward_std`; an example in the prompt may help). If the reward can be had without solving the task, the policy
    finds out how; read completions. k3 explodes where the policy makes a sampled token very unlikely; clipping bounds
    the gradient, not the logged number. For advantage and curiosity see `rollout_heads.py`.

    Args:
        dataset: rows with a `prompt`, text or conversation; other columns are passed to the reward functions.
        reward_funcs: one or several functions as in TRL, `f(prompts=, completions=, completion_ids=, **columns)`, that
            return one number per completion.
        reward_weights: one weight per function. None: 1 each.
        eval_dataset: held-out rows of the same format.
        name: name of the objective.
        advantages: "gae" (with a value head), "grpo" or "rloo".
        num_generations: completions per prompt; at least 2 for "grpo" and "rloo".
        max_prompt_length: tokens kept of a prompt, its last ones.
        max_completion_length: maximum number of tokens in a completion.
        temperature, top_k, top_p, min_p: the distribution that completions are drawn from and scored in, see `Sampling`
            of `tokens.py`. Other generation settings of the model do not act on rollouts, except its end tokens.
        generation: arguments of `model.generate` that do not change what is sampled: `eos_token_id` (one id or a list,
            instead of those of the tokenizer and the model) and settings of the cache and the compiler.
        gamma: discount of a token, for "gae".
        lam: lambda of "gae".
        whiten: bring the advantages of "gae" to mean 0 and deviation 1.
        clip: range of the probability ratio, 1 +- clip.
        value_clip: range around the old value. None does not clip.
        value_coef: factor of the value loss.
        entropy_coef: factor of the entropy bonus.
        kl_coef: factor of the KL to the reference.
        kl_in: "loss" (the signal "kl") or "reward" (subtracted from the reward of each token).
        kl_estimator: "k1", "k2" or "k3", see `kl_estimate` of `ppo_losses.py`; "k1" only with kl_in="reward".
        kl_target: target KL of a completion, in nats, to which `kl_coef` adapts. None keeps `kl_coef`.
        kl_horizon: number of completions over which it adapts.
        epochs: passes over a rollout.
        minibatches: steps in a pass.
        advantage_coef: factor of the error of a head that predicts the advantage of each token.
        curiosity_coef: factor of the error of a head that predicts the next state.
        curiosity_reward: intrinsic reward of a token per unit of that error.
        missing_eos_penalty: subtracted from the reward of a completion without an end token. None: nothing.

    Raises:
        ValueError: an argument is out of range; the message names it and says what to write.

    Example:
        >>> from peft_bundles.objectives import PPO
        >>> def short(completions, **columns):
        ...     return [-float(len(text)) for text in completions]
        >>> rows = [{"prompt": "2+2="}, {"prompt": "3+3="}]
        >>> PPO(rows, short).signals
        ('policy', 'value', 'kl')
        >>> PPO(rows, short, advantages="rloo", num_generations=4, kl_in="reward").signals
        ('policy',)
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
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
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
        functions: Any = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        self.functions: list[Callable[..., Any]] = list(functions)
        self.weights = [1.0] * len(self.functions) if reward_weights is None else list(reward_weights)
        prefix = f"objective {name!r}"
        for field, value, choices in (
            ("advantages", advantages, ADVANTAGES),
            ("kl_in", kl_in, ("loss", "reward")),
            ("kl_estimator", kl_estimator, KL_ESTIMATORS),
        ):
            if value not in choices:
                raise ValueError(f"{prefix}: {field}={value!r} is unknown; choose one of {', '.join(choices)}.")
        if wrong := [f for f in self.functions if not callable(f)]:
            raise ValueError(
                f"{prefix}: reward_funcs has {wrong[0]!r}; give functions that return one reward per completion."
            )
        if not self.functions or len(self.weights) != len(self.functions):
            raise ValueError(
                f"{prefix}: {len(self.functions)} reward_funcs and {len(self.weights)} reward_weights; give at least "
                "one function, and as many weights as functions."
            )
        if kl_in == "loss" and kl_coef and kl_estimator == "k1":
            raise ValueError(
                f"{prefix}: kl_estimator='k1' has no gradient as a loss; set it to 'k2' or 'k3', or set kl_in='reward'."
            )
        if advantages != "gae" and num_generations < 2:
            raise ValueError(
                f"{prefix}: advantages={advantages!r} compares the completions of a prompt, but num_generations is "
                f"{num_generations}; num_generations must be >= 2."
            )
        for field, number in (
            ("num_generations", num_generations),
            ("max_completion_length", max_completion_length),
            ("epochs", epochs),
            ("minibatches", minibatches),
            ("max_prompt_length", max_prompt_length),
        ):
            whole_number(prefix, field, number)
        for field, factor in (
            ("advantage_coef", advantage_coef),
            ("curiosity_coef", curiosity_coef),
            ("curiosity_reward", curiosity_reward),
        ):
            if not 0 <= factor < math.inf:
                raise ValueError(f"{prefix}: {field}={factor!r} must be a number >= 0.")
        if curiosity_reward and not curiosity_coef:
            raise ValueError(
                f"{prefix}: curiosity_reward={curiosity_reward!r} rewards the error of a head that is not trained; set "
                "curiosity_coef, e.g. 1.0."
            )
        self.sampling = Sampling(temperature, top_k, top_p, min_p).checked(prefix)
        self.generation = generation_options(prefix, generation or {})
        signals = ["policy"]
        signals += ["value"] if advantages == "gae" else []
        signals += ["entropy"] if entropy_coef else []
        signals += ["kl"] if kl_coef and kl_in == "loss" else []
        signals += ["advantage"] if advantage_coef else []
        signals += ["curiosity"] if curiosity_coef else []
        super().__init__(name, signals, dataset, eval_dataset)
        self.penalties = tuple(s for s in ("entropy", "kl") if s in signals)
        self.advantages, self.num_generations = advantages, num_generations
        self.max_prompt_length, self.max_completion_length = max_prompt_length, max_completion_length
        self.gamma, self.lam, self.whiten = gamma, lam, whiten
        self.clip, self.value_clip, self.value_coef, self.entropy_coef = clip, value_clip, value_coef, entropy_coef
        self.kl = KLController(kl_coef, kl_target, kl_horizon)
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
        prefix = f"objective {self.name!r}"
        self.ends = end_tokens(self.generation, tokenizer, model)
        if not self.ends:
            raise ValueError(
                f"{prefix}: neither the tokenizer nor the model's generation_config has an end token, so no completion "
                "would end; set tokenizer.eos_token."
            )
        super().setup(tokenizer, model)
        config: Any = model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        longest = max(len(row["prompt_ids"]) for row in self.rows)
        if limit is not None and longest + self.max_completion_length > limit:
            raise ValueError(
                f"{prefix}: a prompt of {longest} tokens and max_completion_length={self.max_completion_length} exceed "
                f"the model's {limit} positions; lower max_prompt_length or max_completion_length."
            )
        if self.advantages == "gae":
            width = model.get_output_embeddings().weight.shape[1]  # type: ignore[operator]
            self.value_head = nn.Linear(width, 1)
            nn.init.zeros_(self.value_head.weight)  # values start at 0, not at noise
            nn.init.zeros_(self.value_head.bias)
        if "advantage" in self.signals:
            self.advantage_head = SubspaceHead(subspace(model, "advantage"), 1, self.name)
        if "curiosity" in self.signals:
            weight = model.get_output_embeddings().weight  # type: ignore[operator]
            self.curiosity = Curiosity(subspace(model, "curiosity"), weight, self.name)

    def prepare(self, dataset: Dataset, split: str) -> list[dict[str, Any]]:
        require_columns(self.name, dataset, ("prompt",))
        require_words(self.name, dataset, self.tokenizer, ["prompt"])
        rows = []
        for number, row in enumerate(dataset):
            ids = prompt_ids(row, self.tokenizer)[-self.max_prompt_length :]
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
        count = share.rows * share.accumulation * self.minibatches  # completions of this process in a rollout
        if count % self.num_generations:
            raise ValueError(
                f"objective {self.name!r}: num_generations={self.num_generations} does not divide the {count} "
                "completions of a rollout (rows * accumulation * minibatches); change one of these numbers."
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
        draws = self.topics.draws(count * share.world, self.name, step) if TOPICS in self._rollout else None  # type: ignore
        batches = []
        for m in range(share.accumulation):
            chosen = order[m * share.rows : (m + 1) * share.rows]
            batches.append(select(self._rollout, chosen.to(forward.device)))
            if draws is not None:
                batches[-1]["draws"] = draws[share.rank * count + chosen]
        return batches

    def eval_batches(self, forward: Forward, share: Share) -> Iterator[Batch]:
        for start, rows, weight in self.held_out(share, max(share.rows // self.num_generations, 1)):
            rollout = self.rollout(forward, rows, (share.seed, "eval", start, share.rank), share.rows, reduce=False)
            every = torch.arange(len(rollout["input_ids"]), device=forward.device)
            yield {**select(rollout, every), "weight": weight}

    @torch.no_grad()
    def rollout(
        self, forward: Forward, rows: list[dict[str, Any]], key: tuple[int | str, ...], chunk: int, *, reduce: bool
    ) -> dict[str, Tensor]:
        """Completions of the rows' prompts, with the tensors that the losses need and scalars `metric.<name>` to log.

        Args:
            forward: the model.
            rows: prepared rows, one per prompt.
            key: seeds the sampling.
            chunk: rows of one forward.
            reduce: take means over all processes instead of this one alone.
        """
        rows = [row for row in rows for _ in range(self.num_generations)]
        options = {
            "max_new_tokens": self.max_completion_length,
            **self.sampling.options(),
            **{option: value for option, value in self.generation.items() if option != "eos_token_id"},
        }
        pad_id = self.tokenizer.pad_token_id
        rollout, completion_ids = generate(forward, self.name, rows, pad_id, self.ends, options, key)
        by_row = list(rollout)
        table = self._score(rows, completion_ids)
        ended = torch.tensor([ids[-1] in self.ends for ids in completion_ids])
        if not ended.any():
            warnings.warn(
                f"objective {self.name!r}: none of the {len(ended)} completions of a rollout has an end token within "
                f"max_completion_length={self.max_completion_length}; they are scored as they are, cut off. Raise "
                "it, or set missing_eos_penalty.",
                stacklevel=2,
            )
        rewards = (table.nan_to_num(0.0) * torch.tensor(self.weights)).sum(1)
        if self.missing_eos_penalty is not None:
            rewards = rewards - self.missing_eos_penalty * ~ended
        rewards = rewards.to(forward.device)

        parts: dict[str, list[Tensor]] = {"old_logprobs": [], "ref_logprobs": [], "old_values": []}
        parts |= {NEXT_STATES: [], "intrinsic": []} if self.curiosity is not None else {}
        for start in range(0, len(rows), chunk):
            part = {k: rollout[k][start : start + chunk] for k in by_row}
            current = forward.current(self.name, part)
            parts["old_logprobs"].append(token_logprobs(current.logits, part["input_ids"], self.sampling))
            parts["old_values"].append(self._values(current))
            reference = forward.reference(part)
            parts["ref_logprobs"].append(token_logprobs(reference.logits, part["input_ids"], self.sampling))
            if self.curiosity is not None:
                parts[NEXT_STATES].append(self.curiosity.target(reference.hidden))
                parts["intrinsic"].append(self.curiosity(current.hidden, part["input_ids"], parts[NEXT_STATES][-1]))
        rollout |= {name: torch.cat(tensors) for name, tensors in parts.items()}

        mask = rollout["completion_mask"][:, 1:].float()
        kl = kl_estimate(rollout["old_logprobs"], rollout["ref_logprobs"], self.kl_estimator)
        kl = torch.where(mask > 0, kl, 0.0)
        token_rewards = -self.kl.coefficient * kl if self.kl_in == "reward" else torch.zeros_like(kl)
        intrinsic = mask * rollout.pop("intrinsic", torch.zeros_like(mask))
        token_rewards = token_rewards + self.curiosity_reward * intrinsic
        rollout |= self._advantages(rewards, token_rewards, rollout["old_values"], mask, reduce)
        k3 = kl_estimate(rollout["old_logprobs"], rollout["ref_logprobs"], "k3")
        metrics = {
            "reward": rewards.mean(),
            "reward_std": rewards.std(unbiased=False),
            "kl_per_completion": masked_sum(k3, mask).mean(),
            "completion_length": mask.sum(1).mean(),
            "ended": ended.float().mean().to(mask.device),
            **{f"reward/{name_of(f)}": table[:, i].nanmean().to(mask.device) for i, f in enumerate(self.functions)},
        }
        if self.curiosity is not None:
            metrics["intrinsic_reward"] = self.curiosity_reward * intrinsic.sum(1).mean()
        if self.value_head is not None:
            metrics["explained_variance"] = explained_variance(rollout["old_values"], rollout["returns"], mask)
        if reduce and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.stack(list(metrics.values()))
            dist.all_reduce(flat)
            metrics = dict(zip(metrics, flat / dist.get_world_size()))
        return rollout | {f"metric.{name}": value for name, value in metrics.items()}

    def _score(self, rows: list[dict[str, Any]], completion_ids: list[list[int]]) -> Tensor:
        """The reward of every completion by every function, (n, F)."""
        texts: list[Any] = self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        if is_conversational({"prompt": rows[0]["prompt"]}):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        columns = {
            k: [row[k] for row in rows] for k in rows[0] if k not in ("prompt", "prompt_ids", "completion", ROW, TAU)
        }
        return score(self.name, self.functions, [row["prompt"] for row in rows], texts, completion_ids, columns)

    def _advantages(
        self, rewards: Tensor, token_rewards: Tensor, values: Tensor, mask: Tensor, reduce: bool
    ) -> dict[str, Tensor]:
        """`advantages` and `returns`, (n, T - 1), from rewards of completions (n,) and of tokens (n, T - 1)."""
        if self.advantages != "gae":
            rewards = rewards + token_rewards.sum(1)
            advantages = group_advantages(rewards, self.num_generations, self.advantages)
            return {"advantages": mask * advantages.unsqueeze(1), "returns": torch.zeros_like(mask)}
        last = mask * (mask.flip(1).cumsum(1).flip(1) == 1)
        token_rewards = token_rewards + rewards[:, None] * last
        advantages, returns = gae(token_rewards, values, mask, self.gamma, self.lam)
        if self.whiten:
            advantages = whiten(advantages, mask, reduce=reduce)
        return {"advantages": advantages, "returns": returns}

    def _values(self, outputs: Outputs) -> Tensor:
        """V of the state before each token t >= 1, (B, T - 1)."""
        hidden = wide(outputs.hidden[:, :-1])
        return hidden.new_zeros(hidden.shape[:2]) if self.value_head is None else self.value_head(hidden).squeeze(-1)

    # ---- losses ----

    def collate(self, rows: list[Mapping[str, Any]]) -> Batch:
        raise NotImplementedError("PPO makes its batches in batches() and eval_batches(), from rollouts.")

    def items(self, batch: Batch) -> Tensor:
        """The number of tokens in the completions."""
        return batch["completion_mask"][:, 1:].sum().float()

    def losses(self, outputs: Outputs, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        mask, ids = batch["completion_mask"][:, 1:].float(), batch["input_ids"]
        logprobs, old = token_logprobs(outputs.logits, ids, self.sampling), batch["old_logprobs"]
        metrics = {name.removeprefix("metric."): value for name, value in batch.items() if name.startswith("metric.")}
        losses = {"policy": policy_loss(logprobs, old, batch["advantages"], mask, self.clip)}
        if "value" in self.signals:
            values = self._values(outputs)
            losses["value"] = self.value_coef * value_loss(
                values, batch["old_values"], batch["returns"], mask, self.value_clip
            )
        with torch.set_grad_enabled("entropy" in self.signals and torch.is_grad_enabled()):
            entropy = masked_mean(token_entropy(outputs.logits, self.sampling), mask)
        if "entropy" in self.signals:
            losses["entropy"] = -self.entropy_coef * entropy
        if "kl" in self.signals:
            kl = kl_estimate(logprobs, batch["ref_logprobs"], self.kl_estimator)
            losses["kl"] = self.kl.coefficient * masked_mean(kl, mask)
        if self.advantage_head is not None:
            error, predicted = advantage_error(self.advantage_head, outputs.hidden, batch["advantages"])
            losses["advantage"] = self.advantage_coef * masked_mean(error, mask)
            metrics["advantage_explained"] = explained_variance(predicted, batch["advantages"], mask)
        if self.curiosity is not None:
            error = self.curiosity(outputs.hidden, ids, batch[NEXT_STATES])
            losses["curiosity"] = self.curiosity_coef * masked_mean(error, mask)
        logprobs = logprobs.detach()
        metrics |= {
            "entropy": entropy.detach(),
            "kl": masked_mean(kl_estimate(logprobs, batch["ref_logprobs"], "k3"), mask),
            "kl_to_old": masked_mean(kl_estimate(logprobs, old, "k3"), mask),
            "clip_fraction": clip_fraction(logprobs, old, mask, self.clip),
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
