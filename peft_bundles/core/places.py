"""Where bundles sit: behind decoder blocks, and at the linear layers inside them.

A place is named in the config ("block", "mlp", "attention", "all-linear", a name of linear layers). A `Site` is one
module of the model: a block, or a linear layer inside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import BundleConfig
from ..specs import BLOCK


CHILD = "bundles"  # the name under which a block or a linear layer holds its BundleLayer
# Linear layers that bundles leave alone: those that choose experts, and Mamba's, whose weight is used without a call.
LEFT_OUT = ("gate", "router", "shared_expert_gate", "dt_proj")


class Site(NamedTuple):
    """A module with bundles.

    Attributes:
        block: number of the decoder block.
        path: name of the linear layer inside the block; "" for the block itself.
    """

    block: int
    path: str = ""

    def __str__(self) -> str:
        return f"{self.block}.{self.path}" if self.path else str(self.block)


def sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of a linear layer, plain, quantised, of GPT-2 or with LoRA on it; None for other modules."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return sizes if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]


def linears_of(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside a block by name, without adapters, what they wrap, and `LEFT_OUT`."""
    return dict(_linears(block, ""))


def _linears(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if name == CHILD or name in LEFT_OUT:
            continue
        if sizes_of(child) is not None:
            yield inner, child
        else:
            yield from _linears(child, inner)


def _is_attention(block: nn.Module, path: str) -> bool:
    """Whether a linear layer belongs to an attention module, by the names and classes of the modules around it."""
    parts = path.split(".")[:-1]
    around = [block.get_submodule(".".join(parts[: n + 1])) for n in range(len(parts))]
    marks = [*parts, *(type(module).__name__ for module in around)]
    return any("attention" in mark.lower() or "attn" in mark.lower() for mark in marks)


def at_place(place: str, block: nn.Module, linears: Sequence[str]) -> list[str]:
    """Those of the linear layers of a block that a place names; none for "block"."""
    if place == BLOCK:
        return []
    if place == "all-linear":
        return list(linears)
    if place in ("mlp", "attention"):
        return [path for path in linears if _is_attention(block, path) == (place == "attention")]
    return [path for path in linears if path == place or path.endswith(f".{place}")]


def bundles_at(config: BundleConfig, blocks: Mapping[int, nn.Module]) -> dict[Site, list[str]]:
    """Which bundles sit where; sites without a bundle are left out.

    Args:
        config: of the adapter.
        blocks: number of the block -> block, for those that get bundles.

    Raises:
        ValueError: a place that names no linear layer in any block, or where the bundle cannot be.
    """
    sites: dict[Site, list[str]] = {}
    linears = {number: list(linears_of(block)) for number, block in blocks.items()}
    for bundle in config.bundles or ():
        config.check_bundle(bundle)
        for place in config.places(bundle):
            if place == BLOCK:
                matched = [Site(number) for number in blocks]
            else:
                matched = [
                    Site(number, path)
                    for number, block in blocks.items()
                    for path in at_place(place, block, linears[number])
                ]
            if not matched and blocks:
                names = sorted({path for paths in linears.values() for path in paths})
                raise ValueError(
                    f"bundle {bundle!r}: place={place!r} names no linear layer of the decoder blocks. They have {names}"
                    + (
                        "; experts that are one tensor for all of them are no linear layers. "
                        if place in ("mlp", "all-linear")
                        else ". "
                    )
                    + f"Name some of these, or use place={BLOCK!r}."
                )
            for site in matched:
                names_there = sites.setdefault(site, [])
                if bundle not in names_there:
                    names_there.append(bundle)
    return sites


def place_targets(config: BundleConfig, blocks: Mapping[str, int], names: Sequence[str]) -> None:
    """Read `target_modules` that name linear layers as the place of the bundles that have none.

    Args:
        config: of the adapter; its `place`, `target_modules` and `layers_to_transform` are set.
        blocks: name of the block -> its number.
        names: the linear layers that `target_modules` names.

    Raises:
        ValueError: every bundle has a place; linear layers outside the blocks, or other ones in one block than in the
            next.
    """
    check_unplaced(config)
    by_block: dict[int, set[str]] = {}
    for name in names:
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if block is None:
            raise ValueError(
                f"target_modules={config.target_modules!r} names {name}, which is not inside a decoder block; bundles "
                "sit behind blocks and at their linear layers. Name some of these."
            )
        by_block.setdefault(blocks[block], set()).add(name.removeprefix(f"{block}."))
    paths = next(iter(by_block.values()))
    if any(other != paths for other in by_block.values()):
        raise ValueError(
            f"target_modules={config.target_modules!r} names other linear layers in one decoder block than in the "
            "next; give their names with place= and the blocks with layers_to_transform=."
        )
    if len(by_block) < len(blocks) and config.layers_to_transform is None:
        config.layers_to_transform = sorted(by_block)
    config.place, config.target_modules = sorted(paths), None


def check_unplaced(config: BundleConfig) -> None:
    """Refuse `target_modules` that name linear layers where no bundle would sit at them."""
    specs: dict[str, Any] = config.bundles or {}
    if specs and (config.place is not None or all(spec.place is not None for spec in specs.values())):
        raise ValueError(
            f"target_modules={config.target_modules!r} names linear layers for bundles without a place, and every "
            "bundle has one; leave target_modules out, or the place."
        )


def signals_of(config: BundleConfig, names: Sequence[str]) -> dict[str, int]:
    """A number for each bundle; bundles that learn from the same signals have the same one."""
    specs: dict[str, Any] = config.bundles or {}
    signals = [frozenset(s for s, w in specs[name].signals.items() if w) for name in names]
    return {name: signals.index(each) for name, each in zip(names, signals)}
