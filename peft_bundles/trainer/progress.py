"""The console of a run: which bundles learn together, a progress bar, and of the log the losses and the reward."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer


SHOWN = re.compile(r"(eval_)?loss(/.*)?|(eval_)?[^/]+/reward|epoch|train_loss|train_runtime")


def _shown(logs: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (logs or {}).items() if SHOWN.fullmatch(name)}


class ShortProgress(ProgressCallback):
    """transformers' progress bar. Of a log line it shows what `SHOWN` matches; a tracker gets all of it."""

    lines: Sequence[str] = ()  # written when training begins

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        _write(self.lines, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=_shown(logs), **kwargs)


class ShortPrinter(PrinterCallback):
    """What transformers prints where the progress bar is disabled, as short as `ShortProgress`."""

    lines: Sequence[str] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _write(self.lines, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=_shown(logs), **kwargs)


def _write(lines: Sequence[str], state: Any) -> None:
    for line in lines if state.is_world_process_zero else ():
        tqdm.write(line)


def shorten_console(trainer: Trainer, lines: Sequence[str]) -> None:
    """Replace transformers' console callbacks, where they are in use; others (a notebook's, TRL's) stay.

    Args:
        trainer: whose callbacks these are.
        lines: what the console says when training begins.
    """
    short = {ProgressCallback: ShortProgress, PrinterCallback: ShortPrinter}
    for callback in list(trainer.callback_handler.callbacks):
        if (replacement := short.get(type(callback))) is not None:
            trainer.remove_callback(callback)
            shown: Any = replacement()
            shown.lines = lines
            trainer.add_callback(shown)


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bars of `datasets` inside the block: each `map` and `filter` of an objective would leave one."""
    shown = not datasets.are_progress_bars_disabled()
    if shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
