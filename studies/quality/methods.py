"""What the quality study compares, as data: PEFT's methods, the package's bundles, the forms that were tried."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import IA3Config, LoraConfig, OSFConfig, ShiraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn

from peft_bundles import BundleConfig, BundleSpec, calibrate
from peft_bundles.core.places import at_place, linears_of, sizes_of
from studies.quality.forms import Form, Statistics, attach, measure, penalty
from studies.quality.local import LocalPenalty
from studies.training import final_states


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = "20000"  # of calibration text, for every local penalty
# "lora:targets=o_proj+down_proj,r=50,local=10" and "bundles:place=mlp,quiet=10,kl=1": options and their defaults.
LORA_OPTIONS = {"targets": "all-linear", "r": "16", "local": "0", "kl": "0", "source": "both", "tokens": TOKENS}
BUNDLE_OPTIONS = {"place": "block", "kind": "", "r": "", "bundles": "1", "routed": "", "owners": "", "kl": "0"}
BUNDLE_OPTIONS |= {"rank": "0.75", "source": "both", "tokens": TOKENS}
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


def options_of(text: str, defaults: dict[str, str], more: tuple[str, ...] = ()) -> dict[str, str]:
    """The options "name=value,name=value" over their defaults.

    Raises:
        ValueError: an option that is neither in `defaults` nor in `more`, or has no value.

    Example:
        >>> options_of("r=26,local=10", {"r": "16", "local": "0", "kl": "0"})
        {'r': '26', 'local': '10', 'kl': '0'}
    """
    options = dict(defaults)
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in (*defaults, *more) or not value:
            raise ValueError(f"{item!r} is no option; write name=value with a name of {[*defaults, *more]}.")
        options[name] = value
    return options


def equal_rank(base: Any, place: list[str]) -> int:
    """The rank at which LoRA at a place has about the parameters of LoRA r16 on all linear layers."""
    block = base.model.layers[0]
    linears = linears_of(block)
    sizes = {path: sum(sizes_of(module) or ()) for path, module in linears.items()}
    there = {path for name in place for path in at_place(name, block, list(linears))}
    return round(16 * sum(sizes.values()) / sum(sizes[path] for path in there))


def build_bundles(
    options: dict[str, str],
    base: nn.Module,
    calibration: dict[str, Tensor],
    tokenizer: Any,
    seed: int,
    kinds: list[str],
) -> Built:
    """The package's own bundles. `options`: fields of BundleConfig, and those of BUNDLE_OPTIONS.

    place: "block", or a place at linear layers, several joined by "+". kind, r: of the bundles there; r is by default
    what gives the parameters of LoRA r16 on all linear layers. bundles: so many, of equal size. routed: each learns
    from one kind of row, every kind has as many or one more; at least one a kind. owners: while training, a row sees
    the bundles of its own kind only.
    """
    options = {**BUNDLE_OPTIONS, **options}
    own = {name: options.pop(name) for name in BUNDLE_OPTIONS}
    place, kind, kl = own["place"].split("+"), own["kind"] or None, float(own["kl"])
    source, tokens = own["source"], int(own["tokens"])
    owners = bool(own["owners"])
    routed = bool(own["routed"]) or owners
    fields: dict[str, Any] = {
        name: value if isinstance(getattr(BundleConfig(), name), str) else float(value)
        for name, value in options.items()
    }
    signals = sorted(set(kinds)) if routed else ["all"]
    owner: dict[str, str] = {}  # bundle -> what it learns from
    for n in range(max(int(own["bundles"]), len(signals))):
        again, which = divmod(n, len(signals))
        name = f"b_{signals[which]}" + (f"_{again}" if again else "") if routed else f"b_{n}"
        owner[name] = signals[which]
    # Trained together, all learn from one signal: the penalty then takes them together too.
    if place == ["block"]:
        rank = float(own["rank"])
        # 189 hidden units of 432 columns, in all: 4.90 M parameters, as LoRA r16 on all linears has.
        of_each: dict[str, Any] = {"rank": rank, "sub_bases": ["main"], "bottleneck": 189 // len(owner), "kind": kind}
        fields["sub_bases"] = {"main": rank}
    else:
        rank_there = int(own["r"] or equal_rank(base, place))
        of_each = {"rank": max(1, rank_there // len(owner)), "place": place, "kind": kind or "lora"}
    bundles = {name: BundleSpec(**of_each, signals={signal: 1.0}) for name, signal in owner.items()}
    config = BundleConfig(bundles=bundles, basis_seed=seed, task_type="CAUSAL_LM", **fields)
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
        method: a key of PEFT_METHODS, also with "_kl<weight>", "_local<weight>" or both behind it; "corda_r16",
            "full", "lora:option=value,...", "bundles:option=value,..." or "form:field=value,...".
        calibration: source -> token rows (N, T).
        kinds: what each row of a training batch is.
    """
    torch.manual_seed(seed)
    if method.startswith("bundles:"):
        options = options_of(method[8:], BUNDLE_OPTIONS, tuple(BundleConfig.__dataclass_fields__))
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
    name, options = lora_options(method)
    if name == "corda_r16":
        config = prepare_corda(model, base, calibration[CORDA_SOURCE])
    elif name == "lora":
        targets, rank = options["targets"], int(options["r"])
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=targets if targets == "all-linear" else targets.split("+"),
            task_type="CAUSAL_LM",
        )
    else:
        config = PEFT_METHODS[name]()
    with full_precision():
        peft_model = get_peft_model(model, config)
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    built = Built(
        peft_model, lambda ids: final_states(model, ids), parameters, graph=name not in ("osf_r16", "shira_r16")
    )
    extras: list[Callable[[], Tensor]] = []
    if kl := float(options["kl"]):
        extras.append(kl_to_base(model, base, calibration["own"], kl))
    if local := float(options["local"]):
        rows = calibration[options["source"]]
        rows = rows[: max(1, int(options["tokens"]) // rows.shape[1])]
        extras.append(LocalPenalty(peft_model, built.trunk, rows, local))
    if extras:
        built.extra = lambda: torch.stack([extra() for extra in extras]).sum()
    return built


def lora_options(method: str) -> tuple[str, dict[str, str]]:
    """The name of a PEFT method and its options, from "lora:r=26,local=10" or "lora_r16_kl1_local10".

    Raises:
        ValueError: a method that this file does not know.

    Example:
        >>> name, options = lora_options("lora_r16_kl1.0_local10")
        >>> name, options["kl"], options["local"]
        ('lora_r16', '1.0', '10')
    """
    if method.startswith("lora:"):
        return "lora", options_of(method[5:], LORA_OPTIONS)
    found = re.fullmatch(r"(\w+?)(?:_kl([\d.]+))?(?:_local([\d.]+))?", method)
    if found is None or found[1] not in (*PEFT_METHODS, "corda_r16"):
        raise ValueError(f"method={method!r} is unknown; see `build`.")
    return found[1], {**LORA_OPTIONS, "kl": found[2] or "0", "local": found[3] or "0"}


CORDA_SOURCE, CORDA_ROWS = "mixture", 8  # rows that pass as one: its authors use long ones
_eigens: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()  # base -> by name of the linear layer


def prepare_corda(model: Any, base: nn.Module, rows: Tensor) -> LoraConfig:
    """Knowledge-preserving CorDA (arXiv 2406.05223): gives `model` what PEFT then reads, and returns its config.

    LoRA starts as the smallest components of W C, C the covariance of the inputs on `rows` (N, T), and W keeps the
    rest. So many rows as PEFT's page asks for, and lora_alpha = r as there.
    """
    config = LoraConfig(
        r=16,
        lora_alpha=16,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
        target_modules=LINEARS,
        task_type="CAUSAL_LM",
    )
    linears = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in LINEARS}
    if base not in _eigens:
        together = CORDA_ROWS * rows.shape[1]
        count = max(1, min(128 * model.config.hidden_size, rows.numel()) // together)
        chosen = rows.flatten()[: count * together].view(count, -1)

        def run() -> None:
            for row in chosen:
                final_states(model, row[None])

        with full_precision():
            preprocess_corda(model, config, run_model=run)
        _eigens[base] = {name: module.eigens for name, module in linears.items()}
    for name, module in linears.items():
        module.eigens = copy.deepcopy(_eigens[base][name])  # `get_peft_model` writes into them
    return config


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products without TF32: an initialisation that takes something out of W must put the same in."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def kl_to_base(model: Any, base: Any, rows: Tensor, weight: float) -> Callable[[], Tensor]:
    """weight * mean KL(base || model) a token, on 16 rows of 64 tokens drawn anew each time."""

    def penalty_of_the_whole() -> Tensor:
        picked = rows[torch.randint(len(rows), (16,), device=rows.device), :64]
        with torch.no_grad():
            target = base.lm_head(final_states(base, picked)).float().log_softmax(-1)
        found = model.lm_head(final_states(model, picked)).float().log_softmax(-1)
        return weight * (target.exp() * (target - found)).sum(-1).mean()

    return penalty_of_the_whole
