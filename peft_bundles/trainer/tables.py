"""The two tables of a run: the bundles that a signal updates (the config's), and those that are on in which rows.

Isolated parameters are not an isolated function: a bundle that is on changes the forward of every row. What a run
promises follows from both tables (`untouched_by`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import BundleConfig
from ..specs import ROLES


def forward_table(
    config: BundleConfig, signals: Mapping[str, tuple[str, ...]], entries: Mapping[str, Any] | None
) -> dict[str, dict[str, float]]:
    """Objective -> bundle -> alpha in that objective's rows; bundles not named keep their alpha.

    Args:
        config: of the adapter.
        signals: objective -> the signals it emits.
        entries: objective, or a signal of it -> "all", "owners" (the bundles that its signals update), a list of
            what is on, or bundle -> alpha. A list names bundles, "owners" and roles (all bundles of that role); where a
            bundle has such a name, the bundle is meant. None: "all" everywhere.

    Raises:
        ValueError: an unknown name, two entries for one objective that differ, or a signal whose owners are all off.
    """
    bundles = config.bundles or {}
    home = {s: name for name, emitted in signals.items() for s in emitted} | {name: name for name in signals}
    chosen: dict[str, Any] = {}
    for key, value in (entries or {}).items():
        if key not in home:
            raise ValueError(f"forward[{key!r}] is not an objective or signal; use some of {sorted(home)}.")
        if chosen.setdefault(home[key], value) != value:
            raise ValueError(
                f"forward[{key!r}]={value!r}, but other signals of objective {home[key]!r} have "
                f"{chosen[home[key]]!r}. They share rows: give one entry, forward[{home[key]!r}]."
            )
    table = {}
    for name, emitted in signals.items():
        table[name] = _alphas(name, chosen.get(name, "all"), updated(config, emitted), config)
        for signal in emitted:
            owners = updated(config, (signal,))
            if bundles and all(table[name].get(b, bundles[b].alpha) == 0 for b in owners):
                raise ValueError(
                    f"forward[{name!r}] turns off all bundles that signal {signal!r} updates, {sorted(owners)}. A "
                    "bundle that is off learns nothing; leave one of them on."
                )
    return table


def _alphas(name: str, value: Any, owners: set[str], config: BundleConfig) -> dict[str, float]:
    """One row of the forward table."""
    bundles = config.bundles or {}
    if value == "all":
        return {}
    value = ["owners"] if value == "owners" else value
    if not isinstance(value, (list, tuple, Mapping)):
        raise ValueError(
            f"forward[{name!r}]={value!r} must be 'all', 'owners', a list of bundles or a dict bundle -> alpha."
        )
    groups = {role: {b for b, spec in bundles.items() if spec.role == role} for role in ROLES} | {"owners": owners}
    groups = {} if isinstance(value, Mapping) else groups
    if unknown := [b for b in value if b not in bundles and not (isinstance(b, str) and b in groups)]:
        raise ValueError(f"forward[{name!r}] names bundle(s) {unknown}; it takes some of {[*bundles, *groups]}.")
    if isinstance(value, Mapping):
        return {b: float(a) for b, a in value.items()}
    on = {b for each in value for b in ({each} if each in bundles else groups[each])}
    return {b: 0.0 for b in bundles if b not in on}


def updated(config: BundleConfig, signals: Sequence[str]) -> set[str]:
    """The bundles that at least one of the signals updates."""
    return {b for s in signals for b, w in config.column(s).items() if w > 0}


def untouched_by(
    config: BundleConfig, signals: Mapping[str, tuple[str, ...]], table: Mapping[str, Mapping[str, float]]
) -> dict[str, list[str]]:
    """Objective -> the others that cannot change what its bundles learn, with a frozen trunk.

    B can change what A's bundles learn if a bundle that B updates is on in A's rows or is updated by A too, or if B can
    change what a third objective's bundles learn, and the third can change A's.

    Args:
        config: of the adapter.
        signals: objective -> the signals it emits.
        table: from `forward_table`.
    """
    bundles = config.bundles or {}
    updates = {name: updated(config, emitted) for name, emitted in signals.items()}
    on = {name: {b for b, spec in bundles.items() if table[name].get(b, spec.alpha)} for name in signals}
    changed_by = {a: {b for b in signals if updates[b] & (on[a] | updates[a])} | {a} for a in signals}
    for _ in signals:
        changed_by = {a: set().union(*(changed_by[b] for b in direct)) for a, direct in changed_by.items()}
    return {a: [b for b in signals if b not in changed_by[a]] for a in signals}


def promises(
    config: BundleConfig, signals: Mapping[str, tuple[str, ...]], table: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """What the tables promise: one or two sentences for each objective."""
    bundles = config.bundles or {}
    sentences = []
    for name, others in untouched_by(config, signals, table).items():
        changing = [b for b in signals if b not in others and b != name]
        if others:
            sentences.append(f"{name}: its bundles get the weights of a run without {', '.join(others)}.")
        if changing:
            own = updated(config, signals[name])
            reasons = []
            for other in changing:
                theirs = updated(config, signals[other])
                seen = [b for b in bundles if b in theirs - own and table[name].get(b, bundles[b].alpha)]
                if common := [b for b in bundles if b in own & theirs]:
                    reasons.append(f"{other} (which updates {', '.join(common)} too)")
                elif seen:
                    reasons.append(f"{other} ({', '.join(seen)} on in these rows)")
                else:
                    reasons.append(f"{other} (through another objective)")
            sentences.append(f"{name}: what its bundles learn depends on {', '.join(reasons)}.")
    return sentences


def company(
    config: BundleConfig, signals: Mapping[str, tuple[str, ...]], table: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """Which bundles learn with which others on: a sentence for each objective."""
    bundles = config.bundles or {}
    lines = []
    for name, emitted in signals.items():
        own = updated(config, emitted)
        on = [b for b in bundles if table[name].get(b, bundles[b].alpha) != 0]
        learning, others = [b for b in on if b in own], [b for b in on if b not in own]
        if not bundles:
            continue
        whole = len(others) > 4 and set(bundles) <= own | set(others)
        beside = "no other bundle" if not others else "all other bundles" if whole else ", ".join(others)
        lines.append(f"{name}: {', '.join(learning)} learn{'s' * (len(learning) == 1)} with {beside} on.")
    return lines


def at_full_rate(config: BundleConfig, penalties: Sequence[str], multipliers: Mapping[str, float]) -> list[str]:
    """The bundles that only penalties update and that have no learning-rate multiplier.

    Adam's step does not depend on the scale of a gradient. So a penalty that has a bundle to itself moves it as far as
    the main loss moves its bundles, however small the penalty's coefficient is (docs/decisions.md).

    Args:
        config: of the adapter.
        penalties: signals that are penalties.
        multipliers: bundle -> factor on the learning rate.
    """
    bundles = config.bundles or {}
    owners = updated(config, penalties)
    return [b for b in bundles if b in owners and set(bundles[b].signals) <= set(penalties) and b not in multipliers]
