"""Advantage and curiosity on thousands of completions sampled for sums; held out: other sums. A part of the study.

Two advantages are told apart. "group": a completion's reward against the others of its prompt, the same for all of its
tokens (GRPO's). "gae": of a value baseline that is fitted to the training prompts' returns (ridge regression on the
state before a token), so it differs from token to token. Both are predicted on new prompts, by the head and by what
needs no head: a token's position, its log-probability, the mean log-probability so far, and the length of the whole
completion, which no token can know.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_bundles.core.dialling import alphas
from peft_bundles.objectives import Forward
from peft_bundles.objectives.heads import SubspaceHead, subspace
from peft_bundles.objectives.ppo_losses import gae, group_advantages
from peft_bundles.objectives.rollout_heads import Curiosity, advantage_error
from studies.heads.bench import Bench, array, correlation, fit, interval, mean
from studies.heads.make_data import FAMILIES, Rows, questions, rewarded


SAMPLES = 8  # completions a prompt
PROMPTS = 64  # of a batch that is sampled
LENGTH = 6  # tokens of a completion
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
    families = [questions(family, bench.size(300), bench.size(150), bench.seed) for family in FAMILIES]
    curiosity = Curiosity(subspace(bench.model, "curiosity"), bench.forward.output_embeddings.weight, "all")
    curiosity.to(bench.forward.device)
    torch.manual_seed(bench.seed)
    known, held = (sampled(bench, curiosity, [family[i] for family in families]) for i in (0, 1))
    common = {
        "prompts": [len(np.unique(r.prompt)) for r in (known, held)],
        "completions": [int(r.last.sum()) for r in (known, held)],
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
def sampled(bench: Bench, curiosity: Curiosity, families: list[Rows]) -> Rollout:
    """`SAMPLES` completions of every prompt at temperature 1, with states and log-probabilities as they are sampled.

    The prompts of a family begin with the same worked examples, and its questions go in batches of one length: the
    examples are read once, a question once for all of its samples, and nothing is padded. Fresh bundles change nothing,
    so they are off, and the base model's next state, which curiosity is to predict, is the state itself.
    """
    columns: dict[str, list[Any]] = {k: [] for k in ("before", "after", "ids", "target", "prompt", "last", "simple")}
    batches: list[dict[str, Tensor]] = []
    off = dict.fromkeys(bench.model.peft_config["default"].bundles, 0.0)
    number = 0
    with alphas(bench.model, off), bench.forward.eval_mode():
        for rows in families:
            ids = [bench.tokenizer(text=row["prompt"])["input_ids"] for row in rows]
            same = min(next(i for i, t in enumerate(zip(*ids)) if len(set(t)) > 1), min(map(len, ids)) - 1)
            for length in sorted({len(i) for i in ids}):
                of = [k for k, i in enumerate(ids) if len(i) == length]
                for some in (of[i : i + PROMPTS] for i in range(0, len(of), PROMPTS)):
                    batch, parts = _continued(bench, torch.tensor([ids[k] for k in some]), same)
                    texts = bench.tokenizer.batch_decode(
                        [i[m > 0].tolist() for i, m in zip(batch["input_ids"], batch["completion_mask"])]
                    )
                    answers = [rows[k]["answer"] for k in some for _ in range(SAMPLES)]
                    rewards = torch.tensor(rewarded(texts, answers), device=bench.forward.device)
                    mask = batch["completion_mask"][:, 1:]
                    batch["returns"] = mask * rewards[:, None]
                    batches += [{k: v[i : i + CHUNK] for k, v in batch.items()} for i in range(0, len(mask), CHUNK)]
                    for name, value in parts.items():
                        columns[name].append(value)
                    columns["target"].append(curiosity.reader.coordinates(parts["after"]).float())
                    row = mask.nonzero()[:, 0].cpu().numpy()
                    columns["prompt"].append(number + row // SAMPLES)
                    number += len(some)
    table = np.concatenate(columns["simple"])
    names = ("position", "log-probability", "mean log-probability so far", "length of the whole")
    return Rollout(
        batches, *(torch.cat(columns[k]) for k in ("before", "after", "ids", "target")),
        *(np.concatenate(columns[k]) for k in ("prompt", "last")), dict(zip(names, table.T)),
    )  # fmt: skip


def _continued(bench: Bench, prompts: Tensor, same: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Prompts (n, P), their first `same` tokens alike -> a batch of n * SAMPLES rows, and the columns of its tokens.

    A completion ends with the end of its line, or after `LENGTH` tokens.
    """
    prompts = prompts.to(bench.forward.device)
    decoder, head = bench.model.get_base_model().get_decoder(), bench.forward.output_embeddings
    cache = decoder(input_ids=prompts[:1, :same], use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(prompts))
    read = decoder(input_ids=prompts[:, same:], past_key_values=cache, use_cache=True)
    state = read.last_hidden_state[:, -1].repeat_interleave(SAMPLES, 0)
    cache = read.past_key_values
    cache.batch_repeat_interleave(SAMPLES)
    going = torch.ones(len(state), dtype=torch.bool, device=state.device)
    states, ids, logs, masks = [state], [], [], []
    for _ in range(LENGTH):
        logits = head(state).float().log_softmax(-1)
        new = torch.multinomial(logits.exp(), 1)
        read = decoder(input_ids=new, past_key_values=cache, use_cache=True)
        state, cache = read.last_hidden_state[:, -1], read.past_key_values
        states.append(state)
        ids.append(new[:, 0])
        logs.append(logits.gather(1, new)[:, 0])
        masks.append(going)
        going = going & (new[:, 0] != bench.line_end)
        if not going.any():
            break
    mask, chosen, logprobs = (torch.stack(x, 1) for x in (masks, ids, logs))
    whole, one = prompts.repeat_interleave(SAMPLES, 0), torch.ones_like(prompts).repeat_interleave(SAMPLES, 0)
    batch = {
        "input_ids": torch.cat([whole, chosen * mask], 1),
        "attention_mask": torch.cat([one, mask.long()], 1),
        "completion_mask": torch.cat([0 * one, mask.long()], 1),
    }
    hidden = torch.stack(states, 1).float()
    position = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    length = mask.sum(1, keepdim=True).expand_as(mask)
    so_far = (logprobs * mask).cumsum(1) / (position + 1)
    before = torch.cat([whole[:, -1:], chosen[:, :-1]], 1)
    return batch, {
        "before": hidden[:, :-1][mask],
        "after": hidden[:, 1:][mask],
        "ids": torch.stack([before[mask], chosen[mask]], 1),
        "last": (position == length - 1)[mask].cpu().numpy(),
        "simple": torch.stack([x[mask].float() for x in (position, logprobs, so_far, length)], 1).cpu().numpy(),
    }


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
