"""`BundleModel`: finds the decoder blocks, gives each its bundles, carries the public methods of a bundled model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from .config import BundleConfig
from .core.base import CHILD, PEFT_PREFIX, base_shape, check_base, find_blocks
from .core.basis import FINGERPRINT_TOLERANCE, basis_rank, bundle_shapes, fingerprint
from .core.checkpoints import weights_digest
from .core.dialling import alphas, set_alphas
from .core.layer import MERGE_ERROR, BundleLayer, basis_brought
from .core.packing import Packing
from .core.planning import prepared
from .core.quiet import loudness
from .core.state import BundleState
from .core.walking import bundle_layers, bundle_parameters
from .reporting import BundleReport, report
from .routing import backward, reduction, routes


class BundleModel(BaseTuner):
    """The BUNDLE tuner (design.md sections 2, 3 and 5). Made by `get_peft_model(model, BundleConfig(...))`.

    Its methods are reached through the `PeftModel` too: `model.route(...)`, `model.alphas(...)`,
    `model.bundle_report()`. Where there is no `BundleModel` (adapters that transformers attached), the functions of the
    same names in `peft_bundles` take any model.
    """

    prefix = "bundle_"
    tuner_layer_cls = BundleLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - blocks are found, not looked up

    # ---- injection ----

    def _check_new_adapter_config(self, config: BundleConfig) -> None:
        super()._check_new_adapter_config(config)
        names = {name for c in self._bundle_configs() for name in c.bundles or ()}
        if clash := sorted(names & set(self.peft_config)):
            raise ValueError(
                f"{clash} name(s) both an adapter and a bundle; PEFT would drop that bundle's weights on saving. "
                "Rename the adapter."
            )
        if len(self._bundle_configs()) > 1 and any(not c.bundles for c in self._bundle_configs()):
            raise ValueError(
                "an adapter without bundles trains the base model itself and cannot share it with other adapters; "
                "attach it alone."
            )
        check_base(config, self.model)

    def _bundle_configs(self) -> list[BundleConfig]:
        # Beside ours there may be the configs of adapters that were injected into the base model before.
        return [config for config in self.peft_config.values() if isinstance(config, BundleConfig)]

    def _prepare_adapter_config(self, peft_config: BundleConfig, model_config: dict[str, Any]) -> BundleConfig:
        matcher = copy.copy(peft_config)
        matcher.layers_to_transform = None  # PEFT reads it for the submodules of a layer; here it is the layers
        try:
            numbers = {name: i for i, name in enumerate(find_blocks(self.model))}
        except ValueError:
            if peft_config.target_modules is None:
                raise
            numbers = {}
        depth = len(numbers)
        if peft_config.target_modules is not None:
            names = [name for name, _ in self.model.named_modules() if name and f".{CHILD}." not in f".{name}."]
            matched = [name for name in names if check_target_module_exists(matcher, name)]
            leaves = [name for name in matched if not any(True for _ in self.model.get_submodule(name).children())]
            if leaves or peft_config.target_modules == "all-linear":
                raise ValueError(
                    f"target_modules={peft_config.target_modules!r} names {leaves[0] if leaves else 'linear layers'}, "
                    "which is no decoder block as LoRA's targets are none; leave it out, the blocks are found."
                )
            known = set(matched) <= numbers.keys()  # then a layer keeps its number, however few of them are named
            numbers = {name: numbers[name] if known else i for i, name in enumerate(matched)}
            depth = depth if known else len(matched)
        chosen = peft_config.layers_to_transform
        if chosen is not None and (wrong := sorted(set(chosen) - set(numbers.values()))):  # type: ignore[arg-type]
            raise ValueError(f"layers_to_transform has {wrong}, but the layers are {sorted(numbers.values())}.")
        # Not fields: names differ between AutoModel and the CausalLM, so blocks are found anew at every injection.
        matcher.target_modules = [n for n, i in numbers.items() if chosen is None or i in chosen]  # type: ignore[operator]
        vars(peft_config).update(_blocks=numbers, _matcher=matcher, _depth=depth)
        return peft_config

    def _prepare_model(self, peft_config: BundleConfig, model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, BundleLayer)]
        state = layers[0].state if layers else BundleState()
        shape = base_shape(self.model)
        state.num_layers = peft_config._depth  # type: ignore[attr-defined]
        adapter = self._injecting
        shapes = bundle_shapes(peft_config, shape[0])  # checks ranks and supports before anything is touched
        state.configs[adapter] = peft_config
        state.version += 1  # an adapter of this name may have been there before
        signals = [frozenset(s for s, w in spec.signals.items() if w) for spec in (peft_config.bundles or {}).values()]
        state.packings[adapter, shape[0]] = Packing(
            shapes,
            basis_rank(peft_config, shape[0]),
            peft_config.projection != "none",
            [signals.index(each) for each in signals],
        )
        peft_config.base_shape = shape
        self._state = state

    @staticmethod
    def _check_target_module_exists(peft_config: BundleConfig, key: str) -> Any:
        blocks, matcher = peft_config._blocks, peft_config._matcher  # type: ignore[attr-defined]
        return check_target_module_exists(matcher, key) if key in blocks else False

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's own. A state dict names our layers ("h.0.bundles"), PEFT looks for the modules they sit in ("h.0")."""
        if (state_dict := kwargs.get("state_dict")) is not None:
            kwargs["state_dict"] = {
                f"{key.rsplit(f'.{CHILD}.', 1)[0]}.{self.prefix}": v for key, v in state_dict.items()
            }
        self._injecting = adapter_name  # one config object may serve several adapters
        config = cast(BundleConfig, self.peft_config[adapter_name])
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            vars(config).pop("_given", None)  # tensors that `compose` brought; the layers have them now
        self._layers = [m for m in model.modules() if isinstance(m, BundleLayer)]
        self._state.nested |= len(bundle_layers(model)) < len(self._layers)
        layers = {str(m.index): m for m in self._layers if adapter_name in m.bundle_basis}
        if config.bundles and config.basis_fingerprint is None:
            config.basis_fingerprint = {i: fingerprint(m.bundle_basis[adapter_name]) for i, m in layers.items()}

    def adopt(self, adapter: str, config: BundleConfig, tensors: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Add an adapter on blocks that have bundles already, with its tensors by layer; it is not active.

        As PEFT's `add_adapter`, without its walk over every module and parameter of the base model.
        """
        layers = {m.index: m for m in self.model.modules() if isinstance(m, BundleLayer)}
        self.peft_config[adapter] = config
        try:
            self._check_new_adapter_config(config)
            self._injecting = adapter
            self._prepare_model(self._prepare_adapter_config(config, {}), self.model)
            vars(config)["_given"] = tensors
            for number in tensors:
                layers[number].update_layer(adapter, config.init_weights, inference_mode=True)
        except Exception:
            self.delete_adapter(adapter)
            raise
        finally:
            vars(config).pop("_given", None)

    def _create_and_replace(
        self,
        peft_config: BundleConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        layer, index = getattr(target, CHILD, None), peft_config._blocks[current_key]  # type: ignore[attr-defined]
        if not isinstance(layer, BundleLayer):
            layer = BundleLayer(target, index, base_shape(self.model)[0], self._state)
            setattr(target, CHILD, layer)
        elif layer.index != index:
            raise ValueError(
                f"block {current_key!r} is layer {layer.index} of the adapters it has and would be layer {index} of "
                f"{adapter_name!r}; give target_modules that number the blocks alike."
            )
        layer.update_layer(adapter_name, peft_config.init_weights, peft_config.inference_mode)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # A config without bundles is plain fine-tuning: the trunk stays trainable.
        if all(config.bundles or config.inference_mode for config in self._bundle_configs()):
            super()._mark_only_adapters_as_trainable(model)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's looks at every buffer, and so would have U drawn that a checkpoint is about to replace.
        for layer in self._layers if autocast_adapter_dtype else ():
            if adapter_name not in layer.bundle_basis:
                continue
            for what in layer.adapter_layer_names:
                table = getattr(layer, what)[adapter_name]
                for name, p in table.items():
                    if torch.finfo(p.dtype).bits < 32:
                        table[name] = nn.Parameter(p.data.float(), requires_grad=p.requires_grad)

    def disable_adapter_layers(self) -> None:
        """PEFT's own; an adapter without bundles cannot be disabled, and says so."""
        if any(not config.bundles for config in self._bundle_configs()):
            warnings.warn(
                "without bundles the base model itself was trained; disabling the adapter does not undo it.",
                stacklevel=2,
            )
        super().disable_adapter_layers()

    def unload(self) -> nn.Module:
        """The base model, without hooks and bundles."""
        for module in list(self.model.modules()):
            layer = getattr(module, CHILD, None)
            if isinstance(layer, BundleLayer):
                layer.detach_from_block()
                delattr(module, CHILD)
        return super().unload()

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_ERROR)

    def unmerge_adapter(self) -> None:
        """Raises ValueError: bundles cannot be merged, so there is nothing to undo."""
        raise ValueError(MERGE_ERROR)

    # ---- checkpoints ----

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: BundleConfig, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        if not config.bundles:  # plain fine-tuning: what was trained is the base model
            return dict(state_dict)
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, **kwargs)
        entries = {k: v for k, v in entries.items() if config.save_basis or ".bundle_basis." not in k}
        vars(config)["_digest_to_save"] = weights_digest(
            {cls._remove_adapter_name_from_key(k, adapter_name): v for k, v in entries.items()}
        )
        return entries

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # "...bundles.bundle_weight.<adapter>.<bundle>" and "...bundles.bundle_basis.<adapter>"
        head, child, tail = key.rpartition(f".{CHILD}.")
        if not child:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        what, _, rest = tail.partition(".")
        rest = rest.removeprefix(adapter_name).removeprefix(".")
        return f"{head}{child}{what}" + (f".{rest}" if rest else "")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: BundleConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's own, after checking that the file is whole and made for this base model and basis.

        Raises:
            ValueError: tensors missing, of another shape, left over, not finite or changed; another basis.
        """
        with basis_brought(model, adapter_name) if config.save_basis else nullcontext():
            return cls._checked(model, config, adapter_name, state_dict)

    @classmethod
    def _checked(
        cls, model: nn.Module, config: BundleConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors under the model's keys, if they are what `config` says."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if not config.bundles:
            return remapped
        target = {k.removeprefix(PEFT_PREFIX): v for k, v in model.state_dict().items()}
        mine = {k for k in target if _adapter_of(k) == adapter_name}
        if not config.save_basis:  # drawn from the seed when the adapter was attached
            prefix = PEFT_PREFIX if any(k.startswith(PEFT_PREFIX) for k in remapped) else ""
            remapped.update({prefix + k: target[k] for k in mine if ".bundle_basis." in k})
        present = {k.removeprefix(PEFT_PREFIX): v for k, v in remapped.items()}
        if missing := sorted(mine - present.keys()):
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors of adapter {adapter_name!r}, first {missing[0]!r}."
            )
        if extra := sorted(present.keys() - target.keys()):
            raise ValueError(
                f"the checkpoint has {len(extra)} tensors that a model with adapter {adapter_name!r} has not, first "
                f"{extra[0]!r}."
            )
        for key in sorted(mine):
            tensor = present[key]
            if tensor.shape != target[key].shape:
                raise ValueError(
                    f"{key!r} has shape {tuple(tensor.shape)} in the checkpoint and {tuple(target[key].shape)} in "
                    "the model; it belongs to another base model or another config."
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{key!r} holds NaN or infinity; the checkpoint is damaged.")
            if ".bundle_scale." in key and not bool((tensor > 0).all()):
                raise ValueError(f"{key!r} holds deviations that are not positive; the checkpoint is damaged.")
        _check_basis(model, config, adapter_name, present)
        # Only what comes with a file: the digest is spent by the first load, and state dicts set later may be anything.
        wanted, config.weights_digest = config.weights_digest, None
        if wanted is not None and wanted != weights_digest(state_dict):
            raise ValueError(
                f"the tensors of adapter {adapter_name!r} are not those that were saved with its config; the file is "
                'damaged or was changed. If you changed it yourself, remove "weights_digest" from adapter_config.json.'
            )
        return remapped

    # ---- a call's own alphas and adapters ----

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """`PeftModel` runs every forward and generate inside this; it takes `alphas=` and `adapter_names=`."""
        call = self._state.call
        given, names = kwargs.get("alphas"), kwargs.get("adapter_names")
        if names is not None:
            if self.training:
                raise ValueError("adapter_names cannot be used in training mode; call model.eval() or set_adapter.")
            if unknown := sorted(set(names) - set(self.peft_config) - {"__base__"}):
                raise ValueError(f"adapter_names has {unknown}; the adapters are {sorted(self.peft_config)}.")
        before = call.adapter_names
        call.adapter_names = names if names is not None else before
        try:
            own = alphas(self.model, given) if given is not None else nullcontext()
            with self._pinned(names or ()), own, prepared(self.model, self._layers):
                yield
        finally:
            call.adapter_names = before

    @contextmanager
    def _pinned(self, others: Sequence[str] = ()) -> Iterator[None]:
        """Run the block with the adapters that are active now, whatever other threads add or remove meanwhile."""
        call, use = self._state.call, self._state.use
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            torch._dynamo.graph_break()  # what starts a call is not for the compiler, what it calls is
        if call.active is not None or torch.compiler.is_compiling():  # training: it traces the set it finds
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
            # Where another thread is changing the set, it lets go of them, or the next call to end does.
            if use.retired and use.swapping.acquire(blocking=False):
                try:
                    self.delete_retired()
                finally:
                    use.swapping.release()

    def delete_retired(self) -> None:
        """Delete the adapters that are to go and that no call in flight runs with; for who holds `use.swapping`."""
        use = self._state.use
        with use.lock:
            gone = [a for a in use.retired if use.calls[a] == 0]
            use.retired.difference_update(gone)
        for adapter in gone:  # no call runs with them, and none can start to
            self.delete_adapter(adapter)
            known = self._state.bundle_names()
            self._state.set_alphas = {n: value for n, value in self._state.set_alphas.items() if n in known}

    def forward(self, *args: Any, alphas: Any = None, adapter_names: Any = None, **kwargs: Any) -> Any:
        """The base model's, with alphas and adapter names for this call.

        While training with labels, the loss includes `quiet_loss` of the bundles that this forward lets learn (as
        PEFT's AdaLoRA adds its regulariser).
        """
        state = self._state
        hooks: AbstractContextManager[None] = nullcontext()
        if alphas is not None or adapter_names is not None:
            hooks = self._enable_peft_forward_hooks(alphas=alphas, adapter_names=adapter_names)
        before, state.seen = state.seen, set()
        state.call.joined = {} if self.training else None
        try:
            with self._pinned(), hooks, prepared(self.model, self._layers):
                output = self.model(*args, **kwargs)
            if self.training and state.seen and getattr(output, "loss", None) is not None:
                # Where the loss is a sum over this micro-batch's tokens by those of the whole step, so is the penalty.
                labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
                share = 1.0 if labels is None or items is None else (labels[..., 1:] != -100).sum() / items
                output.loss = output.loss + share * self.quiet_loss()
        finally:
            state.seen |= before
            state.call.joined = None
        return output

    def quiet_loss(self) -> Tensor:
        """`config.quiet` times how loud the bundles are on the states that `calibrate` kept; a scalar.

        For the bundles that some forward since the last `finalize_grads` let learn, summed over layers: the mean
        squared length of what they add to those states, over their variance. At alpha 1 in every layer (also where an
        alpha by layer is 0), and bundles of different signals each by themselves: the gradient of one does not depend
        on bundles that learn from something else. 0 for an adapter that was not calibrated.
        """
        layers = bundle_layers(self.model)
        learning: dict[str, list[str]] = {}
        for adapter, bundle in sorted(self._state.seen):
            learning.setdefault(adapter, []).append(bundle)
        total = torch.zeros((), device=next(self.model.parameters()).device)
        for adapter, names in learning.items():
            weight = self._state.configs[adapter].quiet
            if weight and (kept := [layer for layer in layers if adapter in layer.bundle_states]):
                total = total + weight * loudness(kept, adapter, names).to(total.device)
        return total

    def generate(self, *args: Any, alphas: Any = None, adapter_names: Any = None, **kwargs: Any) -> Any:
        """The base model's, with alphas and adapter names for this call; rows are those of the prompt batch.

        The bundles are folded once for the whole call.
        """
        call = self._state.call
        given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
        before = call.prompts
        call.prompts = next((t.shape[0] for t in given if isinstance(t, Tensor)), 1)
        try:
            hooks = self._enable_peft_forward_hooks(alphas=alphas, adapter_names=adapter_names)
            with torch.no_grad(), self.folded(), hooks:
                return self.model.generate(*args, **kwargs)
        finally:
            call.prompts = before

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Fold the bundles once for all no-grad forwards of the block, in this thread. Do not change weights inside."""
        call = self._state.call
        before = call.folds
        call.folds = before if before is not None else {}
        try:
            yield
        finally:
            call.folds = before

    # ---- alphas, routing, report: the functions of the same names, on this model ----

    def alphas(self, values: Any = None, *, per: str = "row", **by_name: Any) -> AbstractContextManager[None]:
        """`with model.alphas(b_rl_policy=0.0):` gates for the block's forwards, in this thread; see `parse_alphas`."""
        return alphas(self.model, values, per=per, **by_name)

    def set_alphas(self, values: Mapping[str, Any] | Tensor | Sequence[Any], *, per: str = "row") -> None:
        """Gates for all later forwards; see `alphas.set_alphas`."""
        set_alphas(self.model, values, per=per)

    def route(self, signals: Any, *, weights: Any = None, block_diagonal: bool = False) -> AbstractContextManager[None]:
        """Route the gradients of the block's forwards; see `signals.route`."""
        return routes.route(self.model, signals, weights=weights, block_diagonal=block_diagonal)

    def routed_backward(self, losses: Mapping[str, Tensor], *, retain_graph: bool = False) -> None:
        """Backward of several losses into their own bundles; see `signals.routed_backward`."""
        backward.routed_backward(self.model, losses, retain_graph=retain_graph)

    def finalize_grads(self, *, reduce: bool = True) -> None:
        """Close a step's backwards; see `signals.finalize_grads`."""
        reduction.finalize_grads(self.model, reduce=reduce)

    def clip_bundle_grads(self, max_norm: float) -> dict[str, Tensor]:
        """Clip every bundle's gradient by itself; see `signals.clip_bundle_grads`."""
        return reduction.clip_bundle_grads(self.model, max_norm)

    def bundle_parameters(self, bundle: str, adapter: str | None = None) -> list[nn.Parameter]:
        """The weights of one bundle over all layers, of the active adapter unless another is named."""
        adapter = adapter or self.active_adapters[0]
        table = bundle_parameters(self.model)
        if (adapter, bundle) not in table:
            raise ValueError(
                f"adapter {adapter!r} has no bundle {bundle!r}; it has {[b for a, b in table if a == adapter]}."
            )
        return table[adapter, bundle]

    def bundle_report(self, adapter: str | None = None, *, angles: bool = False) -> BundleReport:
        """Ranks, supports, overlaps, signals and parameters of an adapter's bundles; print it. See `report.report`."""
        return report(self.model, adapter or self.active_adapters[0], angles=angles)


def _adapter_of(key: str) -> str | None:
    """Adapter that a key of the model's state dict belongs to: "h.0.bundles.bundle_weight.<adapter>.<bundle>"."""
    _, child, tail = key.rpartition(f".{CHILD}.")
    return tail.split(".")[1] if child else None


def _check_basis(model: nn.Module, config: BundleConfig, adapter: str, present: Mapping[str, Tensor]) -> None:
    """Compare the basis in the file, or the one drawn from the seed, with the fingerprint in the config."""
    for name, layer in model.named_modules():
        if not (isinstance(layer, BundleLayer) and adapter in layer.bundle_basis):
            continue
        key = f"{name.removeprefix(PEFT_PREFIX)}.bundle_basis.{adapter}"
        found, wanted = fingerprint(present.get(key, layer.bundle_basis[adapter])), config.basis_fingerprint or {}
        if abs(found - wanted.get(str(layer.index), found)) > FINGERPRINT_TOLERANCE:
            raise ValueError(
                f"layer {layer.index}: the basis of adapter {adapter!r} is not the one it was trained in (fingerprint "
                f"{found:.6f}, the config says {wanted[str(layer.index)]:.6f}); was the seed or the file "
                "changed, or cast to a lower precision?"
            )


def _announce_alphas(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Tell a `PeftModel` that gets a `BundleModel` that `alphas` is an argument of ours and not of the base model."""
    if isinstance(child, BundleModel) and isinstance(parent, PeftModel):
        parent.special_peft_forward_args = {*parent.special_peft_forward_args, "alphas"}


register_module_module_registration_hook(_announce_alphas)
