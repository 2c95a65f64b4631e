"""`BundleConfig` and the specs it holds: plain dataclasses that check themselves and survive a trip through JSON."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeAlias

from peft.config import PeftConfig
from peft.utils import PeftType
from peft.utils.constants import CONFIG_NAME
from torch import nn

from .taxonomy import PRESETS


ADAPTERS = ("mlp", "linear", "diag", "full")
ROLES = ("general", "semantic", "signal")
BASIS_INITS = ("random", "pca", "null")
INPUT_NORMS = ("standard", "none")
PROJECTIONS = ("none", "tied")
REMOVED = {"adapter": ("identity",), "projection": ("free",)}  # values that version 0.1 knew
FORMAT_VERSION = 1  # of the checkpoints that this version writes; it reads this one and those before
COMMON = "common"  # the sub-basis that `overlap` draws from

USAGE = """
## Loading

This is a BUNDLE adapter: `pip install peft-bundles`, and `import peft_bundles` before PEFT loads it.

```python
import peft_bundles
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this folder or repository")
print(model.bundle_report())
```
"""

Rank: TypeAlias = int | float


def resolve_rank(rank: Rank, hidden_size: int) -> int:
    """Width in columns of a rank: an int as it is, a fraction of `hidden_size` rounded down, at least 1."""
    # 1e-9: 0.29 * 100 is 28.999999999999996, and the user meant 29.
    return rank if isinstance(rank, int) else max(1, math.floor(rank * hidden_size + 1e-9))


def _check_rank(owner: str, name: str, rank: Any, fraction_up_to: float = 1.0) -> None:
    is_int = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    is_fraction = isinstance(rank, float) and 0.0 < rank <= fraction_up_to
    if not (is_int or is_fraction):
        raise ValueError(f"{owner}: {name}={rank!r} must be an int >= 1 or a float in (0, {fraction_up_to:g}].")


def _check_number(owner: str, name: str, value: Any, low: float, high: float) -> None:
    """low <= value <= high; NaN, strings and None fail."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{owner}: {name}={value!r} must be a number in [{low:g}, {high:g}].")


def _check_choice(owner: str, name: str, value: Any, choices: Sequence[str]) -> None:
    if value in REMOVED.get(name, ()):
        raise ValueError(
            f"{owner}: {name}={value!r} is no longer supported since version 0.2; use one of {', '.join(choices)}, or "
            "load an adapter that was trained with it with peft-bundles 0.1."
        )
    if value not in choices:
        raise ValueError(f"{owner}: {name}={value!r} is unknown; choose one of {', '.join(choices)}.")


def _check_name(kind: str, name: Any) -> None:
    # Names become attributes of `nn.ParameterDict` and components of state-dict keys.
    if not (isinstance(name, str) and name.isidentifier()) or hasattr(nn.ParameterDict, name):
        raise ValueError(
            f"{kind} name {name!r} cannot be used: take letters, digits and '_', not starting with a digit, and no "
            "name of a torch.nn.ParameterDict method."
        )


def _from_mapping(cls: type, owner: str, values: Mapping[str, Any]) -> Any:
    known = [f.name for f in fields(cls)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{owner}: unknown field(s) {unknown}; a {cls.__name__} has {known}.")
    if "rank" not in values:
        raise ValueError(f"{owner}: rank is missing; give an int or a fraction of the hidden size.")
    return cls(**values)


@dataclass
class SubBasis:
    """A named run of columns of the layer's basis U.

    Args:
        rank: number of columns, as an int or as a fraction of the hidden size (rounded down, at least 1).
        name: filled in from the key of `BundleConfig.sub_bases`.
    """

    rank: Rank
    name: str | None = None

    def __post_init__(self) -> None:
        _check_rank(f"sub-basis {self.name!r}", "rank", self.rank)


@dataclass
class BundleSpec:
    """One bundle: the columns of U it may use, its size, and the signals that may update it.

    Args:
        rank: r_k, the size of the bundle (int, or a fraction of the hidden size): the width of its projector W_k where
            it has one, and what `bottleneck` is a fraction of.
        sub_bases: names of the sub-bases whose columns make up the support. Not used by `adapter="full"`.
        overlap: share of the support that is drawn from the sub-basis named "common", in [0, 1).
        signals: signal name -> weight in [0, 1]: 1 owns, 0 (or absent) is quarantined, between is attenuated.
        bottleneck: hidden width b_k of the adapter (int, or a fraction of r_k; for "full", of the hidden size).
            Only "mlp", "linear" and "full" have one. None takes the config's.
        adapter: "mlp", "linear", "diag" or "full"; None takes the config's.
        alpha: the gate this bundle has when nobody says otherwise.
        role: "general", "semantic" or "signal": a label for reports and trainers.
        topic: what a semantic bundle is about: a label for routers.
        protected: a label for trainers: no signal but an owner may touch it, attenuated weights are refused.
        name: filled in from the key of `BundleConfig.bundles`.

    Raises:
        ValueError: on a value outside the ranges above; the message names field, value and fix.
    """

    rank: Rank
    sub_bases: list[str] = field(default_factory=list)
    overlap: float = 0.0
    signals: dict[str, float] = field(default_factory=dict)
    bottleneck: Rank | None = None
    adapter: str | None = None
    alpha: float = 1.0
    role: str = "general"
    topic: str | None = None
    protected: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        me = f"bundle {self.name!r}"
        _check_rank(me, "rank", self.rank)
        _check_choice(me, "role", self.role, ROLES)
        if self.adapter is not None:
            _check_choice(me, "adapter", self.adapter, ADAPTERS)
        if self.bottleneck is not None:
            _check_rank(me, "bottleneck", self.bottleneck, fraction_up_to=4.0)
        if not isinstance(self.sub_bases, (list, tuple)):
            raise ValueError(f"{me}: sub_bases={self.sub_bases!r} must be a list, e.g. ['mem'].")
        if not isinstance(self.signals, Mapping):
            raise ValueError(f"{me}: signals={self.signals!r} must be a dict, e.g. {{'lm': 1.0}}.")
        self.sub_bases, self.signals = list(self.sub_bases), dict(self.signals)
        if len(set(self.sub_bases)) != len(self.sub_bases):
            raise ValueError(f"{me}: sub_bases={self.sub_bases} names a sub-basis twice; name each once.")
        _check_number(me, "overlap", self.overlap, 0.0, 0.999)
        _check_number(me, "alpha", self.alpha, -1e6, 1e6)
        for signal, weight in self.signals.items():
            _check_number(me, f"signals[{signal!r}]", weight, 0.0, 1.0)
            if self.protected and 0.0 < weight < 1.0:
                raise ValueError(
                    f"{me} is protected, so signals[{signal!r}]={weight!r} must be 0 or 1, or protected=False."
                )


@dataclass
class BundleConfig(PeftConfig):
    """Configuration of a BUNDLE adapter (design.md sections 2, 3 and 6).

    Args:
        preset: a name of `taxonomy.PRESETS`; "single_adapter" when neither it nor `bundles` is given.
        bundles: name -> `BundleSpec` (or a list of named specs). Beside a preset they replace the preset's bundles.
        sub_bases: name -> `SubBasis` (or a bare rank). Beside a preset they replace the preset's sub-bases.
        basis_rank: R, the columns of U. None: the sub-bases, rounded up to a multiple of 8. Spare columns are not used.
        basis_seed: seed of the random basis and of the weights' start; layer l draws from (seed, l), whatever its name.
        basis_init: "random", "pca" (directions of high variance) or "null" (of low variance). The last two are
            chosen by `calibrate`; until it has run they are the random basis.
        adapter: adapter kind of bundles that name none.
        bottleneck: bottleneck of bundles that name none.
        projection: "none": a bundle reads and writes its columns of U as they are. "tied" puts a trained projector W_k
            between, and its transpose behind. W costs parameters that hidden units use better (docs/learning.md).
        input_norm: "standard" (x is centred and scaled by what `calibrate` measured) or "none".
        scaling: c, a constant factor of what the bundles add, as lora_alpha / r is for LoRA. Under Adam it is the ratio
            of the step sizes of the second map (`up`) and the first (`down`), as LoRA+'s (arXiv 2402.12354).
        quiet: weight of the penalty on what the bundles add to the states that `calibrate` kept; `forward` with labels
            adds it to the loss while training, other losses add `model.quiet_loss()`. 0 turns it off.
        dropout: dropout on the adapter's hidden units while training.
        layers_to_transform: indices of the decoder layers that get bundles; None is all of them.
        target_modules: names or a regex of the decoder blocks, only for models where they are not found by themselves.
        exclude_modules: blocks to leave out, as in other PEFT methods.
        modules_to_save: further modules to train in full and save, as in other PEFT methods.
        save_basis: store U in the checkpoint. False regenerates it from the seed (only `basis_init="random"`).
        init_weights: True starts as the base model exactly. False draws random weights (for tests).

    The remaining fields are filled in by the library and travel with the checkpoint: `base_shape` (hidden size and
    number of decoder layers), `basis_fingerprint` (a number a layer), `calibration` (how `calibrate` was run),
    `provenance` (of bundles that `save_bundle` cut out: the basis and the base model they were trained in, a summary of
    the training) and, in files, `weights_digest` (of the bundles' tensors beside the config).

    Raises:
        ValueError: at construction, naming field, value and fix.
    """

    preset: str | None = None
    bundles: dict[str, BundleSpec] | None = None
    sub_bases: dict[str, SubBasis] | None = None
    basis_rank: Rank | None = None
    basis_seed: int = 0
    basis_init: str = "null"
    adapter: str = "mlp"
    bottleneck: Rank = 0.25
    projection: str = "none"
    input_norm: str = "standard"
    scaling: float = 4.0
    quiet: float = 20.0
    dropout: float = 0.0
    layers_to_transform: list[int] | int | None = None
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    save_basis: bool = True
    init_weights: bool = True
    base_shape: list[int] | None = None
    basis_fingerprint: dict[str, float] | None = None
    calibration: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    weights_digest: str | None = field(default=None, compare=False)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        # PEFT and transformers take an adapter's tensors and then save its config. This is the digest of the tensors
        # that were taken last, and becomes `weights_digest` in the file. In memory that field is None, but for a config
        # that was read and whose tensors have not been loaded yet.
        self.digest_to_save: str | None = None
        self.peft_type = PeftType("BUNDLE")
        me = "BundleConfig"
        if not isinstance(self.format_version, int) or self.format_version < 1:
            raise ValueError(f"{me}: format_version={self.format_version!r} must be an int >= 1; the file is damaged.")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"{me}: format_version={self.format_version} was written by a newer version of peft-bundles; this one "
                f"reads formats up to {FORMAT_VERSION}. Upgrade it: pip install --upgrade peft-bundles."
            )
        if self.preset is None and self.bundles is None:
            self.preset = "single_adapter"
        if self.preset is not None:
            _check_choice(me, "preset", self.preset, sorted(PRESETS))
            if self.bundles is None:
                self.bundles = PRESETS[self.preset]["bundles"]  # type: ignore[assignment]
            if self.sub_bases is None:
                self.sub_bases = PRESETS[self.preset]["sub_bases"]  # type: ignore[assignment]
        self.sub_bases = self._named(self.sub_bases or {}, SubBasis, "sub-basis")
        self.bundles = self._named(self.bundles or {}, BundleSpec, "bundle")

        _check_choice(me, "adapter", self.adapter, ADAPTERS)
        _check_choice(me, "basis_init", self.basis_init, BASIS_INITS)
        _check_choice(me, "input_norm", self.input_norm, INPUT_NORMS)
        _check_choice(me, "projection", self.projection, PROJECTIONS)
        _check_number(me, "scaling", self.scaling, 1e-6, 1e6)
        _check_number(me, "quiet", self.quiet, 0.0, 1e6)
        _check_rank(me, "bottleneck", self.bottleneck, fraction_up_to=4.0)
        if self.basis_rank is not None:
            _check_rank(me, "basis_rank", self.basis_rank)
        _check_number(me, "dropout", self.dropout, 0.0, 0.999)
        if not isinstance(self.basis_seed, int) or self.basis_seed < 0:
            raise ValueError(f"{me}: basis_seed={self.basis_seed!r} must be an int >= 0.")
        if self.target_parameters:
            raise ValueError(f"{me}: target_parameters={self.target_parameters!r}: bundles sit on decoder blocks.")
        if not self.save_basis and self.basis_init != "random":
            raise ValueError(
                f"{me}: save_basis=False with basis_init={self.basis_init!r}: only a random basis can be drawn again "
                "from its seed; use save_basis=True."
            )
        if isinstance(self.layers_to_transform, int):
            self.layers_to_transform = [self.layers_to_transform]
        if not all(isinstance(i, int) for i in self.layers_to_transform or []):
            raise ValueError(f"{me}: layers_to_transform={self.layers_to_transform!r} must be a list of layer numbers.")
        for name, spec in self.bundles.items():
            self._check_bundle(name, spec)

    @staticmethod
    def _named(given: Any, cls: type, kind: str) -> dict[str, Any]:
        """Dict of `cls` by name, from a dict (of instances, field dicts or bare ranks) or a list of named ones."""
        if not isinstance(given, (Mapping, list, tuple)):
            raise ValueError(f"BundleConfig: {kind}s={given!r} must be a dict by name, or a list.")
        if not isinstance(given, Mapping):
            given = [item if isinstance(item, cls) else _from_mapping(cls, f"{kind} {item}", item) for item in given]
            names = [item.name for item in given]
            if twice := sorted({str(n) for n in names if names.count(n) > 1}):
                raise ValueError(f"BundleConfig: {kind} name(s) {twice} are given twice; names must differ.")
            given = {item.name: item for item in given}
        named = {}
        for name, item in given.items():
            _check_name(kind, name)
            if isinstance(item, (int, float)) and cls is SubBasis:
                item = {"rank": item}
            if not isinstance(item, (Mapping, cls)):
                raise ValueError(
                    f"BundleConfig: {kind} {name!r} is {item!r}; give a {cls.__name__} or a dict of its fields."
                )
            values = dict(item) if isinstance(item, Mapping) else {f.name: getattr(item, f.name) for f in fields(cls)}
            if values.get("name") not in (None, name):
                raise ValueError(
                    f"BundleConfig: the {kind} under key {name!r} is named {values['name']!r}; rename one."
                )
            named[name] = _from_mapping(cls, f"{kind} {name!r}", {**values, "name": name})
        return named

    def _check_bundle(self, name: str, spec: BundleSpec) -> None:
        assert self.sub_bases is not None
        kind = spec.adapter or self.adapter
        if kind == "full":
            return
        if unknown := [s for s in spec.sub_bases if s not in self.sub_bases]:
            raise ValueError(f"bundle {name!r}: sub_bases {unknown} are unknown; known are {sorted(self.sub_bases)}.")
        if not spec.sub_bases:
            raise ValueError(f"bundle {name!r}: sub_bases is empty; name at least one of {sorted(self.sub_bases)}.")
        if spec.overlap and COMMON not in self.sub_bases:
            raise ValueError(f"bundle {name!r}: overlap={spec.overlap} needs a sub-basis named {COMMON!r}; add one.")
        if spec.overlap and COMMON in spec.sub_bases:
            raise ValueError(
                f"bundle {name!r}: overlap={spec.overlap} already draws on {COMMON!r}; drop one of the two."
            )

    @property
    def signals(self) -> list[str]:
        """Names of all signals that some bundle takes part in, in order of first mention."""
        assert self.bundles is not None
        return list(dict.fromkeys(s for spec in self.bundles.values() for s, w in spec.signals.items() if w > 0))

    def column(self, signal: str) -> dict[str, float]:
        """Routing column of a signal: bundle -> weight in [0, 1] (a row of the S x M table of design.md section 3)."""
        assert self.bundles is not None
        return {name: float(spec.signals.get(signal, 0.0)) for name, spec in self.bundles.items()}

    def to_dict(self) -> dict[str, Any]:
        """PEFT's own, with bundles and sub-bases as lists: PEFT sorts the keys of the file, and their order matters."""
        values = asdict(self)
        values["weights_digest"] = self.digest_to_save or self.weights_digest
        return {**values, "bundles": list(values["bundles"].values()), "sub_bases": list(values["sub_bases"].values())}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's own, through a temporary file: a failed save leaves the earlier config in place."""
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory={save_directory!r} is a file; give a folder.")
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".saving-") as staging:
            super().save_pretrained(staging, **kwargs)
            os.replace(os.path.join(staging, CONFIG_NAME), os.path.join(save_directory, CONFIG_NAME))
        card = os.path.join(save_directory, "README.md")
        if os.path.isfile(card):  # PEFT's, just written: without our import it could not load the adapter
            with open(card, "r+") as file:
                if USAGE not in file.read():
                    file.write(USAGE)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """PEFT's own, with an error that names the file when it is not a JSON object."""
        try:
            with open(path_json_file) as file:
                loaded = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path_json_file} is not valid JSON ({error}); the checkpoint is damaged.") from error
        if not isinstance(loaded, dict):
            raise ValueError(f"{path_json_file} holds a {type(loaded).__name__} and not an object; it is damaged.")
        return super().from_json_file(path_json_file, **kwargs)
