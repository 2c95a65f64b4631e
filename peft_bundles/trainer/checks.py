"""What `BundleTrainer` refuses before anything is prepared or trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel

from ..calibration import STATES
from ..config import BundleConfig
from ..core.walking import adapter_layers, state_of
from ..objectives.base import Objective
from ..routing.routes import check_signals
from .config import BundleTrainingConfig


def check_arguments(args: Any) -> None:
    """Raises ValueError for arguments of another class."""
    if not isinstance(args, BundleTrainingConfig):
        raise ValueError(
            f"args is a {type(args).__name__}; give a BundleTrainingConfig, which has all fields of transformers' "
            "TrainingArguments."
        )


def config_of(model: Any) -> BundleConfig:
    """The config of the active adapter.

    Raises:
        ValueError: the model has no bundles.
    """
    config = model.peft_config.get(model.active_adapter) if isinstance(model, PeftModel) else None
    if not isinstance(config, BundleConfig):
        raise ValueError(f"{type(model).__name__} has no bundles; use get_peft_model(model, BundleConfig(...)).")
    if config.bundles and state_of(model).router is not None:
        raise ValueError(
            "the model has a router, and in training the forward table says which bundles are on; call "
            "model.set_router(None), and set it again after training."
        )
    return config


def objectives_by_name(objectives: Objective | Sequence[Objective], config: BundleConfig) -> dict[str, Objective]:
    """The objectives by their names.

    Raises:
        ValueError: something that is not an objective, a name used twice, or a signal that no bundle owns.
    """
    objectives = [objectives] if isinstance(objectives, Objective) else list(objectives)
    for objective in objectives:
        if not isinstance(objective, Objective):
            raise ValueError(f"objectives has a {type(objective).__name__}; give objectives, e.g. [LM(rows)].")
    names = [objective.name for objective in objectives]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"objectives are named {names}; give at least one, and give each its own name (signal=).")
    for objective in objectives:
        try:
            check_signals({"": config}, objective.signals)
        except ValueError as error:
            raise ValueError(f"objective {objective.name!r}: {error}") from None
    return {objective.name: objective for objective in objectives}


def check_names(args: BundleTrainingConfig, config: BundleConfig, signals: Mapping[str, tuple[str, ...]]) -> None:
    """Compare the names in the arguments with those of bundles, objectives and signals.

    Raises:
        ValueError: a name that does not exist.
    """
    bundles, objectives = list(config.bundles or ()), list(signals)
    for field, allowed in (
        ("rows", objectives),
        ("lr_multipliers", [*bundles, *objectives, "trunk"]),
        ("max_grad_norms", bundles),
        ("trunk_ranks", [signal for emitted in signals.values() for signal in emitted]),
    ):
        if unknown := sorted(set(getattr(args, field) or {}) - set(allowed)):
            raise ValueError(f"{field} names {unknown}; it takes some of {allowed}.")


def check_held_out(args: BundleTrainingConfig, objectives: Mapping[str, Objective]) -> None:
    """Raises ValueError if the arguments ask for evaluations and no objective has held-out rows."""
    if any(objective.eval_rows is not None for objective in objectives.values()):
        return
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    asked = {"eval_strategy": strategy, "eval_on_start": args.eval_on_start}
    for name, value in asked.items():
        if value not in ("no", False):
            raise ValueError(
                f"{name}={value!r}, but no objective has held-out rows; give them to an objective, e.g. "
                "LM(rows, eval_dataset=held_out)."
            )


def warn_of_weak_penalty(model: Any, config: BundleConfig) -> None:
    """One warning if the penalty on what bundles add to other text (`quiet`) has no states, or few, to act on."""
    if not (config.quiet and config.bundles):
        return
    adapter = model.active_adapter
    layers = adapter_layers(model, adapter)
    kept = min((len(layer.bundle_states[adapter]) for layer in layers if adapter in layer.bundle_states), default=0)
    if config.calibration is None:
        what = "the bundles are not calibrated, so there is no"
        fix = "call peft_bundles.calibrate(model, texts, tokenizer)"
    elif not kept:
        what = "a calibrated adapter was loaded, and no states were kept with it, so there is no"
        fix = "call peft_bundles.calibrate(model, texts, tokenizer, states_only=True)"
    elif kept < STATES // 2:
        what = f"calibration kept {kept:,} of up to {STATES:,} states, so there is only a weak"
        fix = "call peft_bundles.calibrate with more text (20,000 tokens are usual)"
    else:
        return
    warnings.warn(
        f"{what} penalty on what bundles do to other text (quiet={config.quiet:g}). Before training {fix}, or set "
        "BundleConfig(quiet=0) to train without it.",
        stacklevel=3,
    )


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer, or that of a processor, with a padding token: the end token where it has none.

    Raises:
        ValueError: it is something else, or has neither of the two tokens.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not hasattr(tokenizer, "eos_token"):
        raise ValueError(f"processing_class is {processing_class!r}; give the model's tokenizer, or its processor.")
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(
            "the tokenizer has neither a padding token nor an end token; set tokenizer.pad_token, e.g. "
            "tokenizer.pad_token = tokenizer.unk_token."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
