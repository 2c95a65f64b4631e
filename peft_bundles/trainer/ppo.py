"""`BundlePPOTrainer`: `BundleTrainer` with PPO as its only objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from ..objectives import PPO
from .config import BundleTrainingConfig
from .trainer import BundleTrainer


class BundlePPOTrainer(BundleTrainer):
    """PPO (or GRPO, RLOO) on a bundled model; policy, value, entropy and KL each train their own bundles.

    It is `BundleTrainer` with `PPO` as its only objective; with several objectives use that.

    Args:
        model: from `get_peft_model(base, BundleConfig(...))`.
        reward_funcs: one or several TRL-style reward functions: keyword arguments `completions`, `prompts` and the
            dataset's other columns in, a list of numbers out.
        args: a `BundleTrainingConfig`.
        train_dataset, eval_dataset: rows with a `prompt`.
        processing_class: the tokenizer.
        callbacks, optimizers: as in `transformers.Trainer`.
        ppo: further arguments of `peft_bundles.objectives.PPO`.

    Raises:
        ValueError: as `BundleTrainer` and `PPO`.

    Example:
        >>> args = BundleTrainingConfig("outputs", report_to="none")
        >>> BundlePPOTrainer(None, [], args, [{"prompt": "1+1="}], None)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: objective 'ppo': 0 reward_funcs and 0 reward_weights...
    """

    _name = "BundlePPO"

    def __init__(
        self,
        model: PeftModel,
        reward_funcs: Callable[..., Any] | Sequence[Callable[..., Any]],
        args: BundleTrainingConfig,
        train_dataset: Any,
        processing_class: Any,
        eval_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        **ppo: Any,
    ) -> None:
        objective = PPO(train_dataset, reward_funcs, eval_dataset=eval_dataset, **ppo)
        super().__init__(model, args, objective, processing_class, callbacks, optimizers)
