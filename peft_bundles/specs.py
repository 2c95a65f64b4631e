"""`BundleSpec` and `SubBasis`, and the checks of their fields that `BundleConfig` uses too."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from torch import nn


KINDS = ("mlp", "linear", "diag", "full")  # behind a block
LINEAR_KINDS = ("lora", "mlp")  # at linear layers
BLOCK = "block"
GROUPS = ("mlp", "attention", "all-linear")  # places that stand for several linear layers of a block
ROLES = ("general", "semantic", "signal")
REMOVED = {"adapter": ("identity",), "kind": ("identity",), "projection": ("free",)}  # values of version 0.1

Rank: TypeAlias = int | float


def resolve_rank(rank: Rank, hidden_size: int) -> int:
    """Number of columns: an int stays, a fraction is that share of `hidden_size`, rounded down, at least 1."""
    # 1e-9: 0.29 * 100 is 28.999999999999996, and the user meant 29.
    return rank if isinstance(rank, int) else max(1, math.floor(rank * hidden_size + 1e-9))


def check_rank(owner: str, name: str, rank: Any, fraction_up_to: float = 1.0) -> None:
    is_int = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    is_fraction = isinstance(rank, float) and 0.0 < rank <= fraction_up_to
    if not (is_int or is_fraction):
        raise ValueError(
            f"{owner}: {name}={rank!r} is not a rank; give an int >= 1 or a float in (0, {fraction_up_to:g}]."
        )


def check_number(owner: str, name: str, value: Any, low: float, high: float) -> None:
    """Refuse anything but a number in [low, high]; NaN is refused too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{owner}: {name}={value!r} must be a number in [{low:g}, {high:g}].")


def check_choice(owner: str, name: str, value: Any, choices: Sequence[str]) -> None:
    if value in REMOVED.get(name, ()):
        raise ValueError(
            f"{owner}: {name}={value!r} is no longer supported as of version 0.2; use one of {', '.join(choices)}, or "
            "use peft-bundles 0.1 for an adapter that was trained with it."
        )
    if value not in choices:
        raise ValueError(f"{owner}: {name}={value!r} is unknown; choose one of {', '.join(choices)}.")


def check_name(kind: str, name: Any) -> None:
    # Names become attributes of `nn.ParameterDict` and components of state-dict keys.
    if not (isinstance(name, str) and name.isidentifier()) or hasattr(nn.ParameterDict, name):
        fitting = re.sub(r"\W", "_", str(name))
        fitting = fitting if fitting.isidentifier() and not hasattr(nn.ParameterDict, fitting) else f"b_{fitting}"
        raise ValueError(
            f"{kind} name {name!r} cannot be used, because it becomes a part of parameter names and an argument of "
            f"alphas(...): only letters, digits and '_', no digit first, no method of torch.nn.ParameterDict. Write "
            f"{fitting!r}."
        )


def take_kind(of: Any, owner: str, choices: Sequence[str]) -> None:
    """Check the field `kind`, and move to it what is given under its older name `adapter`."""
    if of.adapter is not None:
        check_choice(owner, "adapter", of.adapter, choices)
        if of.kind not in (None, of.adapter):
            raise ValueError(f"{owner}: kind={of.kind!r} and adapter={of.adapter!r} disagree; give kind alone.")
        of.kind, of.adapter = of.adapter, None
    if of.kind is not None:
        check_choice(owner, "kind", of.kind, choices)


def check_place(owner: str, place: Any) -> None:
    """Refuse a place that is neither a name nor a list of names."""
    names = [place] if isinstance(place, str) else place
    several = isinstance(names, (list, tuple)) and names and all(isinstance(n, str) and n for n in names)
    if place is not None and not several:
        raise ValueError(
            f"{owner}: place={place!r} must be {BLOCK!r}, one of {', '.join(GROUPS)}, a name of linear layers such as "
            "'o_proj', or a list of these."
        )


def from_mapping(cls: type, owner: str, values: Mapping[str, Any]) -> Any:
    names = [f.name for f in fields(cls)]
    if not isinstance(values, Mapping):
        raise ValueError(f"{owner} is {values!r}; give a {cls.__name__} or a dict of its fields.")
    if unknown := sorted(map(str, set(values) - set(names))):
        raise ValueError(f"{owner}: unknown field(s) {unknown}; a {cls.__name__} has {names}.")
    if "rank" not in values:
        raise ValueError(f"{owner}: rank is missing; give an int or a fraction of the hidden size.")
    return cls(**values)


@dataclass
class SubBasis:
    """A named part of the basis U of every layer: some of its columns.

    Args:
        rank: number of columns: an int, or a float as a fraction of the hidden size (rounded down, at least 1).
        name: filled in from the key of `BundleConfig.sub_bases`.

    Raises:
        ValueError: `rank` is neither an int >= 1 nor a float in (0, 1].

    Example:
        >>> from peft_bundles import BundleConfig, SubBasis
        >>> BundleConfig(sub_bases={"facts": SubBasis(64), "style": 0.1}, bundles={}).sub_bases["style"]
        SubBasis(rank=0.1, name='style')
    """

    rank: Rank
    name: str | None = None

    def __post_init__(self) -> None:
        check_rank("SubBasis" if self.name is None else f"sub-basis {self.name!r}", "rank", self.rank)


@dataclass
class BundleSpec:
    """One bundle: its place, its size, and the signals that update it.

    Args:
        rank: r_k, the size of the bundle: an int, or a float as a fraction of the hidden size. Behind a block
            `bottleneck` is a fraction of it, and with `projection="tied"` it is the width of the projector W_k. At
            linear layers it is the rank of each update.
        place: where the bundle acts. "block": on the residual stream behind the decoder block. "mlp", "attention" or
            "all-linear": at the linear layers inside the block. Or a name of linear layers, such as "o_proj". A list
            gives several places. None takes the config's.
        sub_bases: names of the sub-bases of U whose columns the bundle reads and writes behind a block (its support).
            Not used by `kind="full"`, nor at linear layers.
        overlap: share of the support that comes from the sub-basis named "common", in [0, 1).
        signals: signal -> weight in [0, 1]. 1: the signal updates the bundle (it owns it). 0 or absent: it never does.
            Between: its gradients are multiplied by the weight.
        bottleneck: hidden width b_k: an int, or a float as a fraction of r_k (for "full": of the hidden size), at most
            4.0. "diag" has none. None takes the config's. Not used at linear layers.
        kind: what the bundle computes. Behind a block, from the states x in its support: "mlp" up(gelu(down x)),
            "linear" up(down x), "diag" one factor per column, "full" an "mlp" on the whole residual stream, without U.
            At a linear layer, from its input v: "lora" s up(down v), "mlp" s up(gelu(down v)). None takes the config's.
        lora_alpha: s is lora_alpha / rank at linear layers, as in LoRA. None: 2 * rank, so that s is 2.
        use_rslora: s is lora_alpha / sqrt(rank) instead (arXiv 2312.03732).
        alpha: factor of the bundle's output, unless `alphas` or `set_alphas` say otherwise.
        role: "general", "semantic" or "signal"; a label for reports, and for `forward` of the trainer.
        topic: what a semantic bundle is about; a label for routers.
        protected: allow only weights of 0 and 1 in `signals`; also a label for trainers.
        name: filled in from the key of `BundleConfig.bundles`.
        adapter: the name of `kind` in version 0.1.

    Raises:
        ValueError: a value outside these ranges. The message names the field, the value and what to write.

    Example:
        >>> from peft_bundles import BundleSpec
        >>> spec = BundleSpec(rank=0.1, sub_bases=["style"], signals={"lm": 1.0, "preference": 0.3})
        >>> spec.alpha
        1.0
        >>> BundleSpec(rank=16, place="mlp", signals={"lm": 1.0}).kind is None  # "lora", by default
        True
    """

    rank: Rank
    sub_bases: list[str] = field(default_factory=list)
    overlap: float = 0.0
    signals: dict[str, float] = field(default_factory=dict)
    bottleneck: Rank | None = None
    kind: str | None = None
    place: str | list[str] | None = None
    lora_alpha: float | None = None
    use_rslora: bool = False
    alpha: float = 1.0
    role: str = "general"
    topic: str | None = None
    protected: bool = False
    name: str | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        owner = "BundleSpec" if self.name is None else f"bundle {self.name!r}"
        take_kind(self, owner, (*KINDS, *LINEAR_KINDS))
        check_place(owner, self.place)
        check_rank(owner, "rank", self.rank)
        check_choice(owner, "role", self.role, ROLES)
        if self.bottleneck is not None:
            check_rank(owner, "bottleneck", self.bottleneck, fraction_up_to=4.0)
        if not isinstance(self.sub_bases, (list, tuple)) or not all(isinstance(s, str) for s in self.sub_bases):
            raise ValueError(f"{owner}: sub_bases={self.sub_bases!r} must be a list of names, e.g. ['mem'].")
        if not isinstance(self.signals, Mapping):
            raise ValueError(f"{owner}: signals={self.signals!r} must be a dict, e.g. {{'lm': 1.0}}.")
        self.sub_bases, self.signals = list(self.sub_bases), dict(self.signals)
        if len(set(self.sub_bases)) != len(self.sub_bases):
            raise ValueError(f"{owner}: sub_bases={self.sub_bases} names a sub-basis twice; name each once.")
        check_number(owner, "overlap", self.overlap, 0.0, 0.999)
        check_number(owner, "alpha", self.alpha, -1e6, 1e6)
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"{owner}: use_rslora={self.use_rslora!r} must be True or False.")
        if self.lora_alpha is not None:
            check_number(owner, "lora_alpha", self.lora_alpha, 1e-6, 1e6)
        for signal, weight in self.signals.items():
            check_number(owner, f"signals[{signal!r}]", weight, 0.0, 1.0)
            if self.protected and 0.0 < weight < 1.0:
                raise ValueError(
                    f"{owner} is protected, so signals[{signal!r}]={weight!r} must be 0 or 1, or protected=False."
                )
