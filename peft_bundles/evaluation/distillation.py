"""To plain LoRA: a static adapter that imitates one setting of the alphas, for engines that serve only LoRA.

Bundles are not linear and cannot be merged, so the LoRA learns from the bundled model's distribution on text (Hinton et
al., "Distilling the knowledge in a neural network", 2015, at temperature 1).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core.dialling import alphas as use_alphas
from ..core.gates import parse_alphas
from ..core.walking import state_of
from .sweeps import Batch, EvalFn


@dataclass
class DistillReport:
    """How close a LoRA comes to the setting that it imitates.

    Attributes:
        kl: mean KL(bundled model || model) over held-out tokens, in nats a token, whole vocabulary: "base" for the
            plain base model, where the LoRA starts, and "lora" for what it became.
        agreement: share of held-out tokens at which the most likely next token is the bundled model's, of both.
        scores: task -> mean score of "base", "bundles" and "lora".
        parameters: trained parameters of the LoRA.
        alphas: the setting.
        steps: optimizer steps.
        losses: KL of each step's batch before the step (with `top_k`: the coarser KL that was trained).
    """

    kl: dict[str, float]
    agreement: dict[str, float]
    scores: dict[str, dict[str, float]]
    parameters: int
    alphas: dict[str, float]
    steps: int
    losses: list[float]

    def to_dict(self) -> dict[str, Any]:
        """All but the losses, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "losses"}


def distill_to_lora(
    model: PeftModel,
    alphas: Mapping[str, float],
    dataset: Sequence[Batch],
    *,
    held_out: Sequence[Batch],
    lora: LoraConfig | None = None,
    steps: int = 200,
    learning_rate: float = 1e-3,
    top_k: int | None = None,
    tasks: Mapping[str, Batch] | None = None,
    eval_fn: EvalFn | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[PeftModel, DistillReport]:
    """Train a LoRA on the plain base model to give the distributions of the bundled one under these alphas.

    Text decides what is imitated: take what the adapter will be used on. The LoRA's model shares the base model's
    weights with `model` and needs no second copy of them.

    Args:
        model: a model with bundles; not changed, but its base weights are frozen from here.
        alphas: one number a bundle; bundles not named keep what `set_alphas` or their config gave them.
        dataset: batches of `input_ids` (B, T) and, where rows are padded, `attention_mask` (B, T), as
            `evaluation.text_batch` makes them; taken in a shuffled order, again and again.
        held_out: batches to measure on, from other text.
        lora: what to train; None is rank 16 on all linear layers.
        steps: optimizer steps of AdamW, a batch each; the learning rate falls linearly to 0.
        learning_rate: of the first step.
        top_k: compare the teacher's k most likely tokens and the mass of all others as one, a lower bound of the KL
            that needs less memory. None: the whole vocabulary.
        tasks, eval_fn: as of `evaluation.alpha_sweep`: also score the tasks with base, bundles and LoRA.
        seed: of the LoRA's start and the order of batches.
        progress: show a progress bar.

    Returns:
        A `PeftModel` with the LoRA, in eval mode (`save_pretrained` writes a plain LoRA folder), and the report.

    Raises:
        ValueError: an unknown bundle, an alpha that is not a number, no batches, a bad number, tasks without eval_fn,
            or an adapter without bundles or with whole modules of its own, which a LoRA cannot start from.
        RuntimeError: the KL is not finite.
    """
    state = state_of(model)
    names = {name: spec.alpha for config in state.configs.values() for name, spec in (config.bundles or {}).items()}
    setting = {}
    for name, value in {**names, **state.set_alphas, **parse_alphas(alphas, state)}.items():
        if not isinstance(value, float):
            raise ValueError(f"the alpha of {name!r} is {value!r}; a static LoRA imitates one number a bundle.")
        setting[name] = value
    for what, batches in (("dataset", dataset), ("held_out", held_out)):
        if not len(batches):
            raise ValueError(f"{what} is empty; give at least one batch of input_ids.")
        if isinstance(batches, Mapping) or not all(isinstance(b, Mapping) and "input_ids" in b for b in batches):
            raise ValueError(
                f"{what} must be a list of batches with input_ids, e.g. [evaluation.text_batch(texts, tokenizer)]."
            )
    if steps < 1 or not 0 < learning_rate < math.inf or (top_k is not None and top_k < 1):
        raise ValueError(f"steps={steps}, learning_rate={learning_rate} and top_k={top_k} must be positive.")
    if tasks and eval_fn is None:
        raise ValueError("tasks need an eval_fn, e.g. evaluation.negative_loss.")
    for config in state.configs.values():
        if not config.bundles or config.modules_to_save:
            raise ValueError(
                "this adapter trained modules of the base model (modules_to_save, or no bundles), so there is no plain "
                "base model for a LoRA to start from; distil an adapter of bundles alone."
            )

    student = _lora(model, lora or LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"), seed)
    device = next(model.parameters()).device
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    training = model.training
    model.eval()

    def teacher(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad(), use_alphas(model, setting):
            return model(**batch, use_cache=False).logits

    try:
        before = _closeness(student, teacher, held_out, device)
        order: list[int] = []
        for step in tqdm(range(steps), desc="distil", disable=not progress):
            order = order or torch.randperm(len(dataset), generator=generator).tolist()
            batch = _model_inputs(dataset[order.pop()], device)
            wanted = teacher(batch)
            loss = kl(wanted, student(**batch, use_cache=False).logits, top_k)[_targets(batch)].mean()
            if not bool(torch.isfinite(loss)):
                raise RuntimeError(f"the KL of step {step} is {loss.item()}; use a lower learning_rate.")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        student.eval()
        after = _closeness(student, teacher, held_out, device)
        scores = _scores(model, student, setting, tasks or {}, eval_fn, device)
    finally:
        model.train(training)
    kls, agreements = ({"base": before[i], "lora": after[i]} for i in (0, 1))
    size = sum(p.numel() for p in trained)
    return student, DistillReport(kls, agreements, scores, size, setting, steps, losses)


def kl(teacher: Tensor, student: Tensor, top_k: int | None = None) -> Tensor:
    """KL(teacher || student) of the next token at every position, in nats.

    Args:
        teacher, student: logits (..., V).
        top_k: k. Both distributions are cut to the teacher's k most likely tokens and one event "any other"; by the
            data-processing inequality this is at most the KL of the whole, which None gives.

    Returns:
        (...), >= 0 up to rounding.
    """
    logs, mine = (
        logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1) for logits in (teacher, student)
    )
    if top_k is not None and top_k < logs.shape[-1]:
        logs, best = logs.topk(top_k, -1)
        mine = mine.gather(-1, best)
        logs, mine = (torch.cat([each, _rest(each)], -1) for each in (logs, mine))
    return (logs.exp() * (logs - mine)).sum(-1)


def _rest(logs: Tensor) -> Tensor:
    """log(1 - sum exp(logs)) over the last axis, kept as an axis of 1."""
    return torch.log1p(-logs.exp().sum(-1, keepdim=True).clamp_max(1 - torch.finfo(logs.dtype).eps))


def _lora(model: PeftModel, config: LoraConfig, seed: int) -> PeftModel:
    """The base model without bundles, its weights shared with `model`, with a fresh LoRA."""
    shared: dict[int, Any] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    plain: nn.Module = copy.deepcopy(model, shared).unload()  # type: ignore[operator]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cast(PeftModel, get_peft_model(cast(Any, plain), config).train())


def _model_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}


def _targets(batch: Mapping[str, Tensor]) -> Tensor:
    """Which positions count, (B, T): the real tokens."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


@torch.no_grad()
def _closeness(
    student: nn.Module, teacher: Callable[[dict[str, Tensor]], Tensor], batches: Sequence[Batch], device: torch.device
) -> tuple[float, float]:
    """Mean KL to the teacher in nats a token, and the share of tokens with the same most likely next one."""
    training = student.training
    student.eval()
    total = torch.zeros(3, dtype=torch.float64)
    for each in batches:
        batch = _model_inputs(each, device)
        wanted, found = teacher(batch), student(**batch, use_cache=False).logits
        real = _targets(batch)
        same = wanted.argmax(-1) == found.argmax(-1)
        total += torch.stack([kl(wanted, found)[real].double().sum(), same[real].sum(), real.sum()]).cpu()
    student.train(training)
    return float(total[0] / total[2]), float(total[1] / total[2])


@torch.no_grad()
def _scores(
    model: nn.Module,
    student: PeftModel,
    setting: Mapping[str, Any],
    tasks: Mapping[str, Batch],
    eval_fn: EvalFn | None,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    scores = {}
    for task, batch in tasks.items():
        assert eval_fn is not None
        given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        with use_alphas(model, setting):
            bundles = eval_fn(model, given)
        lora = eval_fn(student, given)
        with student.disable_adapter():
            base = eval_fn(student, given)
        scores[task] = {
            name: float(s.double().mean()) for name, s in zip(("base", "bundles", "lora"), (base, bundles, lora))
        }
    return scores
