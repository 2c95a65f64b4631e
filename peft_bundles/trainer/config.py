"""`BundleTrainingConfig`: transformers' training arguments, and what several objectives on one model need."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from ..routers.topics import TopicRouting
from .arguments import REFUSED, refuse_without_effect
from .mixing import MIXINGS


TRUNKS = ("frozen", "full")


@dataclass
class BundleTrainingConfig(TrainingArguments):
    """Training arguments of `BundleTrainer`: those of transformers, and the ones below.

    Two of transformers' arguments have another meaning here. `per_device_train_batch_size` counts the rows of *each*
    objective in a micro-batch (a preference row is a pair). `max_grad_norm` holds for every bundle, for the trunk and
    for every head separately. DDP and FSDP2 are supported, DeepSpeed is not. Arguments that would have no effect are
    refused; docs/training-arguments.md lists what each of them does.

    Args:
        rows: objective -> rows in a micro-batch, where it differs from `per_device_train_batch_size`.
        mixing: "together", every step has rows of each objective; "ratio", one objective a step, drawn by
            `mixing_weights`; "alternate", one objective a step, in turn.
        mixing_weights: objective -> weight, for "ratio"; an objective not named weighs 1.
        forward: objective (or a signal of it) -> the bundles that are on in its rows: "all" (default), "owners" (those
            that its signals update, and no other), a list, or bundle -> alpha. A list names bundles, "owners", and
            roles of bundles: ["owners", "general"] are the owners and all bundles of role "general".
        shared_forward: let objectives whose losses need one backward share one forward. False forwards each objective
            alone; then what the forward table promises holds bit for bit, not only up to rounding.
        lr_multipliers: bundle, "trunk" or objective (its value head) -> factor on the learning rate.
        max_grad_norms: bundle -> norm, where it differs from `max_grad_norm`.
        kl_clamp: limits how far training moves the model's readout from the base model's, bundle by bundle: the fields
            `strength`, `tau` (nats), `beta` and `tokens` of `objectives.kl_clamp.KLClamp`. None: no limit.
        topics: fields of `routers.topics.TopicRouting`, for datasets with a column `topics`: in each row a vector, a
            dict topic -> weight, or a list of names ({} or [] for none; one kind in all rows). Each row gates the
            semantic bundles, alpha and gradient, as `mask` says. With the mask "rate" a bundle's learning rate in a
            step is multiplied by the mean of its topic's weight over the rows that have the topic. Objectives whose
            dataset has no such column train as without topics.
        keys: make the key of every bundle when training ends, from the rows of its signals (`peft_bundles.learn_keys`).
            A key holds means of hidden states of these rows, and is saved with the bundle.
        trunk: "frozen", or "full": the base model is trained too, by all signals.
        trunk_ranks: signal -> rank of the subspace that its gradient on the trunk is projected to, with trunk="full".
        trunk_refresh: number of steps after which these subspaces are chosen again.

    Raises:
        ValueError: a field has an invalid value. The message names field, value and fix.

    Example:
        >>> args = BundleTrainingConfig("outputs", report_to="none", lr_multipliers={"b_kl": 0.01})
        >>> args.mixing, args.trunk
        ('together', 'frozen')
        >>> BundleTrainingConfig("outputs", report_to="none", mixing="sometimes")
        Traceback (most recent call last):
        ...
        ValueError: mixing='sometimes' is unknown; choose one of together, ratio, alternate.
    """

    logging_steps: float = field(default=10)
    rows: dict[str, int] | None = None
    mixing: str = "together"
    mixing_weights: dict[str, float] | None = None
    forward: dict[str, Any] | None = None
    shared_forward: bool = True
    lr_multipliers: dict[str, float] | None = None
    max_grad_norms: dict[str, float] | None = None
    kl_clamp: dict[str, Any] | None = None
    topics: dict[str, Any] | None = None
    keys: bool = True
    trunk: str = "frozen"
    trunk_ranks: dict[str, int] | None = None
    trunk_refresh: int = 200

    def __post_init__(self) -> None:
        refuse_without_effect(self)  # before transformers asks for DeepSpeed to be installed
        # transformers' older names of these arguments contain "gradient".
        checkpointing = self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs or {}
        if isinstance(checkpointing, dict):
            if checkpointing.get("use_reentrant"):
                raise ValueError(
                    "activation_checkpointing_kwargs: use_reentrant=True loses gradients; set it to False."
                )
            self.activation_checkpointing_kwargs = {**checkpointing, "use_reentrant": False}
        super().__post_init__()
        for name, value, choices in (("mixing", self.mixing, MIXINGS), ("trunk", self.trunk, TRUNKS)):
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}.")
        for name in ("lr_multipliers", "max_grad_norms", "mixing_weights"):
            _check_positive(name, getattr(self, name), (int, float), "number")
        for name in ("rows", "trunk_ranks"):
            _check_positive(name, getattr(self, name), int, "int")
        if self.topics is not None:
            _check_topics(self.topics)
        if self.trunk_ranks and self.trunk != "full":
            raise ValueError(f"trunk_ranks={self.trunk_ranks!r} need trunk='full'; it is {self.trunk!r}.")
        if self.trunk_refresh < 1:
            raise ValueError(f"trunk_refresh={self.trunk_refresh!r} must be at least 1.")
        if os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower() in ("fp16", "fp8"):
            raise ValueError(
                f"accelerate's launch sets mixed_precision={os.environ['ACCELERATE_MIXED_PRECISION']!r}, which is not "
                f"supported by BundleTrainer: {REFUSED['fp16']}."
            )


def _check_positive(name: str, values: Mapping[str, Any] | None, kind: Any, kind_name: str) -> None:
    for key, value in (values or {}).items():
        if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:
            raise ValueError(f"{name}[{key!r}]={value!r} must be a positive {kind_name}.")


def _check_topics(topics: Any) -> None:
    if not isinstance(topics, Mapping):
        raise ValueError(f"topics={topics!r} must be a dict, e.g. {{'topics': ['law', 'ml'], 'mask': 'soft'}}.")
    names = [f.name for f in fields(TopicRouting)]
    if unknown := sorted(set(topics) - set(names)):
        raise ValueError(f"topics has unknown field(s) {unknown}; it takes {', '.join(names)}.")
    try:
        TopicRouting(**topics)
    except ValueError as error:
        raise ValueError(f"topics: {error}") from None
