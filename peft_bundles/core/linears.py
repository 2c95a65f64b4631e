"""`LinearBundles`: the bundles at one linear layer, shaped like LoRA.

    y = W v + sum_k alpha_k s_k up_k act(down_k v)

It is the operation of functional.py with the layer's input v as the states, its output W v as the residual, and no
basis. The second map is stored as its transpose, so that the maps of all bundles side by side are plain rows of one
tensor.

Shapes: I and O input and output features, r ranks, H hidden units of all bundles (the sum of their ranks).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..config import BundleConfig
from .basis import linear_shapes
from .functional import BundleWeights
from .layer import BundleLayer
from .merge import add_to_weight, alpha_of, check_mergeable, update_of
from .packing import JoinWeights, Layout
from .places import Site, signals_of, sizes_of
from .state import BundleState, CallAlphas


class LinearPacking(Layout):
    """Where the weights of bundles go in D and E at linear layers; the same for all layers with the same bundles.

    Args:
        config: of the adapter.
        names: the bundles, in the order of the config.
        hidden_size: d, which ranks that are fractions refer to.
    """

    def __init__(self, config: BundleConfig, names: Sequence[str], hidden_size: int) -> None:
        shapes = linear_shapes(config, hidden_size)
        self.ranks = {name: shapes[name][0] for name in names}
        self.scales = {name: shapes[name][1] for name in names}
        self.kinds = {name: config.kind_of(name, at_linears=True) for name in names}
        super().__init__(names, self.kinds, self.ranks, signals_of(config, names))
        scale = torch.tensor([self.scales[name] for name in self.names], dtype=torch.float64)[self.owner]
        self.scale = float(scale[0]) if bool((scale == scale[0]).all()) else None
        self._index["scale"] = scale[:, None]

    def fold(
        self,
        down: Mapping[str, Tensor],
        up: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        live: Collection[str] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """D (I, H) and E (H, O) in `dtype`, differentiable in the weights of `live` bundles (None: all).

        Args:
            down, up: bundle -> weight, (r, I) and (r, O).
            device: of the weights.
            dtype: of the result.
            live: bundles that get a gradient. The others get None.
        """
        index = self.index(device)
        weights, learns = [], []
        for table in (down, up):
            weights += [table[name] for name in self.ordered]
            learns += [live is None or name in live for name in self.ordered]
            if self.padding:
                weights.append(weights[-1].new_zeros(self.padding, weights[-1].shape[1]))
                learns.append(False)
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():  # Dynamo cannot trace the node there
            flat = torch.cat([weight.reshape(-1) for weight in weights])
        else:
            flat = JoinWeights.apply(learns, index["constants"], *weights)
        scale: float | Tensor = index["scale"] if self.scale is None else self.scale
        return _Split.apply(flat, len(self.owner), weights[0].shape[1], weights[-1].shape[1], scale, dtype)


class _Split(torch.autograd.Function):
    """D (I, H) and E (H, O) from joined weights: rows of D^T, then rows of E before their scale."""

    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, H: int, inputs: int, outputs: int, scale: float | Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.scale, ctx.dtype, ctx.rest = scale, flat.dtype, len(flat) - H * (inputs + outputs)
        flat = flat[: H * (inputs + outputs)].to(dtype)
        reads_HI, writes_HO = flat[: H * inputs].view(H, inputs), flat[H * inputs :].view(H, outputs)
        if isinstance(scale, Tensor) or scale != 1.0:
            writes_HO = writes_HO * (scale.to(dtype) if isinstance(scale, Tensor) else scale)
        return reads_HI.T, writes_HO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dD: Tensor, dE: Tensor) -> Any:
        dE = dE.to(ctx.dtype)
        if isinstance(ctx.scale, Tensor) or ctx.scale != 1.0:
            dE = dE * (ctx.scale.to(dE.dtype) if isinstance(ctx.scale, Tensor) else ctx.scale)
        grad = torch.cat([dD.T.to(ctx.dtype).reshape(-1), dE.reshape(-1), dE.new_zeros(ctx.rest)])
        return grad, None, None, None, None, None


class LinearBundles(BundleLayer):
    """The bundles at one linear layer, by adapter. Weights have the names `bundle_<what>.<adapter>.<bundle>`.

    Args:
        linear: the linear layer that it hooks.
        site: its block and its name there.
        hidden_size: d of the model.
        state: what all bundle layers of the model share.

    Attributes:
        bundle_down: (r, I). bundle_up: (r, O), transposed.
        bundle_states: kept inputs of calibration text, (N, I), for the quiet penalty. Made by `calibrate`, never saved.
        bundle_energy: mean squared length of W v on them, (). Never saved.
    """

    bundle_energy: Any

    def __init__(self, linear: nn.Module, site: Site, hidden_size: int, state: BundleState) -> None:
        super().__init__(linear, site, hidden_size, state)
        sizes = sizes_of(linear)
        assert sizes is not None
        self.in_features, self.out_features = sizes
        self.bundle_energy = BufferDict(persistent=False)
        self.names: dict[str, tuple[str, ...]] = {}  # adapter -> the bundles that sit here
        self._merged: dict[str, dict[str, float]] = {}  # adapter -> the alphas at which its bundles are merged

    def update_layer(self, adapter: str, init_weights: bool, inference_mode: bool) -> None:
        """Create the weights of an adapter's bundles that sit here (`names`)."""
        packing = self.packing(adapter)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, rank in packing.ranks.items():
            shapes[f"bundle_down.{name}"] = (rank, self.in_features)
            shapes[f"bundle_up.{name}"] = (rank, self.out_features)
        self._make_weights(adapter, shapes, init_weights)
        self._finish(adapter, inference_mode)

    def packing(self, adapter: str) -> Any:
        """How the adapter's bundles that sit here are laid out in D and E."""
        names, packings = self.names[adapter], self.state.packings
        if (adapter, names) not in packings:
            packings[adapter, names] = LinearPacking(self.state.configs[adapter], names, self.hidden_size)
        return packings[adapter, names]

    def take(self, adapter: str, tensors: Mapping[str, Tensor]) -> None:
        """As for blocks; which bundles sit here is what the tensors say."""
        held = {tail.partition(".")[2] for tail in tensors}
        self.names[adapter] = tuple(name for name in self.state.configs[adapter].bundles or () if name in held)
        super().take(adapter, tensors)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.names.pop(adapter_name, None)
        if adapter_name in self.bundle_energy:
            del self.bundle_energy[adapter_name]

    def bundle_weights(self, adapter: str) -> list[BundleWeights]:
        """One adapter's bundles as the plain reference takes them (`linear_reference`)."""
        packing = self.packing(adapter)
        return [
            BundleWeights(
                packing.kinds[name],
                torch.arange(0),
                down=self.bundle_down[adapter][name],
                up=self.bundle_up[adapter][name].T,
                scaling=packing.scales[name],
            )
            for name in packing.names
        ]

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:  # type: ignore[override]
        """Forward hook of the linear layer: its output, with the bundles' update."""
        inputs, shape = args[0] if args else kwargs["input"], self.state.call.shape
        if inputs.dim() == 3:
            return self(inputs, output)
        rows = 1
        if inputs.dim() > 3:  # (B, ..., I): what lies between are tokens of the row
            rows = len(inputs)
        # Some models (OPT) put all rows in one here. What an expert gets are tokens of any rows.
        elif inputs.dim() == 2 and shape is not None and shape.numel() == len(inputs):
            rows = shape[0]
        tokens = inputs.shape[:-1].numel() // max(rows, 1)
        return self(*(each.reshape(rows, tokens, each.shape[-1]) for each in (inputs, output))).view(output.shape)

    def _fold(
        self, adapter: str, dtype: torch.dtype, live: Collection[str], tables: Any | None = None
    ) -> tuple[Tensor, Tensor]:
        _, down, up = tables or self.tables(adapter)
        return self.packing(adapter).fold(down, up, self.device_of(adapter), dtype, live)

    def _mean(self, adapter: str) -> Tensor | None:
        return None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the bundles of kind "lora" to the weight of the linear layer, at their present alphas, as in PEFT.

        Raises:
            ValueError: a bundle that is on is of another kind, its alpha differs between rows or tokens; or with
                `safe_merge` the sum is not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if not self.holds(adapter):
                continue
            check_mergeable(self.state, [self], [adapter])
            update = update_of(self, adapter)
            if update is not None:
                add_to_weight(self.get_base_layer(), update, safe_merge, adapter)
            self.merged_adapters.append(adapter)
            self._merged[adapter] = {n: alpha_of(self.state, adapter, n, self.index) for n in self.names[adapter]}

    def unmerge(self) -> None:
        """Take what `merge` added off the weight again; to rounding, as in PEFT."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        call = self.state.call
        before = call.own
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            call.own = CallAlphas(dict(self._merged.pop(adapter)))
            try:
                update = update_of(self, adapter) if self.holds(adapter) else None
            finally:
                call.own = before
            if update is not None:
                add_to_weight(self.get_base_layer(), -update, False, adapter)

    def keep_inputs(self, adapter: str, inputs: Tensor, energy: Tensor) -> None:
        """Keep inputs of calibration text, (N, I), and the mean squared length of W v there, for the quiet penalty."""
        self.bundle_states[adapter] = inputs.to(torch.bfloat16)
        self.bundle_energy[adapter] = energy.float().to(inputs.device)
        self.state.penalty.watch(self, adapter)
