"""When the quiet penalty acts: its gradient joins the first gradient of a step that arrives at a bundle's weight.

So it acts whatever loss a trainer makes, and once a step, however many forwards and backwards a step has: a gradient
that is None, or was set to zeros, has had no penalty yet. Autograd runs a weight's hook before it accumulates, so
clipping, and what averages gradients over processes, see the sum. A weight that gets no gradient gets no penalty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .places import Site
from .quiet import Layer, linear_gradients, loudness, warn_uncalibrated


class Penalty:
    """What the hooks of one model share.

    Attributes:
        marks: (adapter, site) -> bundles that learn in the training forwards since the last backward.
        layers: the layers with hooks, by site.
        routes: the routes of the training forwards since the last backward.
        gradients: id of a weight -> the penalty's gradient that still waits for the weight's own.
        arrived: some gradient has arrived since the last forward.
        off: whoever trains adds the penalty himself (`without_penalty`).
        ignoring: gradients that are taken now are not those of a step yet.
        scaled: some forward ran under float16 autocast, where gradients carry a factor that nobody here knows.
        total, count: sum of the penalties since `read`, and the number of their steps.
        noted: the penalty of this step is among them.
    """

    def __init__(self) -> None:
        self.marks: dict[tuple[str, Site], tuple[str, ...]] = {}
        self.layers: dict[Site, Layer] = {}
        self.routes: dict[Any, None] = {}
        self.gradients: dict[int, Tensor] = {}
        self.arrived = self.off = self.ignoring = self.scaled = self.noted = False
        self.total: Tensor | None = None
        self.count = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Penalty, ()  # a copy of the model starts with no step in progress

    def mark(self, layer: Layer, adapter: str, live: Iterable[str]) -> None:
        """Note that a forward with gradients lets these bundles of a layer learn. In eval mode none has a penalty."""
        if self.arrived:
            self.marks, self.gradients, self.arrived, self.scaled, self.noted = {}, {}, False, False, False
            self.routes = {}
        key = adapter, layer.site
        if self.off or not layer.training or not layer.state.configs[adapter].quiet:
            self.marks.pop(key, None)
            return
        if not torch.compiler.is_compiling():
            if adapter not in layer.bundle_states:
                warn_uncalibrated([layer], adapter)
                return
            self.watch(layer, adapter)
        if adapter in layer.bundle_states:
            device = layer.device_of(adapter).type
            self.scaled |= torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
            self.marks[key] = tuple(dict.fromkeys((*self.marks.get(key, ()), *live)))
            if (route := layer.state.call.route) is not None:
                self.routes[route] = None

    def shares(self, adapter: str, names: Iterable[str]) -> dict[str, float]:
        """Bundle -> share of the rows that it learns from, in the routed forwards in which it learns."""
        shares = {}
        for name in names:
            counts = [(own, len(route.rows)) for route in self.routes if (own := route.rows_of(adapter, name))]
            if counts:
                shares[name] = sum(own for own, _ in counts) / sum(rows for _, rows in counts)
        return shares

    def watch(self, layer: Layer, adapter: str) -> None:
        """Put hooks on an adapter's weights in a layer, unless they have them or there is no penalty.

        Raises:
            ValueError: weights that FSDP has sharded.
        """
        self.layers[layer.site] = layer
        if not layer.state.configs[adapter].quiet:
            return
        for table in layer.tables(adapter):
            for bundle, weight in table.items():
                hook = _arrival(weight)
                if hook is not None:
                    # Set by a backward that ended before it came here (`autograd.grad` of some weights only).
                    hook.by_hand &= torch._C._current_graph_task_id() != -1
                elif weight.requires_grad:
                    if not weight.is_leaf or hasattr(weight, "device_mesh"):
                        raise ValueError(
                            "FSDP has sharded the weights of bundles, and the quiet penalty cannot reach them so; "
                            "train with BundleTrainer, which leaves them whole, or set quiet=0 in the BundleConfig."
                        )
                    weight.register_hook(_Arrival(weight, layer, adapter, bundle))

    def due(self, key: tuple[str, Site], bundle: str, weight: Tensor) -> Tensor | None:
        """The penalty's gradient for a weight; None if no training forward has let its bundle learn."""
        if id(weight) not in self.gradients:
            if bundle not in self.marks.get(key, ()):
                return None
            if self.scaled:
                raise RuntimeError(
                    "under float16 autocast gradients carry a loss scale that the model does not know, so the quiet "
                    "penalty cannot be added to them. Train in bfloat16, use the model's own output.loss, which holds "
                    "the penalty under float16, or set quiet=0 in the BundleConfig."
                )
            self._compute(weight.device)
        return self.gradients.pop(id(weight), None)

    def _compute(self, device: torch.device) -> None:
        """Gradients of the penalty of all marked bundles on a device, layers of one kind together.

        Another device's thread may be in a hook too, and would run this thread's hooks while this one waits for it.
        """
        groups: dict[tuple[str, tuple[str, ...], bool], list[Layer]] = {}
        for (adapter, site), names in self.marks.items():
            if self.layers[site].device_of(adapter) == device:
                groups.setdefault((adapter, names, bool(site.path)), []).append(self.layers[site])
        leaves: dict[int, Tensor] = {}  # apart from the weights, whose hooks wait for their own gradients
        losses = []
        with torch.enable_grad():
            for (adapter, names, _), layers in groups.items():
                quiet = layers[0].state.configs[adapter].quiet
                if layers[0].site.path:
                    loss, gradients = linear_gradients(layers, adapter, names, quiet, self.shares(adapter, names))
                    self.gradients.update(gradients)
                    self.note(loss)
                    continue
                tables = [layer.tables(adapter) for layer in layers]
                learning = [(n, w) for of in tables for table in of for n, w in table.items() if w.requires_grad]
                leaves.update((id(w), w.detach().requires_grad_()) for n, w in learning if n in names)
                apart = [tuple({n: leaves.get(id(w), w) for n, w in t.items()} for t in of) for of in tables]
                loss = loudness(layers, adapter, list(names), apart, self.shares(adapter, names))
                losses.append(quiet * loss)
            if losses:
                total = torch.stack(losses).sum()
                found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
                self.gradients.update((key, g) for key, g in zip(leaves, found) if g is not None)
                self.note(total)

    def note(self, value: Tensor) -> None:
        """Keep the penalty of a step, or a part of it, for the log."""
        self.total = value.detach() if self.total is None else self.total + value.detach().to(self.total.device)
        self.count += not self.noted
        self.noted = True

    def read(self) -> float | None:
        """The mean penalty since the last call; None if there was none."""
        mean = None if self.total is None else float(self.total) / self.count
        self.total, self.count = None, 0
        return mean

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Gradients that are taken in the block get no penalty, and do not count as the first of their step."""
        before, self.ignoring = self.ignoring, True
        try:
            yield
        finally:
            self.ignoring = before

    @contextmanager
    def without_penalty(self) -> Iterator[None]:
        """Forwards and backwards in the block add no penalty; a trainer adds it itself, by `quiet_loss`."""
        before, self.off = self.off, True
        try:
            yield
        finally:
            self.off = before


class _Arrival:
    """The hook of one weight.

    Attributes:
        by_hand: the backward that runs now brings the penalty itself (`once`).
        paid: the penalty was added here, and not by hand, to the gradient that the weight has now.
        version: the version that the gradient has if nothing but autograd has written to it.
    """

    __torch_unserializable__ = True  # torch warns of other hooks when it sends a weight to another process

    def __init__(self, weight: nn.Parameter, layer: Layer, adapter: str, bundle: str) -> None:
        self.weight, self.layer, self.key, self.bundle = weight, layer, (adapter, layer.site), bundle
        self.by_hand = self.paid = False
        self.version = -1

    def first(self) -> bool:
        """Whether the weight's gradient is None or zeros, so that the next one is the first of its step."""
        so_far = self.weight.grad
        # Zeros written in place have raised the version. To look for them at every arrival would make a GPU wait.
        return so_far is None or (so_far._version != self.version and not bool(so_far.any()))

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        penalty: Penalty = self.layer.state.penalty
        if gradient is None or penalty.ignoring:  # None: weights of bundles that do not learn are told so
            return None
        penalty.arrived = True
        by_hand, self.by_hand = self.by_hand, False
        first, so_far, extra = self.first(), self.weight.grad, None
        self.version = 0 if so_far is None else so_far._version + 1
        if first:
            extra = None if by_hand or penalty.off else penalty.due(self.key, self.bundle, self.weight)
            self.paid = extra is not None
        return None if extra is None else gradient + extra.to(gradient.dtype)


def _arrival(weight: Tensor) -> _Arrival | None:
    hooks = weight._backward_hooks
    return next((hook for hook in hooks.values() if type(hook) is _Arrival), None) if hooks else None


def arrive(weight: Tensor, gradient: Tensor) -> Tensor:
    """A gradient that is about to be added to `weight.grad` by hand, with the penalty's if it is a step's first."""
    hook = _arrival(weight)
    if hook is None:
        return gradient
    with_penalty = hook(gradient)
    hook.version = 0  # their sum is a new tensor
    return gradient if with_penalty is None else with_penalty


def loss_of_step(state: Any, layers: Sequence[Layer], device: torch.device) -> Tensor:
    """`BundleModel.quiet_loss`: the penalty of all bundles that some forward of the step lets learn, a scalar.

    Args:
        state: what the layers of the model share.
        layers: all layers with bundles.
        device: where the scalar is.
    """
    learning: dict[str, list[str]] = {}
    for adapter, bundle in sorted(state.seen):
        learning.setdefault(adapter, []).append(bundle)
    total = torch.zeros((), device=device)
    for adapter, names in learning.items():
        weight = state.configs[adapter].quiet
        if weight and (kept := [layer for layer in layers if adapter in layer.bundle_states]):
            shares = state.penalty.shares(adapter, names)
            total = total + weight * loudness(kept, adapter, names, shares=shares).to(device)
    return once(total, state.penalty, layers, learning)


def once(value: Tensor, penalty: Penalty, layers: Iterable[Layer], learning: Mapping[str, Sequence[str]]) -> Tensor:
    """A penalty that its caller adds to a loss: its backward replaces what would be added by itself in that step.

    If a backward of the step has added the penalty already, this one's gradient is zeros.

    Args:
        value: the penalty.
        penalty: of the model.
        layers: its layers with bundles.
        learning: adapter -> the bundles that the penalty is of.
    """
    if not value.requires_grad:
        return value
    arrivals = []
    for layer in layers:
        for adapter, names in learning.items():
            if adapter in layer.bundle_states:
                penalty.watch(layer, adapter)
                arrivals += [_arrival(table[n]) for table in layer.tables(adapter) for n in names if n in table]
    return _Once.apply(value, penalty, [hook for hook in arrivals if hook is not None])


class _Once(torch.autograd.Function):
    """The identity; its backward says who brings the penalty, before any weight that it reaches gets a gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, penalty: Penalty, arrivals: list[_Arrival]) -> Tensor:
        ctx.penalty, ctx.arrivals, ctx.value = penalty, arrivals, value.detach()
        return value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        if any(hook.paid and not hook.first() for hook in ctx.arrivals):
            return torch.zeros_like(grad), None, None
        for hook in ctx.arrivals:
            hook.by_hand = True
        ctx.penalty.note(ctx.value)
        return grad, None, None


def share_of_step(labels: Tensor | None, items: Tensor | int | None) -> Tensor | float:
    """What part of its step a micro-batch is, if the trainer divides its loss by the tokens of the whole step."""
    return 1.0 if labels is None or items is None else (labels[..., 1:] != -100).sum() / items
