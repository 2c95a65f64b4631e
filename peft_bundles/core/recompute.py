"""Gradient checkpointing of blocks whose bundles are computed again in backward.

A checkpointed block runs its forward again in backward, and with it the hooks of its linear layers (in transformers
before 5.23 its own hook too). By then the alphas and the route of the forward are gone, and on a GPU it is another
thread. So the forward's call is kept beside the block's inputs, through `context_fn` of `torch.utils.checkpoint`
(non-reentrant checkpointing only: PyTorch refuses it for the other).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import transformers
from packaging.version import Version

from .state import BundleState, CallAlphas


Layer: TypeAlias = Any  # the `BundleLayer` of a block, which imports this file

HOOKS_RUN_AGAIN = Version(transformers.__version__) < Version("5.23.dev0")  # a block's own


class CheckpointWithCall:
    """A block's checkpointing function whose recomputation runs with the alphas and the route of its forward."""

    def __init__(self, checkpoint: Callable[..., Any], layer: Layer) -> None:
        self.checkpoint, self.layer = checkpoint, layer

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.checkpoint(function, *args, context_fn=self.contexts)

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Context managers of a block's forward and of its recomputation; called when the forward starts."""
        state = self.layer.state
        call = state.call
        # `set_alphas` and `set_adapter` may come between the forward and the backward.
        kept = {"own": CallAlphas(call.alphas), "set_alphas": dict(state.set_alphas), "again": True}
        active = tuple(self.layer.active_adapters) if call.active is None else call.active
        return nullcontext(), _With(state, {**vars(call), **kept, "active": active})


class _With:
    """Run the block with these values of `state.call`, in the thread that runs the backward; again for every pass."""

    def __init__(self, state: BundleState, kept: dict[str, Any]) -> None:
        self.state, self.kept = state, kept
        self.before: dict[str, Any] = {}

    def __enter__(self) -> None:
        self.before = dict(vars(self.state.call))
        vars(self.state.call).update(self.kept)

    def __exit__(self, *error: object) -> None:
        vars(self.state.call).update(self.before)


def recompute_with_call(layers: Iterable[Layer], *, required: bool) -> None:
    """Make checkpointed blocks recompute their bundles with the call of the forward.

    Args:
        layers: bundle layers of blocks.
        required: whether the forward has its own alphas or route, which a recomputation must not lose.

    Raises:
        RuntimeError: a block is checkpointed re-entrantly, and `required`.
    """
    for layer in layers:
        if not (HOOKS_RUN_AGAIN or layer.inner):
            continue
        block = layer.get_base_layer()
        checkpoint = vars(block).get("_gradient_checkpointing_func")
        if checkpoint is None or isinstance(checkpoint, CheckpointWithCall):
            continue
        if not getattr(checkpoint, "keywords", {}).get("use_reentrant", True):
            vars(block)["_gradient_checkpointing_func"] = CheckpointWithCall(checkpoint, layer)
        elif required and getattr(block, "gradient_checkpointing", False):
            raise RuntimeError(
                "re-entrant gradient checkpointing runs bundles again in backward, without this call's alphas and "
                'route. Call model.gradient_checkpointing_enable({"use_reentrant": False})'
                + (", or install transformers>=5.23." if HOOKS_RUN_AGAIN and not layer.inner else ".")
            )
