"""peft_bundles: many named low-rank bundles in a causal LM, each updated only by the signals that own it.

Importing the package registers the adapter type BUNDLE with PEFT.

Example:
    >>> from peft import get_peft_model
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> from peft_bundles import BundleConfig
    >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
    ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
    >>> model = get_peft_model(base, BundleConfig(preset="ssl_rl_separate", task_type="CAUSAL_LM"))
    >>> list(model.peft_config["default"].bundles)[:3]
    ['b_ssl_main', 'b_ssl_semantic', 'b_rl_policy']
"""

from peft.utils import register_peft_method

from . import registration  # noqa: F401 - before the config, which names PeftType.BUNDLE
from .calibration import calibrate, own_samples
from .config import BundleConfig, BundleSpec, SubBasis
from .core.dialling import alphas, bake_alphas, set_alphas, set_norm_budget
from .core.layer import BundleLayer
from .evaluation import alpha_sweep
from .evaluation.distillation import distill_to_lora
from .evaluation.interference import conflicts, orthogonality
from .keys import learn_keys, learn_null
from .model import BundleModel
from .reporting import BundleReport, report
from .routers.keys import KeyRouter, Null
from .routing.backward import routed_backward
from .routing.reduction import clip_bundle_grads, finalize_grads
from .routing.routes import route
from .sharing.cards import write_card
from .sharing.composing import compose, composition, load_bundle, remove_bundle
from .sharing.hub import pull_bundle, push_bundle, save_bundle
from .sharing.lora import from_lora, to_lora
from .sharing.merging import merge_bundles
from .sharing.shared_basis import load_basis, push_basis, save_basis
from .taxonomy import PRESETS


__version__ = "0.2.0"

__all__ = [
    "PRESETS",
    "BundleConfig",
    "BundleLayer",
    "BundleModel",
    "BundleReport",
    "BundleSpec",
    "KeyRouter",
    "Null",
    "SubBasis",
    "alpha_sweep",
    "alphas",
    "bake_alphas",
    "calibrate",
    "clip_bundle_grads",
    "compose",
    "composition",
    "conflicts",
    "distill_to_lora",
    "finalize_grads",
    "from_lora",
    "learn_keys",
    "learn_null",
    "load_basis",
    "load_bundle",
    "merge_bundles",
    "orthogonality",
    "own_samples",
    "pull_bundle",
    "push_basis",
    "push_bundle",
    "remove_bundle",
    "report",
    "route",
    "routed_backward",
    "save_basis",
    "save_bundle",
    "set_alphas",
    "set_norm_budget",
    "to_lora",
    "write_card",
]

register_peft_method(name="bundle", config_cls=BundleConfig, model_cls=BundleModel)
