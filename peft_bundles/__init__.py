"""peft_bundles: many named low-rank bundles per decoder layer, each trained by the signals that own it.

Importing the package registers the tuner type BUNDLE with PEFT.
"""

from peft.utils import register_peft_method

from . import registration  # noqa: F401 - first: the config names PeftType.BUNDLE
from .alphas import alphas, set_alphas
from .calibration import calibrate, own_samples
from .config import BundleConfig, BundleSpec, SubBasis
from .layer import BundleLayer
from .model import BundleModel
from .report import BundleReport, report
from .signals import clip_bundle_grads, finalize_grads, route, routed_backward
from .taxonomy import PRESETS


__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "BundleConfig",
    "BundleLayer",
    "BundleModel",
    "BundleReport",
    "BundleSpec",
    "SubBasis",
    "alphas",
    "calibrate",
    "clip_bundle_grads",
    "finalize_grads",
    "own_samples",
    "report",
    "route",
    "routed_backward",
    "set_alphas",
]

register_peft_method(name="bundle", config_cls=BundleConfig, model_cls=BundleModel)
