"""Advantage and curiosity on thousands of completions sampled for sums; held out: other sums. A part of meta_heads.py.

Two advantages are told apart. "group": a completion's reward against the others of its prompt, the same for all of its
tokens (GRPO's). "gae": of a value baseline that is fitted to the training prompts' returns (ridge regression on the
state before a token), so it differs from token to token. Both are predicted on new prompts, by the head and by what
needs no head: a token's position, its log-probability, the mean log-probability so far, and the length of the whole
completion, which no token can know.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from meta_heads_bench import Bench, array, correlation, fit, interval, mean
from meta_heads_data import FAMILIES, questions, rewarded
from torch import Tensor

from peft_bundles.objectives import PPO, Forward
from peft_bundles.objectives.heads import SubspaceHead, subspace
from peft_bundles.objectives.intrinsic import Curiosity, advantage_error
from peft_bundles.objectives.ppo import gae, group_advantages


SAMPLES = 8  # completions a prompt
CHUNK = 64  # completions of a forward
TOKENS = 2048  # of a batch of a head
EPOCHS = 40


@dataclass
class Rollout:
    """Completions of some prompts as batches, and their tokens one under the other."""

    batches: list[dict[str, Tensor]]
    before: Tensor  # (N, d): the state before each token
    after: Tensor  # (N, d)
    ids: Tensor  # (N, 2): the token before, and itself
    target: Tensor  # (N, r): what curiosity predicts
    prompt: np.ndarray  # (N,)
    last: np.ndarray  # (N,): whether it is a completion's last token
    simple: dict[str, np.ndarray]  # baseline -> (N,)


def rollouts(bench: Bench, trained: bool) -> dict[str, Any]:
    """The records of both signals: heads alone, or `trained` together with the bundles that own the advantage."""
    parts: list[list[dict[str, Any]]] = [[], []]
    for family in FAMILIES:
        for into, rows in zip(parts, questions(family, bench.size(300), bench.size(150), bench.seed)):
            into += [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]
    for rows in parts:
        random.Random(bench.seed).shuffle(rows)
    # With values of 0 and lam = 1 the returns of a rollout are the rewards; both advantages are made of these below.
    objective = PPO(parts[0], rewarded, advantages="gae", lam=1.0, whiten=False, num_generations=SAMPLES,
                    max_completion_length=6, kl_coef=0.0, curiosity_coef=1.0, name="all")  # fmt: skip
    tokenizer = copy.deepcopy(bench.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(bench.line_end)  # an answer is a line
    objective.setup(tokenizer, bench.model)
    heads, curiosity = objective.head(), objective.curiosity
    assert heads is not None and curiosity is not None
    heads.to(bench.forward.device)
    given = (objective.rows, objective.prepare(Dataset.from_list(parts[1]), "eval"))
    known, held = (sampled(bench, objective, rows, name) for rows, name in zip(given, ("train", "test")))
    common = {
        "prompts": [len(rows) for rows in parts],
        "completions": [SAMPLES * len(rows) for rows in parts],
        "tokens": [len(r.ids) for r in (known, held)],
        "mean reward": [float(tokens(r, "returns")[r.last].mean().round(4)) for r in (known, held)],
        "right answers": [float((tokens(r, "returns")[r.last] >= 1).mean().round(4)) for r in (known, held)],
    }
    for rollout in (known, held):
        with_group(rollout)
    values = with_gae(known, held)
    found: dict[str, Any] = {"advantage": {**common, "value baseline": values}}
    kinds = ("group",) if trained else ("group", "gae")
    for kind in kinds:
        true = [tokens(r, kind) for r in (known, held)]
        cells = {"mean square": float(np.square(true[1]).mean().round(4)),
                 "share of tokens with an advantage": float((true[1] != 0).mean().round(4))}  # fmt: skip
        if trained:
            head = SubspaceHead(subspace(bench.model, "advantage"), 1, "all").to(bench.forward.device)
            said = train(bench, head, known, held)
            cells["trained"] = measured(said, true[1], held)
        else:
            width = known.after.shape[1]
            bases = {"subspace": subspace(bench.model, "advantage"), "whole state": torch.eye(width)}
            expected: dict[str, Any] = {}
            for where, basis in bases.items():
                for outputs, into in ((1, cells), (2, expected)):
                    head = SubspaceHead(basis, outputs, "all").to(bench.forward.device)
                    into[where] = measured(head_alone(head, known, held, true[0]), true[1], held)
            found["advantage"][f"{kind}, with surprise"] = expected
            cells["simple"] = simple(known, held, true)
        found["advantage"][kind] = cells
    if not trained:
        weight, width = bench.model.get_output_embeddings().weight, known.after.shape[1]
        whole = Curiosity(torch.eye(width), weight, "all").to(bench.forward.device)
        found["curiosity"] = {
            **common,
            "subspace": curious(curiosity, known, held, lambda r: r.target),
            # of fresh bundles the states are the base model's
            "whole state": curious(whole, known, held, lambda r: whole.reader.coordinates(r.after)),
        }
    return found


@torch.no_grad()
def sampled(bench: Bench, objective: PPO, rows: Any, name: str) -> Rollout:
    parts: dict[str, list[Any]] = {k: [] for k in ("before", "after", "ids", "target", "prompt", "last", "simple")}
    batches = []
    many = max(512 // SAMPLES, 1)
    for start in range(0, len(rows), many):
        chunk = [rows[i] for i in range(start, min(start + many, len(rows)))]
        whole = objective.rollout(bench.forward, chunk, ("heads", bench.seed, name, start), CHUNK, reduce=False)
        for i in range(0, SAMPLES * len(chunk), CHUNK):
            batch = {k: v[i : i + CHUNK] for k, v in whole.items() if not k.startswith("metric.")}
            hidden = bench.forward.current("all", batch).hidden.float()
            mask = batch["completion_mask"][:, 1:] > 0
            number, column = (x.cpu().numpy() for x in mask.nonzero(as_tuple=True))
            first = mask.float().argmax(1).cpu().numpy()
            length = mask.sum(1).cpu().numpy()[number]
            position = column - first[number]
            logprobs = batch["old_logprobs"] * mask
            so_far = logprobs.cumsum(1)[mask].cpu().numpy() / (position + 1)
            parts["before"].append(hidden[:, :-1][mask])
            parts["after"].append(hidden[:, 1:][mask])
            parts["ids"].append(torch.stack([batch["input_ids"][:, :-1][mask], batch["input_ids"][:, 1:][mask]], 1))
            parts["target"].append(batch["next_states"][mask])
            parts["prompt"].append(start + (i + number) // SAMPLES)
            parts["last"].append(position == length - 1)
            parts["simple"].append(
                np.stack([position, logprobs[mask].cpu().numpy(), so_far, length], 1).astype(np.float32)
            )
            batches.append(batch)
    table = np.concatenate(parts["simple"])
    names = ("position", "log-probability", "mean log-probability so far", "length of the whole")
    return Rollout(
        batches, *(torch.cat(parts[k]) for k in ("before", "after", "ids", "target")),
        *(np.concatenate(parts[k]) for k in ("prompt", "last")), dict(zip(names, table.T)),
    )  # fmt: skip


def tokens(rollout: Rollout, name: str) -> np.ndarray:
    """A column of the batches, token by token."""
    return np.concatenate([b[name][b["completion_mask"][:, 1:] > 0].cpu().numpy() for b in rollout.batches])


# ---- advantages ----


def with_group(rollout: Rollout) -> None:
    """Add "group" (n, T - 1) to the batches; a prompt's completions lie side by side, whole, in one batch."""
    for batch in rollout.batches:
        mask = batch["completion_mask"][:, 1:].float()
        rewards = batch["returns"].gather(1, mask.argmax(1, keepdim=True))[:, 0]
        batch["group"] = mask * group_advantages(rewards, SAMPLES, "grpo").unsqueeze(1)


def with_gae(known: Rollout, held: Rollout) -> dict[str, Any]:
    """Add "gae" (n, T - 1), lam 0.95, of V = a ridge regression of the reward on the state before a token."""
    x, y = _with_one(known.before), torch.from_numpy(tokens(known, "returns")).to(known.before.device)
    square = x.T @ x
    weight = torch.linalg.solve(
        square + 1e-2 * square.diagonal().mean() * torch.eye(len(square), device=x.device), x.T @ y
    )
    for rollout in (known, held):
        values, place = _with_one(rollout.before) @ weight, 0
        for batch in rollout.batches:
            mask = batch["completion_mask"][:, 1:].float()
            at_token, count = torch.zeros_like(mask), int(mask.sum())
            at_token[mask > 0] = values[place : place + count]
            place += count
            last = mask * (mask.flip(1).cumsum(1).flip(1) == 1)
            batch["gae"] = gae(batch["returns"] * last, at_token, mask, 1.0, 0.95)[0]
    rewards, guess = tokens(held, "returns"), (_with_one(held.before) @ weight).cpu().numpy()
    return {
        "R2 of the reward": interval(lambda r: 1 - ((rewards - guess)[r] ** 2).mean() / rewards[r].var(), held.prompt)
    }


def _with_one(states: Tensor) -> Tensor:
    """States (N, d) at root mean square 1, and a 1: (N, d + 1)."""
    states = torch.nn.functional.rms_norm(states, states.shape[1:])
    return torch.cat([states, torch.ones_like(states[:, :1])], 1)


def head_alone(head: SubspaceHead, known: Rollout, held: Rollout, true: np.ndarray) -> np.ndarray:
    """What a head says of the held-out tokens, fitted to the advantages of the others.

    With a second output a(h_t) + w(h_{t-1}) log p_t, as `MetaCorrectness` reads: an advantage is of an action, and how
    expected the action was is in the state before it, not in the one after.
    """
    wanted = torch.from_numpy(true).to(known.after.device)

    def said(rollout: Rollout, places: Tensor) -> Tensor:
        end = head(rollout.after[places])
        if end.shape[1] == 1:
            return end[:, 0]
        logprobs = torch.from_numpy(rollout.simple["log-probability"]).to(end.device)[places]
        return end[:, 0] + head(rollout.before[places])[:, 1] * logprobs

    fit(head, lambda i: 0.5 * (said(known, i) - wanted[i]).square().mean(), shuffled(len(wanted)), EPOCHS)
    with torch.no_grad():
        return said(held, torch.arange(len(held.ids))).cpu().numpy()


def train(bench: Bench, head: SubspaceHead, known: Rollout, held: Rollout) -> np.ndarray:
    """The same of a head that is trained together with the bundles that own the advantage."""
    forward = Forward(bench.model, {"all": ("advantage",)}, {"all": {}})

    def loss(batch: dict[str, Tensor]) -> Tensor:
        error, _ = advantage_error(head, forward({"all": batch})["all"].hidden, batch["group"])
        return error[batch["completion_mask"][:, 1:] > 0].mean()

    def batches() -> Any:
        rng = random.Random(bench.seed)
        while True:
            yield from rng.sample(known.batches, len(known.batches))

    bench.descend(head, loss, batches())
    said = []
    for batch in held.batches:
        hidden = bench.forward.current("all", batch).hidden
        with torch.no_grad():
            said.append(head(hidden[:, 1:])[..., 0][batch["completion_mask"][:, 1:] > 0])
    return array(said)


def measured(said: np.ndarray, true: np.ndarray, held: Rollout) -> dict[str, Any]:
    last, by = held.last, held.prompt
    return {
        "correlation": interval(correlation(said, true), by),
        "correlation at the last token": interval(correlation(said[last], true[last]), by[last]),
        "R2": interval(lambda r: 1 - float(((said - true)[r] ** 2).mean() / (true[r] ** 2).mean()), by),
    }


def simple(known: Rollout, held: Rollout, true: list[np.ndarray]) -> dict[str, Any]:
    """Least squares on the training tokens: each baseline alone, and the three that a token can know together."""
    found, told = {}, [name for name in known.simple if name != "length of the whole"]
    for name, used in (*((n, [n]) for n in known.simple), ("all but the length", told)):
        x, z = (np.stack([*(r.simple[n] for n in used), np.ones(len(r.ids))], 1) for r in (known, held))
        found[name] = interval(correlation(z @ np.linalg.lstsq(x, true[0], rcond=None)[0], true[1]), held.prompt)
    return found


# ---- curiosity ----


def curious(head: Curiosity, known: Rollout, held: Rollout, states: Any) -> dict[str, Any]:
    """The error of a predictor of `states` (rollout -> (N, r)), and that of their mean."""
    target = [states(r) for r in (known, held)]
    fit(head, lambda i: head(_two(known, i), known.ids[i], target[0][i, None]).mean(), shuffled(len(known.ids)), EPOCHS)
    with torch.no_grad():
        places = torch.arange(len(held.ids)).split(TOKENS)
        error = array([head(_two(held, i), held.ids[i], target[1][i, None])[:, 0] for i in places])
        plain = array([(target[1] - target[0].mean(0)).square().mean(-1)])
    return {
        "error": interval(mean(error), held.prompt),
        "error of the mean": interval(mean(plain), held.prompt),
        "R2": interval(lambda r: 1 - float(error[r].mean() / plain[r].mean()), held.prompt),
    }


def _two(rollout: Rollout, places: Tensor) -> Tensor:
    """The states before and after some tokens, (n, 2, d): a row a token, as heads read sequences."""
    return torch.stack([rollout.before[places], rollout.after[places]], 1)


def shuffled(count: int) -> list[Tensor]:
    return list(torch.randperm(count, generator=torch.Generator().manual_seed(0)).split(TOKENS))
