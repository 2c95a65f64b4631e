"""KL to the base model on text that must not be disturbed."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .base import Batch, Outputs
from .forward import Forward
from .lm import LM
from .tokens import masked_mean, wide


class Anchor(LM):
    """coef * mean_t KL(p_base(. | t) || p(. | t)) over the whole vocabulary, in nats a token.

    The strongest remedy against disturbance in docs/learning.md, at the price of a forward of the base model (bundles
    off) and a forward and backward of its rows. Give it rows of `peft_bundles.own_samples`, or general text. It updates
    the bundles that own its signal: those that also learn from something else are the ones it can hold back.

    Failure mode: it holds where its rows are and says nothing of other text. Under a signal whose bundles learn from
    nothing else it trains these to cancel the others: a low `kl` with all on, and none of it with them off.

    Args:
        dataset: rows of `text`, `messages` or `input_ids`.
        signal: name of the signal, and of the objective.
        coef: its weight beside the other losses of its bundles.
        eval_dataset, max_length, text_field: as of `LM`.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        signal: str = "anchor",
        coef: float = 1.0,
        eval_dataset: Any = None,
        max_length: int | None = 1024,
        text_field: str = "text",
    ) -> None:
        super().__init__(
            dataset,
            signal=signal,
            eval_dataset=eval_dataset,
            max_length=max_length,
            prompt_weight=1.0,
            text_field=text_field,
        )
        if not 0 < coef < math.inf:
            raise ValueError(f"objective {signal!r}: coef={coef!r} must be a positive number.")
        self.coef = coef

    def complete(self, forward: Forward, batch: Batch) -> Batch:
        return {**batch, "reference": wide(forward.reference(batch).logits[:, :-1]).log_softmax(-1)}

    def losses(self, outputs: Outputs, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        reference, current = batch["reference"], wide(outputs.logits[:, :-1]).log_softmax(-1)
        kl = masked_mean((reference.exp() * (reference - current)).sum(-1), batch["weights"][:, 1:])
        return {self.signals[0]: self.coef * kl}, {"kl": kl}
