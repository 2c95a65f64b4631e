"""Folding many small bundles into the two stacked maps D and E (see functional.py) with few kernels.

The bundles' weights are parameters of their own, so that an optimizer can skip one. A forward needs them side by side:
one `cat` and one `scatter` per kind of weight lay them out as block matrices, whatever the number of bundles.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .basis import BundleShape, align


# Hidden units are laid out kind by kind, the non-linear ones first.
_ORDER = ("mlp", "full", "linear", "diag", "identity")


class _Join(torch.autograd.Function):
    """Many weights as one flat tensor; gradients go to those flagged in `learn`, None to the rest.

    One node for all of them: a node or two per weight is what many small bundles would spend their time on.
    """

    @staticmethod
    def forward(ctx: Any, learn: list[bool], *parts: Tensor) -> Tensor:
        ctx.learn, ctx.shapes = learn, [p.shape for p in parts]
        return torch.cat([p.reshape(-1) for p in parts])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        flat = grad.split([shape.numel() for shape in ctx.shapes])
        return None, *(g.view(s) if learn else None for g, s, learn in zip(flat, ctx.shapes, ctx.learn))


def _flat(like: Tensor, size: int, ones: Tensor | None) -> Tensor:
    out = like.new_zeros(size)
    return out if ones is None or not len(ones) else out.index_fill_(0, ones, 1.0)


class Packing:
    """Where each weight of each bundle goes in the block matrices; the same for every layer of an adapter.

    With projectors, adapters read and write rows of a stacked W (total rank x R); without, columns of U directly.

    Attributes:
        names: bundles in the order of the config (the order of alphas and gates).
        nonlinear: number of leading hidden units that pass through the activation.
        owner: bundle number of every hidden unit, (H,).
        group: the same for groups of bundles that learn from the same signals, (H,).
    """

    def __init__(
        self, shapes: Mapping[str, BundleShape], basis_rank: int, projected: bool, groups: list[int] | None = None
    ) -> None:
        self.shapes, self.basis_rank, self.has_weight = dict(shapes), basis_rank, projected
        self.names = list(shapes)
        ordered = sorted(self.names, key=lambda name: _ORDER.index(shapes[name].kind))
        self.full = [n for n in ordered if shapes[n].kind == "full"]
        self.projected = [n for n in ordered if shapes[n].kind != "full"]
        self.before_full = sum(shapes[n].hidden for n in ordered if shapes[n].kind == "mlp")
        self.nonlinear = self.before_full + sum(shapes[n].hidden for n in self.full)
        owners = [torch.full((shapes[n].hidden,), self.names.index(n)) for n in ordered]
        used = sum(shapes[n].hidden for n in ordered)
        # Units that pad the matrices to a good size: their columns of D and rows of E are zero, whoever owns them.
        self.padding = align(used) - used
        self.owner = torch.cat([*owners, torch.zeros(self.padding, dtype=torch.long)])
        self.group = torch.tensor(groups if groups is not None else list(range(len(shapes))))[self.owner]
        if self.nonlinear == used:
            self.nonlinear += self.padding
        self.width = align(sum(shapes[n].rank for n in self.projected)) if projected else basis_rank
        self.total_hidden = sum(shapes[n].hidden for n in self.projected) + self.padding

        weight: list[Tensor] = []
        down: list[Tensor] = []
        up: list[Tensor] = []
        down_eye: list[Tensor] = []
        up_eye: list[Tensor] = []
        r0 = h0 = 0
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
                up.append(block.T.flatten())  # `up` is (width, b), and E needs its transpose
            else:
                down_eye.append(block.diagonal())
                (up if shape.kind == "diag" else up_eye).append(block.diagonal())
            r0, h0 = r0 + r, h0 + b

        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts) if parts else torch.arange(0)

        self._index = {
            "weight": joined(weight),
            "down": joined(down),
            "up": joined(up),
            "down_eye": joined(down_eye),
            "up_eye": joined(up_eye),
            "owner": self.owner,
            "group": self.group,
        }
        self._on_device: dict[torch.device, dict[str, Tensor]] = {}

    def index(self, device: torch.device) -> dict[str, Tensor]:
        """The index tensors on a device, copied there once."""
        if device not in self._on_device:
            # Inference mode would mark the copies as unfit for any later backward.
            with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
                self._on_device[device] = {name: index.to(device) for name, index in self._index.items()}
        return self._on_device[device]

    def fold(
        self,
        weight: Mapping[str, Tensor],
        weight_out: Mapping[str, Tensor],
        down: Mapping[str, Tensor],
        up: Mapping[str, Tensor],
        basis: Tensor,
        inverse_scale: Tensor | None,
        scaling: float = 1.0,
        live: Collection[str] | None = None,
        joined: dict[Any, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """D (d, H) and E (H, d) in the dtype of `basis`, differentiable in the weights of `live` bundles (None: all).

        `joined` is for several folds of the same weights in one graph: they share what it keeps, so that each weight
        gets one gradient and not one from every fold to be added up.

        A bundle that is not live gets no gradient at all, so that autograd leaves its `.grad` None: AdamW moves a
        parameter whose gradient is merely zero.
        """
        index = self.index(basis.device)

        def blocks(table: Mapping[str, Tensor], where: str, rows: int, columns: int) -> Tensor:
            names = [name for name in self.projected if name in table]
            learn = [live is None or name in live for name in names]
            out = _flat(basis, rows * columns, index.get(f"{where}_eye"))
            if names:
                joins, key = {} if joined is None else joined, (id(table), *learn)
                if key not in joins:
                    parts = [table[n] for n in names]
                    # Without gradients the compiler cannot trace the node, nor is it of use.
                    grad = torch.is_grad_enabled()
                    joins[key] = _Join.apply(learn, *parts) if grad else torch.cat([p.reshape(-1) for p in parts])
                out = out.scatter_(0, index[where], joins[key].to(basis.dtype))
            return out.view(rows, columns)

        def alone(table: Mapping[str, Tensor], name: str) -> Tensor:
            value = table[name].to(basis.dtype)
            return value if live is None or name in live else value.detach()

        def product(left: Tensor, right: Tensor) -> Tensor:
            # beta=0: the first argument is not read. The factor is part of the product, and not one more kernel.
            if scaling == 1.0:
                return left @ right
            return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scaling)

        if self.projected:
            reads = blocks(down, "down", self.total_hidden, self.width)
            writes = blocks(up, "up", self.total_hidden, self.width)
            if self.has_weight:
                W = blocks(weight, "weight", self.width, self.basis_rank)
                reads = reads @ W
                writes = writes @ (blocks(weight_out, "weight", self.width, self.basis_rank) if weight_out else W)
            D, E = basis @ reads.T, product(writes, basis.T)
        else:
            D, E = basis.new_zeros(basis.shape[0], self.padding), basis.new_zeros(self.padding, basis.shape[0])
        if self.full:
            m = self.before_full
            D = torch.cat([D[:, :m], *(alone(down, name).T for name in self.full), D[:, m:]], 1)
            E = torch.cat([E[:m], *(scaling * alone(up, name).T for name in self.full), E[m:]])
        return D if inverse_scale is None else D * inverse_scale[:, None], E
