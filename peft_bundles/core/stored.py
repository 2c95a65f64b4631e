"""`StoredBundles`: the tensors of a bundle layer, and its hook on the module that it belongs to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .bases import Bases
from .basis import FINGERPRINT_TOLERANCE, SHARED, fingerprint, weight_shapes
from .inference import Slot
from .merge import check_mergeable
from .packing import Packing
from .places import Site
from .state import BundleState


class StoredBundles(nn.Module, BaseTunerLayer):
    """The bundles behind one decoder block, by adapter. Weights have the names `bundle_<what>.<adapter>.<bundle>`.

    A block whose linear layers have bundles has a `BundleLayer` too, if only an empty one, which lists them.

    Args:
        module: the decoder block that the layer hooks.
        site: its number.
        hidden_size: d.
        state: what all bundle layers of the model share.

    Attributes:
        inner: name of a linear layer inside the block -> its bundles.
        bundle_weight: W_k, (r, |support|); with a projection only.
        bundle_down: (b, w) for kinds "mlp" and "linear", (b, d) for "full". The width w is r behind a projection and
            |support| without.
        bundle_up: (w, b) for "mlp" and "linear", (d, b) for "full", (w,) for "diag".
        bundle_basis: U, (d, R). Never trained.
        bundle_mean, bundle_scale: mu and sigma, (d,); 0 and 1 until calibrated. Never trained.
        bundle_states: kept states of calibration text, (N, R), in coordinates of U; minus mu only, (N, d), where a
            bundle is of kind "full". For the quiet penalty (quiet.py). Made by `calibrate`, never saved.
        slot: this thread's plan for compiled inference (inference.py).
    """

    adapter_layer_names = ("bundle_weight", "bundle_down", "bundle_up")
    other_param_names = SHARED

    hook: Any  # the forward hook on the module, which a subclass has
    # ModuleDict of ParameterDict, and BufferDict, by adapter
    bundle_weight: Any
    bundle_down: Any
    bundle_up: Any
    bundle_basis: Any
    bundle_mean: Any
    bundle_scale: Any
    bundle_states: Any

    def __init__(self, module: nn.Module, site: Site, hidden_size: int, state: BundleState) -> None:
        super().__init__()
        self._module = (module,)  # a tuple, so that PyTorch does not register the module, our parent, as a child
        self.site, self.index = site, site.block
        self.hidden_size, self.state, self.slot = hidden_size, state, Slot()
        self.inner: dict[str, Any] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.bundle_mean, self.bundle_scale = BufferDict(persistent=True), BufferDict(persistent=True)
        self.bundle_basis = Bases(self.bundle_mean)
        self.bundle_states = BufferDict(persistent=False)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._handles: list[Any] = []  # of the hooks, from the first adapter on

    def extra_repr(self) -> str:
        return f"site={self.site}, adapters={self.bundle_adapters()}"

    def get_base_layer(self) -> nn.Module:
        """The decoder block, or the linear layer."""
        return self._module[0]

    def holds(self, adapter: str) -> bool:
        """Whether the adapter has bundles here."""
        return adapter in self.bundle_up

    def train(self, mode: bool = True) -> StoredBundles:
        """As in PyTorch. Weights that replaced others (a loaded checkpoint, a copy of the model) get their hooks."""
        if mode:
            for adapter in self.bundle_states:
                self.state.penalty.watch(self, adapter)
        return super().train(mode)

    def attach(self) -> None:
        """Put the hook on the module, unless it is there."""
        if not self._handles:
            self._handles.append(
                self.get_base_layer().register_forward_hook(self.hook, prepend=True, with_kwargs=bool(self.site.path))
            )

    def detach(self) -> None:
        """Remove the hook, so that the module runs without bundles."""
        for handle in self._handles:
            handle.remove()

    # ---- parameters ----

    def update_layer(self, adapter: str, init_weights: bool, inference_mode: bool) -> None:
        """Create an adapter's weights on the device and in the dtype of the block (float32 if it is quantised)."""
        config, packing, d = self.state.configs[adapter], self.packing(adapter), self.hidden_size
        self._make_weights(adapter, weight_shapes(config, d), init_weights)
        self.bundle_mean[adapter], self.bundle_scale[adapter] = torch.zeros(d), torch.ones(d)
        self.bundle_basis.draw_later(adapter, d, packing.basis_rank, config.basis_seed, self.index)
        if config.basis_fingerprint is not None or config.calibration is not None:
            self.state.unchecked.add((adapter, self.index))  # its U, mu and sigma have to come from elsewhere
        self._finish(adapter, inference_mode)

    def _make_weights(self, adapter: str, shapes: Mapping[str, tuple[int, ...]], init_weights: bool) -> None:
        """New weights of these shapes, by key such as "bundle_down.<bundle>", in float32 on the CPU."""

        def drawn(*size: int) -> Tensor:  # kaiming_uniform_(a=sqrt(5)), as in nn.Linear and LoRA
            bound = 1 / math.sqrt(size[-1])
            return torch.rand(*size, device="cpu").mul_(2 * bound).sub_(bound)

        tables: dict[str, dict[str, nn.Parameter]] = {name: {} for name in self.adapter_layer_names}
        for key, size in shapes.items():
            what, _, bundle = key.partition(".")
            fresh = what == "bundle_up" and init_weights  # zeros in the last map: a fresh adapter equals the base model
            tables[what][bundle] = nn.Parameter(torch.zeros(*size, device="cpu") if fresh else drawn(*size))
        for what, table in tables.items():
            getattr(self, what)[adapter] = nn.ParameterDict(table)

    def _finish(self, adapter: str, inference_mode: bool) -> None:
        """Take new weights into use, on the device and in the dtype of the module."""
        self.attach()
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for what in self.adapter_layer_names:
            getattr(self, what)[adapter].to(dtype)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def take(self, adapter: str, tensors: Mapping[str, Tensor]) -> None:
        """Use these tensors (keys as in `tensor_shapes`) as an adapter's, frozen; without a copy on the same device."""
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
            if what in tensors:
                getattr(self, what)[adapter] = tensors[what].to(device)
        self.attach()
        self.set_adapter(self.active_adapters, inference_mode=True)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; the state that the layers share forgets the adapter too."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.bundle_states:
            del self.bundle_states[adapter_name]
        self.state.penalty.marks.pop((adapter_name, self.site), None)
        self.state.warned.discard(adapter_name)
        self.state.unchecked.discard((adapter_name, self.index))
        self.state.configs.pop(adapter_name, None)
        if any(owner == adapter_name for owner, _ in self.state.keys):
            self.state.take_keys(adapter_name, {})
        for key in [key for key in self.state.packings if key[0] == adapter_name]:
            del self.state.packings[key]

    def weights_to_float32(self, adapter: str) -> None:
        """Train an adapter's weights in float32, whatever the base's dtype, as PEFT does."""
        if not self.holds(adapter):
            return
        for what in self.adapter_layer_names:
            table = getattr(self, what)[adapter]
            for name, p in table.items():
                if torch.finfo(p.dtype).bits < 32:
                    table[name] = nn.Parameter(p.data.float(), requires_grad=p.requires_grad)

    def copy_basis(self, adapter: str, donor: str) -> None:
        """Give an adapter the U, mu and sigma of another one, and the states kept for the quiet penalty."""
        for what in self.other_param_names:
            getattr(self, what)[adapter] = getattr(self, what)[donor].clone()
        if donor in self.bundle_states and bool(self.packing(adapter).full) == bool(self.packing(donor).full):
            self.bundle_states[adapter] = self.bundle_states[donor]

    def check_basis(self, adapter: str) -> None:
        """Refuse an adapter whose config names another basis than it has, as nothing brought that basis.

        Raises:
            ValueError: U is not the recorded one, or the config is that of a calibrated adapter and mu is 0.
        """
        if (adapter, self.index) not in self.state.unchecked or adapter not in self.bundle_basis:
            return
        config, basis = self.state.configs[adapter], self.bundle_basis[adapter]
        if basis.is_meta:
            return
        measured = fingerprint(basis)
        recorded = (config.basis_fingerprint or {}).get(str(self.index), measured)
        fresh = config.calibration is not None and not bool(self.bundle_mean[adapter].any())
        if fresh or not abs(measured - recorded) <= FINGERPRINT_TOLERANCE:
            raise ValueError(
                f"the config of adapter {adapter!r} names the basis of an adapter that was calibrated or loaded "
                "elsewhere, and nothing brought that basis. Load that adapter (PeftModel.from_pretrained or "
                "load_adapter), or attach a new BundleConfig and calibrate it."
            )
        self.state.unchecked.discard((adapter, self.index))

    def packing(self, adapter: str) -> Packing:
        """How the adapter's bundles are laid out in D and E."""
        return cast(Packing, self.state.packings[adapter, None])

    def device_of(self, adapter: str) -> torch.device:
        """The device of an adapter's weights."""
        return next(weight.device for table in self.tables(adapter) for weight in table.values())

    def bundle_adapters(self) -> list[str]:
        """Names of the adapters with bundles here."""
        return list(self.bundle_up.keys())

    def bundle_parameters(self, adapter: str, bundle: str) -> list[nn.Parameter]:
        """The trainable weights of one bundle in this layer."""
        tables = (getattr(self, what)[adapter] for what in self.adapter_layer_names)
        return [table[bundle] for table in tables if bundle in table]

    def tables(self, adapter: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """An adapter's weights, bundle -> weight, in the order of `adapter_layer_names`."""
        # Plain dicts: a look-up in a ParameterDict takes longer than the rest of the work on a weight.
        weight, down, up = (
            table[adapter]._parameters for table in (self.bundle_weight, self.bundle_down, self.bundle_up)
        )
        return weight, down, up

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        # PEFT looks for `.weight`, which a block does not have.
        own = {id(p) for p in self.parameters()}
        parameters = [p for p in base_layer.parameters() if id(p) not in own]
        if not parameters:
            return None, None
        first = next((p for p in parameters if p.is_floating_point()), parameters[0])
        hooks = [module._hf_hook for module in base_layer.modules() if hasattr(module, "_hf_hook")]
        offloaded = [h for hook in hooks for h in getattr(hook, "hooks", [hook]) if getattr(h, "offload", False)]
        # accelerate keeps an offloaded block on the meta device, and its states are where it computes.
        device = torch.device(offloaded[0].execution_device) if offloaded and first.is_meta else first.device
        return device, first.dtype if first.is_floating_point() else torch.float32

    def _apply(self, fn: Any, recurse: bool = True) -> StoredBundles:
        # `model.to(torch.bfloat16)` must not round the basis: U would lose orthogonality (2e-3), and mu precision.
        kept = {(n, a): t for n in self.other_param_names for a, t in getattr(self, n).items()}
        super()._apply(fn, recurse)
        for (name, adapter), before in kept.items():
            after = getattr(self, name)[adapter]
            if torch.finfo(after.dtype).bits < 32:
                getattr(self, name)[adapter] = before.to(after.device, torch.float32)
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version would also cast loaded weights to the dtype of the base model, which loses precision.
        device = device if device is not None else self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if device is None or not self.holds(adapter_name):
            return
        for what in self.adapter_layer_names:
            table = getattr(self, what)[adapter_name]
            if not any(p.device.type == "meta" for p in table.values()):
                table.to(device)
        for what in self.other_param_names:
            if (what == "bundle_basis" and adapter_name in self.bundle_basis.later) or not self.bundle_mean:
                continue
            # A copy: tensors that point into a file are not aligned, which changes the rounding of matrix products.
            getattr(self, what)[adapter_name] = getattr(self, what)[adapter_name].to(device, copy=True)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Behind a block only bundles that are off can be merged, which changes nothing.

        Raises:
            ValueError: a bundle is on.
        """
        check_mergeable(self.state, [self], list(adapter_names or self.active_adapters))

    def unmerge(self) -> None:
        """Nothing to undo."""
