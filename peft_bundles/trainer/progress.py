"""The console of a run: transformers' progress bar, without the numbers of each bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import ProgressCallback, Trainer


OF_BUNDLES = ("alpha/", "alpha_std/", "activation/", "grad_norm/", "update_norm/")  # logged for every bundle


class ShortProgress(ProgressCallback):
    """transformers' progress bar. It shows the losses and metrics of a log line and leaves out `OF_BUNDLES`."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        short = {name: value for name, value in (logs or {}).items() if not name.startswith(OF_BUNDLES)}
        super().on_log(args, state, control, logs=short, **kwargs)


def shorten_console(trainer: Trainer) -> None:
    """Replace transformers' progress bar, where it is in use; other callbacks (a notebook's, TRL's) stay."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback) is ProgressCallback:
            trainer.remove_callback(callback)
            trainer.add_callback(ShortProgress)
