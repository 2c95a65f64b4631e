"""Gradient checkpointing in transformers before 5.23, which recomputes a block together with its forward hooks.

From 5.23 on a block checkpoints its `forward`, so that our hook runs once. Before, the hook runs again in backward,
when the alphas and the route of the forward are gone. Here the recomputation gets them back, through `context_fn` of
`torch.utils.checkpoint` (non-reentrant checkpointing only: PyTorch refuses it for the other).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import transformers
from packaging.version import Version
from torch import nn

from .state import BundleState, CallAlphas


HOOKS_RUN_AGAIN = Version(transformers.__version__) < Version("5.23.dev0")


class CheckpointWithCall:
    """A block's checkpointing function whose recomputation runs with the alphas and the route of its forward."""

    def __init__(self, checkpoint: Callable[..., Any], state: BundleState) -> None:
        self.checkpoint, self.state = checkpoint, state

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.checkpoint(function, *args, context_fn=self.contexts)

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Context managers of a block's forward and of its recomputation; called when the forward starts."""
        call = self.state.call
        kept = {**vars(call), "own": CallAlphas(call.alphas)}
        return nullcontext(), _with(self.state, kept)


@contextmanager
def _with(state: BundleState, kept: dict[str, Any]) -> Iterator[None]:
    """Run the block with these values of `state.call`, in the thread that runs the backward."""
    call = state.call
    before = dict(vars(call))
    vars(call).update(kept)
    try:
        yield
    finally:
        vars(call).update(before)


def recompute_with_call(blocks: Iterable[tuple[nn.Module, BundleState]], *, required: bool) -> None:
    """Make checkpointed blocks recompute their bundles with the call of the forward; does nothing from 5.23 on.

    Args:
        blocks: blocks with bundles, and the state of their bundle layers.
        required: whether the forward has its own alphas or route, which a recomputation must not lose.

    Raises:
        RuntimeError: a block is checkpointed re-entrantly, and `required`.
    """
    if not HOOKS_RUN_AGAIN:
        return
    for block, state in blocks:
        checkpoint = vars(block).get("_gradient_checkpointing_func")
        if checkpoint is None or isinstance(checkpoint, CheckpointWithCall):
            continue
        if not getattr(checkpoint, "keywords", {}).get("use_reentrant", True):
            vars(block)["_gradient_checkpointing_func"] = CheckpointWithCall(checkpoint, state)
        elif required and getattr(block, "gradient_checkpointing", False):
            raise RuntimeError(
                f"re-entrant gradient checkpointing in transformers {transformers.__version__} runs bundles again in "
                "backward, without this call's alphas and route. Call "
                'model.gradient_checkpointing_enable({"use_reentrant": False}), or install transformers>=5.23.'
            )
