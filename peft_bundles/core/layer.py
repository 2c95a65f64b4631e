"""`BundleLayer`: the bundles behind one decoder block. (`LinearBundles`, in linears.py, are those at a linear layer.)

It is a child of the block with a forward hook that runs before others, not a wrapper around the block. So the block
stays the same for everything else that looks at it (hidden-state capture, LoRA on its linears, device maps, FSDP
units), and what the hook returns is the output of the block.

Some blocks return a tuple (GPT-J, Bloom, Falcon, ...); its first entry is the hidden states.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .functional import BundleWeights, bundle_forward, compute_dtype, eager_bundle_forward, within_budget
from .gates import expand_rows, layer_alphas, switched_on
from .inference import Part, Plan, for_reuse, run_plan
from .recompute import recompute_with_call
from .stored import StoredBundles


class BundleLayer(StoredBundles):
    """The bundles behind one decoder block; `StoredBundles` has its arguments and tensors."""

    def bundle_weights(self, adapter: str) -> list[BundleWeights]:
        """One adapter's bundles as the plain reference takes them (functional.py)."""
        return [
            BundleWeights(
                shape.kind,
                shape.support.to(self.bundle_basis[adapter].device),
                *(getattr(self, what)[adapter].get(name) for what in self.adapter_layer_names),
                scaling=self.state.configs[adapter].scaling,
            )
            for name, shape in self.packing(adapter).shapes.items()
        ]

    def add_inner(self, path: str, layer: Any) -> None:
        """Note the bundles at a linear layer inside the block."""
        if not self.inner:  # whoever runs the model, with or without a `BundleModel`
            block = self.get_base_layer()
            self._inner_handle = block.register_forward_pre_hook(self._before)
        self.inner[path] = layer

    def _before(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.state.call.shape = args[0].shape[:2] if args else None
        if torch.is_grad_enabled() and getattr(block, "gradient_checkpointing", False):
            recompute_with_call([self], required=False)

    def detach(self) -> None:
        super().detach()
        if self.inner:
            self._inner_handle.remove()

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the block: its output, with the bundles' update in the hidden states."""
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        return self(output)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """What the module returned, with the bundles' update; same shape and dtype.

        Args:
            hidden: what the bundles read: the output of the block, (B, T, d), or the input of the linear layer.
            residual: what their update is added to: the output of the linear layer. None: hidden.
        """
        residual = hidden if residual is None else residual
        if self._disable_adapters:
            return residual
        if not torch.compiler.is_compiling() and self._offloaded():
            with self._fetched():
                return self._bundled(hidden, residual)
        return self._bundled(hidden, residual)

    def _offloaded(self) -> bool:
        """Whether accelerate offloads the bundles here."""
        return any(hasattr(table, "_hf_hook") for table in self.bundle_up._modules.values())

    @contextmanager
    def _fetched(self) -> Iterator[None]:
        """Run the block with the tensors that accelerate offloads: it fetches them when their module is called, but
        the modules that hold ours never are.

        Raises:
            RuntimeError: offloaded weights are to be trained, of which every forward gets a new copy.
        """
        if self.training and torch.is_grad_enabled() and any(p.is_meta and p.requires_grad for p in self.parameters()):
            raise RuntimeError(
                f"accelerate has offloaded the weights of the bundles at {self.site}, so no optimizer can train them. "
                "Offload the base model and attach bundles after that: get_peft_model keeps theirs on the device that "
                "computes. Without training, call model.eval() or use torch.no_grad()."
            )
        modules: list[Any] = [module for module in self.modules() if hasattr(module, "_hf_hook")]
        for module in modules:
            module._hf_hook.pre_forward(module)
        try:
            yield
        finally:
            for module in modules:
                module._hf_hook.post_forward(module, None)

    def _bundled(self, hidden: Tensor, residual: Tensor) -> Tensor:
        if self.state.call.reading is not None:
            return self._gated(hidden, residual)
        if not torch.is_grad_enabled() and (plan := self._plan(hidden)) is not None:
            return run_plan(plan, hidden, residual)
        return self._training_forward(hidden, residual)

    @torch.compiler.disable
    def _gated(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """With a router: it reads the output of a block before the bundles behind it act."""
        if not self.site.path:
            self.state.call.reading.read(self.index + 1, hidden)  # type: ignore[union-attr]
        return self._training_forward(hidden, residual)

    def _plan(self, hidden: Tensor) -> Plan | None:
        """The plan for states without gradients; None if dropout is drawn again in every forward."""
        if self.slot.plan is not None:
            return self.slot.plan
        state, call, dtype = self.state, self.state.call, compute_dtype(hidden)
        if self.training and state.draws_dropout():
            return None
        active = tuple(self.active_adapters) if call.active is None else call.active
        if torch.compiler.is_compiling():
            state.compiled = True  # from the next call on, `prepared` makes the plans
        elif call.folds is not None:
            made_for = *state.settings(active), hidden.shape[:2], hidden.dtype, dtype, hidden.device
            kept = call.folds.get(self)
            if kept is not None and kept[0] == made_for:
                return kept[1]
            alphas = {**state.set_alphas, **call.alphas}.values()
            if not any(isinstance(alpha, Tensor) and alpha.requires_grad for alpha in alphas):
                plan = for_reuse(self.plan(hidden, dtype, active), hidden)
                call.folds[self] = made_for, plan
                return plan
            # An alpha with gradients may be moved by an optimizer, so no plan with it is kept.
        return self.plan(hidden, dtype, active)

    def plan(self, hidden: Tensor, dtype: torch.dtype, active: Sequence[str]) -> Plan:
        """What the bundles do to states like `hidden`, (B, T, d), in this thread's call, with products in `dtype`."""
        parts = [self.part(adapter, hidden, dtype) for adapter in self.acting(active)]
        return Plan(tuple(part for part in parts if part is not None), self.state.budget, False)

    def acting(self, active: Sequence[str]) -> list[str]:
        """Of the active adapters, or of those that rows name, those with bundles on this layer."""
        names = self.state.call.adapter_names
        adapters = active if names is None else dict.fromkeys(names)
        if self.state.unchecked and not torch.compiler.is_compiling():
            for adapter in adapters:
                if (adapter, self.index) in self.state.unchecked:
                    self.check_basis(adapter)
        return [n for n in adapters if self.holds(n) and self.packing(n).names and n not in self.merged_adapters]

    def part(self, adapter: str, hidden: Tensor, dtype: torch.dtype) -> Part | None:
        """One adapter's part of a plan; None where all its bundles are off."""
        numbers, alpha = self._alphas(adapter, hidden, dtype)
        if numbers is not None and not any(numbers):
            return None
        packing = self.packing(adapter)
        D, E = self.fold(adapter, dtype, numbers, packing.names)
        return Part(D, E, self._mean(adapter), packing.nonlinear, alpha)

    def _training_forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """The operation with a backward, one adapter after another."""
        call, out = self.state.call, residual
        active = self.active_adapters if call.active is None else call.active
        for adapter in self.acting(active):
            out = self._training_forward_of(adapter, hidden, out)
        return out if out is residual or self.state.budget is None else within_budget(residual, out, self.state.budget)

    def _training_forward_of(self, adapter: str, hidden: Tensor, residual: Tensor) -> Tensor:
        packing, state, config = self.packing(adapter), self.state, self.state.configs[adapter]
        dtype, learning = compute_dtype(hidden), torch.is_grad_enabled()
        numbers, alpha = self._alphas(adapter, hidden, dtype)
        if numbers is not None and not any(numbers):
            return residual
        if state.call.reading is not None:
            gates = state.call.reading.gates(adapter, self, hidden, dtype)
            alpha = gates if alpha is None else alpha * gates
        live, route, gate, run = packing.names, state.call.route if learning else None, None, bundle_forward
        if numbers is None or not all(numbers):  # a bundle that is off learns nothing, whatever the others' alphas are
            live = switched_on(state, adapter, self.index, live)
        if route is not None:
            live = [name for name in live if name in route.live(adapter)]
            gate = route.gate(adapter, hidden, packing)
            if route.deferred:
                run = eager_bundle_forward
                if route not in state.waiting and not state.call.again:
                    state.waiting.append(route)
        if learning and not state.call.again:
            state.seen.update(zip(itertools.repeat(adapter), live))
            state.penalty.mark(self, adapter, live)
        D, E = self.fold(adapter, dtype, numbers, live)
        mask = None
        if config.dropout and self.training:
            keep = torch.rand(*hidden.shape[:-1], D.shape[1], device=hidden.device) >= config.dropout
            mask = keep.to(hidden.dtype) / (1 - config.dropout)
        return run(
            hidden,
            D,
            E,
            nonlinear=packing.nonlinear,
            residual=None if residual is hidden else residual,
            mean=self._mean(adapter),
            alpha=alpha,
            mask=mask,
            gate=gate,
        )

    def _alphas(
        self, adapter: str, hidden: Tensor, dtype: torch.dtype
    ) -> tuple[tuple[float, ...] | None, Tensor | None]:
        """An adapter's alphas: one number per bundle, and a factor for each hidden unit, (B|1, T|1, H|1); None is 1."""
        packing, names = self.packing(adapter), self.state.call.adapter_names
        units = packing.index(hidden.device)["owner"], dtype
        numbers, alpha = layer_alphas(self.state, adapter, self.index, hidden, units, packing.names)
        if names is None:
            return numbers, alpha
        rows = self._row_mask([name == adapter for name in names], hidden)  # a mixed batch: only rows that name it
        return numbers, rows if alpha is None else alpha * rows

    def _row_mask(self, rows: list[bool], hidden: Tensor) -> Tensor:
        """(B, 1, 1): 1 for the chosen rows, 0 for the others."""
        call, batch = self.state.call, hidden.shape[0]

        def mask() -> Tensor:
            chosen = torch.tensor(rows, device=hidden.device, dtype=hidden.dtype)
            return expand_rows(chosen, call.prompts, batch, "adapter_names").view(-1, 1, 1)

        return call.cached(("adapter_names", tuple(rows), batch), hidden, mask)

    def _mean(self, adapter: str) -> Tensor | None:
        return self.bundle_mean[adapter] if self._standardised(adapter) else None

    def _standardised(self, adapter: str) -> bool:
        config = self.state.configs[adapter]
        return config.calibration is not None and config.input_norm == "standard"

    def fold(
        self,
        adapter: str,
        dtype: torch.dtype,
        numbers: tuple[float, ...] | None,
        live: Collection[str],
        tables: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """An adapter's D (d, H) and E (H, d) in `dtype`; kept inside `folded()` and `generate`.

        Args:
            adapter: name of the adapter.
            dtype: of the result and of the products.
            numbers: alphas to multiply into E, one per bundle; None: 1.
            live: the bundles whose weights get gradients.
            tables: weights to take instead of the adapter's own, as in `tables`; with gradients on only.
        """
        call, packing, learning = self.state.call, self.packing(adapter), torch.is_grad_enabled()
        folds = None if learning or torch.compiler.is_compiling() else call.folds
        key = self, adapter, dtype, numbers
        if folds is not None and key in folds:
            return folds[key]
        with torch.autocast(self.device_of(adapter).type, enabled=False):  # products in `dtype` already, as LoRA's
            D, E = self._fold(adapter, dtype, live, tables)
            if numbers is not None and any(number != 1.0 for number in numbers):
                owner = packing.index(E.device)["owner"]
                E = E * call.cached(
                    (packing, numbers), E, lambda: torch.tensor(numbers, device=E.device, dtype=E.dtype)[owner, None]
                )
        if folds is not None:
            folds[key] = D, E
        return D, E

    def _fold(
        self, adapter: str, dtype: torch.dtype, live: Collection[str], tables: Any | None = None
    ) -> tuple[Tensor, Tensor]:
        """`fold` at alpha 1, without autocast."""
        scale = self.bundle_scale[adapter] if self._standardised(adapter) else None
        basis, scaling = self.bundle_basis[adapter], self.state.configs[adapter].scaling
        weight, down, up = tables or self.tables(adapter)
        return self.packing(adapter).fold(weight, down, up, basis, scale, scaling, live, dtype)

    def keep_states(self, adapter: str, states: Tensor) -> None:
        """Keep states of calibration text, (N, d), for the quiet penalty."""
        basis, scale = self.bundle_basis[adapter], self.bundle_scale[adapter]
        standardised, whole = self.state.configs[adapter].input_norm == "standard", bool(self.packing(adapter).full)
        states = states.to(basis.dtype)
        states = states - self.bundle_mean[adapter] if standardised else states
        if not whole:
            states = (states / scale if standardised else states) @ basis
        self.bundle_states[adapter] = states.to(torch.bfloat16)
        self.state.penalty.watch(self, adapter)
