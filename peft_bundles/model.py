"""`BundleModel`, the tuner that PEFT makes: attaches bundles, saves and loads them, and runs calls with alphas."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from .config import BundleConfig
from .core.attaching import basis_brought, borrow_basis, check_loaded, check_saved, with_shared_basis
from .core.base import Injection, base_fingerprint, base_shape, check_base
from .core.basis import SHARED, basis_rank, bundle_shapes, fingerprint
from .core.calling import Calls
from .core.checkpoints import KEYS, named_keys, plain_name, renamed, size_in_words, split_keys, weights_digest
from .core.dialling import alphas as set_for_block
from .core.dialling import bake_alphas, set_alphas
from .core.layer import BundleLayer
from .core.linears import LinearBundles
from .core.merge import check_mergeable
from .core.packing import Packing
from .core.penalty import loss_of_step, share_of_step
from .core.places import CHILD, Site, signals_of
from .core.recompute import recompute_with_call
from .core.state import OF_MODEL, BundleState
from .core.walking import bundle_layers, bundle_parameters, state_of
from .reporting import BundleReport, report
from .routers.using import Routed
from .routing import backward, reduction, routes


class BundleModel(Routed, Calls):
    """The BUNDLE tuner, made by `get_peft_model(model, BundleConfig(...))`.

    Its methods are reached through the `PeftModel`: `model.route(...)`, `model.alphas(...)`, `model.bundle_report()`.
    Adapters that transformers attached (`model.add_adapter`) have no `BundleModel`; there the functions of the same
    names in `peft_bundles` take the model (for `bundle_report` it is `peft_bundles.report`).

    Give the config a task type, such as "CAUSAL_LM": without one PEFT calls the base model directly, so `alphas=` works
    only where the base model ignores arguments that it does not know.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> model = get_peft_model(base, BundleConfig(preset="ssl_rl_separate", task_type="CAUSAL_LM")).eval()
        >>> ids = torch.arange(6)[None]
        >>> with model.alphas(b_rl_policy=0.0):
        ...     off = model(ids).logits
        >>> torch.equal(off, model(ids, alphas={"b_rl_policy": 0.0}).logits)
        True
        >>> [tuple(p.shape) for p in model.bundle_parameters("b_rl_policy")]  # down and up of two layers
        [(2, 12), (12, 2), (2, 12), (12, 2)]
    """

    prefix = "bundle_"
    tuner_layer_cls = BundleLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - blocks are found, not looked up

    # ---- attaching ----

    def _bundle_configs(self) -> list[BundleConfig]:
        # Adapters of other types may have been injected into the base model before.
        return [config for config in self.peft_config.values() if isinstance(config, BundleConfig)]

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

    def _prepare_adapter_config(self, peft_config: BundleConfig, model_config: dict[str, Any]) -> BundleConfig:
        self._injection.choose_sites(self.model, peft_config)
        return peft_config

    def _prepare_model(self, peft_config: BundleConfig, model: nn.Module) -> None:
        layers = [m for m in model.modules() if isinstance(m, BundleLayer)]
        state = layers[0].state if layers else BundleState()
        adapter, shape = self._injection.adapter, base_shape(self.model)
        shapes = bundle_shapes(peft_config, shape[0])  # checks ranks and supports before anything is changed
        state.num_layers = self._injection.depth
        state.configs[adapter] = peft_config
        state.version += 1  # an adapter of this name may have been there before
        groups = list(signals_of(peft_config, list(shapes)).values())
        rank = basis_rank(peft_config, shape[0])
        state.packings[adapter, None] = Packing(shapes, rank, peft_config.projection != "none", groups)
        peft_config.base_shape = shape
        self._state = state

    def _check_target_module_exists(self, peft_config: BundleConfig, key: str) -> Any:  # type: ignore[override]
        if self._injection.config is not peft_config:  # PEFT's `inspect_matched_modules` asks about any adapter
            self._injection.choose_sites(self.model, peft_config)
        return self._injection.matches.get(key, False)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter; PEFT calls this."""
        if (state_dict := kwargs.get("state_dict")) is not None:
            # Keys name our layers ("h.0.bundles"), and PEFT looks for the modules they sit in ("h.0").
            kwargs["state_dict"] = {
                f"{key.rsplit(f'.{CHILD}.', 1)[0]}.{self.prefix}": v for key, v in state_dict.items()
            }
        self._injection = Injection(adapter_name)
        config = given = cast(BundleConfig, self.peft_config[adapter_name])
        others = {name: c for name, c in self.peft_config.items() if name != adapter_name}
        if any(other is given for other in others.values()):  # a third adapter of either has to tell them apart
            config = self.peft_config[adapter_name] = copy.deepcopy(given)
        in_memory, named = config.weights_digest is None, config.basis_fingerprint is not None
        if in_memory and config.bundles:
            config.base_fingerprint = base_fingerprint(model) or None
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._layers = bundle_layers(model)
        if in_memory and named:  # no file follows that brings its basis
            borrow_basis(self._layers, others, adapter_name, given)
        if config.bundles and config.basis_fingerprint is None:
            config.basis_fingerprint = {
                str(layer.index): fingerprint(layer.bundle_basis[adapter_name])
                for layer in self._layers
                if adapter_name in layer.bundle_basis
            }
            if not config.basis_fingerprint:  # no bundle behind a block
                config.basis_fingerprint = None

    def adopt(self, adapter: str, config: BundleConfig, tensors: Mapping[Site, Mapping[str, Tensor]]) -> None:
        """Add an adapter on blocks that have bundles already; it is not active.

        As PEFT's `add_adapter`, without its walk over every module and parameter of the base model.

        Args:
            adapter: name of the new adapter.
            config: its config.
            tensors: site -> key -> tensor, as in `Checkpoint.layers`; used without a copy.
        """
        self.peft_config[adapter] = config
        try:
            self._check_new_adapter_config(config)
            self._injection = Injection(adapter)
            self._prepare_model(self._prepare_adapter_config(config, {}), self.model)
            self._take(adapter, tensors)
        except Exception:
            self.delete_adapter(adapter)
            raise

    def fill(self, adapter: str, tensors: Mapping[Site, Mapping[str, Tensor]]) -> None:
        """Replace the tensors that an adapter was attached with; arguments as in `adopt`."""
        self._take(adapter, tensors)
        self._cast_adapter_dtype(adapter)

    def _take(self, adapter: str, tensors: Mapping[Site, Mapping[str, Tensor]]) -> None:
        layers = {layer.site: layer for layer in self._layers}
        for site, layer_tensors in tensors.items():
            layers[site].take(adapter, layer_tensors)

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
        site = self._injection.sites.get(current_key)
        if site not in self._injection.bundles:
            raise ValueError(
                f"the state dict has bundles at {current_key!r}, where the config of {adapter_name!r} puts none in "
                f"{type(self.model).__name__}; it belongs to another base model or another config."
            )
        d, options = base_shape(self.model)[0], (adapter_name, peft_config.init_weights, peft_config.inference_mode)
        block = current_key.removesuffix(f".{site.path}") if site.path else current_key
        layer = self._layer_of(self.model.get_submodule(block), Site(site.block), d, current_key)
        if not site.path:
            layer.update_layer(*options)
            return
        linear = layer.inner.get(site.path)
        if not isinstance(linear, LinearBundles):
            linear = LinearBundles(target, site, d, self._state)
            layer.add_inner(site.path, linear)
            setattr(target, CHILD, linear)
        linear.names[adapter_name] = tuple(self._injection.bundles[site])
        linear.update_layer(*options)

    def _layer_of(self, block: nn.Module, site: Site, hidden_size: int, key: str) -> BundleLayer:
        """The bundle layer of a block, made if it has none."""
        layer = getattr(block, CHILD, None)
        if not isinstance(layer, BundleLayer):
            layer = BundleLayer(block, site, hidden_size, self._state)
            setattr(block, CHILD, layer)
        elif layer.site != site:
            raise ValueError(
                f"block {key!r} is layer {layer.index} of the adapters it has and would be layer {site.block} of "
                f"{self._injection.adapter!r}; give target_modules that number the blocks the same way."
            )
        return layer

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # A config without bundles is plain fine-tuning: the trunk stays trainable.
        if all(config.bundles or config.inference_mode for config in self._bundle_configs()):
            super()._mark_only_adapters_as_trainable(model)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's version reads every buffer, so U would be drawn just before a checkpoint replaces it.
        for layer in self._layers if autocast_adapter_dtype else ():
            layer.weights_to_float32(adapter_name)

    def disable_adapter_layers(self) -> None:
        """Turn the bundles off, as in PEFT; warns about an adapter without bundles, which cannot be turned off."""
        if any(not config.bundles for config in self._bundle_configs()):
            warnings.warn(
                "without bundles the base model itself was trained; disabling the adapter does not undo it.",
                stacklevel=2,
            )
        if self._state.merged:  # as PEFT's LoRA does
            warnings.warn("Adapter cannot be disabled when it is merged: unmerging it.", stacklevel=2)
            self.unmerge_adapter()
        super().disable_adapter_layers()

    def unload(self) -> nn.Module:
        """The base model, without hooks and bundles."""
        if self._hooks is not None:
            self._hooks.remove()
        for module in list(self.model.modules()):
            layer = getattr(module, CHILD, None)
            if isinstance(layer, BundleLayer):
                layer.detach()
                delattr(module, CHILD)
        return super().unload()

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, alphas: Any = None
    ) -> None:
        """Merge adapters into the base model's linear layers, as in PEFT; `unmerge_adapter` undoes it, to rounding.

        Everything that is on must be of kind "lora" at linear layers. Alphas are fixed until it is undone.

        Args:
            adapter_names: of the adapters; None: the active ones.
            safe_merge: refuse weights that would not be finite.
            alphas: alphas to merge at (see `peft_bundles.alphas`); None: the present ones.

        Raises:
            ValueError: a bundle that is on cannot be merged, or its alpha differs between rows or tokens. Nothing was
                changed then.
        """
        state = self._state
        before = state.before_merge if state.merged else state.set_alphas
        try:
            if alphas is not None:
                set_alphas(self.model, alphas)
            check_mergeable(state, self._layers, list(adapter_names or self.active_adapters), safe_merge)
            super().merge_adapter(adapter_names, safe_merge)
        except Exception:
            state.set_alphas = before
            raise
        state.merged, state.before_merge = any(layer.merged_adapters for layer in self._layers), before

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`, as in PEFT."""
        for layer in self._layers:
            if layer.merged_adapters or layer.site.path:
                layer.unmerge()
        if self._state.merged:
            self._state.merged, self._state.set_alphas = False, self._state.before_merge
            self._state.version += 1

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        alphas: Any = None,
    ) -> nn.Module:
        """The base model with adapters merged into it, without bundles; arguments and errors as in `merge_adapter`."""
        self.merge_adapter(adapter_names, safe_merge, alphas)
        return self.unload()

    # ---- checkpoints ----

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: BundleConfig, adapter_name: str, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> dict[str, Tensor]:
        if not config.bundles:  # plain fine-tuning: what was trained is the base model
            return dict(state_dict)
        check_saved(model, config, adapter_name)
        entries = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, **kwargs)
        entries = {k: v for k, v in entries.items() if config.save_basis or ".bundle_basis." not in k}
        if config.basis_source is not None:
            entries = {k: v for k, v in entries.items() if not any(f".{what}." in k for what in SHARED)}
        named = {cls._remove_adapter_name_from_key(k, adapter_name): v for k, v in entries.items()}
        keys = {name: key for (owner, name), key in state_of(model).keys.items() if owner == adapter_name}
        named.update(tensors := named_keys(keys, ""))
        config.digest_to_save, config.size_to_save = weights_digest(named), size_in_words(named)
        return {**entries, **tensors}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # "...bundles.bundle_weight.<adapter>.<bundle>" and "...bundles.bundle_basis.<adapter>"
        head, child, tail = plain_name(key).rpartition(f".{CHILD}.")
        if not child:
            return key if key.startswith(KEYS) else super()._remove_adapter_name_from_key(key, adapter_name)
        what, _, rest = tail.partition(".")
        rest = rest.removeprefix(adapter_name).removeprefix(".")
        return f"{head}{child}{what}" + (f".{rest}" if rest else "")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: BundleConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors under the model's keys, after checking that they are what the config says.

        Raises:
            ValueError: tensors missing, of another shape, left over, not finite or changed; another basis.
        """
        brings = config.save_basis or config.basis_source is not None
        with basis_brought(model, adapter_name) if brings else nullcontext():
            keys, rest = split_keys(state_dict, config, f"the checkpoint of adapter {adapter_name!r}")
            rest = with_shared_basis(model, config, adapter_name, rest)
            remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest)
            inside = {plain_name(n): n for n, m in model.named_modules() if isinstance(m, BundleLayer)}
            remapped = {renamed(key, inside): tensor for key, tensor in remapped.items()}
            if not config.bundles:
                return remapped
            check_loaded(model, config, adapter_name, rest, keys, remapped)
            if keys:  # a state dict that is set may have none, and the model keeps its own
                state_of(model).take_keys(adapter_name, keys)
        config.weights_digest = None  # state dicts that are set later are not checked against it
        return remapped

    # ---- forwards ----

    def forward(self, *args: Any, alphas: Any = None, adapter_names: Any = None, **kwargs: Any) -> Any:
        """The base model's forward.

        In training mode its backward adds the gradient of `quiet_loss`, whatever the loss is made of; the value of
        `output.loss` is without it. Under float16 autocast gradients have a scale that is not known here: there the
        penalty is in `output.loss`, and the backward of another loss is refused.

        Args:
            alphas: alphas for this call (see `peft_bundles.alphas`).
            adapter_names: one adapter name for each row of the batch; not while training.

        Returns:
            What the base model returns.

        Raises:
            ValueError: alphas of unknown bundles or of a wrong shape, or unknown adapter names.
        """
        state = self._state
        if self.training and torch.is_grad_enabled():
            state.check_unmerged()  # nothing would learn
        before, state.seen = state.seen, set()
        if self.training:
            recompute_with_call((layer for layer in self._layers if not layer.site.path), required=False)
        try:
            with self._call(self._not_set_yet(alphas), adapter_names):
                output = self.model(*args, **kwargs)
            if state.penalty.scaled and state.seen and getattr(output, "loss", None) is not None:
                share = share_of_step(kwargs.get("labels"), kwargs.get("num_items_in_batch"))
                output.loss = output.loss + share * self.quiet_loss()
        finally:
            state.seen |= before
        return output

    def quiet_loss(self) -> Tensor:
        """The penalty on what bundles add to the states that `calibrate` kept, times `config.quiet`.

        It counts the bundles that learn in some forward since the last `finalize_grads`, at alpha 1. Summed over
        layers: the mean squared length of what they add to those states, divided by the variance of the states.
        Bundles of different signals are measured apart, so that the gradient of one does not depend on the others. If
        a forward ran under `route`, a bundle's penalty is multiplied by the share of its rows that the bundle learns
        from: the mean of a loss over all rows multiplies its gradient by the same.

        The backward of any training forward adds its gradient, once a step. In a step whose loss holds `quiet_loss()`
        nothing is added to that; after a backward that has added it, the gradient of `quiet_loss()` is zeros.

        Returns:
            A scalar; 0 without calibration.
        """
        return loss_of_step(self._state, bundle_layers(self.model), next(self.model.parameters()).device)

    def generate(
        self,
        *args: Any,
        alphas: Any = None,
        adapter_names: Any = None,
        router: Any = OF_MODEL,
        return_gates: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The base model's `generate`, with its result. The bundles are folded once for the whole call.

        Args:
            alphas: alphas for this call (see `peft_bundles.alphas`); a row is a prompt, with all of its beams.
            adapter_names: one adapter name for each prompt.
            router: router of this call, as in `set_router`; left out: the model's.
            return_gates: return (result, `Gates`): which bundles were on while each token was read. Without beams.
        """
        options = {"alphas": alphas, "adapter_names": adapter_names, **kwargs}
        if router is not OF_MODEL:
            with self.router(router):
                return self.generate(*args, return_gates=return_gates, **options)
        if return_gates:
            return self._with_gates(*args, **options)
        call = self._state.call
        inputs = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
        before = call.prompts, call.uncached
        call.uncached = kwargs.get("use_cache") is False
        call.prompts = next((t.shape[0] for t in inputs if isinstance(t, Tensor)), 1)
        try:
            with (
                torch.no_grad(),
                self.folded(),
                self._call(self._not_set_yet(alphas), adapter_names),
                self._gated_by_prompt(inputs, kwargs.get("attention_mask")),
            ):
                return self.model.generate(*args, **kwargs)
        finally:
            call.prompts, call.uncached = before

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's continuous batching, in a thread of its own: only `set_alphas` acts, others are refused."""
        if self._state.router_in_use() is not None:
            raise ValueError(
                "generate_batch packs rows into one, which no router can read; call set_router(None), or use generate."
            )
        if kwargs.pop("alphas", None) is not None or self._state.call.alphas:
            raise ValueError(
                "generate_batch runs in a thread of its own, where alphas= and `with model.alphas(...)` do not act; "
                "call model.set_alphas(...) before it, or use generate."
            )
        return self.model.generate_batch(*args, **kwargs)

    # ---- the functions of the same names in `peft_bundles`, on this model ----

    def alphas(self, values: Any = None, *, per: str = "row", **by_name: Any) -> AbstractContextManager[None]:
        """`with model.alphas(b_rl_policy=0.0):`; see `peft_bundles.alphas`."""
        return set_for_block(self.model, values, per=per, **by_name)

    def set_alphas(self, values: Any = None, *, per: str = "row", **by_name: Any) -> None:
        """Set alphas for all later forwards; see `peft_bundles.set_alphas`."""
        set_alphas(self.model, values, per=per, **by_name)

    def bake_alphas(self, adapter: str | None = None) -> None:
        """Make the alphas of `set_alphas` those of the config; see `peft_bundles.bake_alphas`."""
        bake_alphas(self.model, adapter or self.active_adapters[0])

    def route(self, signals: Any, *, weights: Any = None, block_diagonal: bool = False) -> AbstractContextManager[None]:
        """Route the gradients of the block's forwards; see `peft_bundles.route`."""
        return routes.route(self.model, signals, weights=weights, block_diagonal=block_diagonal)

    def routed_backward(self, losses: Mapping[str, Tensor], *, retain_graph: bool = False) -> None:
        """Run the backward of several losses into their own bundles; see `peft_bundles.routed_backward`."""
        backward.routed_backward(self.model, losses, retain_graph=retain_graph)

    def finalize_grads(self, *, reduce: bool = True) -> None:
        """End the backward passes of a step; see `peft_bundles.finalize_grads`."""
        reduction.finalize_grads(self.model, reduce=reduce)

    def clip_bundle_grads(self, max_norm: float) -> dict[str, Tensor]:
        """Clip the gradient of every bundle on its own; see `peft_bundles.clip_bundle_grads`."""
        return reduction.clip_bundle_grads(self.model, max_norm)

    def bundle_parameters(self, bundle: str, adapter: str | None = None) -> list[nn.Parameter]:
        """The weights of one bundle in all layers.

        Args:
            bundle: its name.
            adapter: the adapter that holds it. None: the first active one.

        Raises:
            ValueError: the adapter has no such bundle.
        """
        adapter = adapter or self.active_adapters[0]
        table = bundle_parameters(self.model)
        if (adapter, bundle) not in table:
            raise ValueError(
                f"adapter {adapter!r} has no bundle {bundle!r}; it has {[b for a, b in table if a == adapter]}."
            )
        return table[adapter, bundle]

    def bundle_report(self, adapter: str | None = None, *, angles: bool = False) -> BundleReport:
        """Describe the first active adapter, or the one named; see `peft_bundles.report`."""
        return report(self.model, adapter or self.active_adapters[0], angles=angles)
