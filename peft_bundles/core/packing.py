"""Folding many small bundles into the two stacked maps D and E (see functional.py) with few kernels.

The bundles' weights are parameters of their own, so that an optimizer can skip one. A forward needs them side by side:
one `cat` joins them, one gather lays them out as block matrices, one product with U folds them, whatever their number.
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
_ORDER = ("mlp", "full", "linear", "diag")


class _Join(torch.autograd.Function):
    """Many weights and a 0 and a 1 as one flat tensor; gradients go to those flagged in `learn`, None to the rest.

    One node for all of them: a node or two per weight is what many small bundles would spend their time on.
    """

    @staticmethod
    def forward(ctx: Any, learn: Sequence[bool], constants: Tensor, *parts: Tensor) -> Tensor:
        ctx.learn, ctx.parts = learn, parts
        constants = constants.to(parts[0].dtype)
        if torch.compiler.is_compiling():
            return torch.cat([*(part.reshape(-1) for part in parts), constants])
        return _flatten_dense_tensors((*parts, constants))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.compiler.is_compiling():
            pieces = grad.split([*(part.numel() for part in ctx.parts), 2])
            found = [piece.view(part.shape) for piece, part in zip(pieces, ctx.parts)]
        else:
            found = _unflatten_dense_tensors(grad[:-2], ctx.parts)
        return None, None, *(found if all(ctx.learn) else (g if is_on else None for g, is_on in zip(found, ctx.learn)))


class _Lay(torch.autograd.Function):
    """The entries of joined weights (n,) at `place` (m,), in `dtype`: (m,). `index` (n,) is where each went.

    An entry has one place, so the way back is a gather too, and no sum. The constants' gradients are read by nobody.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, place: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.index, ctx.dtype = index, flat.dtype
        return gathered(flat, place, dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return gathered(grad, ctx.index, ctx.dtype), None, None, None


class _Fold(torch.autograd.Function):
    """What bundles read and write in coordinates of U, (2, H, R), as D (d, H) and E (H, d): one product with U.

    U is cast anew in backward: a copy in every layer would be kept until then.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, basis: Tensor, scale: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(basis, scale)
        ctx.scaling, ctx.shape = scaling, maps.shape
        folded = (maps.flatten(0, 1) @ basis.to(maps.dtype).T).view(*maps.shape[:2], len(basis))
        reads, writes = folded.unbind(0)
        if scale is not None:
            reads.div_(scale)
        if scaling != 1.0:
            writes.mul_(scaling)
        return reads.T, writes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dD: Tensor, dE: Tensor) -> Any:
        basis, scale = ctx.saved_tensors
        reads = dD.T if scale is None else (dD.T / scale).to(dD.dtype)
        grad = torch.cat([reads, dE if ctx.scaling == 1.0 else dE * ctx.scaling])
        return (grad @ basis.to(grad.dtype)).view(ctx.shape), None, None, None


class Packing:
    """Where each weight of each bundle goes in the block matrices; the same for every layer of an adapter.

    With projectors, adapters read and write rows of a stacked W (total rank x R); without, columns of U directly.

    Attributes:
        names: bundles in the order of the config (the order of alphas and gates).
        nonlinear: number of leading hidden units that pass through the activation.
        owner: bundle number of every hidden unit, (H,).
        groups: names of bundles that learn from the same signals, and where their hidden units are, as (start, size).
    """

    def __init__(
        self, shapes: Mapping[str, BundleShape], basis_rank: int, projected: bool, groups: list[int] | None = None
    ) -> None:
        self.shapes, self.basis_rank = dict(shapes), basis_rank
        self.names = list(shapes)
        group = dict(zip(self.names, groups if groups is not None else range(len(shapes))))
        ordered = sorted(self.names, key=lambda name: (_ORDER.index(shapes[name].kind), group[name]))
        self.full = [n for n in ordered if shapes[n].kind == "full"]
        self.projected = [n for n in ordered if shapes[n].kind != "full"]
        projected = projected and bool(self.projected)
        self.before_full = sum(shapes[n].hidden for n in ordered if shapes[n].kind == "mlp")
        self.nonlinear = self.before_full + sum(shapes[n].hidden for n in self.full)
        owners = [torch.full((shapes[n].hidden,), self.names.index(n)) for n in ordered]
        used = sum(shapes[n].hidden for n in ordered)
        # Units that pad the matrices to a good size: their columns of D and rows of E are zero, whoever owns them.
        self.padding = align(used) - used
        self.owner = torch.cat([*owners, torch.zeros(self.padding, dtype=torch.long)])
        self.groups: list[tuple[list[str], list[tuple[int, int]]]] = []
        for number in dict.fromkeys(group.values()):
            mine = [name for name in ordered if group[name] == number]
            starts = {name: sum(shapes[n].hidden for n in ordered[: ordered.index(name)]) for name in mine}
            spans: list[tuple[int, int]] = []
            for name in mine:  # side by side, within a kind
                last = spans.pop() if spans and sum(spans[-1]) == starts[name] else (starts[name], 0)
                spans.append((last[0], last[1] + shapes[name].hidden))
            self.groups.append((mine, spans))
        if self.nonlinear == used:
            self.nonlinear += self.padding
        self.width = align(sum(shapes[n].rank for n in self.projected)) if projected else basis_rank
        self.total_hidden = sum(shapes[n].hidden for n in self.projected) + self.padding

        weight: list[Tensor] = []
        down: list[Tensor] = []
        up: list[Tensor] = []
        ones: list[Tensor] = []
        r0 = h0 = 0
        second = self.total_hidden * self.width  # what is written lies behind what is read
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

        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts) if parts else torch.arange(0)

        def laid(index: Tensor, size: int, ones: Tensor) -> dict[str, Tensor]:
            """Which entry of the joined weights, the 0 and the 1 behind them, each place gets; and the way back."""
            place = torch.full((size,), len(index)).index_fill_(0, ones, len(index) + 1)
            place.index_copy_(0, index, torch.arange(len(index)))
            back = torch.cat([index, index.new_zeros(2)]) if size else index.new_zeros(0)
            return {"place": place.int(), "back": back.int()}  # half of what a gather reads is its indices

        self._index = {
            "owner": self.owner,
            "constants": torch.tensor([0.0, 1.0]),
            **{f"maps_{k}": v for k, v in laid(joined([*down, *up]), 2 * second, joined(ones)).items()},
            **{f"weight_{k}": v for k, v in laid(joined(weight), self.width * basis_rank, joined([])).items()},
        }
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    def index(self, device: torch.device) -> dict[str, Tensor]:
        """The index tensors on a device, copied there once."""
        if device not in self._on_device:
            # Inference mode would mark the copies as unfit for any later backward.
            with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
                self._on_device[device] = {name: index.to(device) for name, index in self._index.items()}
        return self._on_device[device]

    def span(self, chosen: Tensor) -> tuple[int, int]:
        """Where the hidden units of the chosen bundles, (M,) bool begin and end, to multiples of `ALIGN`."""
        units = chosen[self.owner[: len(self.owner) - self.padding]].nonzero().flatten()
        if not len(units):
            return 0, 0
        return int(units[0]) // ALIGN * ALIGN, min(align(int(units[-1]) + 1), len(self.owner))

    def maps(
        self,
        weight: Mapping[str, Tensor],
        down: Mapping[str, Tensor],
        up: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        live: Collection[str] | None = None,
        joined: dict[Any, Any] | None = None,
    ) -> Tensor:
        """What the projected bundles read and write in coordinates of U, (2, H, R), in `dtype`.

        `joined` is for several uses of these very weights in one graph: they share what it keeps, so that each weight
        gets one gradient and not one from every use to be added up.

        A bundle that is not `live` (None: all are) gets no gradient at all, so that autograd leaves its `.grad` None:
        AdamW moves a parameter whose gradient is merely zero.
        """
        # Names and no `id`, which Dynamo of torch 2.11 cannot trace.
        key = tuple(name for name in self.projected if live is None or name in live)
        joined, laid = {} if joined is None else joined, (key, dtype)
        if laid in joined:
            return joined[laid]
        index = self.index(device)

        def lay(flat: Tensor, what: str, *size: int) -> Tensor:
            return _Lay.apply(flat, index[f"{what}_place"], index[f"{what}_back"], dtype).view(size)

        if key not in joined:
            tables = [(down, up), (weight,)] if weight else [(down, up)]
            joined[key] = [self._join(each, key, index["constants"]) for each in tables]
        flat, *projectors = joined[key]
        maps = lay(flat, "maps", 2, self.total_hidden, self.width)
        if projectors:
            maps = maps @ lay(projectors[0], "weight", 1, self.width, self.basis_rank)
        joined[laid] = maps
        return maps

    def _join(self, tables: Sequence[Mapping[str, Tensor]], live: Collection[str], constants: Tensor) -> Tensor:
        """The projected bundles' weights of some tables side by side, (n + 2,)."""
        names = [[name for name in self.projected if name in table] for table in tables]
        if not any(names):
            return constants
        parts = [table[name] for table, mine in zip(tables, names) for name in mine]
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():  # where it cannot trace the node
            return torch.cat([*(part.reshape(-1) for part in parts), constants.to(parts[0].dtype)])
        return _Join.apply([name in live for mine in names for name in mine], constants, *parts)

    def fold(
        self,
        weight: Mapping[str, Tensor],
        down: Mapping[str, Tensor],
        up: Mapping[str, Tensor],
        basis: Tensor,
        scale: Tensor | None,
        scaling: float = 1.0,
        live: Collection[str] | None = None,
        joined: dict[Any, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """D (d, H) and E (H, d) in `dtype` (None: that of `basis`), differentiable in the weights of `live` bundles.

        `live` and `joined`: see `maps`.
        """
        dtype = basis.dtype if dtype is None else dtype
        maps = self.maps(weight, down, up, basis.device, dtype, live, joined)
        D, E = _Fold.apply(maps, basis, scale, scaling)
        if self.full:

            def alone(table: Mapping[str, Tensor], name: str) -> Tensor:
                return table[name] if live is None or name in live else table[name].detach()

            m = self.before_full
            reads = [alone(down, name).T for name in self.full]
            reads = reads if scale is None else [each / scale[:, None] for each in reads]
            D = torch.cat([D[:, :m], *(each.to(dtype) for each in reads), D[:, m:]], 1)
            E = torch.cat([E[:m], *(scaling * alone(up, name).T.to(dtype) for name in self.full), E[m:]])
        return D, E
