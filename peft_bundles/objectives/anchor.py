"""KL to the base model on text that must not be disturbed."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .batches import Batch, Outputs
from .forward import Forward
from .lm import LM
from .tokens import kl_divergence, masked_mean, wide


class Anchor(LM):
    """coef * mean_t KL(p_base(. | t) || p(. | t)) over the whole vocabulary, in nats per token.

    It costs a forward of the base model (bundles off) and a forward and backward of its rows. Its rows are those of
    `peft_bundles.own_samples`, or general text. It updates the bundles that own its signal, so it can only hold back
    bundles that also learn from something else.

    Failure mode: it acts on its own rows and says nothing about other text. If the owners of its signal learn from
    nothing else, it trains them to cancel the other bundles: `kl` is then low with all bundles on, but not with the
    others alone.

    Args:
        dataset: rows of `text`, `messages` or `input_ids`.
        signal: name of the signal and of the objective.
        coef: factor of the loss, > 0.
        eval_dataset: held-out rows of the same format.
        max_length: tokens kept of a row. None keeps all.
        text_field: name of the column with text.

    Raises:
        ValueError: `coef` is not a positive number.

    Example:
        >>> from peft_bundles.objectives import Anchor
        >>> Anchor([{"text": "one"}, {"text": "two"}], signal="lm", coef=0.5).signals
        ('lm',)
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
        current = wide(outputs.logits[:, :-1]).log_softmax(-1)
        kl = masked_mean(kl_divergence(batch["reference"], current), batch["weights"][:, 1:])
        return {self.signals[0]: self.coef * kl}, {"kl": kl}
