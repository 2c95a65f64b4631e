"""What recipes/removal.py does to a model: teach, remove, bring back, measure."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from studies.quality.make_data import PROMPT
from studies.quality.methods import LINEARS, PEFT_METHODS, Built, _trunk
from studies.quality.run import DOMAIN_LENGTH, Encoded, Rows, capture, logits_at, rows_of, tokens_of


LOGITS = 3200  # places whose logits are there at once, when measuring


# ---- rows ----


def encoded(tokenizer: Any, pairs: list[list[str]]) -> list[Encoded]:
    return [tokens_of(tokenizer, (PROMPT.format(question), answer + "<|im_end|>")) for question, answer in pairs]


def kinds_of(data: dict[str, Any], split: str, given: dict[str, Any], tokenizer: Any) -> dict[str, list[Encoded]]:
    """Kind -> its questions with answers; the families of a kind are joined."""
    found = {}
    for kind in given["rows"]:
        pairs = data[split][kind]
        found[kind] = encoded(tokenizer, pairs if isinstance(pairs, list) else [p for f in pairs.values() for p in f])
    return found


def drawn(pools: dict[str, list[Encoded]], counts: dict[str, int], steps: int, seed: int) -> Rows:
    """Batches stacked, ids (steps, B, T) and the rest (steps, P): every pool is gone through in a new order again."""
    rng = random.Random(seed)
    queues: dict[str, list[Encoded]] = {kind: [] for kind in counts}

    def draw(kind: str) -> Encoded:
        if not queues[kind]:
            queues[kind] = rng.sample(pools[kind], len(pools[kind]))
        return queues[kind].pop()

    batches = [
        rows_of([draw(kind) for kind, n in counts.items() for _ in range(n)], DOMAIN_LENGTH) for _ in range(steps)
    ]
    length, most = max(b.ids.shape[1] for b in batches), max(len(b.where) for b in batches)
    stacked = []
    for b in batches:  # one shape for all, so that one CUDA graph does
        own = b.ids.shape[1]
        where = b.where // own * length + b.where % own
        parts = [F.pad(t, (0, most - len(t))) for t in (where, b.target, b.row, b.weight)]
        stacked.append([F.pad(b.ids, (0, length - own)), *parts])
    return Rows(*(torch.stack(parts) for parts in zip(*stacked)))


# ---- measuring ----


@torch.no_grad()
def answered(built: Built, rows: Rows, base: Any = None) -> dict[str, Any]:
    """{"right" (N,): greedy decoding gives the answer, "loss": of a counted token, "kl": of base || model there}."""
    right = torch.ones(len(rows.ids), dtype=torch.bool, device=rows.ids.device)
    loss, kl, length = 0.0, 0.0, rows.ids.shape[1]
    most = int(rows.row.bincount().max()) if len(rows.row) else 1
    step = max(1, min(100, LOGITS // most))  # rows of a forward; several workers share a GPU
    for start in range(0, len(rows.ids), step):
        mine = (rows.row >= start) & (rows.row < start + step)
        ids, where, target = rows.ids[start : start + step], rows.where[mine] - start * length, rows.target[mine]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
            logits = logits_at(built, ids, where).float()
            if base is not None:
                reference = base.lm_head(_trunk(base, ids).flatten(0, 1)[where]).float().log_softmax(-1)
                kl += float((reference.exp() * (reference - logits.log_softmax(-1))).sum())
        loss += float(F.cross_entropy(logits, target, reduction="sum"))
        right[rows.row[mine][logits.argmax(-1) != target]] = False
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
    built: Built,
    loss: Callable[[dict[str, Rows]], Tensor],
    batches: dict[str, Rows],
    rate: Callable[[int], float],
    steps: int,
    after: Callable[[int], bool] = lambda n: False,
    clip: Callable[[], Any] | None = None,
) -> Callable[..., int]:
    """A function that trains `built` with AdamW, gradient norm at most 1, and returns the steps taken.

    Args:
        batches: name -> stacked batches, one a step; `loss` gets one of each.
        rate: step -> learning rate.
        after: called with the number of steps done, 0 too; True ends the training.
        clip: instead of clipping the norm of all parameters.

    The function takes other `batches` of the same shapes and another `after`: one CUDA graph does for several
    trainings. Their optimizer begins anew; resetting the weights is the caller's.
    """
    device = next(iter(batches.values())).ids.device
    lr, cuda = torch.zeros((), device=device), device.type == "cuda"
    optimizer = torch.optim.AdamW(built.parameters, lr=lr, weight_decay=0.0, capturable=cuda, foreach=cuda)
    fixed = {name: Rows(*(t[0].clone() for t in vars(rows).values())) for name, rows in batches.items()}

    def step() -> None:
        for parameter in built.parameters:
            parameter.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            value = loss(fixed)
        value.backward()
        nn.utils.clip_grad_norm_(built.parameters, 1.0) if clip is None else clip()
        optimizer.step()

    run = capture(step, built, optimizer) if cuda else step

    def training(batches: dict[str, Rows] = batches, after: Callable[[int], bool] = after) -> int:
        for state in optimizer.state.values():
            for entry in state.values():
                entry.zero_()
        if after(0):
            return 0
        for n in range(steps):
            lr.fill_(rate(n))
            for name, rows in batches.items():
                for into, source in zip(vars(fixed[name]).values(), vars(rows).values()):
                    into.copy_(source[n])
            run()
            if after(n + 1):
                return n + 1
        return steps

    return training


def answer_loss(built: Built, rows: Rows) -> Tensor:
    """Cross-entropy of the counted tokens, a mean over rows."""
    losses = F.cross_entropy(logits_at(built, rows.ids, rows.where).float(), rows.target, reduction="none")
    return (losses * rows.weight).sum() / len(rows.ids)


def teach(
    built: Built, pools: dict[str, list[Encoded]], counts: dict[str, int], given: dict[str, Any], seed: int
) -> None:
    """Linear warm-up and decay, as studies/quality/run.py has them."""
    device = next(built.model.parameters()).device
    steps, warmup = given["steps"], given["warmup"]

    def rate(n: int) -> float:
        return given["learning_rate"] * ((n + 1) / warmup if n < warmup else (steps - n) / (steps - warmup))

    def loss(batch: dict[str, Rows]) -> Tensor:
        return answer_loss(built, batch["all"]) + (built.extra() if built.extra else 0.0)

    clip = (lambda: built.model.clip_bundle_grads(1.0)) if built.extra else None  # type: ignore[operator]
    optimise(built, loss, {"all": drawn(pools, counts, steps, seed).to(device)}, rate, steps, clip=clip)()


def lora(base: Any, seed: int) -> Built:
    torch.manual_seed(seed)
    model: Any = get_peft_model(copy.deepcopy(base), PEFT_METHODS["lora_r16"]())
    inner = model.get_base_model()
    return Built(model, lambda ids: _trunk(inner, ids), [p for p in model.parameters() if p.requires_grad])


def lora_weights(built: Built) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in built.model.named_parameters() if p.requires_grad}


# ---- removing ----


def state_at(model: Any, ids: Tensor, layer: int) -> Tensor:
    """Output of a decoder layer, (B, T, d)."""
    kept: list[Any] = []
    handle = model.model.layers[layer].register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        _trunk(model, ids)
    finally:
        handle.remove()
    return kept[0][0] if isinstance(kept[0], tuple) else kept[0]


def rmu_loss(built: Built, frozen: Any, rows: Rows, given: dict[str, Any], seed: int) -> Callable[..., Tensor]:
    """RMU's loss (Li et al. 2024, eq. 1-3) at one layer, over the squared length of its target.

    The forget set's states are drawn to one random vector, of `strength` times their mean length; the retain set's to
    what the model had there before. Every token but the first and padding counts. It is RMU-style: the LoRA is trained
    up to that layer, not three MLPs, and the target's length follows the model's own.
    """
    inner: Any = built.model.get_base_model()  # type: ignore[operator]
    layer = max(0, round(given["depth"] * inner.config.num_hidden_layers) - 1)

    def counted(ids: Tensor) -> Tensor:
        return (ids != 0) & (torch.arange(ids.shape[1], device=ids.device) > 0)

    def mean(values: Tensor, ids: Tensor) -> Tensor:
        mask = counted(ids)
        return (values * mask).sum() / mask.sum()

    with torch.no_grad():
        length = mean(state_at(frozen, rows.ids[0], layer).float().norm(dim=-1), rows.ids[0]) * given["strength"]
    direction = torch.rand(inner.config.hidden_size, generator=torch.Generator().manual_seed(seed)).to(length.device)
    target = direction / direction.norm() * length

    def loss(batch: dict[str, Rows]) -> Tensor:
        forget, retain = batch["forget"].ids, batch["retain"].ids
        with torch.no_grad():
            kept = state_at(frozen, retain, layer).float()
        away = mean((state_at(inner, forget, layer).float() - target).square().sum(-1), forget)
        stay = mean((state_at(inner, retain, layer).float() - kept).square().sum(-1), retain)
        return (away + given["retain"] * stay) / length**2

    return loss


def unlearn(
    built: Built,
    method: str,
    rate: float,
    pools: dict[str, list[Encoded]],
    test: Rows,
    given: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Train the LoRA until the forget set is answered no better than `below`; {"steps", "removed", "curve"}."""
    forget, settings = given["forget"], given["unlearn"]
    retained = {kind: settings["rows"] // (len(pools) - 1) for kind in pools if kind != forget}
    batches = {
        "forget": drawn(pools, {forget: settings["rows"]}, settings["steps"], seed).to(test.ids.device),
        "retain": drawn(pools, retained, settings["steps"], seed + 1).to(test.ids.device),
    }
    if method == "rmu":
        frozen = copy.deepcopy(built.model).merge_and_unload()  # type: ignore[operator]
        loss = rmu_loss(built, frozen.requires_grad_(False), batches["forget"], settings, seed)
    elif method == "ascent":
        batches.pop("retain")

        def loss(batch: dict[str, Rows]) -> Tensor:
            return -answer_loss(built, batch["forget"])
    else:

        def loss(batch: dict[str, Rows]) -> Tensor:
            return answer_loss(built, batch["retain"]) - answer_loss(built, batch["forget"])

    curve: list[list[float]] = []

    def after(n: int) -> bool:
        if n % settings["every"] == 0 or n == settings["steps"]:
            curve.append([n, float(answered(built, test)["right"].float().mean())])
            return curve[-1][1] <= settings["below"]
        return False

    steps = optimise(built, loss, batches, lambda n: rate, settings["steps"], after)()
    return {"steps": steps, "removed": curve[-1][1] <= settings["below"], "curve": curve}


# ---- bringing it back ----


def relearn(model: Any, pairs: list[Encoded], test: Rows, given: dict[str, Any], seed: int) -> dict[str, Any]:
    """Accuracy over steps of a fresh LoRA on everything else frozen.

    {"all": [[step, accuracy]], taught all of the facts; "part": [[step, of the taught part, of the rest]]}.

    Args:
        model: a causal LM, with its bundles where it has some; their alphas are as set.
    """
    settings = given["relearn"]
    torch.manual_seed(1000 + seed)
    model.requires_grad_(False)
    config = LoraConfig(r=settings["rank"], lora_alpha=2 * settings["rank"], target_modules=LINEARS)
    inject_adapter_in_model(config, model, "relearn")
    parameters = [p for name, p in model.named_parameters() if "relearn" in name]
    for parameter in parameters:
        parameter.requires_grad_(True)
    built = Built(model, lambda ids: _trunk(model, ids), parameters)
    start, steps = [p.detach().clone() for p in parameters], max(settings["at"])
    part = round(settings["part"] * len(pairs))
    taught = {
        name: drawn({"facts": some}, {"facts": settings["rows"]}, steps, seed).to(test.ids.device)
        for name, some in (("all", pairs), ("part", pairs[:part]))
    }
    length = max(rows.ids.shape[2] for rows in taught.values())
    most = max(rows.where.shape[1] for rows in taught.values())
    taught = {name: widened(rows, length, most) for name, rows in taught.items()}
    training = optimise(
        built,
        lambda batch: answer_loss(built, batch["facts"]),
        {"facts": taught["all"]},
        lambda n: settings["learning_rate"] * min(1.0, (n + 1) / 5),
        steps,
    )
    curves: dict[str, list[list[float]]] = {name: [] for name in taught}
    for name, rows in taught.items():
        with torch.no_grad():
            for parameter, value in zip(parameters, start):
                parameter.copy_(value)

        def after(n: int, name: str = name) -> bool:
            if n in settings["at"]:
                right = answered(built, test)["right"].float()
                shares = [right] if name == "all" else [right[:part], right[part:]]
                curves[name].append([n, *(float(share.mean()) for share in shares)])
            return False

        training({"facts": rows}, after)
    return curves


def widened(rows: Rows, length: int, most: int) -> Rows:
    """Stacked batches with that many tokens a row and counted places a batch."""
    own = rows.ids.shape[2]
    where = rows.where // own * length + rows.where % own
    parts = [F.pad(t, (0, most - t.shape[1])) for t in (where, rows.target, rows.row, rows.weight)]
    return Rows(F.pad(rows.ids, (0, length - own)), *parts)
