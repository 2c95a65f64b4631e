"""The two tables of a run: who is updated by a signal (the config's), and who is on in an objective's rows.

Parameters isolated is not function isolated: a bundle that is on changes the forward of every row. From both tables
follows what a run promises, which `untouched_by` works out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import BundleConfig


def forward_table(
    config: BundleConfig, signals: Mapping[str, tuple[str, ...]], given: Mapping[str, Any] | None
) -> dict[str, dict[str, float]]:
    """Objective -> bundle -> alpha in that objective's rows; bundles not named keep what they have.

    Args:
        signals: objective -> the signals it emits.
        given: by objective, or by a signal of it: "all", "owners" (the bundles that its signals update, and those of
            role "general"), a list of the bundles that are on, or bundle -> alpha.

    Raises:
        ValueError: unknown names; two entries for one objective that differ; a signal none of whose owners is on.
    """
    bundles = config.bundles or {}
    home = {s: name for name, emitted in signals.items() for s in emitted} | {name: name for name in signals}
    chosen: dict[str, Any] = {}
    for key, value in (given or {}).items():
        if key not in home:
            raise ValueError(f"forward[{key!r}] is no objective or signal; those are {sorted(home)}.")
        if chosen.setdefault(home[key], value) != value:
            raise ValueError(
                f"forward[{key!r}]={value!r}, but other signals of objective {home[key]!r} have "
                f"{chosen[home[key]]!r}; they share rows, give one entry for the objective."
            )
    table = {}
    for name, emitted in signals.items():
        table[name] = _alphas(name, chosen.get(name, "all"), updated(config, emitted), config)
        for signal in emitted:
            owners = updated(config, (signal,))
            if bundles and all(table[name].get(b, bundles[b].alpha) == 0 for b in owners):
                raise ValueError(
                    f"forward[{name!r}] turns off all bundles that signal {signal!r} updates, {sorted(owners)}; a "
                    "bundle that is off learns nothing. Leave one of them on."
                )
    return table


def _alphas(name: str, value: Any, owners: set[str], config: BundleConfig) -> dict[str, float]:
    bundles = config.bundles or {}
    if value == "all":
        return {}
    if value == "owners":
        value = [b for b, spec in bundles.items() if b in owners or spec.role == "general"]
    if not isinstance(value, (list, tuple, Mapping)):
        raise ValueError(
            f"forward[{name!r}]={value!r} must be 'all', 'owners', a list of bundles or a dict bundle -> alpha."
        )
    if unknown := [b for b in value if b not in bundles]:
        raise ValueError(f"forward[{name!r}] names bundle(s) {unknown}; known are {list(bundles)}.")
    if isinstance(value, Mapping):
        return {b: float(a) for b, a in value.items()}
    return {b: 0.0 for b in bundles if b not in value}


def updated(config: BundleConfig, signals: Sequence[str]) -> set[str]:
    """Bundles that some of the signals update."""
    return {b for s in signals for b, w in config.column(s).items() if w > 0}


def untouched_by(
    config: BundleConfig, signals: Mapping[str, tuple[str, ...]], table: Mapping[str, Mapping[str, float]]
) -> dict[str, list[str]]:
    """Objective -> the objectives without which its bundles would get the very same weights (frozen trunk).

    Objective A feels B if a bundle that B updates is on in A's rows or updated by A too, or if A feels someone who
    feels B.
    """
    bundles = config.bundles or {}
    learns = {name: updated(config, emitted) for name, emitted in signals.items()}
    reads = {name: {b for b, spec in bundles.items() if table[name].get(b, spec.alpha)} for name in signals}
    feels = {a: {b for b in signals if learns[b] & (reads[a] | learns[a])} | {a} for a in signals}
    for _ in signals:
        feels = {a: set().union(*(feels[b] for b in near)) for a, near in feels.items()}
    return {a: [b for b in signals if b not in feels[a]] for a in signals}


def promises(
    config: BundleConfig, signals: Mapping[str, tuple[str, ...]], table: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """What the tables promise, a sentence an objective."""
    said = []
    for name, others in untouched_by(config, signals, table).items():
        felt = [b for b in signals if b not in others and b != name]
        if others:
            said.append(f"{name}: its bundles get the weights of a run without {', '.join(others)}.")
        if felt:
            said.append(f"{name}: its bundles feel {', '.join(felt)}: see `forward` to turn bundles off in its rows.")
    return said


def at_full_rate(config: BundleConfig, penalties: Sequence[str], multipliers: Mapping[str, float]) -> list[str]:
    """Bundles that only these signals update, and that have no learning-rate multiplier.

    Adam's step does not depend on the scale of a gradient, so a penalty moves a bundle of its own as far as the main
    loss moves its own, however small the coefficient (docs/decisions.md).
    """
    bundles = config.bundles or {}
    owners = updated(config, penalties)
    return [b for b in bundles if b in owners and set(bundles[b].signals) <= set(penalties) and b not in multipliers]
