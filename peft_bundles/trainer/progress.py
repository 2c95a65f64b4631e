"""The console of a run: transformers' progress bar and log lines, without the numbers of each bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer


OF_BUNDLES = ("alpha/", "alpha_std/", "activation/", "grad_norm/", "update_norm/")  # logged for every bundle


def _without_bundles(logs: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (logs or {}).items() if not name.startswith(OF_BUNDLES)}


class ShortProgress(ProgressCallback):
    """transformers' progress bar. It shows the losses and metrics of a log line and leaves out `OF_BUNDLES`."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=_without_bundles(logs), **kwargs)


class ShortPrinter(PrinterCallback):
    """What transformers prints where the progress bar is disabled, without `OF_BUNDLES`."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=_without_bundles(logs), **kwargs)


def shorten_console(trainer: Trainer) -> None:
    """Replace transformers' console callbacks, where they are in use; others (a notebook's, TRL's) stay."""
    short = {ProgressCallback: ShortProgress, PrinterCallback: ShortPrinter}
    for callback in list(trainer.callback_handler.callbacks):
        if (replacement := short.get(type(callback))) is not None:
            trainer.remove_callback(callback)
            trainer.add_callback(replacement)
