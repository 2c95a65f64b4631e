"""What recipes/removal.py does to a model: teach, remove, bring back, measure."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor

from studies.quality.make_data import PROMPT
from studies.quality.methods import LINEARS, PEFT_METHODS, Built
from studies.quality.run import DOMAIN_LENGTH, logits_at
from studies.rows import Draws, Encoded, Rows, batches_of, tokens_of, widen
from studies.training import Training, autocast, final_states, row_loss, warmup_decay


LOGITS = 3200  # places whose logits are there at once, when measuring


# ---- rows ----


def encoded(tokenizer: Any, pairs: list[list[str]]) -> list[Encoded]:
    return [tokens_of(tokenizer, (PROMPT.format(question), answer + "<|im_end|>")) for question, answer in pairs]


def kinds_of(data: dict[str, Any], split: str, config: dict[str, Any], tokenizer: Any) -> dict[str, list[Encoded]]:
    """Kind -> its questions with answers; the families of a kind are joined."""
    found = {}
    for kind in config["rows"]:
        pairs = data[split][kind]
        found[kind] = encoded(tokenizer, pairs if isinstance(pairs, list) else [p for f in pairs.values() for p in f])
    return found


def drawn(pools: dict[str, list[Encoded]], counts: dict[str, int], steps: int, seed: int) -> Rows:
    """Stacked batches with `counts[kind]` rows of every kind."""
    draws = Draws(pools, dict.fromkeys(pools, random.Random(seed)))
    return draws.batches([kind for kind, n in counts.items() for _ in range(n)], steps, DOMAIN_LENGTH)


# ---- measuring ----


@torch.no_grad()
def answered(built: Built, rows: Rows, base: Any = None) -> dict[str, Any]:
    """{"right" (N,): greedy decoding gives the answer, "loss": of a counted token, "kl": of base || model there}."""
    right = torch.ones(len(rows.ids), dtype=torch.bool, device=rows.ids.device)
    loss, kl, length = 0.0, 0.0, rows.ids.shape[1]
    most = int(rows.row.bincount().max()) if len(rows.row) else 1
    step = max(1, min(100, LOGITS // most))  # rows of a forward; several workers share a GPU
    for start in range(0, len(rows.ids), step):
        chunk = (rows.row >= start) & (rows.row < start + step)
        ids, where, target = rows.ids[start : start + step], rows.where[chunk] - start * length, rows.target[chunk]
        with autocast(ids.device):
            logits = logits_at(built, ids, where).float()
            if base is not None:
                reference = base.lm_head(final_states(base, ids).flatten(0, 1)[where]).float().log_softmax(-1)
                kl += float((reference.exp() * (reference - logits.log_softmax(-1))).sum())
        loss += float(F.cross_entropy(logits, target, reduction="sum"))
        right[rows.row[chunk][logits.argmax(-1) != target]] = False
    count = max(len(rows.where), 1)
    return {"right": right, "loss": loss / count, "kl": kl / count}


def measure(built: Built, base: Any, tests: dict[str, Rows], forget: str) -> dict[str, Any]:
    """Accuracy of every kind, loss and KL to the base on the forget set's answers, loss of every domain."""
    found: dict[str, Any] = {"accuracy": {}, "text": {}}
    for name, rows in tests.items():
        group, _, kind = name.partition("/")
        got = answered(built, rows, base if kind == forget else None)
        if group == "text":
            found["text"][kind] = round(got["loss"], 5)
            continue
        found["accuracy"][kind] = float(got["right"].float().mean())
        if kind == forget:
            found |= {"forget_loss": round(got["loss"], 5), "forget_kl": round(got["kl"], 5)}
    if next(iter(tests.values())).ids.is_cuda:
        torch.cuda.empty_cache()  # for the other workers
    return found


# ---- training ----


def optimise(
    built: Built, loss: Callable[..., Tensor], batches: Sequence[Rows], clip: float | Callable[[], Any] = 1.0
) -> Training:
    """Training of `built` on a loss, which gets a batch of each of the stacked `batches`."""
    device = batches[0].ids.device

    def gradients(*batch: Rows) -> Tensor:
        with autocast(device):
            value = loss(*batch)
        value.backward()
        return value.detach()

    return Training([built.parameters], gradients, fixed=[rows.at(0) for rows in batches], clip=clip)


def answer_loss(built: Built, rows: Rows) -> Tensor:
    """Cross-entropy of the counted tokens, a mean over rows."""
    return row_loss(logits_at(built, rows.ids, rows.where), rows)


def teach(
    built: Built, pools: dict[str, list[Encoded]], counts: dict[str, int], config: dict[str, Any], seed: int
) -> None:
    """Train on `counts` rows of every kind a step, with linear warm-up and decay."""
    device = next(built.model.parameters()).device
    steps, warmup, lr = config["steps"], config["warmup"], config["learning_rate"]

    def loss(rows: Rows) -> Tensor:
        return answer_loss(built, rows) + (built.extra() if built.extra else 0.0)

    clip: Any = (lambda: built.model.clip_bundle_grads(1.0)) if built.extra else 1.0  # type: ignore[operator]
    rows = drawn(pools, counts, steps, seed).to(device)
    optimise(built, loss, [rows], clip).run(batches_of(rows), lambda n: [lr * warmup_decay(n, steps, warmup)])


def lora(base: Any, seed: int) -> Built:
    torch.manual_seed(seed)
    model: Any = get_peft_model(copy.deepcopy(base), PEFT_METHODS["lora_r16"]())
    inner = model.get_base_model()
    return Built(model, lambda ids: final_states(inner, ids), [p for p in model.parameters() if p.requires_grad])


def lora_weights(built: Built) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in built.model.named_parameters() if p.requires_grad}


# ---- removing ----


def state_at(model: Any, ids: Tensor, layer: int) -> Tensor:
    """Output of a decoder layer, (B, T, d)."""
    kept: list[Any] = []
    handle = model.model.layers[layer].register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        final_states(model, ids)
    finally:
        handle.remove()
    return kept[0][0] if isinstance(kept[0], tuple) else kept[0]


def rmu_loss(built: Built, frozen: Any, rows: Rows, config: dict[str, Any], seed: int) -> Callable[..., Tensor]:
    """RMU's loss (Li et al. 2024, eq. 1-3) at one layer, over the squared length of its target.

    The forget set's states are drawn to one random vector, of `strength` times their mean length; the retain set's to
    what the model had there before. Every token but the first and padding counts. It is RMU-style: the LoRA is trained
    up to that layer, not three MLPs, and the target's length follows the model's own.
    """
    inner: Any = built.model.get_base_model()  # type: ignore[operator]
    layer = max(0, round(config["depth"] * inner.config.num_hidden_layers) - 1)

    def counted(ids: Tensor) -> Tensor:
        return (ids != 0) & (torch.arange(ids.shape[1], device=ids.device) > 0)

    def mean(values: Tensor, ids: Tensor) -> Tensor:
        mask = counted(ids)
        return (values * mask).sum() / mask.sum()

    with torch.no_grad():
        length = mean(state_at(frozen, rows.ids[0], layer).float().norm(dim=-1), rows.ids[0]) * config["strength"]
    direction = torch.rand(inner.config.hidden_size, generator=torch.Generator().manual_seed(seed)).to(length.device)
    target = direction / direction.norm() * length

    def loss(forget: Rows, retain: Rows) -> Tensor:
        with torch.no_grad():
            kept = state_at(frozen, retain.ids, layer).float()
        away = mean((state_at(inner, forget.ids, layer).float() - target).square().sum(-1), forget.ids)
        stay = mean((state_at(inner, retain.ids, layer).float() - kept).square().sum(-1), retain.ids)
        return (away + config["retain"] * stay) / length**2

    return loss


def unlearn(
    built: Built,
    method: str,
    rate: float,
    pools: dict[str, list[Encoded]],
    test: Rows,
    config: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Train the LoRA until the forget set is answered no better than `below`; {"steps", "removed", "curve"}."""
    forget, settings = config["forget"], config["unlearn"]
    retained = {kind: settings["rows"] // (len(pools) - 1) for kind in pools if kind != forget}
    device, steps = test.ids.device, settings["steps"]
    forgotten = drawn(pools, {forget: settings["rows"]}, steps, seed).to(device)
    batches = [forgotten, drawn(pools, retained, steps, seed + 1).to(device)]
    loss: Callable[..., Tensor]
    if method == "rmu":
        frozen = copy.deepcopy(built.model).merge_and_unload()  # type: ignore[operator]
        loss = rmu_loss(built, frozen.requires_grad_(False), forgotten, settings, seed)
    elif method == "ascent":
        batches = [forgotten]
        loss = lambda forget: -answer_loss(built, forget)  # noqa: E731
    else:
        loss = lambda forget, retain: answer_loss(built, retain) - answer_loss(built, forget)  # noqa: E731

    training = optimise(built, loss, batches)
    curve: list[list[float]] = []

    def after(done: int, _: Tensor | None = None) -> bool:
        if done % settings["every"] == 0 or done == steps:
            curve.append([done, float(answered(built, test)["right"].float().mean())])
            return curve[-1][1] <= settings["below"]
        return False

    done = 0 if after(0) else training.run(batches_of(*batches), lambda n: [rate], after)
    return {"steps": done, "removed": curve[-1][1] <= settings["below"], "curve": curve}


# ---- bringing it back ----


def relearn(model: Any, pairs: list[Encoded], test: Rows, config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Accuracy over steps of a fresh LoRA on everything else frozen.

    {"all": [[step, accuracy]], taught all of the facts; "part": [[step, of the taught part, of the rest]]}.

    Args:
        model: a causal LM, with its bundles where it has some; their alphas are as set.
    """
    settings = config["relearn"]
    torch.manual_seed(1000 + seed)
    model.requires_grad_(False)
    adapter = LoraConfig(r=settings["rank"], lora_alpha=2 * settings["rank"], target_modules=LINEARS)
    inject_adapter_in_model(adapter, model, "relearn")
    parameters = [p for name, p in model.named_parameters() if "relearn" in name]
    for parameter in parameters:
        parameter.requires_grad_(True)
    built = Built(model, lambda ids: final_states(model, ids), parameters)
    start, steps = [p.detach().clone() for p in parameters], max(settings["at"])
    part = round(settings["part"] * len(pairs))
    taught = {
        name: drawn({"facts": some}, {"facts": settings["rows"]}, steps, seed).to(test.ids.device)
        for name, some in (("all", pairs), ("part", pairs[:part]))
    }
    length = max(rows.ids.shape[2] for rows in taught.values())
    most = max(rows.where.shape[1] for rows in taught.values())
    taught = {name: widen(rows, length, most) for name, rows in taught.items()}
    training = optimise(built, lambda rows: answer_loss(built, rows), [taught["all"]])
    curves: dict[str, list[list[float]]] = {name: [] for name in taught}
    for name, rows in taught.items():
        with torch.no_grad():
            for parameter, value in zip(parameters, start):
                parameter.copy_(value)

        def after(done: int, _: Tensor | None = None, name: str = name) -> None:
            if done in settings["at"]:
                right = answered(built, test)["right"].float()
                shares = [right] if name == "all" else [right[:part], right[part:]]
                curves[name].append([done, *(float(share.mean()) for share in shares)])

        after(0)
        training.run(batches_of(rows), lambda n: [settings["learning_rate"] * min(1.0, (n + 1) / 5)], after)
    return curves
