"""`BundleConfig`, `BundleSpec` and `SubBasis`: dataclasses that check their fields and can be saved as JSON."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType
from peft.utils.constants import CONFIG_NAME

from .specs import (
    BLOCK,
    KINDS,
    LINEAR_KINDS,
    BundleSpec,
    Rank,
    SubBasis,
    check_choice,
    check_name,
    check_number,
    check_place,
    check_rank,
    from_mapping,
    take_kind,
)
from .taxonomy import PRESETS


logger = logging.getLogger(__name__)
BASIS_INITS = ("random", "pca", "null")
INPUT_NORMS = ("standard", "none")
PROJECTIONS = ("none", "tied")
# Fields that the package fills in and reads again from files: dicts by name, with values of these types.
NOTES: dict[str, Any] = {
    "base_fingerprint": str,
    "basis_fingerprint": (int, float),
    "calibration": object,
    "provenance": object,
    "keys": Mapping,
}
PEFT_TITLE = "# Model Card for Model ID"  # of the empty form that PEFT writes
FORMAT_VERSION = 2  # of checkpoints; this version writes it, and reads it and all earlier ones
COMMON = "common"  # the sub-basis that `overlap` draws from

USAGE = """
# A BUNDLE adapter

`pip install peft-bundles`, and import it before PEFT loads the adapter:

```python
import peft_bundles
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this folder or repository")
print(model.bundle_report())
```
"""


@dataclass
class BundleConfig(PeftConfig):
    """Configuration of a BUNDLE adapter: its bundles, the basis they live in, and how they train.

    Behind a decoder block there is an orthonormal basis U. A bundle reads x = ((h - mu) / sigma) U on its support (its
    columns of U) and adds c * alpha * u(x) there. At a linear layer W a bundle adds alpha * s * up(down(v)) to W v, as
    LoRA does. `docs/concepts.md` has the equations.

    Args:
        preset: a name of `peft_bundles.PRESETS`. Without it and without `bundles`: "single_adapter".
        bundles: name -> `BundleSpec` (or a dict of its fields), or a list of named ones. Beside a preset they replace
            the preset's bundles.
        sub_bases: name -> `SubBasis` (or a bare rank), or a list of named ones. Beside a preset they replace the
            preset's. They are cut from U in this order.
        basis_rank: R, the number of columns of U: an int, or a float as a fraction of the hidden size. None: as many as
            the sub-bases need, rounded up to a multiple of 8.
        basis_seed: seed of the random basis. Layer l draws from (seed, l). (The first weights come from torch's own
            generator, as in other PEFT methods: call `torch.manual_seed` before attaching.)
        basis_init: "random", or directions that `calibrate` chooses: "pca" (of high variance) or "null" (of low
            variance). Until `calibrate` has run, these are random, too.
        kind: kind of the bundles that name none; see `BundleSpec`. None: "mlp" behind a block, "lora" at linear layers.
        place: place of the bundles that name none; see `BundleSpec`. None: "block". With a preset it moves the preset.
        bottleneck: hidden width of bundles that name none; see `BundleSpec`.
        projection: "none": a bundle reads and writes the columns of its support. "tied": a trained projector W_k maps
            the support to r_k dimensions, and its transpose maps back (P = W U^T). More hidden units are usually a
            better use of the same parameters.
        input_norm: "standard": x is centred and scaled with mu and sigma from `calibrate`. "none": x = h U.
        scaling: c, a constant factor on what the bundles add, like lora_alpha / r in LoRA. Under Adam it is the ratio
            of the step sizes of the second map (`up`) and the first (`down`), as in LoRA+ (arXiv 2402.12354).
        quiet: weight of the penalty on what bundles add to the states that `calibrate` kept. `forward` with labels adds
            it to the loss while training; to a loss of your own add `model.quiet_loss()`. 0 turns it off.
        dropout: dropout of the hidden units while training, in [0, 1).
        layers_to_transform: numbers of the decoder layers that get bundles. None: all.
        target_modules: names or a regex of the decoder blocks, for models where they are not found automatically. Or of
            linear layers inside them, as in LoRA, where bundles without a place then sit.
        exclude_modules: blocks or linear layers to leave out, as in other PEFT methods.
        modules_to_save: further modules to train in full and to save, as in other PEFT methods. Alphas do not turn
            them off; `disable_adapter` does.
        save_basis: store U in the checkpoint. False draws it again from the seed (`basis_init="random"` only).
        basis_source: where U, mu and sigma are stored once for several adapters, and not in each: a folder or Hub
            repository that `save_basis` or `push_basis` wrote. It is read when the adapter is loaded.
        init_weights: True: a fresh adapter changes nothing, bit for bit. False: random weights, for tests.
        task_type: set it to "CAUSAL_LM", as in other PEFT methods. Without a task type PEFT calls the base model
            directly, which leaves out the `quiet` penalty and `generate(..., alphas=)`.

    The library fills in the other fields, and they are saved: `base_shape` ([hidden size, number of layers]),
    `base_fingerprint` (a few weights of the base model, by which another one is refused), `basis_fingerprint` (layer ->
    a number that tells bases apart), `calibration` (what `calibrate` returned), `keys` (bundle -> the rows and tokens
    that its key was made of), `provenance` (of bundles that `save_bundle` wrote: their basis, their base model, a
    summary of their training),
    `weights_digest` (in files: SHA-256 of the tensors) and `format_version` (of the files; 1 where it is missing, as in
    files of version 0.1; 2 since bundles have places).

    Raises:
        ValueError: a value is not allowed. The message names the field, the value and what to write.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, BundleSpec
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> config = BundleConfig(
        ...     sub_bases={"facts": 0.5, "style": 8},
        ...     bundles={
        ...         "b_facts": BundleSpec(rank=0.5, sub_bases=["facts"], signals={"lm": 1.0}),
        ...         "b_style": BundleSpec(rank=8, sub_bases=["style"], signals={"preference": 1.0}),
        ...     },
        ...     task_type="CAUSAL_LM",
        ... )
        >>> config.signals
        ['lm', 'preference']
        >>> get_peft_model(base, config).get_nb_trainable_parameters()[0]
        320
    """

    preset: str | None = None
    bundles: dict[str, BundleSpec] | None = None
    sub_bases: dict[str, SubBasis] | None = None
    basis_rank: Rank | None = None
    basis_seed: int = 0
    basis_init: str = "null"
    kind: str | None = None
    place: str | list[str] | None = None
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
    basis_source: str | None = None
    init_weights: bool = True
    base_shape: list[int] | None = None
    base_fingerprint: dict[str, str] | None = None
    basis_fingerprint: dict[str, float] | None = None
    calibration: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    keys: dict[str, dict[str, int]] | None = None
    weights_digest: str | None = field(default=None, compare=False)
    format_version: int = FORMAT_VERSION
    adapter: str | None = None  # the name of `kind` in version 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        # PEFT and transformers collect an adapter's tensors first and save its config afterwards. This is the digest of
        # the tensors collected last; it becomes `weights_digest` in the file. In memory that field is None, except in a
        # config that was read from a file and whose tensors have not been loaded yet.
        self.digest_to_save: str | None = None
        self.size_to_save: str | None = None  # and the size of these tensors, in words
        self.peft_type = PeftType("BUNDLE")
        owner = "BundleConfig"
        if not isinstance(self.format_version, int) or self.format_version < 1:
            raise ValueError(
                f"{owner}: format_version={self.format_version!r} must be an int >= 1; the file is damaged."
            )
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"{owner}: format_version={self.format_version} was written by a newer version of peft-bundles; this "
                f"one reads formats up to {FORMAT_VERSION}. Upgrade it: pip install --upgrade peft-bundles."
            )
        if self.preset is None and self.bundles is None:
            self.preset = "single_adapter"
        if self.preset is not None:
            check_choice(owner, "preset", self.preset, sorted(PRESETS))
            if self.bundles is None:
                self.bundles = PRESETS[self.preset]["bundles"]  # type: ignore[assignment]
            if self.sub_bases is None:
                self.sub_bases = PRESETS[self.preset]["sub_bases"]  # type: ignore[assignment]
        self.sub_bases = self._named(self.sub_bases or {}, SubBasis, "sub-basis")
        self.bundles = self._named(self.bundles or {}, BundleSpec, "bundle")

        take_kind(self, owner, (*KINDS, *LINEAR_KINDS))
        check_place(owner, self.place)
        check_choice(owner, "basis_init", self.basis_init, BASIS_INITS)
        check_choice(owner, "input_norm", self.input_norm, INPUT_NORMS)
        check_choice(owner, "projection", self.projection, PROJECTIONS)
        check_number(owner, "scaling", self.scaling, 1e-6, 1e6)
        check_number(owner, "quiet", self.quiet, 0.0, 1e6)
        check_rank(owner, "bottleneck", self.bottleneck, fraction_up_to=4.0)
        if self.basis_rank is not None:
            check_rank(owner, "basis_rank", self.basis_rank)
        check_number(owner, "dropout", self.dropout, 0.0, 0.999)
        if not isinstance(self.basis_seed, int) or self.basis_seed < 0:
            raise ValueError(f"{owner}: basis_seed={self.basis_seed!r} must be an int >= 0.")
        if self.target_parameters:
            raise ValueError(
                f"{owner}: target_parameters={self.target_parameters!r} cannot be used; bundles sit on decoder "
                "blocks, which are found automatically. Leave it out."
            )
        if self.basis_source is not None and not (isinstance(self.basis_source, str) and self.basis_source):
            raise ValueError(
                f"{owner}: basis_source={self.basis_source!r} must be the folder or repository of a basis, or None."
            )
        if not self.save_basis and self.basis_init != "random":
            raise ValueError(
                f"{owner}: save_basis=False with basis_init={self.basis_init!r}: only a random basis can be drawn "
                "again from its seed; use save_basis=True."
            )
        if isinstance(self.layers_to_transform, int):
            self.layers_to_transform = [self.layers_to_transform]
        for field_name, value_type in NOTES.items():
            notes = getattr(self, field_name)
            if notes is not None and not (
                isinstance(notes, Mapping)
                and all(isinstance(k, str) and isinstance(v, value_type) for k, v in notes.items())
            ):
                raise ValueError(f"{owner}: {field_name} is damaged ({str(notes)[:60]}); get the file again.")
        for field_name in ("target_modules", "exclude_modules", "modules_to_save"):
            modules = getattr(self, field_name)
            several = isinstance(modules, (list, tuple, set)) and all(isinstance(name, str) for name in modules)
            if not several and not isinstance(modules, (str, type(None))):
                raise ValueError(f"{owner}: {field_name}={modules!r} must be a list of module names.")
        layers = [] if self.layers_to_transform is None else self.layers_to_transform
        if not isinstance(layers, (list, tuple)) or not all(isinstance(i, int) for i in layers):
            raise ValueError(
                f"{owner}: layers_to_transform={self.layers_to_transform!r} must be a list of layer numbers, such as "
                "[0, 1]."
            )
        for name, spec in self.bundles.items():
            if self.target_modules is None or spec.place is not None or self.place is not None:
                self.check_bundle(name)  # else it may be at linear layers, which is known when the adapter is attached
        idle = [name for name, spec in self.bundles.items() if not any(spec.signals.values())]
        if idle and len(idle) < len(self.bundles) and not self.inference_mode:
            warnings.warn(
                f"no signal updates bundle(s) {idle}: BundleTrainer and route() leave them alone. Name their owners, "
                "e.g. signals={'lm': 1.0}.",
                stacklevel=2,
            )

    @staticmethod
    def _named(items: Any, cls: type, kind: str) -> dict[str, Any]:
        """Dict of `cls` by name, from a dict (of instances, field dicts or bare ranks) or a list of named ones."""
        if not isinstance(items, (Mapping, list, tuple)):
            raise ValueError(
                f"BundleConfig: {kind}s={items!r} must be a dict by name, or a list of {cls.__name__}(name=...)."
            )
        if not isinstance(items, Mapping):
            items = [item if isinstance(item, cls) else from_mapping(cls, f"{kind} {item}", item) for item in items]
            names = [item.name for item in items]
            if None in names:
                raise ValueError(
                    f"BundleConfig: {kind} {names.index(None)} of the list has no name; give it one, e.g. "
                    f"{cls.__name__}(name='style', ...)."
                )
            if twice := sorted({str(n) for n in names if names.count(n) > 1}):
                raise ValueError(f"BundleConfig: {kind} name(s) {twice} appear twice; give every {kind} its own name.")
            for name in names:
                check_name(kind, name)
            items = {item.name: item for item in items}
        named = {}
        for name, item in items.items():
            check_name(kind, name)
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
            named[name] = from_mapping(cls, f"{kind} {name!r}", {**values, "name": name})
        return named

    def check_bundle(self, name: str) -> None:
        """Refuse a bundle that cannot be at one of its places.

        Args:
            name: of the bundle.

        Raises:
            ValueError: its kind acts behind blocks only, or at linear layers only; behind a block, no sub-basis or one
                that is unknown, or an overlap without common columns.
        """
        assert self.bundles is not None and self.sub_bases is not None
        spec, places = self.bundles[name], self.places(name)
        kind = self.kind_of(name, BLOCK not in places)
        if any(place != BLOCK for place in places) and kind not in LINEAR_KINDS:
            raise ValueError(
                f"bundle {name!r}: kind={kind!r} acts behind blocks only, and place={places} is at linear layers. "
                f"Write kind={' or '.join(map(repr, LINEAR_KINDS))} there (rank=1 is the smallest), or keep the kind "
                f"and write place={BLOCK!r}" + ("." if kind == "full" else " and sub_bases.")
            )
        if BLOCK in places and kind not in KINDS:
            raise ValueError(
                f"bundle {name!r}: kind={kind!r} acts at linear layers only, and place={places} has {BLOCK!r}; use "
                f"place='mlp', or one of the kinds {', '.join(KINDS)}."
            )
        if BLOCK not in places or kind == "full":
            return
        if unknown := [s for s in spec.sub_bases if s not in self.sub_bases]:
            raise ValueError(f"bundle {name!r}: sub_bases {unknown} are unknown; choose from {sorted(self.sub_bases)}.")
        if not spec.sub_bases:
            choices = sorted(self.sub_bases) or "the config's, which has none yet, e.g. sub_bases={'main': 0.25}"
            raise ValueError(f"bundle {name!r}: sub_bases is empty; name at least one of {choices}.")
        if spec.overlap and COMMON not in self.sub_bases:
            raise ValueError(
                f"bundle {name!r}: overlap={spec.overlap} needs a sub-basis named {COMMON!r}; add one to sub_bases."
            )
        if spec.overlap and COMMON in spec.sub_bases:
            raise ValueError(
                f"bundle {name!r}: overlap={spec.overlap} already adds columns of {COMMON!r}; drop it from sub_bases."
            )

    def places(self, bundle: str) -> tuple[str, ...]:
        """The places of a bundle, as named: "block", "mlp", "attention", "all-linear" or names of linear layers."""
        assert self.bundles is not None
        place = self.bundles[bundle].place or self.place or BLOCK
        return (place,) if isinstance(place, str) else tuple(place)

    def kind_of(self, bundle: str, at_linears: bool = False) -> str:
        """The kind of a bundle behind blocks, or at linear layers."""
        assert self.bundles is not None
        return self.bundles[bundle].kind or self.kind or ("lora" if at_linears else "mlp")

    @property
    def signals(self) -> list[str]:
        """Names of the signals that update some bundle, in the order in which the bundles name them."""
        assert self.bundles is not None
        return list(dict.fromkeys(s for spec in self.bundles.values() for s, w in spec.signals.items() if w > 0))

    def column(self, signal: str) -> dict[str, float]:
        """bundle -> weight in [0, 1] with which a signal updates it: a row of the table signals x bundles."""
        assert self.bundles is not None
        return {name: float(spec.signals.get(signal, 0.0)) for name, spec in self.bundles.items()}

    def to_dict(self) -> dict[str, Any]:
        """The fields for the file, bundles and sub-bases as lists: their order matters, and PEFT sorts dicts by key."""
        values = asdict(self)
        values["weights_digest"] = self.digest_to_save or self.weights_digest
        values["format_version"] = FORMAT_VERSION
        return {**values, "bundles": list(values["bundles"].values()), "sub_bases": list(values["sub_bases"].values())}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the config to a folder, as in PEFT. A save that fails leaves the earlier config in place."""
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory={save_directory!r} is a file; give a folder.")
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".saving-") as staging:
            super().save_pretrained(staging, **kwargs)
            os.replace(os.path.join(staging, CONFIG_NAME), os.path.join(save_directory, CONFIG_NAME))
        if self.size_to_save is not None:
            logger.info("%s: %s", ", ".join(self.bundles or ()), self.size_to_save)
        card = os.path.join(save_directory, "README.md")
        if os.path.isfile(card):  # the card that PEFT has just written does not say which package loads the adapter
            with open(card, "r+") as file:
                text = file.read()
                if USAGE not in text:
                    header, _, body = text.partition(PEFT_TITLE)
                    text = f"{header.rstrip()}\n{USAGE}" if body else text + USAGE
                if self.size_to_save is not None:
                    text = re.sub(r"\nSize of the file: .*\n", "", text) + f"\nSize of the file: {self.size_to_save}.\n"
                file.seek(0)
                file.write(text)
                file.truncate()

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read the fields of a file, as in PEFT. Raises ValueError, with the path, unless it holds a JSON object."""
        try:
            with open(path_json_file) as file:
                loaded = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path_json_file} is not valid JSON ({error}); the checkpoint is damaged.") from error
        if not isinstance(loaded, dict):
            raise ValueError(f"{path_json_file} holds a {type(loaded).__name__}, not an object; it is damaged.")
        values = super().from_json_file(path_json_file, **kwargs)
        values.setdefault("format_version", 1)
        return values
