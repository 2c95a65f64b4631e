"""`BundleTrainingConfig`: transformers' training arguments, and what several objectives on one model need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from ..routers.topics import TopicRouting
from .mixing import MIXINGS


TRUNKS = ("frozen", "full")


@dataclass
class BundleTrainingConfig(TrainingArguments):
    """Training arguments of `BundleTrainer`.

    `per_device_train_batch_size` is the rows of each objective in a micro-batch (a preference row is a pair);
    `max_grad_norm` holds for every bundle by itself (design.md section 3, guarantee 6), and for the rest together.

    Args:
        rows: objective -> rows in a micro-batch, where they differ from `per_device_train_batch_size`.
        mixing: "together" (every step has rows of each objective), "ratio" (one objective a step, drawn by
            `mixing_weights`) or "alternate".
        mixing_weights: objective -> weight, for "ratio".
        forward: objective (or signal) -> the bundles that are on in its rows: "all" (default), "owners", a list of
            bundles, or bundle -> alpha.
        shared_forward: let objectives whose losses need one backward share one forward. False forwards each alone,
            which makes what the forward table promises exact to the bit.
        lr_multipliers: bundle (or "trunk", or the objective whose value head is meant) -> factor on the learning rate.
        max_grad_norms: bundle -> norm, where it differs from `max_grad_norm`.
        kl_clamp: fields of `KLClamp` (objectives/kl_clamp.py), or None.
        topics: fields of `TopicRouting` (routers/topics.py), for datasets with a column `topics`: a row's topic
            vector, a dict topic -> weight, or a list of names, {} or [] for none; one kind in all rows. Each row gates
            the semantic bundles, alpha and gradient, as `mask` says; with "rate" a bundle's learning rate in a step is
            scaled by the mean of its topic over the rows that have it. Objectives whose dataset has no such column are
            as without topics.
        trunk: "frozen", or "full": the base model is trained too, by all signals.
        trunk_ranks: signal -> rank of the subspace that its gradient on the trunk is projected to, with trunk="full".
        trunk_refresh: steps after which these subspaces are chosen anew.

    Raises:
        ValueError: at construction, naming field, value and fix.
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
    trunk: str = "frozen"
    trunk_ranks: dict[str, int] | None = None
    trunk_refresh: int = 200

    def __post_init__(self) -> None:
        # "gradient_..." are the old names of the same arguments.
        checkpointing = self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs or {}
        if isinstance(checkpointing, dict):
            if checkpointing.get("use_reentrant"):
                raise ValueError("activation_checkpointing_kwargs: use_reentrant=True loses gradients; set it False.")
            self.activation_checkpointing_kwargs = {**checkpointing, "use_reentrant": False}
        super().__post_init__()
        for name, value, choices in (("mixing", self.mixing, MIXINGS), ("trunk", self.trunk, TRUNKS)):
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}.")
        for name in ("rows", "lr_multipliers", "max_grad_norms", "mixing_weights", "trunk_ranks"):
            for key, value in (getattr(self, name) or {}).items():
                whole = name in ("rows", "trunk_ranks")
                if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value > 0:
                    raise ValueError(f"{name}[{key!r}]={value!r} must be a positive {'int' if whole else 'number'}.")
        if self.topics is not None:
            if not isinstance(self.topics, Mapping):
                raise ValueError(
                    f"topics={self.topics!r} must be a dict, e.g. {{'topics': ['law', 'ml'], 'mask': 'soft'}}."
                )
            known = [f.name for f in fields(TopicRouting)]
            if unknown := sorted(set(self.topics) - set(known)):
                raise ValueError(f"topics has unknown field(s) {unknown}; it takes {', '.join(known)}.")
            try:
                TopicRouting(**self.topics)
            except ValueError as error:
                raise ValueError(f"topics: {error}") from None
        if self.trunk_ranks and self.trunk != "full":
            raise ValueError(f"trunk_ranks={self.trunk_ranks!r} need trunk='full'; it is {self.trunk!r}.")
        if self.trunk_refresh < 1:
            raise ValueError(f"trunk_refresh={self.trunk_refresh!r} must be at least 1.")
        if self.fp16:
            raise ValueError("fp16=True: several backwards do not go through a gradient scaler; use bf16=True.")
