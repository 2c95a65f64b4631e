"""What `BundleTrainer` refuses before anything is prepared or trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel

from ..config import BundleConfig
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
