"""`Calls`: what a call of the model sets up around its forwards, and takes back: alphas, adapters, folded weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner

from .dialling import alphas
from .layer import BundleLayer
from .planning import prepared
from .state import BundleState


class Calls(BaseTuner):
    """The part of `BundleModel` that runs calls."""

    _layers: list[BundleLayer]
    _state: BundleState

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """`PeftModel` enters this around every forward and generate, with the call's arguments."""
        call, values = self._state.call, kwargs.get("alphas")
        before = call.offered
        try:
            with self._call(values, kwargs.get("adapter_names")):
                call.offered = values
                yield
        except (TypeError, ValueError) as error:
            if call.offered is not None and "'alphas'" in str(error):  # an argument that the base model does not know
                raise ValueError(
                    "alphas= cannot be used here: without a task type PEFT passes it to the base model. Make the "
                    "adapter with BundleConfig(task_type='CAUSAL_LM'), or use `with model.alphas(...):`."
                ) from error
            raise
        finally:
            call.offered = before

    def _not_set_yet(self, values: Any) -> Any:
        """The alphas of a call, or None if `PeftModel` has set them: then it passes the same object to the tuner."""
        call = self._state.call
        if values is None or values is not call.offered:
            return values
        call.offered = None
        return None

    @contextmanager
    def _call(self, values: Any, adapter_names: list[str] | None) -> Iterator[None]:
        """Run the block as one call, with its own alphas and adapter names if they are given."""
        call = self._state.call
        if adapter_names is not None:
            self._state.check_unmerged()
            if self.training:
                raise ValueError("adapter_names cannot be used in training mode; call model.eval() or set_adapter.")
            if unknown := sorted(set(adapter_names) - set(self.peft_config) - {"__base__"}):
                raise ValueError(f"adapter_names has {unknown}; the adapters are {sorted(self.peft_config)}.")
        before = call.adapter_names
        call.adapter_names = adapter_names if adapter_names is not None else before
        try:
            own = alphas(self.model, values) if values is not None else nullcontext()
            with self._pinned(adapter_names or ()), own, prepared(self.model, self._layers):
                yield
        finally:
            call.adapter_names = before
            call.reading = None  # another thread may have taken the router's hooks away in the middle of a forward

    @contextmanager
    def _pinned(self, others: Sequence[str] = ()) -> Iterator[None]:
        """Run the block with the adapters that are active now, even if other threads add or remove some in the
        meantime.

        `use.calls` counts the calls that run with each adapter. An adapter that was replaced is deleted when the last
        of its calls ends.
        """
        call, use = self._state.call, self._state.use
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            torch._dynamo.graph_break()  # only what the call runs is compiled, and not its start
        inside_of_a_call = call.active is not None
        if inside_of_a_call or torch.compiler.is_compiling():  # compiled training keeps the adapters that it traced
            yield
            return
        with use.lock:
            active = tuple(self.active_adapters)
            held = {*active, *others}
            use.calls.update(held)
        call.active = active
        try:
            yield
        finally:
            call.active = None
            with use.lock:
                use.calls.subtract(held)
            # If another thread is changing the set, that thread deletes them, or the next call to end does.
            if use.retired and use.swapping.acquire(blocking=False):
                try:
                    self.delete_retired()
                finally:
                    use.swapping.release()

    def delete_retired(self) -> None:
        """Delete the replaced adapters that no call runs with any more. The caller must hold `use.swapping`."""
        use = self._state.use
        with use.lock:
            unused = [a for a in use.retired if use.calls[a] == 0]
            use.retired.difference_update(unused)
        for adapter in unused:  # no new call can start with them, for they are not active
            self.delete_adapter(adapter)
            remaining = self._state.bundle_names()
            self._state.set_alphas = {n: value for n, value in self._state.set_alphas.items() if n in remaining}

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Fold the bundles once for all forwards without gradients in the block, in this thread.

        Do not change weights inside the block.
        """
        call = self._state.call
        before = call.folds
        call.folds = before if before is not None else {}
        try:
            yield
        finally:
            call.folds = before
