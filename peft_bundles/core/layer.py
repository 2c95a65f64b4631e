"""`BundleLayer`: the bundles of one decoder block.

It is a child of the block with a prepended forward hook, not a wrapper around it: the block stays what it was for
everybody else (hidden-state capture, LoRA on its linears, device maps, FSDP units), and what the hook returns is what
the block outputs.

A block that hides its hidden states in a tuple (GPT-J, Bloom, Falcon, ...) has them first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .basis import SHARED, draw_basis, weight_shapes
from .functional import BundleWeights, activate, bundle_forward, compute_dtype, eager_bundle_forward, within_budget
from .gates import expand_rows, layer_alphas
from .inference import Slot, apply
from .kernels import FewTokens, fits
from .packing import Packing
from .state import BundleState


MERGE_ERROR = (
    "Bundles cannot be merged: they act on the residual stream between decoder blocks, through a non-linearity, and "
    "no weight of the base model could hold them. Keep the adapter, or call unload() to drop it."
)


class Bases(BufferDict):
    """U by adapter, drawn when it is first looked at: what `load_adapter` puts in its place is not drawn first.

    Drawing takes up to a second a layer (a QR in float64, 3072 x 2304 on two cores), all of a LoRA's loading a fifth.
    """

    def __init__(self, beside: BufferDict) -> None:
        super().__init__(persistent=True)
        self.beside = (beside,)  # whose tensors say on which device; a tuple, so that it is no child
        self.later: dict[str, tuple[int, int, int, int]] = {}

    def draw_later(self, adapter: str, *drawn: int) -> None:
        """`drawn`: hidden size, rank, seed and layer, as `draw_basis` takes them."""
        self.register_buffer(adapter, None)
        self.later[adapter] = drawn  # type: ignore[assignment]

    def draw(self) -> None:
        """All that have not been drawn yet."""
        for adapter in list(self.later):
            self[adapter]

    def __getitem__(self, key: str) -> Tensor:
        if key in self.later:
            with torch.inference_mode(False):
                self[key] = draw_basis(*self.later[key]).to(self.beside[0][key].device)
        return super().__getitem__(key)

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        super().__setitem__(key, buffer)
        self.later.pop(key, None)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.later.pop(key, None)

    def items(self) -> Any:
        self.draw()
        return super().items()

    def extra_repr(self) -> str:
        self.draw()
        return super().extra_repr()

    def _save_to_state_dict(self, *args: Any) -> None:
        self.draw()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.draw()
        super()._load_from_state_dict(*args)


class BundleLayer(nn.Module, BaseTunerLayer):
    """The bundles of one block, per adapter. Weights are keyed `bundle_<what>.<adapter>.<bundle>`.

    bundle_weight: W_k (r, |support|), with a projection only.
    bundle_down: (b, w), "mlp" and "linear"; (b, d), "full". bundle_up: (w, b); (d, b), "full"; (w,), "diag". The
    width w is r behind a projection and |support| without.
    bundle_basis: U (d, R). bundle_mean, bundle_scale: mu and sigma (d,), 0 and 1 until calibrated. Never trained.
    bundle_states: (N, R), x of states of calibration text, for the quiet penalty (quiet.py); (N, d), those states minus
    mu, beside a bundle of kind "full". Only after `calibrate`, never saved.
    """

    adapter_layer_names = ("bundle_weight", "bundle_down", "bundle_up")
    other_param_names = SHARED

    # ModuleDict of ParameterDict, and BufferDict, by adapter
    bundle_weight: Any
    bundle_down: Any
    bundle_up: Any
    bundle_basis: Any
    bundle_mean: Any
    bundle_scale: Any
    bundle_states: Any

    def __init__(self, block: nn.Module, index: int, hidden_size: int, state: BundleState) -> None:
        super().__init__()
        self._block = (block,)  # a tuple, so that the parent is not registered as a child
        self.index, self.hidden_size, self.state, self.slot = index, hidden_size, state, Slot()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.bundle_mean, self.bundle_scale = BufferDict(persistent=True), BufferDict(persistent=True)
        self.bundle_basis = Bases(self.bundle_mean)
        self.bundle_states = BufferDict(persistent=False)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._handle = block.register_forward_hook(self.hook, prepend=True)

    def extra_repr(self) -> str:
        return f"layer={self.index}, adapters={self.bundle_adapters()}"

    def get_base_layer(self) -> nn.Module:
        return self._block[0]

    def detach_from_block(self) -> None:
        """Remove the hook; the block is the base model's again."""
        self._handle.remove()

    # ---- parameters ----

    def update_layer(self, adapter: str, init_weights: bool, inference_mode: bool) -> None:
        """Create the weights of an adapter, in the device and dtype of the block (float32 if that is quantised)."""
        config, packing, d = self.state.configs[adapter], self.packing(adapter), self.hidden_size
        generator = torch.Generator().manual_seed(1_000_003 * config.basis_seed + self.index + 500_009)

        def drawn(*size: int) -> Tensor:  # kaiming_uniform_(a=sqrt(5)), as nn.Linear and LoRA
            bound = 1 / math.sqrt(size[-1])
            return torch.rand(*size, generator=generator, device="cpu").mul_(2 * bound).sub_(bound)

        tables: dict[str, dict[str, nn.Parameter]] = {name: {} for name in self.adapter_layer_names}
        for key, size in weight_shapes(config, d).items():
            what, _, bundle = key.partition(".")
            fresh = what == "bundle_up" and init_weights  # zeros in the last map make a fresh adapter the base model
            tables[what][bundle] = nn.Parameter(torch.zeros(*size, device="cpu") if fresh else drawn(*size))
        for what, table in tables.items():
            getattr(self, what)[adapter] = nn.ParameterDict(table)
        self.bundle_mean[adapter], self.bundle_scale[adapter] = torch.zeros(d), torch.ones(d)
        self.bundle_basis.draw_later(adapter, d, packing.basis_rank, config.basis_seed, self.index)
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for what in self.adapter_layer_names:
            getattr(self, what)[adapter].to(dtype)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def take(self, adapter: str, tensors: Mapping[str, Tensor]) -> None:
        """Use these tensors ("bundle_up.<bundle>", "bundle_basis", ...) as an adapter's, frozen and without a copy."""
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for what in self.adapter_layer_names:
            table = {}
            for tail, tensor in tensors.items():
                kind, _, bundle = tail.partition(".")
                if kind == what:
                    own = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
                    table[bundle] = own if own.device == device else nn.Parameter(own.to(device), requires_grad=False)
            getattr(self, what)[adapter] = nn.ParameterDict(table)
        for what in self.other_param_names:
            getattr(self, what)[adapter] = tensors[what].to(device)
        self.set_adapter(self.active_adapters, inference_mode=True)

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's own; the state that the layers share forgets the adapter too."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.bundle_states:
            del self.bundle_states[adapter_name]
        self.state.configs.pop(adapter_name, None)
        self.state.packings.pop((adapter_name, self.hidden_size), None)

    def packing(self, adapter: str) -> Packing:
        return self.state.packings[adapter, self.hidden_size]

    def bundle_adapters(self) -> list[str]:
        """Names of the bundle adapters on this block."""
        return list(self.bundle_basis.keys())

    def bundle_parameters(self, adapter: str, bundle: str) -> list[nn.Parameter]:
        """The trainable weights of one bundle in this layer."""
        tables = (getattr(self, what)[adapter] for what in self.adapter_layer_names)
        return [table[bundle] for table in tables if bundle in table]

    def tables(self, adapter: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """An adapter's weights, bundle -> weight, in the order of `adapter_layer_names`."""
        # Their own dicts: a look-up in a ParameterDict takes longer than all else that is done for a weight.
        weight, down, up = (
            table[adapter]._parameters for table in (self.bundle_weight, self.bundle_down, self.bundle_up)
        )
        return weight, down, up

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

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        # PEFT looks for `.weight`; a block has none of its own.
        own = {id(p) for p in self.parameters()}
        for parameter in base_layer.parameters():
            if id(parameter) not in own and parameter.is_floating_point():
                return parameter.device, parameter.dtype
        first = next((p for p in base_layer.parameters() if id(p) not in own), None)
        return (None, None) if first is None else (first.device, torch.float32)

    def _apply(self, fn: Any, recurse: bool = True) -> BundleLayer:
        # `model.to(torch.bfloat16)` must not round the basis: U loses orthogonality (2e-3) and mu its digits.
        kept = {(n, a): t for n in self.other_param_names for a, t in getattr(self, n).items()}
        super()._apply(fn, recurse)
        for (name, adapter), before in kept.items():
            after = getattr(self, name)[adapter]
            if torch.finfo(after.dtype).bits < 32:
                getattr(self, name)[adapter] = before.to(after.device, torch.float32)
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's would also cast what a checkpoint just brought to the base model's dtype, and lose its digits.
        device = device if device is not None else self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if device is None or adapter_name not in self.bundle_basis:
            return
        for what in self.adapter_layer_names:
            table = getattr(self, what)[adapter_name]
            if not any(p.device.type == "meta" for p in table.values()):
                table.to(device)
        for what in self.other_param_names:
            if what == "bundle_basis" and adapter_name in self.bundle_basis.later:
                continue
            # A copy: tensors that point into a file are not aligned, which changes the rounding of matrix products.
            getattr(self, what)[adapter_name] = getattr(self, what)[adapter_name].to(device, copy=True)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(MERGE_ERROR)

    def unmerge(self) -> None:
        raise ValueError(MERGE_ERROR)

    # ---- the forward ----

    def hook(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the block: its hidden states, through the bundles."""
        if isinstance(output, tuple):
            return (self(output[0]), *output[1:])
        return self(output)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (B, T, d), the output of the block; returns the same shape and dtype."""
        if self._disable_adapters:
            return hidden
        if not torch.is_grad_enabled() and self.slot.ready is not None:
            return apply(self.slot.ready, hidden)
        if not torch.is_grad_enabled() and torch.compiler.is_compiling():
            self.state.compiled = True  # from the next call on, what a compiled forward reads is prepared
        call = self.state.call
        names, active = call.adapter_names, call.active
        active = self.active_adapters if active is None else active
        fixed = call.folds is not None and names is None and self.state.budget is None and not self.training
        if fixed and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self._as_planned(hidden, active)
        out = None
        for adapter in active if names is None else dict.fromkeys(names):
            if adapter not in self.bundle_basis or not self.packing(adapter).names:
                continue
            out = self._apply_bundles(adapter, hidden, out, names)
        if out is None or self.state.budget is None:
            return hidden if out is None else out
        return within_budget(hidden, out, self.state.budget)

    def _as_planned(self, hidden: Tensor, active: Sequence[str]) -> Tensor:
        """`forward` where nothing can change: what one-token steps pay for is each look-up, and each small kernel."""
        call, state, dtype = self.state.call, self.state, compute_dtype(hidden)
        key: Any = (tuple(active), hidden.shape[:2], hidden.dtype, dtype, hidden.device, call.prompts, state.version)
        found = call.folds.get(self)  # type: ignore[union-attr]
        if found is None or found[0] != key or found[1] is not call.alphas:
            given = {**state.set_alphas, **call.alphas}.values()
            if any(isinstance(alpha, Tensor) and alpha.requires_grad for alpha in given):
                key = ()  # not kept: an optimizer may move it
            found = call.folds[self] = key, call.alphas, self._plan(key, hidden, dtype, active)  # type: ignore[index]
        if not found[2]:
            return hidden
        out = hidden
        for few, mean, D, E, nonlinear, alpha in found[2]:
            if few is not None:
                out = few(hidden.contiguous(), out.contiguous())
                continue
            flat, base = hidden.flatten(0, -2), out.flatten(0, -2)
            a = activate((flat if mean is None else flat - mean).to(dtype) @ D, nonlinear)
            if alpha is not None:  # in place: one look at the shape less than a new tensor
                (a if alpha.dim() == 2 else a.view(*hidden.shape[:-1], -1)).mul_(alpha)
            out = (torch.addmm(base, a, E) if base.dtype == dtype else base + a @ E).view(hidden.shape)
        return out

    def _plan(self, key: Any, hidden: Tensor, dtype: torch.dtype, active: Sequence[str]) -> list[tuple[Any, ...]]:
        """For every adapter that acts: kernels if tokens are few, mu, D, E, the number of non-linear units, alphas."""
        plan = []
        for adapter in active:
            if adapter not in self.bundle_basis or not (names := self.packing(adapter).names):
                continue
            packing = self.packing(adapter)
            numbers, alpha = self._planned_alphas(key, hidden, dtype, adapter)
            if numbers is None or any(numbers):
                mean = self.bundle_mean[adapter].to(hidden.dtype) if self._standardised(adapter) else None
                (D, E), few = self._folded(adapter, dtype, numbers, names), None
                if fits(hidden, dtype) and (alpha is None or alpha.shape[1] == 1):
                    few = FewTokens(hidden.shape, mean, D, E, packing.nonlinear, alpha)
                elif alpha is not None and hidden.shape[1] == 1:
                    alpha = alpha[:, 0]
                plan.append((few, mean, D, E, packing.nonlinear, alpha))
        return plan

    def _planned_alphas(self, key: Any, hidden: Tensor, dtype: torch.dtype, adapter: str) -> tuple[Any, Tensor | None]:
        """`layer_alphas`, looked up once for all layers where none has an alpha of its own."""
        state, call, where = self.state, self.state.call, ("alphas", adapter, self.hidden_size)
        found = call.folds.get(where)  # type: ignore[union-attr]
        if not key or found is None or found[0] != key or found[1] is not call.alphas:
            owner = self.packing(adapter).index(hidden.device)["owner"]
            numbers, alpha = layer_alphas(state, adapter, self.index, hidden, (owner, dtype))
            found = key, call.alphas, numbers, None if alpha is None else alpha.to(dtype)
            given = (*state.set_alphas.values(), *call.alphas.values())
            if key and not any(isinstance(value, tuple) for value in given):
                call.folds[where] = found  # type: ignore[index]
        return found[2], found[3]

    def _apply_bundles(self, adapter: str, hidden: Tensor, residual: Tensor | None, rows: list[str] | None) -> Tensor:
        packing, call, config = self.packing(adapter), self.state.call, self.state.configs[adapter]
        dtype, owner = compute_dtype(hidden), packing.index(hidden.device)["owner"]
        numbers, alpha = layer_alphas(self.state, adapter, self.index, hidden, (owner, dtype))
        if numbers is not None and not any(numbers):
            return hidden if residual is None else residual
        live, route, gate = packing.names, call.route if torch.is_grad_enabled() else None, None
        if numbers is not None and not all(numbers):  # a bundle that is off learns nothing
            live = [name for name, number in zip(live, numbers) if number]
        if route is not None:
            live = [name for name in live if name in route.live(adapter)]
            gate = route.gate(adapter, hidden)
        if torch.is_grad_enabled():
            self.state.seen.update(zip(itertools.repeat(adapter), live))
        D, E = self._folded(adapter, dtype, numbers, live)
        if rows is not None:  # a mixed batch: this adapter only acts on the rows that name it
            mine = self._row_mask([name == adapter for name in rows], hidden)
            alpha = mine if alpha is None else alpha * mine
        mask = None
        if config.dropout and self.training:
            keep = torch.rand(*hidden.shape[:-1], D.shape[1], device=hidden.device) >= config.dropout
            mask = keep.to(hidden.dtype) / (1 - config.dropout)
        run = bundle_forward
        if route is not None and route.deferred:
            run = eager_bundle_forward
            if route not in self.state.waiting:
                self.state.waiting.append(route)
        return run(
            hidden,
            D,
            E,
            nonlinear=packing.nonlinear,
            residual=residual,
            mean=self.bundle_mean[adapter] if self._standardised(adapter) else None,
            alpha=alpha,
            mask=mask,
            gate=gate,
            route=route,
        )

    def _standardised(self, adapter: str) -> bool:
        config = self.state.configs[adapter]
        return config.calibration is not None and config.input_norm == "standard"

    def _folded(
        self, adapter: str, dtype: torch.dtype, numbers: tuple[float, ...] | None, live: list[str]
    ) -> tuple[Tensor, Tensor]:
        """D and E with the numeric alphas in E; kept while `generate` or `model.folded()` say nothing can change."""
        call, packing = self.state.call, self.packing(adapter)
        folds, key = call.folds if not torch.is_grad_enabled() else None, (id(self), adapter, dtype, numbers)
        if folds is not None and key in folds:
            return folds[key]
        basis, scale = self.bundle_basis[adapter], self.bundle_scale[adapter]
        with torch.autocast(basis.device.type, enabled=False):  # products in `dtype` already, as LoRA's would be
            D, E = packing.fold(
                *self.tables(adapter),
                basis,
                scale if self._standardised(adapter) else None,
                self.state.configs[adapter].scaling,
                live,
                self.joined(adapter) if torch.is_grad_enabled() else None,
                dtype,
            )
            if numbers is not None and any(number != 1.0 for number in numbers):
                owner = packing.index(E.device)["owner"]
                E = E * call.cached(
                    (packing, numbers), E, lambda: torch.tensor(numbers, device=E.device, dtype=E.dtype)[owner, None]
                )
        if folds is not None:
            folds[key] = D, E
        return D, E

    def joined(self, adapter: str) -> dict[Any, Any] | None:
        """What this call's uses of an adapter's weights share (`Packing.maps`); None where there are no others."""
        joined = self.state.call.joined
        return None if joined is None else joined.setdefault((adapter, self.index), {})

    def keep_states(self, adapter: str, states: Tensor) -> None:
        """Keep states of calibration text, (N, d), for the quiet penalty."""
        basis, scale = self.bundle_basis[adapter], self.bundle_scale[adapter]
        standardised, whole = self.state.configs[adapter].input_norm == "standard", bool(self.packing(adapter).full)
        states = states.to(basis.dtype)
        states = states - self.bundle_mean[adapter] if standardised else states
        if not whole:
            states = (states / scale if standardised else states) @ basis
        self.bundle_states[adapter] = states.to(torch.bfloat16)

    def _row_mask(self, rows: list[bool], hidden: Tensor) -> Tensor:
        """(B, 1, 1): 1 for the rows that are ours."""
        call, batch = self.state.call, hidden.shape[0]

        def mask() -> Tensor:
            ours = torch.tensor(rows, device=hidden.device, dtype=hidden.dtype)
            return expand_rows(ours, call.prompts, batch, "adapter_names").view(-1, 1, 1)

        return call.cached(("adapter_names", tuple(rows), batch), hidden, mask)


@contextmanager
def basis_brought(model: nn.Module, adapter: str) -> Iterator[None]:
    """The block puts a U of its own where one is still to be drawn; if it fails, that one is to be drawn again."""
    layers = [m for m in model.modules() if isinstance(m, BundleLayer) and adapter in m.bundle_basis.later]
    drawn = [layer.bundle_basis.later[adapter] for layer in layers]
    for layer, how in zip(layers, drawn):
        layer.bundle_basis[adapter] = torch.empty(how[:2], device=layer.bundle_mean[adapter].device)
    try:
        yield
    except Exception:
        for layer, how in zip(layers, drawn):
            layer.bundle_basis.draw_later(adapter, *how)
        raise
