"""Distil a model with bundles, at fixed alphas, into a plain LoRA for engines that serve only LoRA.

Bundles are not linear, so they cannot be merged or converted. The LoRA learns to predict the distribution of the model
with bundles (Hinton et al., "Distilling the knowledge in a neural network", 2015, at temperature 1).
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
    """How close the LoRA is to the model with bundles.

    Attributes:
        kl: mean KL(model with bundles || student) over the held-out tokens and the whole vocabulary, in nats per token.
            "base": the student is the base model, where the LoRA starts. "lora": the trained LoRA.
        agreement: share of held-out tokens for which both predict the same next token, for "base" and "lora".
        scores: task -> mean score of "base", "bundles" and "lora".
        parameters: number of trained parameters of the LoRA.
        alphas: bundle -> alpha.
        steps: optimizer steps.
        losses: KL of each step's batch before the step; with `top_k`, the truncated KL that was minimised.
    """

    kl: dict[str, float]
    agreement: dict[str, float]
    scores: dict[str, dict[str, float]]
    parameters: int
    alphas: dict[str, float]
    steps: int
    losses: list[float]

    def to_dict(self) -> dict[str, Any]:
        """All fields but `losses`, as values for JSON."""
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
    """Train a LoRA on the base model to imitate the model with bundles at fixed alphas.

    The LoRA imitates only what the text shows: use text of the kind the adapter will be used on. The student shares
    the base weights with `model`, so there is no second copy of them.

    Args:
        model: a model with bundles, the teacher. It is not changed, but its base weights are frozen.
        alphas: bundle -> number. Bundles that are not named keep the alpha of `set_alphas` or of their config.
        dataset: batches of `input_ids` (B, T) and, for padded rows, `attention_mask` (B, T), as
            `evaluation.text_batch` makes them. They are used in shuffled order, as often as needed.
        held_out: batches of other text, for the report.
        lora: the LoRA to train. None: rank 16 on all linear layers.
        steps: optimizer steps (AdamW, one batch per step), default 200. The learning rate falls linearly to 0.
        learning_rate: of the first step, default 1e-3.
        top_k: compare only the teacher's k most likely tokens, with all others as one event. This is a lower bound of
            the KL and needs less memory. None: the whole vocabulary.
        tasks: as in `evaluation.alpha_sweep`; scored with the base model, the bundles and the LoRA.
        eval_fn: as in `evaluation.alpha_sweep`; needed for `tasks`.
        seed: for the LoRA's initial weights and the order of the batches.
        progress: show a progress bar.

    Returns:
        A `PeftModel` with the LoRA, in eval mode, and a `DistillReport`. `save_pretrained` of the model writes a plain
        LoRA folder.

    Raises:
        ValueError: an unknown bundle, an alpha that is not one number, no batches, a number out of range, `tasks`
            without `eval_fn`, or an adapter that trains modules of the base model (the LoRA would start from other
            weights).
        RuntimeError: the KL is not finite.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, distill_to_lora
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> model = get_peft_model(base, BundleConfig(preset="ssl_rl_separate"))
        >>> batches = [{"input_ids": torch.arange(16).view(2, 8)}]
        >>> lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        >>> student, report = distill_to_lora(
        ...     model, {"b_rl_policy": 0.5}, batches, held_out=batches, lora=lora, steps=2, progress=False
        ... )
        >>> report.alphas["b_rl_policy"], len(report.losses)
        (0.5, 2)
        >>> student.peft_config["default"].peft_type.value
        'LORA'
    """
    state = state_of(model)
    names = {name: spec.alpha for config in state.configs.values() for name, spec in (config.bundles or {}).items()}
    setting = {}
    for name, value in {**names, **state.set_alphas, **parse_alphas(alphas, state)}.items():
        if not isinstance(value, float):
            raise ValueError(f"the alpha of {name!r} is {value!r}; give one number: a LoRA imitates one fixed alpha.")
        setting[name] = value
    for what, batches in (("dataset", dataset), ("held_out", held_out)):
        if not len(batches):
            raise ValueError(f"{what} is empty; give at least one batch of input_ids.")
        if isinstance(batches, Mapping) or not all(isinstance(b, Mapping) and "input_ids" in b for b in batches):
            raise ValueError(
                f"{what} is not a list of batches; give dicts with input_ids, e.g. "
                "[evaluation.text_batch(texts, tokenizer)]."
            )
    if steps < 1 or not 0 < learning_rate < math.inf or (top_k is not None and top_k < 1):
        raise ValueError(f"steps={steps}, learning_rate={learning_rate} and top_k={top_k} must be positive.")
    if tasks and eval_fn is None:
        raise ValueError("tasks was given without eval_fn; add one, e.g. eval_fn=evaluation.negative_loss.")
    for config in state.configs.values():
        if not config.bundles or config.modules_to_save:
            raise ValueError(
                "this adapter trained modules of the base model (modules_to_save, or no bundles), so the base model "
                "that a LoRA would start from is gone; distil an adapter that has only bundles."
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
            target = teacher(batch)
            loss = kl(target, student(**batch, use_cache=False).logits, top_k)[_targets(batch)].mean()
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
        top_k: reduce both distributions to the teacher's k most likely tokens and one event "any other token". By the
            data-processing inequality this is at most the full KL. None: the full KL.

    Returns:
        (...), >= 0 up to rounding.
    """
    p, q = (
        logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1) for logits in (teacher, student)
    )
    if top_k is not None and top_k < p.shape[-1]:
        p, best = p.topk(top_k, -1)
        q = q.gather(-1, best)
        p, q = (torch.cat([logs, _log_rest(logs)], -1) for logs in (p, q))
    return (p.exp() * (p - q)).sum(-1)


def _log_rest(logs: Tensor) -> Tensor:
    """log(1 - sum exp(logs)) over the last axis, which stays as an axis of size 1."""
    return torch.log1p(-logs.exp().sum(-1, keepdim=True).clamp_max(1 - torch.finfo(logs.dtype).eps))


def _lora(model: PeftModel, config: LoraConfig, seed: int) -> PeftModel:
    """The base model without bundles but with a fresh LoRA; it shares the base weights with `model`."""
    shared: dict[int, Any] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    plain: nn.Module = copy.deepcopy(model, shared).unload()  # type: ignore[operator]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cast(PeftModel, get_peft_model(cast(Any, plain), config).train())


def _model_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}


def _targets(batch: Mapping[str, Tensor]) -> Tensor:
    """(B, T), True for the tokens that are not padding."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


@torch.no_grad()
def _closeness(
    student: nn.Module, teacher: Callable[[dict[str, Tensor]], Tensor], batches: Sequence[Batch], device: torch.device
) -> tuple[float, float]:
    """Mean KL to the teacher in nats per token, and the share of tokens with the same most likely next token."""
    training = student.training
    student.eval()
    total = torch.zeros(3, dtype=torch.float64)
    for each in batches:
        batch = _model_inputs(each, device)
        target, logits = teacher(batch), student(**batch, use_cache=False).logits
        real = _targets(batch)
        same = target.argmax(-1) == logits.argmax(-1)
        total += torch.stack([kl(target, logits)[real].double().sum(), same[real].sum(), real.sum()]).cpu()
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
    """Mean score of every task with the base model, the bundles and the LoRA."""
    scores = {}
    for task, batch in tasks.items():
        assert eval_fn is not None
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        with use_alphas(model, setting):
            bundles = eval_fn(model, inputs)
        lora = eval_fn(student, inputs)
        with student.disable_adapter():
            base = eval_fn(student, inputs)
        scores[task] = {
            name: float(s.double().mean()) for name, s in zip(("base", "bundles", "lora"), (base, bundles, lora))
        }
    return scores
