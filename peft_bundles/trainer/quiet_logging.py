"""`loss/quiet` in the logs of trainers that are not ours."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..core.walking import state_of


class QuietLogging(TrainerCallback):
    """Adds the quiet penalty, as "loss/quiet", to what transformers' Trainer and TRL's trainers log.

    It is the mean over the steps since the last log, as the trainer's "loss" is, and no part of that. (`BundleTrainer`
    logs it by itself.) It reaches `trainer.state.log_history` and the console. Trackers run before the callbacks that
    a trainer is given; for them put it first: `trainer.callback_handler.callbacks.insert(0, QuietLogging())`.

    Example:
        >>> from peft_bundles.trainer import QuietLogging
        >>> callbacks = [QuietLogging()]  # SFTTrainer(model, args, callbacks=callbacks, ...)
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        """Put the value into the entry that is being logged."""
        if logs is None or "loss" not in logs or (value := state_of(model).penalty.read()) is None:
            return
        logs["loss/quiet"] = value
        state.log_history[-1]["loss/quiet"] = value
