"""What the quality study compares, as data: PEFT's methods, the package's bundles, the forms that were tried."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import IA3Config, LoraConfig, OSFConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn

from peft_bundles import BundleConfig, BundleSpec, calibrate
from studies.quality.forms import Form, Statistics, attach, measure, penalty
from studies.training import final_states


# One trunk of SmolLM2-135M: `key` and `value` have 192 rows, everything else 576 or more. OSF's trainable rank is what
# its frozen one leaves, so these give rank 16 everywhere.
OSF_RANKS = {"k_proj": 192 - 16, "v_proj": 192 - 16}

PEFT_METHODS: dict[str, Callable[[], Any]] = {
    "lora_r16": lambda: LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    "lora_r64": lambda: LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM"),
    "rslora_r16": lambda: LoraConfig(
        r=16, lora_alpha=32, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    "dora_r16": lambda: LoraConfig(
        r=16, lora_alpha=32, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    "osf_r16": lambda: OSFConfig(
        effective_rank=576 - 16, rank_pattern=OSF_RANKS, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    "shira_r16": lambda: ShiraConfig(r=16, random_seed=0, target_modules=LINEARS, task_type="CAUSAL_LM"),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Built:
    """A model ready to train: `trunk(ids)` gives final hidden states, `extra()` what is added to the loss (or None)."""

    model: nn.Module
    trunk: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    extra: Callable[[], Tensor] | None = None
    graph: bool = True
    decay: float = 0.0
    context: Any = field(default_factory=nullcontext)  # around the training
    rows: Callable[[], Any] = nullcontext  # around a step: what holds for the rows of a training batch only
    tag: Callable[[str], Any] | None = None  # what a row of a kind runs with where its kind is known
    progress: Tensor | None = None  # (), the share of the steps that are done; `train` keeps it


def form_of(method: str) -> dict[str, Any] | None:
    """Fields of the form that "form:field=value,field=value" asks for."""
    if not method.startswith("form:"):
        return None
    fields = {}
    for item in method[5:].split(","):
        name, _, value = item.partition("=")
        kind = type(getattr(Form(), name))
        fields[name] = value if kind is str else value == "True" if kind is bool else float(value)
    for name in ("tokens", "budget"):
        if name in fields:
            fields[name] = int(fields[name])
    return fields


_measured: dict[tuple[Any, ...], list[Statistics]] = {}


def build_bundles(
    options: dict[str, str],
    base: nn.Module,
    calibration: dict[str, Tensor],
    tokenizer: Any,
    seed: int,
    kinds: list[str],
) -> Built:
    """The package's own bundles. `options`: fields of BundleConfig, and source, tokens, bundles, routed, owners, kl.

    bundles: so many, of equal size. routed: each learns from one kind of row, every kind has as many or one more; at
    least one a kind. owners: while training, a row sees the bundles of its own kind only.
    """
    options = {"source": "both", "tokens": "20000", "bundles": "1", "routed": "", "owners": "", "kl": "", **options}
    source, tokens, count = options.pop("source"), int(options.pop("tokens")), int(options.pop("bundles"))
    owners, kl = bool(options.pop("owners")), float(options.pop("kl") or 0)
    routed = bool(options.pop("routed")) or owners
    fields: dict[str, Any] = {
        name: value if isinstance(getattr(BundleConfig(), name), str) else float(value)
        for name, value in options.items()
    }
    signals = sorted(set(kinds)) if routed else ["all"]
    owner: dict[str, str] = {}  # bundle -> what it learns from
    for n in range(max(count, len(signals))):
        again, place = divmod(n, len(signals))
        name = f"b_{signals[place]}" + (f"_{again}" if again else "") if routed else f"b_{n}"
        owner[name] = signals[place]
    rank = fields.pop("rank", 0.75)
    # 189 hidden units of 432 columns, in all: 4.90 M parameters, as LoRA r16 on all linears has.
    # Trained together, all learn from one signal: the penalty then takes them together too.
    bundles = {
        name: BundleSpec(rank, ["main"], bottleneck=189 // len(owner), signals={signal: 1.0})
        for name, signal in owner.items()
    }
    config = BundleConfig(bundles=bundles, sub_bases={"main": rank}, basis_seed=seed, task_type="CAUSAL_LM", **fields)
    model = get_peft_model(copy.deepcopy(base), config)
    texts = tokenizer.batch_decode(calibration[source][: tokens // 128 + 1])
    calibrate(model, texts, tokenizer, tokens=tokens, max_length=128, batch_size=32, progress=False)
    inner: Any = model.get_base_model()
    route = model.route(kinds) if routed else nullcontext()

    def extra() -> Tensor:
        whole = kl_to_base(inner, base, calibration["own"], kl)() if kl else 0.0
        return model.quiet_loss() + whole

    parameters = [p for p in model.parameters() if p.requires_grad]
    built = Built(model, lambda ids: final_states(inner, ids), parameters, extra, context=route)
    if routed:
        built.tag = lambda kind: model.alphas({name: float(of == kind) for name, of in owner.items()})
    if owners:
        gates = {name: torch.tensor([float(of == kind) for kind in kinds]) for name, of in owner.items()}
        built.rows = lambda: model.alphas(gates)
    return built


def build(
    method: str, base: nn.Module, calibration: dict[str, Tensor], tokenizer: Any, seed: int, kinds: list[str]
) -> Built:
    """A copy of the base with the method on it.

    Args:
        method: a key of PEFT_METHODS, "form:field=value,...", "bundles:field=value,...", "full", or
            "lora_r16_kl<weight>".
        calibration: source -> token rows (N, T).
        kinds: what each row of a training batch is.
    """
    torch.manual_seed(seed)
    if method.startswith("bundles:"):
        options = dict(item.split("=") for item in method[8:].split(",") if item)
        return build_bundles(options, base, calibration, tokenizer, seed, kinds)
    model = copy.deepcopy(base)
    fields = form_of(method)
    if fields is not None:
        form = Form(**fields)
        rows = calibration[form.source]
        rows = rows[: max(1, form.tokens // rows.shape[1])]
        key = (form.place, form.input if form.input in ("rms", "next_norm") else "", form.source, form.tokens)
        if key not in _measured:
            _measured[key] = measure(copy.deepcopy(base), rows, form)
        progress = torch.ones((), device=rows.device)
        layers = attach(model, rows, form, seed, _measured[key], progress)
        extra = (lambda: form.quiet * penalty(layers)) if form.quiet else None
        if form.kl:
            extra = kl_to_base(model, base, calibration["own"], form.kl)
        parameters = [p for p in layers.parameters() if p.requires_grad]
        return Built(
            model, lambda ids: final_states(model, ids), parameters, extra, decay=form.decay, progress=progress
        )
    if method == "full":
        return Built(model, lambda ids: final_states(model, ids), list(model.parameters()))
    name, _, weight = method.partition("_kl")
    peft_model = get_peft_model(model, PEFT_METHODS[name]())
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    built = Built(
        peft_model, lambda ids: final_states(model, ids), parameters, graph=name not in ("osf_r16", "shira_r16")
    )
    if weight:
        built.extra = kl_to_base(model, base, calibration["own"], float(weight))
    return built


def kl_to_base(model: Any, base: Any, rows: Tensor, weight: float) -> Callable[[], Tensor]:
    """weight * mean KL(base || model) a token, on 16 rows of 64 tokens drawn anew each time."""

    def penalty_of_the_whole() -> Tensor:
        picked = rows[torch.randint(len(rows), (16,), device=rows.device), :64]
        with torch.no_grad():
            target = base.lm_head(final_states(base, picked)).float().log_softmax(-1)
        found = model.lm_head(final_states(model, picked)).float().log_softmax(-1)
        return weight * (target.exp() * (target - found)).sum(-1).mean()

    return penalty_of_the_whole
