"""Folding many small bundles into the two stacked maps D and E (functional.py) with few kernels.

Each bundle has its own parameters, so that an optimizer can skip one. A forward needs them side by side: one `cat`
joins them, one gather lays them out as block matrices, and one product with U folds them, however many bundles there
are.

Shapes: d hidden size, R columns of U, H hidden units of all bundles, K the ranks of all projectors W together, or R
without projectors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .basis import ALIGN, BundleShape, align
from .kernels import gathered


# Hidden units are laid out kind by kind, the non-linear ones first.
_ORDER = ("mlp", "full", "linear", "diag", "lora")


class JoinWeights(torch.autograd.Function):
    """Many weights, a 0 and a 1 as one flat tensor. Weights flagged in `learns` get a gradient, the others None.

    One autograd node for all of them: with a node or two per weight, many small bundles would mean mostly overhead.
    """

    @staticmethod
    def forward(ctx: Any, learns: Sequence[bool], constants: Tensor, *weights: Tensor) -> Tensor:
        ctx.learns, ctx.weights = learns, weights
        constants = constants.to(weights[0].dtype)
        if torch.compiler.is_compiling():
            return torch.cat([*(weight.reshape(-1) for weight in weights), constants])
        return _flatten_dense_tensors((*weights, constants))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.compiler.is_compiling():
            pieces = grad.split([*(weight.numel() for weight in ctx.weights), 2])
            gradients = [piece.view(weight.shape) for piece, weight in zip(pieces, ctx.weights)]
        else:
            gradients = _unflatten_dense_tensors(grad[:-2], ctx.weights)
        if not all(ctx.learns):
            gradients = [gradient if learns else None for gradient, learns in zip(gradients, ctx.learns)]
        return None, None, *gradients


class _Lay(torch.autograd.Function):
    """Put entries of the joined weights (n,) where they belong in a block matrix (m,), in `dtype`.

    `place` (m,) says which entry each place gets, `back` (n,) where each entry went. An entry has one place, so the
    backward is a gather too, without sums. The gradients of the constants are never read.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, place: Tensor, back: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.back, ctx.dtype = back, flat.dtype
        return gathered(flat, place, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return gathered(grad, ctx.back, ctx.dtype), None, None, None


class _Fold(torch.autograd.Function):
    """D (d, H) and E (H, d) from what bundles read and write in coordinates of U, (2, H, R): one product with U.

    U is cast again in backward; otherwise every layer would keep a copy until then.
    """

    @staticmethod
    def forward(
        ctx: Any, maps_2HR: Tensor, basis_dR: Tensor, scale_d: Tensor | None, scaling: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(basis_dR, scale_d)
        ctx.scaling, ctx.shape = scaling, maps_2HR.shape
        folded = (maps_2HR.flatten(0, 1) @ basis_dR.to(maps_2HR.dtype).T).view(*maps_2HR.shape[:2], len(basis_dR))
        reads_Hd, writes_Hd = folded[0], folded[1]  # not unbind: its results must not be written in place
        if scale_d is not None:
            reads_Hd.div_(scale_d)
        if scaling != 1.0:
            writes_Hd.mul_(scaling)
        return reads_Hd.T, writes_Hd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dD: Tensor, dE: Tensor) -> Any:
        basis, scale = ctx.saved_tensors
        reads = dD.T if scale is None else (dD.T / scale).to(dD.dtype)
        grad = torch.cat([reads, dE if ctx.scaling == 1.0 else dE * ctx.scaling])
        return (grad @ basis.to(grad.dtype)).view(ctx.shape), None, None, None


class Layout:
    """The hidden units of some bundles side by side, the non-linear ones first.

    Args:
        names: the bundles in the order of the config, which is the order of alphas.
        kinds: kind of each.
        sizes: number of hidden units of each.
        groups: a number for each bundle; bundles that learn from the same signals have the same one.

    Attributes:
        names: as given.
        ordered: the bundles in the order of their hidden units.
        nonlinear: number of hidden units that pass through the activation; they come first.
        owner: for every hidden unit the number of its bundle in `names`, (H,).
        padding: number of hidden units at the end that make H a good size for a GPU. Their columns of D and rows of E
            are 0; `owner` counts them as units of bundle 0.
        groups: for each group, its bundles and the spans of their hidden units, as (start, size).
    """

    def __init__(
        self, names: Sequence[str], kinds: Mapping[str, str], sizes: Mapping[str, int], groups: Mapping[str, int]
    ) -> None:
        self.names = list(names)
        self.ordered = ordered = sorted(self.names, key=lambda name: (_ORDER.index(kinds[name]), groups[name]))
        self.nonlinear = sum(sizes[n] for n in ordered if kinds[n] in ("mlp", "full"))
        used = sum(sizes[n] for n in ordered)
        self.padding = align(used) - used
        owners = [torch.full((sizes[n],), self.names.index(n)) for n in ordered]
        self.owner = torch.cat([*owners, torch.zeros(self.padding, dtype=torch.long)])
        if self.nonlinear == used:
            self.nonlinear += self.padding
        self.groups: list[tuple[list[str], list[tuple[int, int]]]] = []
        for number in dict.fromkeys(groups[n] for n in self.names):
            members = [name for name in ordered if groups[name] == number]
            starts = {name: sum(sizes[n] for n in ordered[: ordered.index(name)]) for name in members}
            spans: list[tuple[int, int]] = []
            for name in members:  # within a kind they are adjacent, as one span
                last = spans.pop() if spans and sum(spans[-1]) == starts[name] else (starts[name], 0)
                spans.append((last[0], last[1] + sizes[name]))
            self.groups.append((members, spans))
        self._index: dict[str, Tensor] = {"owner": self.owner, "constants": torch.tensor([0.0, 1.0])}
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    def index(self, device: torch.device) -> dict[str, Tensor]:
        """The index tensors on a device, copied there once."""
        if device not in self._on_device:
            # Copies made in inference mode could not be used in a later backward.
            with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
                self._on_device[device] = {name: index.to(device) for name, index in self._index.items()}
        return self._on_device[device]

    def span(self, chosen: Tensor) -> tuple[int, int]:
        """Where the hidden units of the chosen bundles, (M,) bool, begin and end, to multiples of `ALIGN`."""
        units = chosen[self.owner[: len(self.owner) - self.padding]].nonzero().flatten()
        if not len(units):
            return 0, 0
        return int(units[0]) // ALIGN * ALIGN, min(align(int(units[-1]) + 1), len(self.owner))


class Packing(Layout):
    """Where each weight of each bundle behind a block goes in the block matrices; the same for every block.

    With projectors, bundles read and write rows of a stacked W (K x R); without, columns of U.

    Args:
        shapes: bundle -> its sizes, in the order of the config.
        basis_rank: R.
        projected: whether bundles have a projector W.
        groups: a number for each bundle; bundles that learn from the same signals have the same one. None: all differ.

    Attributes:
        projected: bundles that act in coordinates of U, in the order of their hidden units.
        full: bundles of kind "full", which act on the whole stream.
    """

    def __init__(
        self, shapes: Mapping[str, BundleShape], basis_rank: int, projected: bool, groups: list[int] | None = None
    ) -> None:
        numbers = dict(zip(shapes, groups if groups is not None else range(len(shapes))))
        kinds = {name: shape.kind for name, shape in shapes.items()}
        super().__init__(list(shapes), kinds, {name: shape.hidden for name, shape in shapes.items()}, numbers)
        self.shapes, self.basis_rank = dict(shapes), basis_rank
        self.full = [n for n in self.ordered if shapes[n].kind == "full"]
        self.projected = [n for n in self.ordered if shapes[n].kind != "full"]
        projected = projected and bool(self.projected)
        self.before_full = sum(shapes[n].hidden for n in self.ordered if shapes[n].kind == "mlp")
        self.width = align(sum(shapes[n].rank for n in self.projected)) if projected else basis_rank
        self.total_hidden = sum(shapes[n].hidden for n in self.projected) + self.padding

        weight: list[Tensor] = []
        down: list[Tensor] = []
        up: list[Tensor] = []
        ones: list[Tensor] = []
        r0 = h0 = 0
        second = self.total_hidden * self.width  # entries of E come after those of D
        for name in self.projected:
            shape = shapes[name]
            r, b = shape.rank, shape.hidden
            rows = torch.arange(r0, r0 + r) if projected else shape.support
            hidden = torch.arange(h0, h0 + b)
            if projected:
                weight.append((rows[:, None] * basis_rank + shape.support[None, :]).flatten())
            block = hidden[:, None] * self.width + rows[None, :]  # (b, width)
            if shape.kind in ("mlp", "linear"):
                down.append(block.flatten())
                up.append(second + block.T.flatten())  # `up` is (width, b), and E needs its transpose
            else:
                ones.append(block.diagonal())
                up.append(second + block.diagonal())
            r0, h0 = r0 + r, h0 + b

        def concatenated(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts) if parts else torch.arange(0)

        def laid(index: Tensor, size: int, ones: Tensor) -> dict[str, Tensor]:
            """`place` and `back` of `_Lay`, for weights joined with a 0 and a 1 behind them."""
            place = torch.full((size,), len(index)).index_fill_(0, ones, len(index) + 1)
            place.index_copy_(0, index, torch.arange(len(index)))
            back = torch.cat([index, index.new_zeros(2)]) if size else index.new_zeros(0)
            return {"place": place.int(), "back": back.int()}  # int32: half of what a gather reads is its indices

        self._index |= {
            **{f"maps_{k}": v for k, v in laid(concatenated([*down, *up]), 2 * second, concatenated(ones)).items()},
            **{
                f"weight_{k}": v
                for k, v in laid(concatenated(weight), self.width * basis_rank, concatenated([])).items()
            },
        }

    def maps(
        self,
        weight: Mapping[str, Tensor],
        down: Mapping[str, Tensor],
        up: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        live: Collection[str] | None = None,
    ) -> Tensor:
        """What the projected bundles read and write in coordinates of U, (2, H, R), in `dtype`.

        Args:
            weight, down, up: bundle -> weight.
            device: of the result.
            dtype: of the result and of the product with W.
            live: bundles that get a gradient; None: all. The others get None: AdamW moves a parameter whose gradient is
                merely 0.
        """
        # Names instead of `id`, which Dynamo of torch 2.11 cannot trace.
        key = tuple(name for name in self.projected if live is None or name in live)
        index = self.index(device)

        def lay(flat: Tensor, what: str, *size: int) -> Tensor:
            return _Lay.apply(flat, index[f"{what}_place"], index[f"{what}_back"], dtype).view(size)

        tables = [(down, up), (weight,)] if weight else [(down, up)]
        flat, *projectors = (self._join(each, key, index["constants"]) for each in tables)
        maps = lay(flat, "maps", 2, self.total_hidden, self.width)
        if projectors:
            maps = maps @ lay(projectors[0], "weight", 1, self.width, self.basis_rank)
        return maps

    def _join(self, tables: Sequence[Mapping[str, Tensor]], live: Collection[str], constants: Tensor) -> Tensor:
        """The projected bundles' weights of some tables side by side, then 0 and 1, (n + 2,)."""
        names = [[name for name in self.projected if name in table] for table in tables]
        if not any(names):
            return constants
        weights = [table[name] for table, held in zip(tables, names) for name in held]
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():  # Dynamo cannot trace the node there
            return torch.cat([*(weight.reshape(-1) for weight in weights), constants.to(weights[0].dtype)])
        return JoinWeights.apply([name in live for held in names for name in held], constants, *weights)

    def fold(
        self,
        weight: Mapping[str, Tensor],
        down: Mapping[str, Tensor],
        up: Mapping[str, Tensor],
        basis: Tensor,
        scale: Tensor | None,
        scaling: float = 1.0,
        live: Collection[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """D (d, H) and E (H, d), differentiable in the weights of `live` bundles.

        Args:
            weight, down, up: bundle -> weight.
            basis: U, (d, R).
            scale: sigma, (d,); None: 1.
            scaling: c.
            live: as in `maps`.
            dtype: of the result and of the products; None: that of `basis`.
        """
        dtype = basis.dtype if dtype is None else dtype
        maps = self.maps(weight, down, up, basis.device, dtype, live)
        D, E = _Fold.apply(maps, basis, scale, scaling)
        if self.full:

            def learning(table: Mapping[str, Tensor], name: str) -> Tensor:
                return table[name] if live is None or name in live else table[name].detach()

            m = self.before_full
            reads = [learning(down, name).T for name in self.full]
            reads = reads if scale is None else [each / scale[:, None] for each in reads]
            D = torch.cat([D[:, :m], *(each.to(dtype) for each in reads), D[:, m:]], 1)
            E = torch.cat([E[:m], *(scaling * learning(up, name).T.to(dtype) for name in self.full), E[m:]])
        return D, E
